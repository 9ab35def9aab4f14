package mcpsession

import (
	"context"
	"sync"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"newel.dev/newel/call"
)

// shown remembers what sessions were shown of lists, so that they hear of changes that concern them
// and of no others. A session that never asked for a list hears of all.
type shown struct {
	mu       sync.Mutex
	sessions map[*mcp.ServerSession]map[string]*view // by method of the notification
}

// view is what a session was shown last.
type view struct {
	who   *call.Principal
	lists map[call.Kind]string // digests
}

// listsOf returns the lists that a notification is about.
func listsOf(method string) []call.Kind {
	switch method {
	case "notifications/tools/list_changed":
		return []call.Kind{call.ListTools}
	case "notifications/prompts/list_changed":
		return []call.Kind{call.ListPrompts}
	case "notifications/resources/list_changed":
		return []call.Kind{call.ListResources, call.ListTemplates}
	}
	return nil
}

// shows notes what a session is about to be shown. It stands before the list is made: what changes
// between the two is told.
func (d *Door) shows(req mcp.Request, c *call.Call) {
	now := d.of(req.GetExtra()).o.Shown
	s, ok := req.GetSession().(*mcp.ServerSession)
	if !c.Kind.IsList() || c.Cursor != "" || now == nil || !ok || d.o.Identified && c.Credential.Known == nil {
		return
	}
	for _, method := range []string{"notifications/tools/list_changed", "notifications/prompts/list_changed", "notifications/resources/list_changed"} {
		for _, kind := range listsOf(method) {
			if kind == c.Kind {
				d.shown.note(s, method, c, now)
			}
		}
	}
}

func (r *shown) note(s *mcp.ServerSession, method string, c *call.Call, now func(call.Kind, *call.Principal) string) {
	digests := map[call.Kind]string{}
	for _, kind := range listsOf(method) {
		digests[kind] = now(kind, c.Credential.Known)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	of := r.sessions[s]
	if of == nil {
		of = map[string]*view{}
		r.sessions[s] = of
	}
	v := of[method]
	if v == nil {
		v = &view{lists: digests}
		of[method] = v
	}
	v.who, v.lists[c.Kind] = c.Credential.Known, digests[c.Kind]
}

// news reports whether a session is shown something else than before.
func (r *shown) news(s *mcp.ServerSession, method string, now func(call.Kind, *call.Principal) string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	v := r.sessions[s][method]
	if v == nil {
		return true
	}
	different := false
	for kind, before := range v.lists {
		digest := now(kind, v.who)
		different = different || digest == "" || digest != before
		v.lists[kind] = digest
	}
	return different
}

// forget has every session hear of the next change.
func (r *shown) forget(method string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, of := range r.sessions {
		delete(of, method)
	}
}

// drop forgets sessions that are gone.
func (r *shown) drop(there map[*mcp.ServerSession]bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for s := range r.sessions {
		if !there[s] {
			delete(r.sessions, s)
		}
	}
}

// onlyNews keeps from a session what is no news to it.
func (d *Door) onlyNews(next mcp.MethodHandler) mcp.MethodHandler {
	return func(ctx context.Context, method string, req mcp.Request) (mcp.Result, error) {
		s, ok := req.GetSession().(*mcp.ServerSession)
		if now := d.current.Load().o.Shown; ok && now != nil && listsOf(method) != nil && !d.shown.news(s, method, now) {
			return nil, nil
		}
		return next(ctx, method, req)
	}
}
