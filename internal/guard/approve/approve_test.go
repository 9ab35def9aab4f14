package approve_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/guard/approve"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/inmem"
)

// What metrics say: how many wait, and how those that do not any more were decided, each once.
func TestCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		outcomes := make(chan string, 16)
		p, err := approve.New(approve.Options{Store: inmem.New(), Key: secret.RandomKey(), Ended: func(_ context.Context, outcome string) { outcomes <- outcome }})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- p.Run(ctx) }()
		step := p.Guard("/mcp")(func(context.Context, *call.Call) (*call.Result, error) { return nil, call.ErrUnapproved })
		tool := &call.Capability{Kind: call.Tool, Name: "pay", Effect: call.Write}
		for _, args := range []string{`{"n":1}`, `{"n":2}`, `{"n":3}`} {
			c := &call.Call{Kind: call.Tool, Name: "pay", Args: jsontext.Value(args), Target: tool, Principal: &call.Principal{ID: "alice"}, Sink: call.Discard, Asker: call.NoAsker,
				Approval: &call.Approval{Rule: "r", Approvers: []string{"boss"}, Expires: time.Minute}}
			if _, err := step(ctx, c); call.AsError(err).Code != call.Denied {
				t.Fatal(err)
			}
		}
		time.Sleep(10 * time.Second)
		if n := p.Pending(); n != 3 {
			t.Errorf("%d wait", n)
		}
		boss := approve.Person{Name: "bob", Roles: []string{"boss"}, How: approve.ByToken}
		list, err := p.List(ctx, boss, approve.Pending, 10)
		if err != nil || len(list) != 3 {
			t.Fatal(list, err)
		}
		for i, yes := range []bool{true, false} {
			if _, err := p.Decide(ctx, list[i].ID, boss, yes, ""); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := p.Decide(ctx, list[1].ID, boss, true, ""); !errors.Is(err, approve.ErrEnded) {
			t.Errorf("decided twice: %v", err)
		}
		time.Sleep(10 * time.Second)
		if n := p.Pending(); n != 1 {
			t.Errorf("%d wait", n)
		}
		time.Sleep(time.Hour)
		if n := p.Pending(); n != 0 {
			t.Errorf("%d wait", n)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		close(outcomes)
		var got []string
		for o := range outcomes {
			got = append(got, o)
		}
		slices.Sort(got)
		if !slices.Equal(got, []string{"approved", "denied", "expired", "expired"}) { // what was approved was never used
			t.Errorf("decided: %q", got)
		}
	})
}
