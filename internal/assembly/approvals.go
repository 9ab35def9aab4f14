package assembly

import (
	"context"
	"net/http"
	"slices"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/door/approvals"
	"newel.dev/newel/internal/guard/observe"
)

// OperatorKey is the purpose of the key that proves who is an operator.
const OperatorKey = "newel operators"

// openApprovals makes the door for people who decide. Tokens are those for the main server.
func (h *House) openApprovals(observer *observe.Observer) error {
	o := approvals.Options{
		Approvals: h.approvals, Webhook: h.opts.Webhook,
		Refused: func(ctx context.Context, status int, peer, reason string) {
			observer.Refused(ctx, observe.Refusal{Door: "approvals", Code: refusals[status], Status: status, Peer: peer, Reason: reason})
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
	if h.opts.State != nil { // another process can have the key
		key, err := h.opts.Key.Derive(OperatorKey)
		if err != nil {
			return err
		}
		o.Operators = key
	}
	h.deciding = approvals.New(o)
	return nil
}

var refusals = map[int]call.Code{
	http.StatusUnauthorized: call.Unauthenticated, http.StatusForbidden: call.Denied, http.StatusNotFound: call.NotFound, http.StatusConflict: call.Conflict,
	http.StatusBadRequest: call.Malformed, http.StatusRequestEntityTooLarge: call.TooLarge, http.StatusServiceUnavailable: call.Unavailable, http.StatusInternalServerError: call.Internal,
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
