// Package resolve finds what a call is for and sets Call.Target.
//
// Refuses: names that are not in the current snapshot. Needs: the catalog. Fails: never for a
// dependency (the snapshot is in memory). Records: nothing of its own. Costs: one map access;
// for resources one match per template.
package resolve

import (
	"context"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/catalog"
)

// New returns the guard of the resolve step. see, if not nil, is asked before the target is told
// to the steps behind: its error is the answer. For lists and subscriptions target is nil. tasks finds
// a task of the caller's own: its target is the tool that it runs.
func New(cat *catalog.Catalog, see func(ctx context.Context, c *call.Call, target *call.Capability) error, tasks func(ctx context.Context, c *call.Call, id string) (*call.Task, error)) call.Guard {
	return func(next call.Handler) call.Handler {
		return func(ctx context.Context, c *call.Call) (*call.Result, error) {
			if c.Target != nil {
				return nil, call.Errorf(call.Internal, "internal error")
			}
			if err := own(ctx, c, tasks); err != nil {
				return nil, err
			}
			target, err := find(cat.Load(), c)
			if err != nil {
				return nil, err
			}
			if see != nil {
				if err := see(ctx, c, target); err != nil {
					return nil, err
				}
			}
			c.Target = target
			return next(ctx, c)
		}
	}
}

// own finds the tasks that a call is about.
func own(ctx context.Context, c *call.Call, tasks func(context.Context, *call.Call, string) (*call.Task, error)) (err error) {
	if tasks == nil && (c.Kind.OfTask() || c.Kind == call.ListTasks || c.Kind == call.Subscribe && len(c.Filter.Tasks) > 0) {
		return call.Errorf(call.NotFound, "there are no tasks here")
	}
	if c.Kind.OfTask() {
		c.Task, err = tasks(ctx, c, c.Name)
		return err
	}
	if c.Kind == call.Subscribe {
		for _, id := range c.Filter.Tasks {
			t, err := tasks(ctx, c, id)
			if err != nil {
				return err
			}
			c.Followed = append(c.Followed, t)
		}
	}
	return nil
}

// find returns nil for lists and subscriptions, which have no target.
func find(s *catalog.Snapshot, c *call.Call) (*call.Capability, error) {
	var found *call.Capability
	kind := c.Kind
	if kind == call.Complete && c.Completion != nil {
		kind = c.Completion.Ref
	}
	switch kind {
	case call.Tool:
		if found = s.Tool(c.Name); found == nil {
			return nil, call.Errorf(call.NotFound, "unknown tool %q; tools/list names the tools", clip(c.Name))
		}
	case call.Prompt:
		if found = s.Prompt(c.Name); found == nil {
			return nil, call.Errorf(call.NotFound, "unknown prompt %q; prompts/list names the prompts", clip(c.Name))
		}
	case call.Resource:
		if c.Kind == call.Complete {
			found = s.Template(c.Name)
		}
		if found == nil {
			found = s.Resource(c.Name)
		}
		if found == nil {
			return nil, noResource(c.Name, "resources/list and resources/templates/list name what there is")
		}
	case call.Subscribe:
		for _, uri := range c.Filter.URIs {
			if s.Resource(uri) == nil {
				return nil, noResource(uri, "it cannot be subscribed to")
			}
		}
	case call.GetTask, call.UpdateTask, call.CancelTask, call.TaskResult:
		if found = s.Tool(c.Task.Tool); found == nil {
			return nil, call.Errorf(call.NotFound, "the tool of this task is not served any more")
		}
	default:
		if !kind.IsList() && kind != call.Discover && kind != call.ListTasks {
			return nil, call.Errorf(call.Malformed, "the call has no valid kind")
		}
	}
	return found, nil
}

// noResource carries the URI in its data (SEP-2164).
func noResource(uri, advice string) error {
	e := call.Errorf(call.NotFound, "resource not found: %q; %s", clip(uri), advice)
	e.Data = append(call.AppendString(jsontext.Value(`{"uri":`), clip(uri)), '}')
	return e
}

func clip(s string) string {
	if len(s) > 200 {
		return s[:200]
	}
	return s
}
