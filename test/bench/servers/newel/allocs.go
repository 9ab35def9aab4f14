package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"

	"newel.dev/newel"
)

const prepared = `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":{"text":"hello"},"_meta":{` +
	`"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{},` +
	`"io.modelcontextprotocol/clientInfo":{"name":"newel-bench","version":"1.0.0"}}}}`

// printAllocs prints, as JSON, what a prepared call allocates from the handler to the written answer.
func printAllocs(s *newel.Server) error {
	h, err := s.Handler()
	if err != nil {
		return err
	}
	body := bytes.NewReader(nil)
	r := httptest.NewRequest(http.MethodPost, "http://127.0.0.1:8080/mcp", io.NopCloser(body))
	r.ContentLength = int64(len(prepared))
	r.Header = http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"},
		"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"tools/call"}, "Mcp-Name": {"echo"}}
	w := &answer{header: http.Header{}}
	message := []byte(prepared)
	measured := testing.Benchmark(func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			body.Reset(message)
			clear(w.header)
			w.status, w.body = http.StatusOK, w.body[:0]
			h.ServeHTTP(w, r)
		}
	})
	if w.status != http.StatusOK || !bytes.Contains(w.body, []byte(`"text":"hello"`)) {
		return fmt.Errorf("the call failed: %d %s", w.status, w.body)
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]int64{"allocs": measured.AllocsPerOp(), "bytes": measured.AllocedBytesPerOp()})
}

// answer is a response that keeps its memory.
type answer struct {
	header http.Header
	status int
	body   []byte
}

// Header, WriteHeader and Write implement http.ResponseWriter.
func (a *answer) Header() http.Header    { return a.header }
func (a *answer) WriteHeader(status int) { a.status = status }
func (a *answer) Write(p []byte) (int, error) {
	a.body = append(a.body, p...)
	return len(p), nil
}
