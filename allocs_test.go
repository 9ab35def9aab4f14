//go:build !race

package newel_test

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
)

// What one call of a typed tool may allocate on the whole way, from the handler of the URL to the
// written answer, with its record and its metrics: what it does, and a little for other versions of
// Go. A change that needs more says here why; one that needs less lowers the bound.
const (
	mostAllocs = 20 + 2
	mostBytes  = 2350 + 150
)

func TestACallAllocatesNoMoreThanItDid(t *testing.T) {
	mostly(t, newPreparedCall(t), mostAllocs, mostBytes)
}

func mostly(t *testing.T, c *preparedCall, allocs, size int64) {
	c.make(t) // what the first call sets up for all
	r := testing.Benchmark(func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			c.make(b)
		}
	})
	t.Logf("%d allocations of %d bytes", r.AllocsPerOp(), r.AllocedBytesPerOp())
	if r.AllocsPerOp() == 0 || r.AllocsPerOp() > allocs || r.AllocedBytesPerOp() > size {
		t.Errorf("a call makes %d allocations of %d bytes; at most %d and %d are meant", r.AllocsPerOp(), r.AllocedBytesPerOp(), allocs, size)
	}
}

func BenchmarkPreparedCall(b *testing.B) {
	c := newPreparedCall(b)
	b.ReportAllocs()
	for b.Loop() {
		c.make(b)
	}
}

// preparedCall is a call that can be made again and again with nothing allocated around it.
type preparedCall struct {
	handler http.Handler
	request *http.Request
	message []byte
	body    *bytes.Reader
	header  http.Header
	status  int
	answer  []byte
}

func newPreparedCall(t testing.TB) *preparedCall {
	c := &preparedCall{handler: echoServer(t), message: []byte(echoCall), body: bytes.NewReader(nil), header: http.Header{}}
	c.request = httptest.NewRequest(http.MethodPost, "http://127.0.0.1:8080/mcp", io.NopCloser(c.body))
	c.request.ContentLength = int64(len(echoCall))
	c.request.Header = echoHeader()
	return c
}

func (c *preparedCall) make(t testing.TB) {
	c.body.Reset(c.message)
	clear(c.header)
	c.status, c.answer = http.StatusOK, c.answer[:0]
	c.handler.ServeHTTP(c, c.request)
	if c.status != http.StatusOK || !bytes.Contains(c.answer, []byte(`"text":"hello"`)) {
		t.Fatalf("%d %s", c.status, c.answer)
	}
}

// Header, WriteHeader and Write implement http.ResponseWriter.
func (c *preparedCall) Header() http.Header    { return c.header }
func (c *preparedCall) WriteHeader(status int) { c.status = status }
func (c *preparedCall) Write(p []byte) (int, error) {
	c.answer = append(c.answer, p...)
	return len(p), nil
}
