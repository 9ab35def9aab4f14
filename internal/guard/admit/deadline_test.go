package admit

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"testing/synctest"
	"time"
)

// The context of a call is what context.WithDeadline would be, whoever looks at it and when.
func TestDeadlineIsAContext(t *testing.T) {
	type key struct{}
	for name, tt := range map[string]struct {
		before func(caller context.CancelCauseFunc, d *deadline) // before anybody looks
		err    error
		after  time.Duration
	}{
		"time":            {func(context.CancelCauseFunc, *deadline) {}, context.DeadlineExceeded, time.Minute},
		"time, seen late": {func(context.CancelCauseFunc, *deadline) { time.Sleep(2 * time.Minute) }, context.DeadlineExceeded, 0},
		"caller":          {func(leave context.CancelCauseFunc, _ *deadline) { leave(errors.New("gone")) }, context.Canceled, 0},
		"end":             {func(_ context.CancelCauseFunc, d *deadline) { d.end() }, context.Canceled, 0},
		"end, long ago":   {func(_ context.CancelCauseFunc, d *deadline) { d.end(); time.Sleep(time.Second) }, context.Canceled, 0},
	} {
		for how, look := range map[string]func(*testing.T, context.Context) context.Context{
			"itself": func(_ *testing.T, ctx context.Context) context.Context { return ctx },
			"a value": func(_ *testing.T, ctx context.Context) context.Context {
				return context.WithValue(ctx, key{}, "of a handler")
			},
			"a child": func(t *testing.T, ctx context.Context) context.Context {
				ctx, stop := context.WithCancel(ctx)
				t.Cleanup(stop)
				return ctx
			},
		} {
			t.Run(name+"/"+how, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					caller, leave := context.WithCancelCause(context.WithValue(t.Context(), key{}, "of the caller"))
					defer leave(nil)
					d := within(caller, time.Minute)
					defer d.end()
					if at, ok := d.Deadline(); !ok || time.Until(at) != time.Minute {
						t.Errorf("deadline %v %v", at, ok)
					}
					if d.Value(key{}) != "of the caller" {
						t.Error("values of the caller are not there")
					}
					tt.before(leave, d)
					ctx, start := look(t, d), time.Now()
					<-ctx.Done()
					if took := time.Since(start); !errors.Is(ctx.Err(), tt.err) || took != tt.after {
						t.Errorf("%v after %v, want %v after %v", ctx.Err(), took, tt.err, tt.after)
					}
					if name == "caller" && context.Cause(ctx).Error() != "gone" {
						t.Errorf("cause %v", context.Cause(ctx))
					}
					if d.Value(key{}) != "of the caller" {
						t.Error("values of the caller are gone")
					}
				})
			})
		}
	}
}

// Whoever waited is woken when the call ends, and contexts made of its own cost no goroutine.
func TestDeadlineEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := within(t.Context(), time.Minute)
		if d.Err() != nil {
			t.Error(d.Err())
		}
		before := runtime.NumGoroutine()
		child, stop := context.WithTimeout(d, time.Hour)
		defer stop()
		if n := runtime.NumGoroutine(); n != before {
			t.Errorf("%d goroutines, %d before", n, before)
		}
		woken := make(chan struct{})
		context.AfterFunc(child, func() { close(woken) })
		d.end()
		<-woken
		if !errors.Is(child.Err(), context.Canceled) || !errors.Is(d.Err(), context.Canceled) {
			t.Errorf("%v, %v", child.Err(), d.Err())
		}
	})
}

// A call that waits for nothing pays for no timer.
func TestDeadlineOfNobody(t *testing.T) {
	ctx := t.Context()
	if n := testing.AllocsPerRun(1000, func() { within(ctx, time.Minute).end() }); n > 1 {
		t.Errorf("%v allocations", n)
	}
}
