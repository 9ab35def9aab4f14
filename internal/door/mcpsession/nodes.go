package mcpsession

import (
	"bytes"
	"context"
	"encoding/json" // the SDK's types speak encoding/json
	"errors"
	"io"
	"log/slog"
	"net/http"
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

// kept is a session of this node, as the other nodes know it.
type kept struct {
	user    string
	state   continued
	renewed time.Time
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

// remember tells the other nodes of a session of this one. change, if not nil, changes what they know.
func (d *Door) remember(ctx context.Context, session string, change func(k *kept)) {
	if d.o.Cluster == nil || session == "" {
		return
	}
	d.mu.Lock()
	k := d.kept[session]
	if k == nil {
		k = &kept{}
		d.kept[session] = k
	}
	if change != nil {
		change(k)
	} else if time.Since(k.renewed) < renewEvery {
		d.mu.Unlock()
		return
	}
	k.renewed = time.Now()
	state, err := json.Marshal(&k.state)
	user := k.user
	d.mu.Unlock()
	if err == nil {
		err = d.o.Cluster.Keep(context.WithoutCancel(ctx), cluster.Session{ID: d.clusterID(session), User: user, State: state}, d.o.IdleTimeout+renewSlack)
	}
	if err != nil {
		d.o.Logger.LogAttrs(ctx, slog.LevelWarn, "a session is known to this node alone", slog.String("error", err.Error()))
	}
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
	d.remember(ctx, session.ID(), func(k *kept) {
		k.user = user
		k.state.SDK = mcp.ServerSessionState{
			InitializeParams: session.InitializeParams(), InitializedParams: &mcp.InitializedParams{}, NegotiatedProtocolVersion: agreed.ProtocolVersion, LogLevel: k.state.SDK.LogLevel,
		}
	})
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
	if err := json.Unmarshal(state, &s); err != nil || d.current.Load().full(ownerOf(r)) != nil {
		w.Header().Set("Retry-After", "10")
		refuse(w, &mcpwire.Failure{ID: m.id, Status: http.StatusServiceUnavailable, Code: -31503, Message: "this node cannot go on with the session; try again later"})
		return false
	}
	d.adopting.Lock()
	defer d.adopting.Unlock()
	if d.here(session) { // another request was first
		return true
	}
	transport := &mcp.StreamableServerTransport{SessionID: session, EventStore: d.o.Events}
	ctx := context.WithoutCancel(r.Context()) // the session outlives the request
	ss, err := d.current.Load().server.Connect(ctx, transport, &mcp.ServerSessionOptions{State: &s.SDK})
	if err != nil {
		d.o.Logger.LogAttrs(ctx, slog.LevelWarn, "a session does not go on here", slog.String("error", err.Error()))
		refuse(w, &mcpwire.Failure{ID: m.id, Status: http.StatusNotFound, Code: -32600, Message: "session not found"})
		return false
	}
	d.own(session, ownerOf(r))
	a := &adopted{transport: transport, session: ss, user: user}
	a.used.Store(time.Now().Unix())
	for i, uri := range s.URIs {
		d.resubscribe(ctx, a, i, uri)
	}
	d.mu.Lock()
	d.adopted[session] = a
	d.kept[session] = &kept{user: user, state: s}
	d.mu.Unlock()
	d.remember(ctx, session, func(*kept) {})
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

// sweep ends adopted sessions that nobody uses, and forgets sessions that ended.
func (d *Door) sweep(ctx context.Context) {
	alive := map[string]bool{}
	for _, server := range d.all() {
		for s := range server.Sessions() {
			alive[s.ID()] = true
		}
	}
	oldest := time.Now().Add(-d.o.IdleTimeout).Unix()
	var idle []io.Closer
	var ended []string
	d.mu.Lock()
	for id, a := range d.adopted {
		if a.open.Load() == 0 && a.used.Load() < oldest {
			idle = append(idle, a.session)
		}
		if !alive[id] {
			delete(d.adopted, id)
		}
	}
	for id := range d.kept {
		if !alive[id] {
			delete(d.kept, id)
			ended = append(ended, id)
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
}
