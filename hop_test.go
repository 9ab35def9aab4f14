//go:build !race

package newel_test

import (
	"bytes"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"

	"newel.dev/newel"
	"newel.dev/newel/call"
	"newel.dev/newel/internal/backend/mcpupstream"
	"newel.dev/newel/internal/module"
)

// What a call through the gateway may allocate, from the handler of the URL to the written answer, as
// for a call; the way to the server and back is not net/http's here, but a few bytes in memory.
const (
	mostHopAllocs = 45 + 3
	mostHopBytes  = 7750 + 300
)

func TestAHopAllocatesNoMoreThanItDid(t *testing.T) {
	c := newPreparedCall(t)
	c.handler = gatewayInMemory(t)
	mostly(t, c, mostHopAllocs, mostHopBytes)
}

func BenchmarkPreparedHop(b *testing.B) {
	c := newPreparedCall(b)
	c.handler = gatewayInMemory(b)
	b.ReportAllocs()
	for b.Loop() {
		c.make(b)
	}
}

// gatewayInMemory is a gateway in front of a server that is not reached over a network.
func gatewayInMemory(t testing.TB) http.Handler {
	t.Helper()
	logger := slog.New(slog.NewJSONHandler(io.Discard, nil))
	behind := &memory{server: echoServer(t)}
	u, err := mcpupstream.New("behind", mcpupstream.Config{
		URL: "http://127.0.0.1:8081/mcp", Access: func(http.RoundTripper) http.RoundTripper { return behind },
	}, module.Env{Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	s := newel.New(&newel.Options{
		Logger: logger, Meter: sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewManualReader())), Backends: []call.Backend{u},
	})
	h, err := s.Handler()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// memory answers echo by itself, in the words of the server, which answers everything else.
type memory struct{ server http.Handler }

// RoundTrip implements http.RoundTripper.
func (m *memory) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Header["Mcp-Method"][0] != "tools/call" {
		w := httptest.NewRecorder()
		m.server.ServeHTTP(w, r)
		return w.Result(), nil
	}
	var body [2048]byte
	n, err := io.ReadFull(r.Body, body[:])
	if err != io.ErrUnexpectedEOF {
		return nil, err
	}
	_, rest, _ := bytes.Cut(body[:n], []byte(`"id":`))
	id, _, _ := bytes.Cut(rest, []byte(","))
	answer := make([]byte, 0, 256)
	answer = append(append(answer, `{"jsonrpc":"2.0","id":`...), id...)
	answer = append(answer, `,"result":{"resultType":"complete","content":[{"type":"text","text":"hello"}]}}`...)
	return &http.Response{
		StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {"application/json"}},
		Body: io.NopCloser(bytes.NewReader(answer)), ContentLength: int64(len(answer)), Request: r,
	}, nil
}
