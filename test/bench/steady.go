package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const steadyConnections = 64

// atRate asks for rate calls a second for d, whether or not the answers keep up, and returns how
// long each took, least first. A call counts from when it was due: one that had to wait because
// all connections were waiting for answers took that long too (otherwise a server that stops for
// a second would be forgiven all but one call of it: coordinated omission).
func (r *runner) atRate(ctx context.Context, rate float64, d time.Duration) ([]time.Duration, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	total := int(rate * d.Seconds())
	if total < 1 {
		return nil, fmt.Errorf("%.1f calls a second for %v are none", rate, d)
	}
	due := make(chan time.Time, total) // pacing never waits
	var all sync.WaitGroup
	for _, c := range r.conns {
		all.Go(func() {
			c.took = c.took[:0]
			if err := c.SetDeadline(time.Now().Add(d + 30*time.Second)); err != nil {
				cancel(err)
				return
			}
			for n := 0; ; n++ {
				select {
				case at, more := <-due:
					if !more {
						return
					}
					if err := r.exchange(c, n); err != nil {
						cancel(err)
						return
					}
					c.took = append(c.took, time.Since(at))
				case <-ctx.Done():
					return
				}
			}
		})
	}
	if err := pace(ctx, due, rate, total); err != nil {
		cancel(err)
	}
	close(due)
	all.Wait()
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	var took []time.Duration
	for _, c := range r.conns {
		took = append(took, c.took...)
	}
	if len(took) != total {
		return nil, fmt.Errorf("%d of %d calls were answered", len(took), total)
	}
	slices.Sort(took)
	return took, nil
}

// pace sends on due when calls are due, total of them. It waits on a timer of the kernel: those of
// Go are up to a millisecond late, which is more than most calls take.
func pace(ctx context.Context, due chan<- time.Time, rate float64, total int) (err error) {
	gap := time.Duration(float64(time.Second) / rate)
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return err
	}
	timer := os.NewFile(uintptr(fd), "timer")
	defer func() { err = errors.Join(err, timer.Close()) }()
	every := unix.NsecToTimespec(int64(max(gap, 20*time.Microsecond)))
	if err := unix.TimerfdSettime(fd, 0, &unix.ItimerSpec{Interval: every, Value: every}, nil); err != nil {
		return err
	}
	began := time.Now()
	var expired [binary.MaxVarintLen64]byte
	for sent := 0; sent < total; {
		if _, err := timer.Read(expired[:8]); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return nil // the cause says why
		}
		for now := time.Now(); sent < total; sent++ {
			at := began.Add(time.Duration(float64(sent+1) * float64(time.Second) / rate))
			if at.After(now) {
				break
			}
			due <- at
		}
	}
	return nil
}
