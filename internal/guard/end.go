package guard

import (
	"cmp"
	"context"
	"sync"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/task"
)

// named makes a step own up: when it returns an error that the handler behind it did not, its
// name goes into the record. It needs nothing from the guard.
func named(step string, g call.Guard) call.Guard {
	return func(next call.Handler) call.Handler {
		inner := g(func(ctx context.Context, c *call.Call) (*call.Result, error) {
			r, err := next(ctx, c)
			if err != nil && c.Event.Step == "" {
				c.Event.Step = behind
			}
			return r, err
		})
		return func(ctx context.Context, c *call.Call) (*call.Result, error) {
			r, err := inner(ctx, c)
			if err != nil && c.Event.Step == "" {
				c.Event.Step = step
			}
			return r, err
		}
	}
}

// behind marks an error that came from where the path ends, as opposed to from one of its steps.
const behind = "backend"

// MaxSuggestions bounds one completion (MCP 2026-07-28, server/utilities/completion).
const MaxSuggestions = 100

// End is where the path ends: the target's own handler, the catalog for lists, the hub for
// subscriptions, what keeps tasks for calls about them.
func End(cat *catalog.Catalog, hub *catalog.Hub, tasks *task.Server) call.Handler {
	return func(ctx context.Context, c *call.Call) (*call.Result, error) {
		switch {
		case c.Kind.IsList():
			return cat.Load().PageFor(c.Kind, c.Cursor, c.Visible)
		case c.Kind == call.Discover:
			return &call.Result{}, nil // the door knows what it speaks
		case c.Kind == call.Subscribe:
			return subscribe(ctx, hub, tasks, c)
		case c.Kind.OfTask():
			return tasks.Handle(ctx, c)
		case c.Kind == call.ListTasks:
			return listTasks(ctx, cat.Load(), tasks, c)
		case c.Kind == call.Complete:
			return complete(ctx, c)
		}
		if c.Elsewhere != "" && c.Target.Follow != nil {
			return c.Target.Follow(ctx, c)
		}
		return c.Target.Run(ctx, c)
	}
}

// subscribe acknowledges, then delivers changes until the context ends; that end is a success.
func subscribe(ctx context.Context, hub *catalog.Hub, tasks *task.Server, c *call.Call) (*call.Result, error) {
	first := call.Notification{Method: call.Acknowledged}
	if ids := c.Filter.Tasks; len(ids) > 0 {
		var failed error
		var done sync.WaitGroup
		listening, stop := context.WithCancel(ctx)
		begun := make(chan struct{}) // closed when first was delivered
		done.Go(func() {
			defer stop()
			select {
			case <-begun:
			case <-listening.Done():
				return
			}
			failed = tasks.Follow(listening, c.Principal, ids, func(t *call.Task) error {
				return c.Sink.Notify(listening, call.Notification{Method: call.TaskChanged, TaskID: t.ID, Task: t})
			})
		})
		err := hub.Listen(listening, c.Principal, c.Filter, func(n call.Notification) error {
			err := c.Sink.Notify(listening, n)
			if n.Method == call.Acknowledged && err == nil {
				close(begun)
			}
			return err
		}, first)
		stop()
		done.Wait()
		if err = cmp.Or(err, failed); err != nil {
			return nil, err
		}
		return &call.Result{}, nil
	}
	err := hub.Listen(ctx, c.Principal, c.Filter, func(n call.Notification) error { return c.Sink.Notify(ctx, n) }, first)
	if err != nil {
		return nil, err
	}
	return &call.Result{}, nil
}

// listTasks lists the caller's own tasks of tools that it may see.
func listTasks(ctx context.Context, s *catalog.Snapshot, tasks *task.Server, c *call.Call) (*call.Result, error) {
	list, next, err := tasks.List(ctx, c, func(name string) bool {
		t := s.Tool(name)
		return t != nil && (c.Visible == nil || c.Visible.Shows(t))
	})
	if err != nil {
		return nil, err
	}
	return &call.Result{Tasks: list, Next: next}, nil
}

// completion is the completion object of completion/complete.
type completion struct {
	Values  []string `json:"values"`
	Total   int      `json:"total,omitzero"`
	HasMore bool     `json:"hasMore"`
}

func complete(ctx context.Context, c *call.Call) (*call.Result, error) {
	done := completion{Values: []string{}}
	if c.Target.Suggest != nil {
		values, total, err := c.Target.Suggest(ctx, c.Completion)
		if err != nil {
			return nil, err
		}
		done.HasMore = len(values) > MaxSuggestions || total > len(values)
		done.Values = append(done.Values, values[:min(len(values), MaxSuggestions)]...)
		done.Total = max(total, 0)
	}
	raw, err := json.Marshal(done)
	if err != nil {
		return nil, call.Errorf(call.Internal, "internal error").Because(err)
	}
	return &call.Result{Content: raw}, nil
}
