package admit

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"newel.dev/newel/call"
)

func newGate(t testing.TB, o Options) *Gate {
	t.Helper()
	g, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// empty fails the test if anything is still held.
func empty(t *testing.T, g *Gate) {
	t.Helper()
	if g.Running() != 0 || g.Queued() != 0 || g.Streams() != 0 || len(g.perPeer) != 0 {
		t.Errorf("still held: %d running, %d queued, %d streams, peers %v", g.Running(), g.Queued(), g.Streams(), g.perPeer)
	}
}

func tool() *call.Call { return &call.Call{Kind: call.Tool} }

func subscription(peer string) *call.Call {
	return &call.Call{Kind: call.Subscribe, Credential: call.Credential{Peer: peer}}
}

// until blocks until the context ends and returns its error.
func until(ctx context.Context, _ *call.Call) (*call.Result, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func codeOf(err error) call.Code {
	if err == nil {
		return call.OK
	}
	return call.AsError(err).Code
}

// Whoever came first runs first, and nobody overtakes who waits.
func TestQueueIsFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(t, Options{MaxConcurrent: 1, QueueTimeout: time.Hour})
		var mu sync.Mutex
		var order []int
		h := g.Guard(func(_ context.Context, c *call.Call) (*call.Result, error) {
			mu.Lock()
			order = append(order, c.Size)
			mu.Unlock()
			time.Sleep(time.Second)
			return &call.Result{}, nil
		})
		var all sync.WaitGroup
		calls := make([]*call.Call, 20)
		for i := range calls {
			calls[i] = &call.Call{Kind: call.Tool, Size: i}
			all.Go(func() {
				if _, err := h(t.Context(), calls[i]); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		if g.Running() != 1 || g.Queued() != 19 {
			t.Errorf("%d run and %d wait", g.Running(), g.Queued())
		}
		all.Wait()
		if !slices.IsSorted(order) {
			t.Errorf("order: %v", order)
		}
		for i, c := range calls {
			if want := time.Duration(i) * time.Second; c.Event.QueueTime != want {
				t.Errorf("call %d waited %v, want %v", i, c.Event.QueueTime, want)
			}
		}
		empty(t, g)
	})
}

func TestConcurrencyIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(t, Options{MaxConcurrent: 3, MaxQueued: 100})
		var mu sync.Mutex
		running, most := 0, 0
		h := g.Guard(func(context.Context, *call.Call) (*call.Result, error) {
			mu.Lock()
			running++
			most = max(most, running)
			mu.Unlock()
			time.Sleep(time.Millisecond)
			mu.Lock()
			running--
			mu.Unlock()
			return &call.Result{}, nil
		})
		var all sync.WaitGroup
		for range 100 {
			all.Go(func() {
				if _, err := h(t.Context(), tool()); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if most != 3 {
			t.Errorf("%d ran at once, want 3", most)
		}
		empty(t, g)
	})
}

func TestQueueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(t, Options{MaxConcurrent: 1, MaxQueued: 2, QueueTimeout: time.Minute})
		h := g.Guard(until)
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		for range 3 {
			all.Go(func() { _, _ = h(ctx, tool()) }) // they end with the context
			synctest.Wait()
		}
		_, err := h(ctx, tool())
		e := call.AsError(err)
		if codeOf(err) != call.Exhausted || !e.Retryable || e.RetryAfter <= 0 {
			t.Errorf("the call past the queue got %v (retry after %v)", err, e.RetryAfter)
		}
		cancel()
		all.Wait()
		empty(t, g)
	})
}

func TestWaitTooLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(t, Options{MaxConcurrent: 1, QueueTimeout: 2 * time.Second})
		h := g.Guard(until)
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		all.Go(func() { _, _ = h(ctx, tool()) })
		synctest.Wait()
		c := tool()
		_, err := h(t.Context(), c)
		if codeOf(err) != call.Exhausted || c.Event.QueueTime != 2*time.Second {
			t.Errorf("got %v after %v", err, c.Event.QueueTime)
		}
		cancel()
		all.Wait()
		empty(t, g)
	})
}

func TestCancelWhileWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(t, Options{MaxConcurrent: 1, QueueTimeout: time.Hour})
		ran := 0
		h := g.Guard(func(ctx context.Context, c *call.Call) (*call.Result, error) {
			ran++
			return until(ctx, c)
		})
		first, endFirst := context.WithCancel(t.Context())
		var all sync.WaitGroup
		all.Go(func() { _, _ = h(first, tool()) })
		synctest.Wait()

		waiting, giveUp := context.WithCancel(t.Context())
		all.Go(func() {
			if _, err := h(waiting, tool()); codeOf(err) != call.Canceled {
				t.Errorf("the one who gave up got %v", err)
			}
		})
		impatient, release := context.WithTimeout(t.Context(), time.Second)
		defer release()
		all.Go(func() {
			if _, err := h(impatient, tool()); codeOf(err) != call.Timeout {
				t.Errorf("the one whose deadline passed got %v", err)
			}
		})
		synctest.Wait()
		giveUp()
		time.Sleep(2 * time.Second)
		endFirst()
		all.Wait()
		if ran != 1 {
			t.Errorf("%d handlers ran, want 1", ran)
		}
		empty(t, g)
	})
}

func TestSlotsSurviveTheHandler(t *testing.T) {
	g := newGate(t, Options{MaxConcurrent: 1, MaxQueued: 1, QueueTimeout: time.Nanosecond})
	for name, end := range map[string]func(){
		"panic":  func() { panic("boom") },
		"Goexit": runtime.Goexit,
		"error":  func() {},
	} {
		h := g.Guard(func(context.Context, *call.Call) (*call.Result, error) {
			end()
			return nil, errors.New("no")
		})
		for _, c := range []*call.Call{tool(), subscription("192.0.2.1:1")} {
			done := make(chan struct{})
			go func() {
				defer close(done)
				defer func() { _ = recover() }() // the test is about what is left behind
				_, _ = h(t.Context(), c)
			}()
			<-done
			t.Run(name, func(t *testing.T) { empty(t, g) })
		}
	}
}

func TestDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(t, Options{CallTimeout: 10 * time.Second})
		h := g.Guard(until)

		start := time.Now()
		_, err := h(t.Context(), tool())
		if codeOf(err) != call.Timeout || time.Since(start) != 10*time.Second {
			t.Errorf("got %v after %v", err, time.Since(start))
		}

		start = time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = h(ctx, tool())
		if codeOf(err) != call.Timeout || time.Since(start) != time.Second {
			t.Errorf("with the client's own deadline: got %v after %v", err, time.Since(start))
		}

		ctx, cancel = context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		start = time.Now()
		if _, err = h(ctx, subscription("stdio")); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != time.Hour {
			t.Errorf("a subscription ended with %v after %v", err, time.Since(start))
		}
		empty(t, g)
	})
}

// What a driver says about an ended context is replaced; what a handler says stands.
func TestErrorsAfterTheDeadline(t *testing.T) {
	interrupted := errors.New("interrupted (9)")
	ask := &call.InputRequired{}
	for _, tt := range []struct {
		err  error
		want call.Code
	}{
		{interrupted, call.Timeout},
		{fmt.Errorf("query: %w", context.DeadlineExceeded), call.Timeout},
		{call.Errorf(call.Internal, "internal error").Because(interrupted), call.Timeout},
		{call.Errorf(call.Failed, "half of it is done").Because(context.DeadlineExceeded), call.Timeout},
		{call.Errorf(call.Failed, "half of it is done"), call.Failed},
	} {
		synctest.Test(t, func(t *testing.T) {
			g := newGate(t, Options{CallTimeout: time.Second})
			_, err := g.Guard(func(ctx context.Context, _ *call.Call) (*call.Result, error) {
				<-ctx.Done()
				return nil, tt.err
			})(t.Context(), tool())
			if codeOf(err) != tt.want || !errors.Is(err, tt.err) {
				t.Errorf("%v became %v", tt.err, err)
			}
		})
	}
	synctest.Test(t, func(t *testing.T) {
		g := newGate(t, Options{CallTimeout: time.Second})
		_, err := g.Guard(func(ctx context.Context, _ *call.Call) (*call.Result, error) {
			<-ctx.Done()
			return nil, ask
		})(t.Context(), tool())
		if !errors.Is(err, ask) {
			t.Errorf("a question became %v", err)
		}
	})
}

func TestStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(t, Options{MaxConcurrent: 1, MaxStreams: 3, MaxStreamsPerPeer: 2})
		h := g.Guard(until)
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		open := func(peer string) {
			all.Go(func() { _, _ = h(ctx, subscription(peer)) })
			synctest.Wait()
		}
		open("192.0.2.1:1000")
		open("192.0.2.1:1001")
		if _, err := h(ctx, subscription("192.0.2.1:1002")); codeOf(err) != call.Exhausted || !strings.Contains(err.Error(), "this client") {
			t.Errorf("third stream of one client: %v", err)
		}
		open("[2001:db8::1]:1000")
		if _, err := h(ctx, subscription("192.0.2.9:1")); codeOf(err) != call.Exhausted || !strings.Contains(err.Error(), "the server") {
			t.Errorf("fourth stream: %v", err)
		}
		if g.Streams() != 3 || g.Running() != 0 {
			t.Errorf("%d streams and %d calls", g.Streams(), g.Running())
		}
		cancel()
		all.Wait()
		empty(t, g)
	})
}

func TestNewNamesWhatIsWrong(t *testing.T) {
	_, err := New(Options{MaxQueued: -1, CallTimeout: -1})
	if err == nil || !strings.Contains(err.Error(), "MaxQueued") || !strings.Contains(err.Error(), "CallTimeout") {
		t.Errorf("got %v", err)
	}
}

var result = &call.Result{}

// BenchmarkGuard is what a call pays while there is room.
func BenchmarkGuard(b *testing.B) {
	h := newGate(b, Options{}).Guard(func(context.Context, *call.Call) (*call.Result, error) { return result, nil })
	ctx, cancel := context.WithCancel(b.Context()) // as a request's is
	defer cancel()
	c := tool()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := h(ctx, c); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkContended is the same with more callers than slots.
func BenchmarkContended(b *testing.B) {
	h := newGate(b, Options{MaxConcurrent: 2, QueueTimeout: time.Hour}).Guard(func(context.Context, *call.Call) (*call.Result, error) { return result, nil })
	b.ReportAllocs()
	b.SetParallelism(16)
	b.RunParallel(func(pb *testing.PB) {
		c := tool()
		for pb.Next() {
			if _, err := h(b.Context(), c); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// Near the limit of memory, and when the queue is half full, what is not critical goes first; at the
// limit everything waits.
func TestShedding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var used uint64
		g := newGate(t, Options{MaxConcurrent: 1, MaxQueued: 4, MaxMemory: 1000, Memory: func() uint64 { return used }, NotCritical: []string{"nice_*"}})
		running := make(chan struct{})
		h := g.Guard(func(context.Context, *call.Call) (*call.Result, error) {
			<-running
			return nil, nil
		})
		quick := g.Guard(func(context.Context, *call.Call) (*call.Result, error) { return nil, nil })
		try := func(kind call.Kind, name string) bool {
			t.Helper()
			_, err := quick(t.Context(), &call.Call{Kind: kind, Name: name})
			if err != nil && (call.AsError(err).Code != call.Exhausted || call.AsError(err).RetryAfter == 0) {
				t.Errorf("%s: %v", name, err)
			}
			return err == nil
		}
		for _, tt := range []struct {
			used                      uint64
			needed, nice, all, stream bool
			level                     int64
		}{{500, true, true, true, true, 0}, {850, true, true, true, false, 1}, {900, true, false, true, false, 2}, {950, false, false, false, false, 3}, {100, true, true, true, true, 0}} {
			used = tt.used
			time.Sleep(readEvery) // of the bubble's clock
			if got := [4]bool{try(call.Tool, "needed"), try(call.Tool, "nice_to_have"), try(call.ListTools, ""), try(call.Subscribe, "")}; got != [4]bool{tt.needed, tt.nice, tt.all, tt.stream} || g.Overload() != tt.level || g.Crowded() == tt.stream {
				t.Errorf("%d bytes: %v", tt.used, got)
			}
			if !try(call.Discover, "") {
				t.Error("a client cannot even ask what there is")
			}
		}
		var all sync.WaitGroup
		for range 3 { // one runs, two wait
			all.Go(func() {
				if _, err := h(t.Context(), &call.Call{Kind: call.Tool, Name: "needed"}); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		if try(call.Tool, "nice_to_have") {
			t.Error("what is not critical still waits in a queue that is half full")
		}
		close(running)
		all.Wait()
	})
}
