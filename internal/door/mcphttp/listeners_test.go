//go:build !race

package mcphttp

import (
	"fmt"
	"net"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"newel.dev/newel/internal/mcpwire"
)

// What a subscription holds to which nothing happens: goroutines, and bytes of heap and stacks. A change
// that needs more says here why; one that needs less lowers the bound. The client is in this process:
// its side of the connection counts too.
const (
	subscriptions      = 500
	mostGoroutinesEach = 2
	mostBytesEach      = 20 << 10
)

func TestASubscriptionHoldsNoMoreThanItDid(t *testing.T) {
	w := newWorld(t)
	w.opts.KeepAlive = time.Hour
	srv := httptest.NewServer(w)
	defer srv.Close()
	defer w.drain() // the server waits for those that it still has
	body := `{"jsonrpc":"2.0","id":1,"method":"subscriptions/listen","params":{"notifications":{"toolsListChanged":true},"_meta":{"io.modelcontextprotocol/protocolVersion":"` + mcpwire.Revision + `","io.modelcontextprotocol/clientCapabilities":{}}}}`
	subscribe := func() {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", srv.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() }) // it may be closed
		if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Fprintf(conn, "POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nAccept: application/json, text/event-stream\r\nMcp-Protocol-Version: %s\r\nMcp-Method: subscriptions/listen\r\nContent-Length: %d\r\n\r\n%s", mcpwire.Revision, len(body), body); err != nil {
			t.Fatal(err)
		}
		var said []byte
		for buf := make([]byte, 1024); !strings.Contains(string(said), "acknowledged"); {
			n, err := conn.Read(buf)
			if err != nil {
				t.Fatalf("%v after %q", err, said)
			}
			said = append(said, buf[:n]...)
		}
	}
	held := func() (goroutines, bytes int) {
		runtime.GC()
		runtime.GC() // stacks shrink by half at a time, and what has finalizers goes with the next one
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return runtime.NumGoroutine(), int(m.HeapAlloc + m.StackInuse)
	}
	for range 10 { // what the first set up is for all
		subscribe()
	}
	goroutines, bytes := held()
	for range subscriptions {
		subscribe()
	}
	deadline, tick := time.After(20*time.Second), time.NewTicker(5*time.Millisecond)
	defer tick.Stop()
	var moreGoroutines, moreBytes int
	for {
		g, b := held()
		if moreGoroutines, moreBytes = g-goroutines, b-bytes; moreGoroutines <= mostGoroutinesEach*subscriptions {
			break // the handlers of the requests have returned
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%.2f goroutines each", float64(moreGoroutines)/subscriptions)
		}
	}
	t.Logf("%.2f goroutines and %d bytes each", float64(moreGoroutines)/subscriptions, moreBytes/subscriptions)
	if moreGoroutines < subscriptions || moreBytes/subscriptions > mostBytesEach {
		t.Errorf("each holds %.2f goroutines and %d bytes; at most %d and %d are meant", float64(moreGoroutines)/subscriptions, moreBytes/subscriptions, mostGoroutinesEach, mostBytesEach)
	}
}
