package gateway

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/backend/mcpupstream"
	"newel.dev/newel/test/program"
)

// A server that hangs takes its share of the places, and the other one is as fast as before.
func TestHangingServerStaysAlone(t *testing.T) {
	free := make(chan struct{})
	var inside atomic.Int64
	hangs := good(t, func(w http.ResponseWriter, r *http.Request, id json.RawMessage) {
		inside.Add(1)
		select {
		case <-free:
		case <-r.Context().Done():
		}
		answer(w, id, "at last")
	})
	works := good(t, func(w http.ResponseWriter, _ *http.Request, id json.RawMessage) { answer(w, id, "fine") })
	url := serveWith(t, assembly.Options{Limits: assembly.Limits{ConcurrentCalls: 8, QueuedCalls: 100}},
		upstream{"hangs", mcpupstream.Config{URL: hangs.URL, Prefix: "hangs_"}},
		upstream{"works", mcpupstream.Config{URL: works.URL, Prefix: "works_"}})
	const callers = 30
	answers := make(chan string, callers)
	for range callers {
		go func() { answers <- callOK(t, url, "hangs_ok") }()
	}
	for i := range callers - 2 { // two of eight places are its share
		got := <-answers
		if !strings.Contains(got, "as many calls as it may have") || !strings.Contains(got, "retryAfterSeconds") {
			t.Fatalf("answer %d while it hangs: %s", i, got)
		}
	}
	for range 20 {
		start := time.Now()
		if got := callOK(t, url, "works_ok"); !strings.Contains(got, `"text":"fine"`) {
			t.Fatalf("the other server: %s", got)
		}
		if took := time.Since(start); took > time.Second {
			t.Errorf("the other server took %v", took)
		}
	}
	if n := inside.Load(); n != 2 {
		t.Errorf("the server that hangs has %d calls, want 2", n)
	}
	close(free)
	for range 2 {
		if got := <-answers; !strings.Contains(got, "at last") {
			t.Errorf("after it came back: %s", got)
		}
	}
}

// What a server refuses without doing it is asked again, an effect that may have happened is not.
func TestRetriesAtServers(t *testing.T) {
	for name, tt := range map[string]struct {
		read  bool
		fails func(w http.ResponseWriter)
		asked int64
		want  string
	}{
		"a read, 503":     {true, func(w http.ResponseWriter) { w.WriteHeader(http.StatusServiceUnavailable) }, 3, `"text":"fine"`},
		"a read, broken":  {true, func(http.ResponseWriter) { panic(http.ErrAbortHandler) }, 3, `"text":"fine"`},
		"an effect, 503":  {false, func(w http.ResponseWriter) { w.WriteHeader(http.StatusServiceUnavailable) }, 1, "not known"},
		"an effect, lost": {false, func(http.ResponseWriter) { panic(http.ErrAbortHandler) }, 1, "not known"},
		"an effect, 429":  {false, func(w http.ResponseWriter) { w.WriteHeader(http.StatusTooManyRequests) }, 3, `"text":"fine"`},
		"for too long": {true, func(w http.ResponseWriter) {
			w.Header().Set("Retry-After", "60")
			w.WriteHeader(http.StatusTooManyRequests)
		}, 1, `"retryAfterSeconds":60`},
		"not let in": {true, func(w http.ResponseWriter) { w.WriteHeader(http.StatusForbidden) }, 1, "does not accept"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var asked atomic.Int64
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				var m struct {
					ID     json.RawMessage
					Method string
				}
				_ = json.Unmarshal(body, &m)
				switch m.Method {
				case "server/discover":
					w.Header().Set("Content-Type", "application/json")
					fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete","supportedVersions":["2026-07-28"],"capabilities":{"tools":{}}}}`, m.ID)
				case "tools/list":
					w.Header().Set("Content-Type", "application/json")
					fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete","tools":[{"name":"ok","inputSchema":{"type":"object"},"annotations":{"readOnlyHint":%v},"description":"d"}]}}`, m.ID, tt.read)
				default:
					if asked.Add(1) < 3 {
						tt.fails(w)
						return
					}
					w.Header().Set("Content-Type", "application/json")
					answer(w, m.ID, "fine")
				}
			}))
			t.Cleanup(s.Close)
			var log program.Log
			url := serveOrdered(t, &log, upstream{"up", mcpupstream.Config{URL: s.URL}})
			got := callOK(t, url, "ok")
			if !strings.Contains(got, tt.want) {
				t.Errorf("got %s, want %s in it", got, tt.want)
			}
			if n := asked.Load(); n != tt.asked {
				t.Errorf("the server was asked %d times, want %d", n, tt.asked)
			}
			if said := strings.Contains(log.String(), "attempts=3"); said != (tt.asked == 3) {
				t.Errorf("the record: %s", log.String())
			}
		})
	}
}
