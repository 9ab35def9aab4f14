// Package quotatest is what every store of counts must do.
package quotatest

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"newel.dev/newel/internal/guard/quota"
)

// Run tests a store that is empty. A store that keeps its own time is given real time.
func Run(t *testing.T, s quota.Store) {
	now := time.Now()
	take := func(t *testing.T, claims ...quota.Claim) quota.Outcome {
		t.Helper()
		out, err := s.Take(t.Context(), now, claims)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	t.Run("rate", func(t *testing.T) {
		c := quota.Claim{Key: t.Name(), Kind: quota.KindRate, Limit: 3, Every: time.Hour, Amount: 1}
		for range 3 {
			if out := take(t, c); out.Refused != -1 {
				t.Fatalf("%+v", out)
			}
		}
		out := take(t, c)
		if out.Refused != 0 || out.RetryAfter <= 59*time.Minute || out.RetryAfter > time.Hour {
			t.Errorf("over the rate: %+v", out)
		}
		if out := take(t, quota.Claim{Key: t.Name() + "2", Kind: quota.KindRate, Limit: 1, Every: time.Hour, Amount: 2}); out.Refused != 0 {
			t.Errorf("more than fits at all: %+v", out)
		}
	})
	t.Run("rate comes back", func(t *testing.T) {
		c := quota.Claim{Key: t.Name(), Kind: quota.KindRate, Limit: 1, Every: 30 * time.Millisecond, Amount: 1}
		for range 3 {
			for begun := time.Now(); ; {
				out, err := s.Take(t.Context(), time.Now(), []quota.Claim{c})
				if err != nil {
					t.Fatal(err)
				}
				if out.Refused == -1 {
					break
				}
				if out.RetryAfter <= 0 || out.RetryAfter > 30*time.Millisecond || time.Since(begun) > 5*time.Second {
					t.Fatalf("%+v", out)
				}
			}
		}
	})
	t.Run("concurrent", func(t *testing.T) {
		c := func(id string) quota.Claim {
			return quota.Claim{Key: t.Name(), Kind: quota.KindConcurrent, Limit: 2, Every: time.Hour, Amount: 1, ID: id}
		}
		take(t, c("a"))
		take(t, c("b"))
		if out := take(t, c("c")); out.Refused != 0 || out.RetryAfter <= 0 {
			t.Errorf("a third: %+v", out)
		}
		if _, err := s.Settle(t.Context(), now, []quota.Claim{c("a"), c("a"), c("nobody")}); err != nil {
			t.Fatal(err)
		}
		if out := take(t, c("c")); out.Refused != -1 {
			t.Errorf("after one ended: %+v", out)
		}
		if out := take(t, c("d")); out.Refused != 0 {
			t.Errorf("what ends twice is counted twice: %+v", out)
		}
	})
	t.Run("concurrent calls that nobody ends", func(t *testing.T) {
		c := quota.Claim{Key: t.Name(), Kind: quota.KindConcurrent, Limit: 1, Every: 20 * time.Millisecond, Amount: 1, ID: "a"}
		take(t, c)
		c.ID = "b"
		for begun := time.Now(); ; {
			out, err := s.Take(t.Context(), time.Now(), []quota.Claim{c})
			if err != nil {
				t.Fatal(err)
			}
			if out.Refused == -1 {
				break
			}
			if time.Since(begun) > 5*time.Second {
				t.Fatal("the lease does not end")
			}
		}
	})
	t.Run("budget", func(t *testing.T) {
		c := func(amount int64) quota.Claim {
			return quota.Claim{Key: t.Name(), Kind: quota.KindBudget, Limit: 10, Amount: amount, Until: now.Add(time.Hour)}
		}
		if out := take(t, c(7)); out.Refused != -1 || len(out.Sums) != 1 || out.Sums[0] != 7 {
			t.Fatalf("%+v", out)
		}
		if out := take(t, c(4)); out.Refused != 0 || out.RetryAfter <= 59*time.Minute || out.RetryAfter > time.Hour {
			t.Errorf("over the budget: %+v", out)
		}
		if out := take(t, c(0)); out.Refused != -1 {
			t.Errorf("something is left: %+v", out)
		}
		sums, err := s.Settle(t.Context(), now, []quota.Claim{c(5), c(0)})
		if err != nil || sums[0] != 12 || sums[1] != 12 {
			t.Errorf("sums %v, %v", sums, err)
		}
		if out := take(t, c(0)); out.Refused != 0 {
			t.Errorf("nothing is left: %+v", out)
		}
	})
	t.Run("budget of a window that ended", func(t *testing.T) {
		c := quota.Claim{Key: t.Name(), Kind: quota.KindBudget, Limit: 1, Amount: 1, Until: time.Now().Add(20 * time.Millisecond)}
		take(t, c)
		for begun := time.Now(); ; {
			c.Until = time.Now().Add(time.Hour)
			out, err := s.Take(t.Context(), time.Now(), []quota.Claim{c})
			if err != nil {
				t.Fatal(err)
			}
			if out.Refused == -1 {
				break
			}
			if time.Since(begun) > 5*time.Second {
				t.Fatal("the window does not end")
			}
		}
	})
	t.Run("all or nothing", func(t *testing.T) {
		rate := quota.Claim{Key: t.Name() + "r", Kind: quota.KindRate, Limit: 1, Every: time.Hour, Amount: 1}
		full := quota.Claim{Key: t.Name() + "b", Kind: quota.KindBudget, Limit: 1, Amount: 2, Until: now.Add(time.Hour)}
		held := quota.Claim{Key: t.Name() + "c", Kind: quota.KindConcurrent, Limit: 1, Every: time.Hour, Amount: 1, ID: "a"}
		if out := take(t, rate, held, full); out.Refused != 2 {
			t.Fatalf("%+v", out)
		}
		if out := take(t, rate, held); out.Refused != -1 {
			t.Errorf("what was refused was counted: %+v", out)
		}
	})
	t.Run("exact when many come at once", func(t *testing.T) {
		const limit = 50
		var taken atomic.Int64
		var all sync.WaitGroup
		for i := range 8 {
			all.Go(func() {
				for j := range 25 {
					out, err := s.Take(context.WithoutCancel(t.Context()), now, []quota.Claim{
						{Key: t.Name() + "r", Kind: quota.KindRate, Limit: limit, Every: time.Hour, Amount: 1},
						{Key: t.Name() + "c", Kind: quota.KindConcurrent, Limit: 1000, Every: time.Hour, Amount: 1, ID: fmt.Sprint(i, "-", j)},
					})
					if err != nil {
						t.Error(err)
						return
					}
					if out.Refused == -1 {
						taken.Add(1)
					}
				}
			})
		}
		all.Wait()
		if taken.Load() != limit {
			t.Errorf("%d were taken, want %d", taken.Load(), limit)
		}
	})
}
