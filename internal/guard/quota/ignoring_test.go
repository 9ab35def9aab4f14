package quota_test

import (
	"testing"
	"testing/synctest"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/guard/quota"
)

// A client that ignores the time to wait gets neither more nor less than its rate, is told the time anew
// each time, and takes nothing from others.
func TestWaitIgnored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		send := limiter(t, quota.Options{Rules: []quota.Rule{
			{Name: "each", Per: []string{"principal"}, Rate: quota.Rate{Calls: 10, In: time.Second}, Burst: 10},
			{Name: "all", Per: []string{"tenant"}, Rate: quota.Rate{Calls: 20, In: time.Second}, Burst: 20},
		}})
		let, refused, polite := 0, 0, 0
		const seconds = 10
		for range seconds * 1000 {
			err := send(by("acme", "rude", "x"))
			switch e := call.AsError(err); {
			case err == nil:
				let++
			case e.Code == call.Exhausted && e.RetryAfter > 0 && e.RetryAfter <= 100*time.Millisecond:
				refused++
			default:
				t.Fatalf("got %v (%+v)", err, e)
			}
			if let+refused != 0 && (let+refused)%125 == 0 { // eight calls a second
				if err := send(by("acme", "polite", "x")); err != nil {
					t.Fatalf("somebody who keeps to the rate is refused: %v", err)
				}
				polite++
			}
			time.Sleep(time.Millisecond)
		}
		if want := 10 * seconds; let < want || let > want+10 {
			t.Errorf("%d calls were let through in %d seconds, %d refused", let, seconds, refused)
		}
		if polite != 8*seconds {
			t.Errorf("%d calls of the other", polite)
		}
	})
}
