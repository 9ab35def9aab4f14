package mcpstdio

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/go-json-experiment/json"
)

const modern = `"params":{"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28"}}`

// echoSessions answers every session request with its method.
func echoSessions(_ context.Context, in io.Reader, out io.Writer) error {
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		var h head
		if json.Unmarshal(lines.Bytes(), &h) == nil && h.ID != nil {
			if _, err := fmt.Fprintf(out, `{"session":%q,"id":%s}`+"\n", h.Method, h.ID); err != nil {
				return err
			}
		}
	}
	return lines.Err()
}

func echoStateless(_ context.Context, line []byte, send func([]byte) error) {
	var h head
	if json.Unmarshal(line, &h) == nil {
		_ = send(fmt.Appendf(nil, `{"stateless":%q,"id":%s}`, h.Method, h.ID))
	}
}

func serve(t *testing.T, o Options, in string) string {
	t.Helper()
	d, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := d.Serve(t.Context(), strings.NewReader(in), &out); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestLines(t *testing.T) {
	o := Options{Stateless: echoStateless, Sessions: echoSessions, MaxMessageBytes: 200, MaxConcurrent: 1}
	tests := []struct{ name, in, want string }{
		{"stateless", `{"id":1,"method":"tools/list",` + modern + `}`, `{"stateless":"tools/list","id":1}`},
		{"discover needs no revision", `{"id":1,"method":"server/discover"}`, `{"stateless":"server/discover","id":1}`},
		{"session", `{"id":"a","method":"initialize"}`, `{"session":"initialize","id":"a"}`},
		{"blank lines and CRLF", "\r\n\n" + `{"id":1,"method":"ping"}` + "\r\n", `{"session":"ping","id":1}`},
		{"garbage", "garbage\n" + `{"id":1,"method":"ping"}`, `"code":-32700`},
		{"invalid UTF-8", "{\"id\":\"\xff\"}", `"code":-32700`},
		{"duplicate names", `{"id":1,"id":2}`, `"code":-32700`},
		{"not an object", `7`, `"code":-32600`},
		{"too long", strings.Repeat("x", 100_000) + "\n" + `{"id":1,"method":"ping"}`, `longer than 200 bytes`},
		{"deep", strings.Repeat("[", 100), "nested deeper"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := serve(t, o, tt.in)
			if !strings.Contains(got, tt.want) {
				t.Errorf("got %s want %s", got, tt.want)
			}
			if strings.Contains(tt.in, `{"id":1,"method":"ping"}`) && !strings.Contains(got, `{"session":"ping","id":1}`) {
				t.Errorf("what follows is lost: %s", got)
			}
		})
	}
}

// Every call is answered although the input ends right behind them.
func TestEndOfInputFinishesCalls(t *testing.T) {
	var in strings.Builder
	for i := range 200 {
		fmt.Fprintf(&in, `{"id":%d,"method":"m",%s}`+"\n"+`{"id":"s%d","method":"ping"}`+"\n", i, modern, i)
	}
	got := serve(t, Options{Stateless: echoStateless, Sessions: echoSessions}, in.String())
	if n := strings.Count(got, "\n"); n != 400 {
		t.Errorf("%d answers, want 400", n)
	}
	for line := range strings.Lines(got) {
		if !strings.HasPrefix(line, `{"s`) || !strings.HasSuffix(line, "}\n") {
			t.Errorf("a torn line: %q", line)
		}
	}
}

func TestDuplicateAndCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var cancelled atomic.Int32
		d, err := New(Options{Sessions: echoSessions, Stateless: func(ctx context.Context, _ []byte, _ func([]byte) error) {
			<-ctx.Done()
			cancelled.Add(1)
		}})
		if err != nil {
			t.Fatal(err)
		}
		in, write := io.Pipe()
		var out bytes.Buffer
		done := make(chan error)
		go func() { done <- d.Serve(t.Context(), in, &out) }()
		call := `{"id":1,"method":"m",` + modern + "}\n"
		fmt.Fprint(write, call, call)
		synctest.Wait()
		if cancelled.Load() != 0 || !strings.Contains(out.String(), "ids must be unique") {
			t.Errorf("the second call with one id: %s", out.String())
		}
		fmt.Fprintln(write, `{"method":"notifications/cancelled","params":{"requestId":1}}`)
		synctest.Wait()
		if cancelled.Load() != 1 {
			t.Error("the call was not cancelled")
		}
		if err := errors.Join(write.Close(), <-done); err != nil {
			t.Error(err)
		}
	})
}

// A message that holds line breaks between its tokens leaves as one line.
func TestOneLine(t *testing.T) {
	got := serve(t, Options{Sessions: echoSessions, Stateless: func(_ context.Context, _ []byte, send func([]byte) error) {
		_ = send([]byte("{\"a\":\n\t[1.50,\r\n\"b\\n\"]}"))
	}}, `{"id":1,"method":"server/discover"}`)
	if got != `{"a":[1.50,"b\n"]}`+"\n" {
		t.Errorf("got %q", got)
	}
}

// The context ends the door although a call runs and input stays open.
func TestContextEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, err := New(Options{
			Sessions:  func(ctx context.Context, _ io.Reader, _ io.Writer) error { <-ctx.Done(); return nil },
			Stateless: func(ctx context.Context, _ []byte, _ func([]byte) error) { <-ctx.Done() },
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		in, write := io.Pipe()
		done := make(chan error)
		go func() { done <- d.Serve(ctx, in, io.Discard) }()
		fmt.Fprintln(write, `{"id":1,"method":"m",`+modern+"}")
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		_ = write.Close() // lets the reader go, which the end of the process would
	})
}
