package catalog

import (
	"context"
	"maps"
	"slices"
	"sync"

	"newel.dev/newel/call"
)

// A Hub tells subscribers what changed. Changes that a slow subscriber has not taken yet are
// merged, so that it costs a bounded amount however slow it is. Methods are safe for
// concurrent use.
type Hub struct {
	// OnFollow, if set before use, is told of every resource that a subscriber names, so that
	// its backend can ask for its changes. It returns quickly.
	OnFollow func(uri string)
	// View, if set before use, returns a digest of what a caller is shown of the list of a kind now; "" if
	// it cannot be told quickly. Who is shown the same as before hears of no change.
	View func(kind call.Kind, who *call.Principal) string

	mu        sync.Mutex // guards what is below
	listeners map[*listener]struct{}
	followed  map[string]struct{} // at most maxFollowed
}

// maxFollowed bounds how many resources are remembered for [Hub.FollowAgain].
const maxFollowed = 10_000

// listener holds what one subscriber has yet to hear; pending is guarded by Hub.mu.
type listener struct {
	filter  *call.Filter
	all     bool // updates of any resource, and changes of any list
	who     *call.Principal
	views   map[call.Kind]string // digests of what it was shown last, of lists that it asked for
	pending []call.Notification
	wake    chan struct{}
}

// NewHub returns a hub without subscribers.
func NewHub() *Hub { return &Hub{listeners: map[*listener]struct{}{}, followed: map[string]struct{}{}} }

// ListenAll is Listen for everything that changes for anybody, any resource included; f.URIs is ignored.
func (h *Hub) ListenAll(ctx context.Context, f *call.Filter, deliver func(call.Notification) error) error {
	return h.listen(ctx, &listener{filter: f, all: true, wake: make(chan struct{}, 1)}, deliver)
}

// Listen delivers first, then the changes that f asks for and that concern who, one after the other,
// until ctx ends (it returns nil) or deliver fails (it returns that error). No change after first is
// missed.
func (h *Hub) Listen(ctx context.Context, who *call.Principal, f *call.Filter, deliver func(call.Notification) error, first ...call.Notification) error {
	l := &listener{filter: f, who: who, views: map[call.Kind]string{}, pending: first, wake: make(chan struct{}, 1)}
	if len(first) > 0 {
		l.wake <- struct{}{}
	}
	return h.listen(ctx, l, deliver)
}

func (h *Hub) listen(ctx context.Context, l *listener, deliver func(call.Notification) error) error {
	h.mu.Lock()
	h.listeners[l] = struct{}{}
	for _, kind := range lists {
		if !l.all && l.filter.Lists(kind) && h.View != nil {
			l.views[kind] = h.View(kind, l.who)
		}
	}
	h.mu.Unlock()
	if !l.all {
		for _, uri := range l.filter.URIs {
			h.Follow(uri)
		}
	}
	defer func() {
		h.mu.Lock()
		delete(h.listeners, l)
		h.mu.Unlock()
	}()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-l.wake:
		}
		h.mu.Lock()
		pending := l.pending
		l.pending = nil
		h.mu.Unlock()
		for _, n := range pending {
			if err := deliver(n); err != nil {
				return err
			}
		}
	}
}

// Follow says that somebody wants to hear of changes of the resource at uri.
func (h *Hub) Follow(uri string) {
	if h.OnFollow == nil {
		return
	}
	h.mu.Lock()
	if len(h.followed) < maxFollowed {
		h.followed[uri] = struct{}{}
	}
	h.mu.Unlock()
	h.OnFollow(uri)
}

// FollowAgain tells OnFollow of every resource that was named before: what it tells may be a
// backend that was not there then.
func (h *Hub) FollowAgain() {
	if h.OnFollow == nil {
		return
	}
	h.mu.Lock()
	uris := slices.Collect(maps.Keys(h.followed))
	h.mu.Unlock()
	for _, uri := range uris {
		h.OnFollow(uri)
	}
}

// lists are the kinds of lists.
var lists = []call.Kind{call.ListTools, call.ListResources, call.ListTemplates, call.ListPrompts}

// ListChanged says that the list of a kind (call.ListTools and so on) may be another one. Whoever is
// shown what it was shown before does not hear of it, unless anew says that what the list names is
// other things than before.
func (h *Hub) ListChanged(kind call.Kind, anew bool) {
	n := call.Notification{Method: "notifications/tools/list_changed", Anew: anew}
	switch kind {
	case call.ListPrompts:
		n.Method = "notifications/prompts/list_changed"
	case call.ListResources, call.ListTemplates:
		n.Method = "notifications/resources/list_changed"
	}
	h.publish(n, func(l *listener) bool {
		if !l.filter.Lists(kind) {
			return false
		}
		if l.all || h.View == nil {
			return true
		}
		before, now := l.views[kind], h.View(kind, l.who)
		l.views[kind] = now
		return anew || now == "" || now != before
	})
}

// Listeners returns how many subscribers there are.
func (h *Hub) Listeners() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.listeners)
}

// Updated says that the content of the resource at uri changed.
func (h *Hub) Updated(uri string) {
	h.publish(call.Notification{Method: "notifications/resources/updated", URI: uri}, func(l *listener) bool { return l.all || slices.Contains(l.filter.URIs, uri) })
}

func (h *Hub) publish(n call.Notification, wanted func(*listener) bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for l := range h.listeners {
		if !wanted(l) || slices.Contains(l.pending, n) {
			continue
		}
		l.pending = append(l.pending, n)
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
}
