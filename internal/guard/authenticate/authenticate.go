// Package authenticate finds out who is calling and sets Call.Principal.
//
// Refuses: callers who present nothing, or nothing that is valid, always with the same words; and
// what of an earlier round of a call was sealed for somebody else.
// Needs: somebody who knows, see [Verifier]. Fails closed when that one is away. Records: nothing
// of its own. Costs: half a microsecond for a token that was seen before.
package authenticate

import (
	"context"

	"newel.dev/newel/call"
)

// A Verifier tells who a credential belongs to. Its errors are Unauthenticated, or Unavailable
// while it cannot tell. It is safe for concurrent use.
type Verifier interface {
	Verify(ctx context.Context, c call.Credential) (*call.Principal, error)
}

// New returns the guard.
func New(v Verifier) call.Guard {
	return func(next call.Handler) call.Handler {
		return func(ctx context.Context, c *call.Call) (*call.Result, error) {
			if c.Principal != nil { // a door must not say who is calling
				return nil, call.Errorf(call.Internal, "internal error")
			}
			p, err := v.Verify(ctx, c.Credential)
			if err != nil {
				return nil, err
			}
			if p == nil || p.ID == "" {
				return nil, call.Errorf(call.Unauthenticated, "authentication is required")
			}
			c.Principal = p
			return restored(ctx, c, next)
		}
	}
}

// Nobody is the guard of servers that know no identities: everybody who can reach them may call,
// so they listen on loopback only.
func Nobody(next call.Handler) call.Handler {
	return func(ctx context.Context, c *call.Call) (*call.Result, error) {
		if c.Principal != nil {
			return nil, call.Errorf(call.Internal, "internal error")
		}
		return restored(ctx, c, next)
	}
}

// restored goes on with a call whose principal is known.
func restored(ctx context.Context, c *call.Call, next call.Handler) (*call.Result, error) {
	if c.Restore != nil {
		if err := c.Restore(c); err != nil {
			return nil, err
		}
	}
	return next(ctx, c)
}
