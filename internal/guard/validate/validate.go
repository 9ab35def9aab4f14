// Package validate checks the arguments of a call against its target's schema.
//
// Refuses: arguments that do not fit, with an error that says what to send instead. Needs: the
// Check that the catalog compiled; a target without one is refused. Fails: closed. Records:
// nothing of its own. Costs: well under a microsecond for simple schemas, a few otherwise;
// large arguments take turns (internal/lane). It never changes the arguments: what was checked is what runs.
package validate

import (
	"context"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/lane"
)

// Guard is the guard of the validate step.
func Guard(next call.Handler) call.Handler {
	return func(ctx context.Context, c *call.Call) (*call.Result, error) {
		switch c.Kind {
		case call.Tool, call.Prompt:
			if c.Args != nil && c.Args.Kind() != '{' {
				return nil, call.Errorf(call.Invalid, "arguments must be an object")
			}
			if c.Target.Check == nil {
				return nil, call.Errorf(call.Internal, "internal error")
			}
			if err := check(ctx, c); err != nil {
				return nil, err
			}
		case call.Complete:
			if err := known(c); err != nil {
				return nil, err
			}
		}
		return next(ctx, c)
	}
}

// check holds the arguments against the schema; large ones wait for their turn.
func check(ctx context.Context, c *call.Call) error {
	leave, err := lane.Enter(ctx, len(c.Args))
	if err != nil {
		return err
	}
	defer leave()
	return c.Target.Check(c.Args)
}

// known refuses completion of a prompt argument that the prompt does not have.
func known(c *call.Call) error {
	if c.Completion.Ref != call.Prompt {
		return nil
	}
	for _, a := range c.Target.Arguments {
		if a.Name == c.Completion.Argument {
			return nil
		}
	}
	return call.Errorf(call.Invalid, "prompt %q has no argument %q", c.Name, c.Completion.Argument)
}
