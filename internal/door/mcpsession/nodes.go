package mcpsession

import (
	"bytes"
	"context"
	"encoding/json" // the SDK's types speak encoding/json
	"errors"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/modelcontextprotocol/go-sdk/auth"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"newel.dev/newel/internal/cluster"
	"newel.dev/newel/internal/mcpwire"
)

// Where several nodes serve one address, a request goes to the node that has its session. When that
// is gone, another one goes on with it: with what was agreed at its beginning, its log level and its
// subscriptions. Calls that ran there are lost; what they had sent can be read from the events.
//
// A node that was stopped for a while may come back after that. It has lost the session then, and finds
// out before it does anything with it: requests go to the node that has it, streams end so that their
// clients come back to that one, and what is kept of the session is left alone. Calls that still run
// end, and their answers can be read from the events.

// kept is a session of this node, as the other nodes know it.
type kept struct {
	copyOf
	user    string
	state   continued
	renewed time.Time
	term    uint64 // in which it was this node's; in another one it may be lost
	// had ends when the session is lost, or left to other nodes.
	had context.Context
	let context.CancelFunc
}

// copyOf is a session as this node has it, or had it: one that was lost may come back, as another copy.
type copyOf struct {
	session string
	adopted *adopted // nil: it began here
}

// continued is what another node needs to go on with a session.
type continued struct {
	SDK  mcp.ServerSessionState `json:"sdk"`
	URIs []string               `json:"uris,omitempty"` // that it is subscribed to
}

// adopted is a session that began at another node.
type adopted struct {
	transport *mcp.StreamableServerTransport
	session   *mcp.ServerSession
	user      string
	open      atomic.Int64 // requests
	used      atomic.Int64 // unix seconds
}

const (
	renewEvery  = time.Minute
	renewSlack  = 2 * time.Minute
	sweepEvery  = 10 * time.Second
	maxFollowed = 1000 // subscriptions that go along to another node
	// quietIntervals is how many intervals of comments a stream that another node serves may be silent for.
	// Two may pass between an event and the next comment (writer.keepAlive).
	quietIntervals = 3
)

func (d *Door) clusterID(session string) string { return d.o.Scope + " " + session }

// keep begins to keep a session, as this node has it. mu is held.
func (d *Door) keep(of copyOf, user string, state continued) {
	k := &kept{copyOf: of, user: user, state: state}
	k.had, k.let = context.WithCancel(d.leaving)
	d.kept[of.session] = k
}

// remember tells the other nodes of a session of this one, now and then, and after this node may have
// counted as gone. change, if not nil, changes what they know. It reports whether this node has the session.
func (d *Door) remember(ctx context.Context, session string, change func(k *kept)) bool {
	if d.o.Cluster == nil || session == "" {
		return true
	}
	if !d.here(session) {
		return false
	}
	term := d.o.Cluster.Term(context.WithoutCancel(ctx))
	d.mu.Lock()
	k := d.kept[session]
	if k == nil {
		d.mu.Unlock()
		return false
	}
	if change != nil {
		change(k)
	} else if k.term == term && time.Since(k.renewed) < renewEvery {
		d.mu.Unlock()
		return true
	}
	k.renewed = time.Now()
	state, err := json.Marshal(&k.state)
	user := k.user
	d.mu.Unlock()
	mine := false
	if err == nil {
		mine, err = d.o.Cluster.Keep(context.WithoutCancel(ctx), cluster.Session{ID: d.clusterID(session), User: user, State: state}, d.o.IdleTimeout+renewSlack)
	}
	if err != nil && !errors.Is(err, cluster.ErrAway) {
		d.o.Logger.LogAttrs(ctx, slog.LevelWarn, "a session is known to this node alone", slog.String("error", err.Error()))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.kept[session] != k: // it was lost meanwhile, and may have come back
		return d.kept[session] != nil
	case err != nil: // nobody can be asked: a node goes on with its own
		return true
	case mine:
		k.term = term
		return true
	}
	d.lose(k)
	d.o.Logger.LogAttrs(ctx, slog.LevelInfo, "another node has gone on with a session of this one, which counted as gone", slog.String("session", session))
	return false
}

// lose lets go of a session that another node has. mu is held.
func (d *Door) lose(k *kept) {
	delete(d.kept, k.session)
	if k.adopted != nil {
		delete(d.adopted, k.session)
	}
	d.lost[k.copyOf] = struct{}{}
	k.let()
}

// had is the context of a stream of a session: it ends when this node does not have that any more.
func (d *Door) had(session string) context.Context {
	d.mu.Lock()
	defer d.mu.Unlock()
	if k := d.kept[session]; k != nil {
		return k.had
	}
	ended, end := context.WithCancel(context.Background())
	end()
	return ended
}

// events are those of sessions of this node. Of one that it lost nothing is said any more that does not
// belong to a call, and nothing is forgotten.
type events struct {
	mcp.EventStore
	door    *Door
	adopted *adopted // whose they are; nil: of all that began here
}

// lost reports whether a copy of a session was lost.
func (e *events) lost(ctx context.Context, session string) bool {
	e.door.remember(ctx, session, nil)
	e.door.mu.Lock()
	defer e.door.mu.Unlock()
	_, lost := e.door.lost[copyOf{session, e.adopted}]
	return lost
}

// Append implements mcp.EventStore.
func (e *events) Append(ctx context.Context, session, stream string, data []byte) error {
	if stream == "" && e.lost(ctx, session) {
		return errors.New("another node has this session")
	}
	return e.EventStore.Append(ctx, session, stream, data)
}

// SessionClosed implements mcp.EventStore.
func (e *events) SessionClosed(ctx context.Context, session string) error {
	if e.lost(ctx, session) {
		return nil
	}
	return e.EventStore.SessionClosed(ctx, session)
}

// began is called when a session was agreed on.
func (d *Door) began(ctx context.Context, req *mcp.ServerRequest[*mcp.InitializeParams], result mcp.Result) {
	agreed, ok := result.(*mcp.InitializeResult)
	if !ok {
		return
	}
	session, user := req.Session, ""
	if req.Extra != nil && req.Extra.TokenInfo != nil {
		user = req.Extra.TokenInfo.UserID
	}
	state := continued{SDK: mcp.ServerSessionState{
		InitializeParams: session.InitializeParams(), InitializedParams: &mcp.InitializedParams{}, NegotiatedProtocolVersion: agreed.ProtocolVersion,
	}}
	d.mu.Lock()
	d.keep(copyOf{session: session.ID()}, user, state)
	d.mu.Unlock()
	d.remember(ctx, session.ID(), nil)
}

// lostHere reports whether a session that began here was lost.
func (d *Door) lostHere(session string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, lost := d.lost[copyOf{session: session}]
	return lost
}

// here reports whether this node has a session.
func (d *Door) here(session string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.kept[session] != nil
}

// elsewhere serves a request of a session that this node does not have, and reports whether it did:
// by the node that has it, or, from now on, by this one, which is then the caller's to do.
func (d *Door) elsewhere(w http.ResponseWriter, r *http.Request, session string, m *message, limit time.Duration) (done bool) {
	found, ok, err := d.o.Cluster.Find(r.Context(), d.clusterID(session))
	switch {
	case err != nil:
		d.o.Logger.LogAttrs(r.Context(), slog.LevelWarn, "it cannot be found out where a session is", slog.String("error", err.Error()))
		w.Header().Set("Retry-After", "1")
		refuse(w, &mcpwire.Failure{ID: m.id, Status: http.StatusServiceUnavailable, Code: -31503, Message: "it cannot be found out which node has this session; try again in a moment"})
		return true
	case !ok && d.lostHere(session): // which the SDK does not know
		refuse(w, &mcpwire.Failure{ID: m.id, Status: http.StatusNotFound, Code: codeOf(http.StatusNotFound), Message: "session not found"})
		return true
	case !ok:
		return false // the SDK says that there is none
	case found.Node.Name == "":
		return !d.adopt(w, r, session, found.Session.User, found.Session.State, m)
	}
	patience := cluster.Patience{Begin: limit, Quiet: quietIntervals * d.o.KeepAlive} // all nodes keep their streams alive in the same way
	d.o.Cluster.Forward(w, r, found.Node, session, mcpwire.PrincipalOf(r.Context()), patience, func(err error) { unanswered(w, m, err) })
	return true
}

// unanswered is what a client gets whose session's node does not answer. What a silent one was asked for
// may have been done.
func unanswered(w http.ResponseWriter, m *message, err error) {
	f := &mcpwire.Failure{ID: m.id, Status: http.StatusServiceUnavailable, Code: -31503, Message: "the node of this session does not answer; try again in a moment"}
	silent := errors.Is(err, cluster.ErrSilent)
	if silent {
		f.Status, f.Code = http.StatusGatewayTimeout, -31504
	}
	if silent && m.id != nil {
		f.Code, f.Data = -31520, jsontext.Value(`{"code":"outcome_unknown","retryable":false}`)
		f.Message = "the node of this session did not answer in time, and it is not known whether this was done; with an idempotency key it can be sent again, with the same one"
	} else {
		w.Header().Set("Retry-After", "3")
	}
	refuse(w, f)
}

// adopt goes on with a session whose node is gone.
func (d *Door) adopt(w http.ResponseWriter, r *http.Request, session, user string, state []byte, m *message) bool {
	var s continued
	err := json.Unmarshal(state, &s)
	if err != nil || d.current.Load().full(ownerOf(r)) != nil {
		w.Header().Set("Retry-After", "10")
		refuse(w, &mcpwire.Failure{ID: m.id, Status: http.StatusServiceUnavailable, Code: -31503, Message: "this node cannot go on with the session; try again later"})
		return false
	}
	d.adopting.Lock()
	defer d.adopting.Unlock()
	if d.here(session) { // another request was first
		return true
	}
	a := &adopted{user: user}
	a.transport = &mcp.StreamableServerTransport{SessionID: session, EventStore: &events{d.o.Events, d, a}}
	ctx := context.WithoutCancel(r.Context()) // the session outlives the request
	a.session, err = d.current.Load().server.Connect(ctx, a.transport, &mcp.ServerSessionOptions{State: &s.SDK})
	if err != nil {
		d.o.Logger.LogAttrs(ctx, slog.LevelWarn, "a session does not go on here", slog.String("error", err.Error()))
		refuse(w, &mcpwire.Failure{ID: m.id, Status: http.StatusNotFound, Code: -32600, Message: "session not found"})
		return false
	}
	d.own(session, ownerOf(r))
	a.used.Store(time.Now().Unix())
	for i, uri := range s.URIs {
		d.resubscribe(ctx, a, i, uri)
	}
	d.mu.Lock()
	d.adopted[session] = a
	d.keep(copyOf{session, a}, user, s)
	d.mu.Unlock()
	if !d.remember(ctx, session, nil) {
		w.Header().Set("Retry-After", "1")
		refuse(w, &mcpwire.Failure{ID: m.id, Status: http.StatusServiceUnavailable, Code: -31503, Message: "the session is going on at another node; try again in a moment"})
		return false
	}
	return true
}

// resubscribe has the SDK follow a resource again, as if the client asked for it.
func (d *Door) resubscribe(ctx context.Context, a *adopted, i int, uri string) {
	body, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": "newel-resubscribe-" + strconv.Itoa(i), "method": "resources/subscribe", "params": map[string]string{"uri": uri}})
	if err != nil {
		return // text can be encoded
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "/", bytes.NewReader(body))
	if err != nil {
		return // the address is constant
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Accept", "application/json, text/event-stream")
	a.transport.ServeHTTP(&nowhere{}, r)
}

// nowhere is a response that nobody reads.
type nowhere struct{ h http.Header }

// Header implements http.ResponseWriter.
func (n *nowhere) Header() http.Header {
	if n.h == nil {
		n.h = http.Header{}
	}
	return n.h
}

// Write implements http.ResponseWriter.
func (*nowhere) Write(b []byte) (int, error) { return len(b), nil }

// WriteHeader implements http.ResponseWriter.
func (*nowhere) WriteHeader(int) {}

// Flush implements http.Flusher.
func (*nowhere) Flush() {}

// serveAdopted serves requests of sessions that began at another node, and leaves all others to next:
// the SDK's handler knows only those that began with it.
func (d *Door) serveAdopted(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		d.mu.Lock()
		a := d.adopted[r.Header.Get("Mcp-Session-Id")]
		if a != nil {
			a.open.Add(1)
			a.used.Store(time.Now().Unix())
		}
		d.mu.Unlock()
		if a == nil {
			next.ServeHTTP(w, r)
			return
		}
		defer a.open.Add(-1)
		if info := auth.TokenInfoFromContext(r.Context()); a.user != "" && (info == nil || info.UserID != a.user) {
			http.Error(w, "session user mismatch", http.StatusForbidden)
			return
		}
		if r.Method == http.MethodDelete {
			if err := a.session.Close(); err != nil {
				d.o.Logger.LogAttrs(r.Context(), slog.LevelDebug, "a session did not close cleanly", slog.String("error", err.Error()))
			}
			w.WriteHeader(http.StatusNoContent)
			return
		}
		a.transport.ServeHTTP(w, r)
	})
}

// sweep ends adopted sessions that nobody uses, forgets sessions that ended, and finds out which were lost.
func (d *Door) sweep(ctx context.Context) {
	began := time.Now()
	d.mu.Lock()
	had := slices.Collect(maps.Values(d.kept)) // before it is asked which are alive: more may begin
	d.mu.Unlock()
	ids, alive := map[string]bool{}, map[*mcp.ServerSession]bool{}
	for _, server := range d.all() {
		for s := range server.Sessions() {
			ids[s.ID()], alive[s] = true, true
		}
	}
	lives := func(c copyOf) bool {
		return c.adopted == nil && ids[c.session] || c.adopted != nil && alive[c.adopted.session]
	}
	oldest, term := began.Add(-d.o.IdleTimeout).Unix(), d.o.Cluster.Term(ctx)
	var idle []io.Closer
	var ended, unsure []string
	d.mu.Lock()
	adopted := slices.Collect(maps.Values(d.adopted))
	for c := range d.lost {
		if !lives(c) {
			delete(d.lost, c)
		} else if c.adopted != nil {
			adopted = append(adopted, c.adopted)
		}
	}
	for _, a := range adopted {
		if a.open.Load() == 0 && a.used.Load() < oldest {
			idle = append(idle, a.session)
		}
	}
	for _, k := range had {
		switch {
		case d.kept[k.session] != k: // it was lost meanwhile
		case !lives(k.copyOf):
			delete(d.kept, k.session)
			delete(d.adopted, k.session)
			k.let()
			ended = append(ended, k.session)
		case k.term != term:
			unsure = append(unsure, k.session)
		}
	}
	d.mu.Unlock()
	for _, s := range idle {
		_ = s.Close() // the next sweep forgets it
	}
	for _, id := range ended {
		if err := d.o.Cluster.Forget(ctx, d.clusterID(id)); err != nil {
			d.o.Logger.LogAttrs(ctx, slog.LevelDebug, "a session that ended is forgotten later", slog.String("error", err.Error()))
		}
	}
	for _, id := range unsure {
		if ctx.Err() != nil || time.Since(began) > sweepEvery {
			return // the next sweep goes on
		}
		d.remember(ctx, id, nil)
	}
}
