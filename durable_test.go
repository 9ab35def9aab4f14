package newel_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"newel.dev/newel"
	"newel.dev/newel/call"
)

// TestEffectsOverHTTP is a call with a key that comes twice, as the header and as _meta have it.
func TestEffectsOverHTTP(t *testing.T) {
	var log bytes.Buffer
	s := newel.New(&newel.Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	ran := map[string]int{}
	newel.AddTool(s, newel.Tool{Name: "pay", Description: "Pay.", Effect: call.Write}, func(_ context.Context, r *newel.Request, _ struct{}) (string, error) {
		ran[r.Call().Once]++
		return "paid", nil
	})
	h, err := s.Handler()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "kept in memory") {
		t.Error("nobody is told that calls are only remembered in memory")
	}
	srv := httptest.NewServer(h)
	defer srv.Close()
	post := func(header, meta, args string) (int, string) {
		t.Helper()
		if meta != "" {
			meta = `,"dev.newel/idempotencyKey":"` + meta + `"`
		}
		body := `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"pay","arguments":` + args + `,"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}` + meta + `}}}`
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, srv.URL+"/mcp", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header = http.Header{"Content-Type": {"application/json"}, "Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"tools/call"}, "Mcp-Name": {"pay"}}
		if header != "" {
			req.Header["Idempotency-Key"] = strings.Split(header, ",")
		}
		res, err := srv.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(res.Body)
		if err := res.Body.Close(); err != nil {
			t.Error(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(b)
	}
	for _, c := range []struct {
		header, meta, args string
		status             int
		want               string
		runs               int
	}{
		{`"k"`, "", "{}", 200, `"paid"`, 1},
		{"", "k", "{}", 200, `"replayed":true`, 1},
		{"k", "k", "{}", 200, `"replayed":true`, 1},
		{`"other"`, "k", "{}", 400, "differ", 1},
		{"a,b", "", "{}", 400, "at most once", 1},
		{strings.Repeat("k", 256), "", "{}", 400, "longer than 255", 1},
		{"", "", "{}", 200, `"paid"`, 2},
		{"", "", "{}", 200, `"paid"`, 3},
	} {
		status, body := post(c.header, c.meta, c.args)
		if status != c.status || !strings.Contains(body, c.want) || len(ran) != c.runs {
			t.Errorf("header %.20s, meta %s: %d %s, ran %v", c.header, c.meta, status, body, ran)
		}
	}
}

// TestUndo is a tool that names the one that undoes it.
func TestUndo(t *testing.T) {
	s := newel.New(&newel.Options{})
	type seat struct {
		Seat int `json:"seat"`
	}
	booked := 0
	newel.AddTool(s, newel.Tool{Name: "book", Description: "Book.", Effect: call.Write, Undo: &call.Undo{Tool: "cancel", Args: map[string]string{"seat": "result.seat"}}},
		func(_ context.Context, _ *newel.Request, in seat) (seat, error) {
			booked++
			return in, nil
		})
	newel.AddTool(s, newel.Tool{Name: "cancel", Description: "Cancel.", Effect: call.Write}, func(_ context.Context, _ *newel.Request, in seat) (string, error) {
		booked--
		return fmt.Sprintf("seat %d is free", in.Seat), nil
	})
	c := &call.Call{Kind: call.Tool, Name: "book", Args: []byte(`{"seat":7}`)}
	if _, err := s.Do(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if r, err := s.Undo(t.Context(), c.Event.Operation, "ada"); err != nil || !strings.Contains(string(r.Content), "seat 7 is free") || booked != 0 {
			t.Errorf("undone: %+v, %v, %d are booked", r, err, booked)
		}
	}
	if _, err := s.Undo(t.Context(), "nothing", "ada"); call.AsError(err).Code != call.NotFound {
		t.Errorf("nothing: %v", err)
	}
	wrong := newel.New(&newel.Options{})
	newel.AddTool(wrong, newel.Tool{Name: "book", Description: "Book.", Effect: call.Write, Undo: &call.Undo{Tool: "cancel", Args: map[string]string{"seat": "seat"}}},
		func(_ context.Context, _ *newel.Request, in seat) (seat, error) { return in, nil })
	if _, err := wrong.Handler(); err == nil || !strings.Contains(err.Error(), "durable_test.go") || !strings.Contains(err.Error(), "args.name or result.name") {
		t.Errorf("an argument from nowhere: %v", err)
	}
}
