package admit

import (
	"runtime/metrics"
	"sync/atomic"
	"time"
)

// Shares of the memory at which something is refused: first what would stay for long, then calls of
// tools that are not critical, then all. What runs may need what is left.
const (
	shedNew  = 0.85
	shedSome = 0.90
	shedAll  = 0.95
	// shedQueue is the share of the queue from which tools that are not critical wait no more.
	shedQueue = 0.5
)

// usage is the memory that the process has from the system, measured at most ten times a second:
// reading it stops nothing, but it is not free.
type usage struct {
	read  func() uint64
	next  atomic.Int64 // when to read again, in unix nanoseconds
	bytes atomic.Uint64
}

const readEvery = 100 * time.Millisecond

func (u *usage) now() uint64 {
	now := time.Now().UnixNano()
	if next := u.next.Load(); now >= next && u.next.CompareAndSwap(next, now+int64(readEvery)) {
		u.bytes.Store(u.read())
	}
	return u.bytes.Load()
}

// taken is what the Go runtime has mapped and not given back.
func taken() uint64 {
	s := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64() - s[1].Value.Uint64()
}
