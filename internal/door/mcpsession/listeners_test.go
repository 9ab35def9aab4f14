//go:build !race

package mcpsession

import (
	"runtime"
	"testing"
	"time"
)

// What a session holds of which the client listens and nothing happens: goroutines, and bytes of
// heap and stacks. A change that needs more says here why; one that needs less lowers the bound. The
// client is in this process: its side of the connection counts too.
const (
	listeners          = 500
	mostGoroutinesEach = 3
	mostBytesEach      = 26 << 10
)

func TestAListenerHoldsNoMoreThanItDid(t *testing.T) {
	w := newWorld(t, never, func(o *Options) { o.KeepAlive = time.Hour })
	held := func() (goroutines, bytes int) {
		runtime.GC()
		runtime.GC() // stacks shrink by half at a time, and what has finalizers goes with the next one
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return runtime.NumGoroutine(), int(m.HeapAlloc + m.StackInuse)
	}
	for range 10 { // what the first set up is for all
		w.raw(t, "2025-11-25", `{}`).dial(t)
	}
	goroutines, bytes := held()
	for range listeners {
		w.raw(t, "2025-11-25", `{}`).dial(t)
	}
	var moreGoroutines, moreBytes int
	until(t, "the handlers of the requests have returned", func() bool {
		g, b := held()
		moreGoroutines, moreBytes = g-goroutines, b-bytes
		return moreGoroutines <= mostGoroutinesEach*listeners
	})
	t.Logf("%.2f goroutines and %d bytes each", float64(moreGoroutines)/listeners, moreBytes/listeners)
	if moreGoroutines < listeners || moreBytes/listeners > mostBytesEach {
		t.Errorf("each holds %.2f goroutines and %d bytes; at most %d and %d are meant", float64(moreGoroutines)/listeners, moreBytes/listeners, mostGoroutinesEach, mostBytesEach)
	}
}
