package mcpwire

import (
	"context"

	"newel.dev/newel/call"
)

type principalKey struct{}

// WithPrincipal tells the door behind another one who sends a request: a proof is good for one
// time, so only one of them can ask.
func WithPrincipal(ctx context.Context, p *call.Principal) context.Context {
	return context.WithValue(ctx, principalKey{}, p)
}

// PrincipalOf returns who sends a request, or nil if no door in front said so.
func PrincipalOf(ctx context.Context) *call.Principal {
	p, _ := ctx.Value(principalKey{}).(*call.Principal)
	return p
}
