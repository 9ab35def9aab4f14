package guard

import (
	"context"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/catalog"
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
// subscriptions.
func End(cat *catalog.Catalog, hub *catalog.Hub) call.Handler {
	return func(ctx context.Context, c *call.Call) (*call.Result, error) {
		switch {
		case c.Kind.IsList():
			return cat.Load().PageFor(c.Kind, c.Cursor, c.Visible)
		case c.Kind == call.Discover:
			return &call.Result{}, nil // the door knows what it speaks
		case c.Kind == call.Subscribe:
			return subscribe(ctx, hub, c)
		case c.Kind == call.Complete:
			return complete(ctx, c)
		}
		return c.Target.Run(ctx, c)
	}
}

// subscribe acknowledges, then delivers changes until the context ends; that end is a success.
func subscribe(ctx context.Context, hub *catalog.Hub, c *call.Call) (*call.Result, error) {
	err := hub.Listen(ctx, c.Filter, func(n call.Notification) error { return c.Sink.Notify(ctx, n) }, call.Notification{Method: call.Acknowledged})
	if err != nil {
		return nil, err
	}
	return &call.Result{}, nil
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
