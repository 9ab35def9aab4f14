package assembly

import (
	"context"
	"net/http"
	"slices"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/door/approvals"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/guard/observe"
	"newel.dev/newel/internal/policy"
)

// OperatorKey is the purpose of the key that proves who is an operator.
const OperatorKey = "newel operators"

// openApprovals makes the door for people who decide. Tokens are those for the main server.
func (h *House) openApprovals() error {
	o := approvals.Options{
		Approvals: h.approvals, Webhook: h.opts.Webhook,
		Refused: func(ctx context.Context, status int, peer, reason string) {
			h.kept.observer.Refused(ctx, observe.Refusal{Door: "approvals", Code: refusals[status], Status: status, Peer: peer, Reason: reason})
		},
	}
	if h.opts.Identity != nil {
		o.Who = func(r *http.Request) (*call.Principal, error) {
			c := h.main().door.Credential(r)
			if c.URL != "" { // the proof is for what is asked, not for /mcp
				c.URL = origin(c.URL) + r.URL.Path
			}
			return h.main().identity(&h.opts).Verify(r.Context(), c)
		}
	}
	if h.opts.Access != nil {
		o.Nonce = h.opts.Access.Nonce
	}
	if h.opts.State != nil { // another process can have the key
		key, err := h.kept.key.Derive(OperatorKey)
		if err != nil {
			return err
		}
		o.Operators, o.Undo = key, h.Undo
		o.Log, _ = h.kept.store.(audit.Eraser) // every engine is one
	}
	h.deciding = approvals.New(o)
	return nil
}

var refusals = map[int]call.Code{
	http.StatusUnauthorized: call.Unauthenticated, http.StatusForbidden: call.Denied, http.StatusNotFound: call.NotFound, http.StatusConflict: call.Conflict,
	http.StatusBadRequest: call.Malformed, http.StatusRequestEntityTooLarge: call.TooLarge, http.StatusServiceUnavailable: call.Unavailable, http.StatusInternalServerError: call.Internal,
}

// Undo has an operation undone by an operator, through the whole path. Whoever it is, the caller is
// the principal "operator" of the operation's tenant: so two of them undo it once.
func (h *House) Undo(ctx context.Context, id, by string) (*call.Result, error) {
	op, c, err := h.effects.Compensation(ctx, id, by)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(h.faces, func(f *face) bool {
		return f.server.Path == op.Server && (f.server.Tenant == "" || f.server.Tenant == op.Tenant)
	})
	if i < 0 {
		return nil, call.Errorf(call.NotFound, "the server %s of this operation is not served any more", op.Server)
	}
	c.Credential = call.Credential{Peer: effect.UndoDoor, Known: &call.Principal{ID: "operator", Tenant: op.Tenant, Client: "newel undo by " + by, Scopes: []string{policy.AllScopes}, Roles: []string{"operator"}}}
	return h.faces[i].path(ctx, c)
}

// Deciding is the door for people who decide and for operators, alone.
func (h *House) Deciding() http.Handler {
	mux := newRoutes()
	h.serveApprovals(mux)
	return mux
}

// serveApprovals serves the door, if there is anybody to serve.
func (h *House) serveApprovals(mux *routes) {
	if h.opts.Identity == nil && h.opts.State == nil && h.opts.Webhook == nil {
		return
	}
	all := h.deciding.Routes()
	patterns := make([]string, 0, len(all))
	for p := range all {
		patterns = append(patterns, p)
	}
	slices.Sort(patterns)
	for _, p := range patterns {
		mux.HandleFunc(p, all[p])
	}
}
