package newel_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"newel.dev/newel"
	"newel.dev/newel/call"
	"newel.dev/newel/neweltest"
)

// Everything that is wrong surfaces at start, with names and places.
func TestRegistrationErrors(t *testing.T) {
	s := newel.New(nil)
	nothing := func(context.Context, *newel.Request, struct{}) (string, error) { return "", nil }
	newel.AddTool(s, newel.Tool{Name: "bad_tag"}, func(context.Context, *newel.Request, struct {
		A int `json:"a" enum:"red"`
	}) (string, error) {
		return "", nil
	})
	newel.AddTool(s, newel.Tool{Name: "no_object"}, func(context.Context, *newel.Request, int) (string, error) { return "", nil })
	newel.AddTemplate(s, newel.Template{Template: "x://{"}, nil)
	_, err := s.Handler()
	for _, want := range []string{"server_test.go:", `"bad_tag"`, `"red" is not a value`, `"no_object"`, "no struct or map", "x://{"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is missing in %v", want, err)
		}
	}
	s = newel.New(nil)
	newel.AddTool(s, newel.Tool{Name: "twice"}, nothing)
	newel.AddTool(s, newel.Tool{Name: "twice"}, nothing)
	if err := s.Serve(t.Context(), "127.0.0.1:0"); err == nil || strings.Count(err.Error(), "server_test.go:") != 2 {
		t.Errorf("a name used twice: %v", err)
	}
}

func TestServeRefusesOthers(t *testing.T) {
	for addr, want := range map[string]string{"0.0.0.0:0": "refusing", ":0": "refusing", "[::]:0": "refusing", "example.com:80": "refusing", "nonsense": "host:port", "192.168.1.1:80": "refusing"} {
		if err := newel.New(nil).Serve(t.Context(), addr); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", addr, err)
		}
	}
}

func TestErrorsKeepTheirCauseInside(t *testing.T) {
	s := newel.New(nil)
	newel.AddTool(s, newel.Tool{Name: "inside"}, func(context.Context, *newel.Request, struct{}) (string, error) { return "", errors.New("secret dsn") })
	newel.AddTool(s, newel.Tool{Name: "panics"}, func(context.Context, *newel.Request, struct{}) (string, error) { panic("secret") })
	newel.AddTool(s, newel.Tool{Name: "says"}, func(context.Context, *newel.Request, struct{}) (string, error) {
		return "", newel.Errorf("try a smaller one").Because(errors.New("secret"))
	})
	c := neweltest.New(t, s)
	for tool, want := range map[string]string{"inside": "internal error", "panics": "internal error", "says": "try a smaller one"} {
		if got := c.Call(tool, nil).Text(); got != want {
			t.Errorf("%s: %q", tool, got)
		}
	}
}

// A result past its bound is kept whole and linked; its parts make up the whole.
func TestLargeResult(t *testing.T) {
	s := newel.New(&newel.Options{Limits: newel.Limits{ResultBytes: 10_000}})
	whole := strings.Repeat("0123456789abcdeé\n", 20_000)
	newel.AddTool(s, newel.Tool{Name: "large", Effect: call.Read}, func(context.Context, *newel.Request, struct{}) (string, error) { return whole, nil })
	c := neweltest.New(t, s)
	r := c.Call("large", nil)
	if r.Err != nil {
		t.Fatal(r.Err)
	}
	_, rest, ok := strings.Cut(string(r.Content), `"uri":"artifact://`)
	id, _, _ := strings.Cut(rest, `"`)
	if !ok || len(r.Content) > 10_000 {
		t.Fatalf("not linked: %.300s", r.Content)
	}
	if got := string(c.Read("artifact://" + id).Content); !strings.Contains(got, `"text":"0123456789abcdeé\n`) || !strings.Contains(got, `dev.newel/next`) {
		t.Errorf("got %.200s", got)
	}
}

func TestProgressAndLogs(t *testing.T) {
	s := newel.New(nil)
	newel.AddTool(s, newel.Tool{Name: "works"}, func(ctx context.Context, r *newel.Request, _ struct{}) (*call.Result, error) {
		return newel.Content(newel.TextBlock("a"), newel.ImageBlock([]byte{1}, "image/png"), newel.LinkBlock("x://y", "y", "", 3)),
			errors.Join(r.Progress(ctx, 1, 2, "half"), r.Log(ctx, "info", "l", map[string]int{"n": 1}))
	})
	c := neweltest.New(t, s)
	r := c.Call("works", nil)
	if got := r.Text(); got != "a" {
		t.Errorf("got %q", got)
	}
	if p, l := r.Progress, r.Logs; len(p) != 1 || p[0].Message != "half" || len(l) != 1 || string(l[0].Data) != `{"n":1}` {
		t.Errorf("got %v %v", p, l)
	}
}

// A call that runs when the server is told to stop still gets its answer, and the server says
// that it is not ready any more.
func TestDrain(t *testing.T) {
	s := newel.New(nil)
	started, finish := make(chan struct{}), make(chan struct{})
	newel.AddTool(s, newel.Tool{Name: "slow"}, func(context.Context, *newel.Request, struct{}) (string, error) {
		close(started)
		<-finish
		return "done", nil
	})
	l := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error)
	go func() { served <- s.ServeListener(ctx, l) }()
	answer := make(chan string)
	go func() { answer <- post(t, "http://"+l.Addr().String()+"/mcp", "slow") }()
	<-started
	cancel()
	h, err := s.Handler()
	if err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for range tick.C { // until the cancellation has been seen
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/ready", nil))
		if w.Code == http.StatusServiceUnavailable && strings.Contains(w.Body.String(), "draining") {
			break
		}
	}
	close(finish)
	if got := <-answer; !strings.Contains(got, `"text":"done"`) {
		t.Errorf("the running call got %s", got)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}
