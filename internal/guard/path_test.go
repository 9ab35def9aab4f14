package guard

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/catalog"
)

// The order of the path, and which steps may be absent. Changing it is changing what happens to
// every call.
const golden = "observe authenticate admit resolve validate authorize approve? task effect cache? bound resilience"

func TestOrder(t *testing.T) {
	var names []string
	for _, s := range Path(Set{}) {
		name := s.Name
		if s.Optional {
			name += "?"
		}
		names = append(names, name)
	}
	if got := strings.Join(names, " "); got != golden {
		t.Errorf("the path is\n%s\nwant\n%s", got, golden)
	}
}

// tracing returns a set whose guards note that they ran; refuse names the one that refuses.
func tracing(ran *[]string, refuse string) Set {
	step := func(name string) call.Guard {
		return func(next call.Handler) call.Handler {
			return func(ctx context.Context, c *call.Call) (*call.Result, error) {
				*ran = append(*ran, name)
				if name == refuse {
					return nil, call.Errorf(call.Denied, "refused by %s", name)
				}
				return next(ctx, c)
			}
		}
	}
	return Set{Observe: step("observe"), Authenticate: step("authenticate"), Admit: step("admit"), Resolve: step("resolve"), Validate: step("validate"), Authorize: step("authorize"), Approve: step("approve"), Task: step("task"), Effect: step("effect"), Cache: step("cache"), Bound: step("bound"), Resilience: step("resilience")}
}

func TestEveryStepRefuses(t *testing.T) {
	order := strings.Fields(strings.ReplaceAll(golden, "?", ""))
	for i, name := range order {
		t.Run(name, func(t *testing.T) {
			var ran []string
			reached := false
			h, err := Compile(Path(tracing(&ran, name)), func(context.Context, *call.Call) (*call.Result, error) {
				reached = true
				return &call.Result{}, nil
			})
			if err != nil {
				t.Fatal(err)
			}
			c := &call.Call{Kind: call.Tool}
			if _, err := h(t.Context(), c); err == nil {
				t.Error("the call went through")
			}
			if reached {
				t.Error("the backend ran")
			}
			if !slices.Equal(ran, order[:i+1]) {
				t.Errorf("ran %v, want nothing below %q", ran, name)
			}
			if c.Event.Step != name {
				t.Errorf("the record blames step %q", c.Event.Step)
			}
		})
	}
}

func TestBackendErrorBlamesNoStep(t *testing.T) {
	var ran []string
	h, err := Compile(Path(tracing(&ran, "")), func(context.Context, *call.Call) (*call.Result, error) {
		return nil, errors.New("backend")
	})
	if err != nil {
		t.Fatal(err)
	}
	c := &call.Call{}
	_, err = h(t.Context(), c)
	if err == nil || c.Event.Step != "backend" {
		t.Errorf("got %v, step %q", err, c.Event.Step)
	}
}

func TestMissingGuardIsAStartUpError(t *testing.T) {
	for i, name := range strings.Fields(golden) {
		var ran []string
		steps := Path(tracing(&ran, ""))
		steps[i].Guard = nil
		_, err := Compile(steps, func(context.Context, *call.Call) (*call.Result, error) { return nil, nil })
		if steps[i].Optional {
			if err != nil {
				t.Errorf("without %s, which may be absent: %v", name, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", name)) {
			t.Errorf("without %s: %v", name, err)
		}
	}
}

func TestCompletion(t *testing.T) {
	many := make([]string, 250)
	for i := range many {
		many[i] = fmt.Sprint(i)
	}
	h := End(catalog.New(&catalog.Snapshot{}), catalog.NewHub(), nil)
	c := &call.Call{Kind: call.Complete, Completion: &call.Completion{}, Target: &call.Capability{
		Suggest: func(context.Context, *call.Completion) ([]string, int, error) { return many, len(many), nil },
	}}
	r, err := h(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(r.Content); !strings.HasSuffix(got, `"99"],"total":250,"hasMore":true}`) {
		t.Errorf("got …%s", got[max(0, len(got)-60):])
	}
}
