package assembly

import (
	"context"
	"errors"
	"fmt"
	"path"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/guard"
	"newel.dev/newel/internal/guard/authenticate"
	"newel.dev/newel/internal/guard/observe"
	"newel.dev/newel/internal/task"
)

func (t *Tasks) check() error {
	for _, r := range t.Rules {
		if _, err := path.Match(r.Tool, ""); err != nil {
			return fmt.Errorf("tasks: %q is not a pattern: %w", r.Tool, err)
		}
	}
	return nil
}

// apply says of each tool whether it may be a task, as the operator has it.
func (t *Tasks) apply(caps []*call.Capability) []*call.Capability {
	if len(t.Rules) == 0 {
		return caps
	}
	out := make([]*call.Capability, len(caps))
	for i, c := range caps {
		out[i] = c
		if c.Kind != call.Tool {
			continue
		}
		for _, r := range t.Rules {
			if ok, _ := path.Match(r.Tool, c.Name); ok { // checked by Build
				if r.Support != c.Tasks {
					mine := *c // capabilities do not change once they are published
					mine.Tasks = r.Support
					out[i] = &mine
				}
				break
			}
		}
	}
	return out
}

// openTasks makes the tasks, or checks the bounds of the ones that are there: they count once the house serves.
func (h *House) openTasks() (err error) {
	k, l := h.kept, &h.opts.Tasks
	o := task.Options{
		Store: k.store, Key: k.key, Path: k.worker, Logger: k.log,
		Workers: l.Workers, MaxQueued: l.MaxQueued, MaxPerUser: l.MaxPerUser, TTL: l.TTL, MaxTTL: l.MaxTTL, Timeout: l.Timeout, Poll: l.Poll,
	}
	if k.tasks != nil {
		h.bound, err = k.tasks.Bound(o)
		return err
	}
	if k.tasks, err = task.New(o); err != nil {
		return err
	}
	return taskMetrics(k.observer, k.tasks)
}

func taskMetrics(o *observe.Observer, t *task.Tasks) error {
	return errors.Join(
		o.Gauge("newel.tasks.queued", "Tasks of all nodes that wait for a worker.", t.Queued),
		o.Gauge("newel.tasks.running", "Tasks of all nodes that run.", t.Running),
		o.Gauge("newel.tasks.waiting", "Tasks of all nodes that wait for answers of their callers.", t.Waiting),
		o.Gauge("newel.tasks.oldest", "Seconds that the first of the tasks which wait for a worker has waited.", t.Oldest))
}

// taskPath is the way of a task that a worker runs: that of every call, but who calls was found out when
// the task was made, and its turn comes from the queue of tasks.
func taskPath(shared guard.Set, end call.Handler, identified bool) (call.Handler, error) {
	shared.Authenticate = func(next call.Handler) call.Handler {
		known, nobody := authenticate.New(maker{})(next), authenticate.Nobody(next)
		return func(ctx context.Context, c *call.Call) (*call.Result, error) {
			if c.Credential.Known == nil && !identified {
				return nobody(ctx, c)
			}
			return known(ctx, c)
		}
	}
	shared.Admit = func(next call.Handler) call.Handler { return next }
	return guard.Compile(guard.Path(shared), end)
}

// maker knows who made a task: it is stored with it.
type maker struct{}

// Verify implements authenticate.Verifier.
func (maker) Verify(_ context.Context, c call.Credential) (*call.Principal, error) {
	if c.Known == nil {
		return nil, call.Errorf(call.Unauthenticated, "authentication is required")
	}
	return c.Known, nil
}
