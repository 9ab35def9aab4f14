package admit

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// deadline is the context of one call: what context.WithDeadline returns, made only once somebody
// waits for its end. Most calls end before, and need neither its timer nor its place in their parent.
// It is safe for concurrent use.
type deadline struct {
	context.Context // of the caller
	at              time.Time

	real atomic.Pointer[ending] // nil: nobody waited yet
	mu   sync.Mutex             // held while real is made
	over bool                   // guarded by mu: the call has ended
}

// ending is a context that somebody waits for.
type ending struct {
	context.Context
	cancel context.CancelFunc
}

// within returns the context of a call that takes timeout at most; an earlier deadline of ctx stays.
// end is called when the call has ended.
func within(ctx context.Context, timeout time.Duration) *deadline {
	at := time.Now().Add(timeout)
	if earlier, ok := ctx.Deadline(); ok && earlier.Before(at) {
		at = earlier
	}
	return &deadline{Context: ctx, at: at}
}

// end releases what waits: to whoever looks from now on the call is cancelled.
func (d *deadline) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.over = true
	if r := d.real.Load(); r != nil {
		r.cancel()
	}
}

// Deadline implements context.Context.
func (d *deadline) Deadline() (time.Time, bool) { return d.at, true }

// Done implements context.Context.
func (d *deadline) Done() <-chan struct{} {
	if r := d.real.Load(); r != nil {
		return r.Done()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if r := d.real.Load(); r != nil {
		return r.Done()
	}
	r := &ending{}
	r.Context, r.cancel = context.WithDeadline(d.Context, d.at)
	if d.over {
		r.cancel()
	}
	d.real.Store(r)
	return r.Done()
}

// Err implements context.Context. It makes the context too: only that one remembers which came
// first, the deadline, the caller's going away or the end of the call.
func (d *deadline) Err() error {
	d.Done()
	return d.real.Load().Err()
}

// Value implements context.Context. What is asked of a context that is there includes itself: package
// context finds it so, and needs no goroutine to pass its end on to contexts that are made of this one.
func (d *deadline) Value(key any) any {
	if r := d.real.Load(); r != nil {
		return r.Value(key)
	}
	return d.Context.Value(key)
}
