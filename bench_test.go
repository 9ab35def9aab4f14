package newel_test

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"

	"newel.dev/newel"
	"newel.dev/newel/call"
)

// echoServer is a server with one typed tool and every guard on: a logger that encodes JSON and a
// meter that counts.
func echoServer(t testing.TB) http.Handler {
	t.Helper()
	s := newel.New(&newel.Options{
		Logger: slog.New(slog.NewJSONHandler(io.Discard, nil)),
		Meter:  sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewManualReader())),
	})
	type text struct {
		Text string `json:"text" minLength:"1"`
	}
	newel.AddTool(s, newel.Tool{Name: "echo", Description: "Echo.", Effect: call.Read},
		func(_ context.Context, _ *newel.Request, in text) (string, error) { return in.Text, nil })
	h, err := s.Handler()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

const echoCall = `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":{"text":"hello"},"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{},"io.modelcontextprotocol/clientInfo":{"name":"bench","version":"1"}}}}`

func echoHeader() http.Header {
	return http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"},
		"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"tools/call"}, "Mcp-Name": {"echo"}}
}

func callEcho(t testing.TB, h http.Handler) {
	r := httptest.NewRequest(http.MethodPost, "http://127.0.0.1/mcp", strings.NewReader(echoCall))
	r.Header = echoHeader()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), `"text":"hello"`) {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
}

func BenchmarkCall(b *testing.B) {
	h := echoServer(b)
	b.ReportAllocs()
	for b.Loop() {
		callEcho(b, h)
	}
}
