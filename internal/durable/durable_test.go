package durable

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/guard/effect"
)

func work() *Work { return &Work{Append: []audit.Entry{{}}} }

// TestGroups is many callers while a commit takes its time: they share the next one, one of them
// leads it, and no two run at once.
func TestGroups(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var sizes []int
		busy := false
		w := NewWriter(func(_ context.Context, batch []*Work) error {
			mu.Lock()
			if busy {
				t.Error("two commits run at once")
			}
			busy = true
			sizes = append(sizes, len(batch))
			mu.Unlock()
			time.Sleep(time.Second)
			mu.Lock()
			busy = false
			mu.Unlock()
			return nil
		})
		var all sync.WaitGroup
		first := func() {
			if err := w.Do(t.Context(), work()); err != nil {
				t.Error(err)
			}
		}
		all.Go(first)
		synctest.Wait()
		for range maxBatch + 10 {
			all.Go(first)
		}
		all.Wait()
		if len(sizes) != 3 || sizes[0] != 1 || sizes[1] != maxBatch || sizes[2] != 10 {
			t.Errorf("the batches have %v units", sizes)
		}
		all.Go(first) // nobody leads now: this one does
		all.Wait()
	})
}

// TestWaits is callers that come again a moment after their commit, one after the other: the next
// commit waits for all of them. One who is alone, and callers who stay away, are not waited for.
func TestWaits(t *testing.T) {
	const commit = 16 * time.Millisecond
	for _, test := range []struct {
		name    string
		callers int
		away    time.Duration // between two of them
		most    time.Duration // for ten calls of each
		size    int           // of the last commits
	}{
		{"alone", 1, 0, 10 * commit, 1},
		{"together", 8, 100 * time.Microsecond, 10*(commit+2*time.Millisecond) + commit, 8},
		{"apart", 2, time.Second, 10*(commit+time.Millisecond) + 11*time.Second, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var last atomic.Int64
				w := NewWriter(func(_ context.Context, batch []*Work) error {
					time.Sleep(commit)
					last.Store(int64(len(batch)))
					return nil
				})
				start := time.Now()
				var all sync.WaitGroup
				for i := range test.callers {
					all.Go(func() {
						for call := range 10 {
							time.Sleep(time.Duration(i) * test.away)
							if err := w.Do(t.Context(), work()); err != nil {
								t.Error(err)
							}
							if call == 8 && int(last.Load()) != test.size {
								t.Errorf("a commit of %d, want %d", last.Load(), test.size)
							}
						}
					})
				}
				all.Wait()
				if took := time.Since(start); took > test.most {
					t.Errorf("took %v, want at most %v", took, test.most)
				}
			})
		})
	}
}

// TestTakeBack is work whose caller goes away: before it is begun it is not done, also if its caller
// was to lead next.
func TestTakeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		done := 0
		w := NewWriter(func(_ context.Context, batch []*Work) error {
			time.Sleep(time.Second)
			done += len(batch)
			return nil
		})
		var all sync.WaitGroup
		all.Go(func() { _ = w.Do(t.Context(), work()) })
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		for range 3 {
			all.Go(func() {
				if err := w.Do(ctx, work()); !errors.Is(err, context.Canceled) {
					t.Errorf("got %v", err)
				}
			})
		}
		all.Go(func() { _ = w.Do(t.Context(), work()) })
		synctest.Wait()
		cancel()
		all.Wait()
		if done != 2 {
			t.Errorf("%d units were done, want 2", done)
		}
	})
}

// TestFailures is one unit that cannot be written, a store that is away, and one that is lost.
func TestFailures(t *testing.T) {
	bad := errors.New("a unit that cannot be written")
	for _, c := range []struct {
		name    string
		err     error
		failing int // of three
		commits int
		after   error
	}{
		{"one unit", bad, 1, 4, nil},
		{"away", effect.ErrAway, 3, 1, nil},
		{"fatal", ErrFatal, 3, 1, ErrFatal},
	} {
		synctest.Test(t, func(t *testing.T) {
			commits := 0
			var poison atomic.Pointer[Work]
			w := NewWriter(func(_ context.Context, batch []*Work) error {
				if poison.Load() == nil {
					time.Sleep(time.Second)
					return nil
				}
				commits++
				for _, u := range batch {
					if u == poison.Load() {
						return c.err
					}
				}
				return nil
			})
			var all sync.WaitGroup
			all.Go(func() { _ = w.Do(t.Context(), work()) }) // meanwhile the others come together
			synctest.Wait()
			var mu sync.Mutex
			failed := 0
			units := []*Work{work(), work(), work()}
			for _, u := range units {
				all.Go(func() {
					if err := w.Do(t.Context(), u); err != nil {
						mu.Lock()
						failed++
						mu.Unlock()
					}
				})
			}
			synctest.Wait()
			poison.Store(units[1])
			all.Wait()
			if failed != c.failing || commits != c.commits {
				t.Errorf("%s: %d units failed in %d commits, want %d in %d", c.name, failed, commits, c.failing, c.commits)
			}
			if err := w.Do(t.Context(), work()); !errors.Is(err, c.after) {
				t.Errorf("%s: then %v", c.name, err)
			}
		})
	}
}

func TestPanic(t *testing.T) {
	w := NewWriter(func(context.Context, []*Work) error { panic("oh") })
	if err := w.Do(t.Context(), work()); !errors.Is(err, ErrFatal) {
		t.Errorf("got %v", err)
	}
	select {
	case <-w.Failed():
	default:
		t.Error("nobody is told")
	}
}

func TestCheckSchema(t *testing.T) {
	for found, ok := range map[int]bool{0: true, Schema: true, Schema + 1: true, Schema + 2: false} {
		if err := CheckSchema(found); (err == nil) != ok {
			t.Errorf("schema %d: %v", found, err)
		}
	}
}

// TestStages is callers that come one after the other: the engine works on the first while the others
// are about to come, and still there is one commit for all, however slow it is. If it fails, each unit of
// each stage is tried alone.
func TestStages(t *testing.T) {
	const (
		callers, rounds = 64, 10
		each            = 20 * time.Microsecond // of a caller, and of the engine for one unit
	)
	bad := errors.New("a unit that cannot be written")
	for _, sync := range []time.Duration{0, 250 * time.Microsecond, 5 * time.Millisecond, 50 * time.Millisecond} {
		t.Run(sync.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var commits, units, stages, alone int
				var poison atomic.Pointer[Work]
				w := NewStaged(func(_ context.Context, work []*Work, more func() []*Work) error {
					commits++
					var err error
					for stage := work; len(stage) > 0; stage = more() {
						stages++
						units += len(stage)
						time.Sleep(time.Duration(len(stage)) * each)
						for _, u := range stage {
							if u == poison.Load() {
								err = bad
							}
						}
						if len(work) == 1 && poison.Load() != nil {
							alone++
						}
					}
					time.Sleep(sync)
					return err
				})
				round := func(poisoned bool) (failed int) {
					results := make(chan error)
					for i := range callers {
						go func() {
							time.Sleep(time.Duration(i+1) * each)
							u := work()
							if poisoned && i == callers/2 {
								poison.Store(u)
							}
							results <- w.Do(t.Context(), u)
						}()
					}
					for range callers {
						if err := <-results; err != nil {
							failed++
						}
					}
					return failed
				}
				round(false) // before it is known how many come
				round(false)
				commits, units, stages = 0, 0, 0
				start := time.Now()
				for range rounds {
					round(false)
				}
				if commits != rounds || units != rounds*callers || stages < 2*rounds {
					t.Errorf("%d commits of %d units in %d stages, want %d of %d in at least %d", commits, units, stages, rounds, rounds*callers, 2*rounds)
				}
				apart := rounds * (2*callers*each + sync)
				if took := time.Since(start); took > apart-rounds*callers*each/2 {
					t.Errorf("took %v; one after the other it is %v", took, apart)
				}
				if failed := round(true); failed != 1 || alone < callers {
					t.Errorf("%d units failed, want 1; %d were tried alone", failed, alone)
				}
			})
		})
	}
}
