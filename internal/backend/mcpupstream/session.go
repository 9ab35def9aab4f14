package mcpupstream

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// A link carries messages to one server, in one way.
type link interface {
	// exchange sends a request and returns its answer. What arrives for it meanwhile goes to on,
	// on the calling goroutine. When ctx ends it tells the server and returns.
	exchange(ctx context.Context, r *request, on func(*message)) (*message, error)
	// send sends a notification, or the answer to a request of the server.
	send(ctx context.Context, body []byte) error
	// alive reports whether the link can still be used.
	alive() bool
	close(ctx context.Context)
}

// A session is one conversation with a server: after initialize in the session revisions, none at
// all (only ids) in the stateless one. It is safe for concurrent use.
type session struct {
	link      link
	stateless bool
	revision  string
	server    features
	ids       *atomic.Int64
	lastUsed  atomic.Int64 // unix nanoseconds
	users     atomic.Int64 // calls on it now
	broken    atomic.Bool
}

// features is what a server says it has.
type features struct {
	Tools       *listFeature `json:"tools"`
	Resources   *listFeature `json:"resources"`
	Prompts     *listFeature `json:"prompts"`
	Completions *struct{}    `json:"completions"`
	Extensions  struct {
		Tasks *struct{} `json:"io.modelcontextprotocol/tasks"`
	} `json:"extensions"`
	Logging *struct{} `json:"logging"`
}

type listFeature struct {
	ListChanged bool `json:"listChanged"`
	Subscribe   bool `json:"subscribe"`
}

func unmarshal(v jsontext.Value, into any) error { return json.Unmarshal(v, into) }

func (s *session) usable() bool { return !s.broken.Load() && s.link.alive() }

// request sends one request. build makes its params; the token of progress is its id.
func (s *session) request(ctx context.Context, r *request, on func(*message)) (*message, error) {
	s.users.Add(1)
	defer func() {
		s.users.Add(-1)
		s.lastUsed.Store(time.Now().UnixNano())
	}()
	m, err := s.link.exchange(ctx, r, func(m *message) {
		if m.Method == "ping" && m.ID != nil {
			s.respond(ctx, m.ID, jsontext.Value("{}"), nil)
			return
		}
		on(m)
	})
	if err != nil && s.gone(err) {
		s.broken.Store(true) // the session is gone (2025-11-25, session management), or the process
	}
	return m, err
}

// gone reports whether an error says that the session is.
func (s *session) gone(err error) bool {
	var status *statusError
	return errors.As(err, &status) && status.status == http.StatusNotFound || errors.Is(err, errCut) && !s.link.alive()
}

// respond answers a request of the server.
func (s *session) respond(ctx context.Context, id, result jsontext.Value, failure *rpcError) {
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), cancelTimeout)
	defer stop()
	b := append([]byte(`{"jsonrpc":"2.0","id":`), id...)
	if failure != nil {
		b = fmt.Appendf(b, `,"error":{"code":%d,"message":`, failure.Code)
		b = append(call.AppendString(b, failure.Message), "}}"...)
	} else {
		b = append(append(append(b, `,"result":`...), result...), '}')
	}
	_ = s.link.send(ctx, b) // if it does not arrive, the call it belongs to fails by itself
}

// statelessHTTP is a link of the stateless revision: every request stands for itself.
type statelessHTTP struct{ *endpoint }

// exchange implements link. Going away cancels.
func (l statelessHTTP) exchange(ctx context.Context, r *request, on func(*message)) (*message, error) {
	h := l.headers()
	h["Mcp-Protocol-Version"] = revisionHeader
	mirrored := [...]string{r.method, headerValue(r.name)}
	h["Mcp-Method"] = mirrored[:1:1]
	if r.name != "" {
		h["Mcp-Name"] = mirrored[1:]
	}
	for _, p := range r.headers {
		h[http.CanonicalHeaderKey("Mcp-Param-"+p[0])] = []string{p[1]}
	}
	m, _, _, err := l.post(ctx, h, r.append(make([]byte, 0, len(r.params)+128)), r.id, on)
	return m, err
}

var revisionHeader = []string{statelessRevision}

func (l statelessHTTP) send(context.Context, []byte) error { return nil } // the revision has none over HTTP
func (l statelessHTTP) alive() bool                        { return true }
func (l statelessHTTP) close(context.Context)              {}

// sessionHTTP is a link of the session revisions.
type sessionHTTP struct {
	*endpoint
	id       string // Mcp-Session-Id, or "" if the server keeps none
	revision string // "" until negotiated
}

func (l *sessionHTTP) head() http.Header {
	h := l.headers()
	if l.id != "" {
		h["Mcp-Session-Id"] = []string{l.id}
	}
	if l.revision != "" {
		h["Mcp-Protocol-Version"] = []string{l.revision}
	}
	return h
}

// maxResumes bounds how often one answer is taken up again without an event in between.
const maxResumes = 5

// exchange implements link. A stream that ends before the answer is taken up where it ended.
func (l *sessionHTTP) exchange(ctx context.Context, r *request, on func(*message)) (*message, error) {
	m, _, s, err := l.post(ctx, l.head(), r.append(nil), r.id, on)
	last, delay := "", time.Second
	for tries := 0; errors.Is(err, errCut) && s != nil && ctx.Err() == nil && tries < maxResumes; tries++ {
		if s.some {
			last, tries = s.lastID, 0
		}
		if last == "" {
			break // nothing to take up: what became of the call is not known
		}
		if s.retry > 0 {
			delay = s.retry
		}
		if err = wait(ctx, delay); err == nil {
			m, s, err = l.get(ctx, l.head(), last, r.id, on)
		}
	}
	if ctx.Err() != nil {
		end, stop := context.WithTimeout(context.WithoutCancel(ctx), cancelTimeout)
		defer stop()
		_ = l.send(end, cancelled(r.id)) // it may be gone: then there is nothing to cancel
		return nil, ctx.Err()
	}
	return m, err
}

// send implements link.
func (l *sessionHTTP) send(ctx context.Context, body []byte) error {
	_, _, _, err := l.post(ctx, l.head(), body, 0, func(*message) {})
	return err
}

func (l *sessionHTTP) alive() bool { return true }

// close ends the session at the server, which may not support that.
func (l *sessionHTTP) close(ctx context.Context) {
	if l.id == "" {
		return
	}
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), cancelTimeout)
	defer stop()
	if resp, err := l.do(ctx, http.MethodDelete, l.head(), nil); err == nil {
		resp.Body.Close()
	}
}

// initialize begins a session on a link (2025-11-25, basic/lifecycle). A server that answers with
// an older revision is taken at its word.
func (u *Upstream) initialize(ctx context.Context, l link, caps jsontext.Value) (*session, error) {
	s := &session{link: l, ids: new(atomic.Int64)}
	p := newObject()
	p.str("protocolVersion", sessionRevision)
	p.raw("capabilities", caps)
	p.raw("clientInfo", u.clientInfo)
	h, overHTTP := l.(*sessionHTTP)
	r := &request{id: s.ids.Add(1), method: "initialize", params: p.end()}
	var m *message
	var err error
	if overHTTP {
		var header http.Header
		m, header, _, err = h.post(ctx, h.head(), r.append(nil), r.id, func(*message) {})
		if err == nil {
			h.id = header.Get("Mcp-Session-Id")
		}
	} else {
		m, err = l.exchange(ctx, r, func(*message) {})
	}
	if err != nil {
		return nil, err
	}
	if m.Error != nil {
		return nil, m.Error
	}
	var said struct {
		Revision     string   `json:"protocolVersion"`
		Capabilities features `json:"capabilities"`
	}
	if err := unmarshal(m.Result.Unknown, &said); err != nil {
		return nil, fmt.Errorf("%w: initialize: %w", errGarbage, err)
	}
	if !slices.Contains([]string{sessionRevision, "2025-06-18", "2025-03-26", "2024-11-05"}, said.Revision) {
		return nil, fmt.Errorf("the server speaks revision %.40q, which the gateway does not", said.Revision)
	}
	s.revision, s.server = said.Revision, said.Capabilities
	if overHTTP {
		h.revision = said.Revision
	}
	if err := l.send(ctx, []byte(`{"jsonrpc":"2.0","method":"notifications/initialized"}`)); err != nil || s.server.Logging == nil {
		return s, err
	}
	// Levels belong to sessions, and callers share this one: it says all, and each caller's own
	// door leaves out what that caller did not ask for. A server that refuses stays as it is.
	_, err = s.request(ctx, &request{id: s.ids.Add(1), method: "logging/setLevel", params: jsontext.Value(`{"level":"debug"}`)}, u.heard)
	return s, err
}

// discover asks a server of the stateless revision what it has. era is false if the answer says
// that the server is of a session revision, or nothing anybody of the stateless one would say.
func (u *Upstream) discover(ctx context.Context, l link) (s *session, era bool, err error) {
	s = &session{link: l, stateless: true, revision: statelessRevision, ids: &u.ids}
	p := newObject()
	p.raw("_meta", u.meta(nil, noCapabilities, 0))
	m, err := l.exchange(ctx, &request{id: s.ids.Add(1), method: "server/discover", params: p.end()}, func(*message) {})
	var status *statusError
	switch {
	case errors.As(err, &status):
		return nil, status.status == http.StatusUnauthorized || status.status == http.StatusForbidden || status.status == http.StatusTooManyRequests || status.status >= 500, err
	case errors.Is(err, errGarbage):
		return nil, false, err
	case err != nil:
		return nil, true, err
	case m.Error != nil:
		return nil, slices.Contains([]int{-32020, -32021}, m.Error.Code), m.Error
	}
	var said struct {
		Revisions    []string `json:"supportedVersions"`
		Capabilities features `json:"capabilities"`
	}
	if unmarshal(m.Result.Unknown, &said) != nil || !slices.Contains(said.Revisions, statelessRevision) {
		return nil, false, fmt.Errorf("%w: server/discover names no revision %s", errGarbage, statelessRevision)
	}
	s.server = said.Capabilities
	return s, true, nil
}

var noCapabilities = jsontext.Value("{}")

// open begins a conversation that may ask for what caps says.
func (u *Upstream) open(ctx context.Context, caps jsontext.Value) (*session, error) {
	ctx, stop := context.WithTimeout(ctx, u.config.StartTimeout)
	defer stop()
	era := u.era.Load()
	if era == nil && u.config.Transport == "sse" {
		session := sessionRevision
		era = &session // the stateless revision has no HTTP+SSE
	}
	if era == nil && u.config.Revision != "auto" {
		era = &u.config.Revision
	}
	if !u.single() {
		if era == nil || *era == statelessRevision {
			s, known, err := u.discover(ctx, statelessHTTP{u.endpoint})
			if err == nil || known || era != nil {
				return u.settle(s, err)
			}
		}
		return u.settle(u.initialize(ctx, &sessionHTTP{endpoint: u.endpoint}, caps))
	}
	l, err := u.start(ctx)
	if err != nil {
		return nil, err
	}
	var s *session
	if era == nil || *era == statelessRevision {
		// A server of a session revision may answer, ignore it, or end.
		probe, stop := context.WithTimeout(ctx, min(u.config.StartTimeout/2, 10*time.Second))
		s, _, err = u.discover(probe, l)
		stop()
		if err != nil && era == nil {
			if !l.alive() {
				if l, err = u.start(ctx); err != nil {
					return nil, err
				}
			}
			s, err = u.initialize(ctx, l, caps)
		}
	} else {
		s, err = u.initialize(ctx, l, caps)
	}
	if err != nil {
		l.close(ctx)
	}
	return u.settle(s, err)
}

// settle remembers the era that worked, and forgets it when it does not any more.
func (u *Upstream) settle(s *session, err error) (*session, error) {
	if err != nil {
		u.era.Store(nil)
		return nil, err
	}
	era := sessionRevision
	if s.stateless {
		era = statelessRevision
	}
	u.era.Store(&era)
	s.lastUsed.Store(time.Now().UnixNano())
	return s, nil
}

// pool keeps the sessions of one upstream: shared ones by whom they serve and what may be asked
// there, and for processes that may ask, ones that a call has for itself.
type pool struct {
	mu     sync.Mutex
	shared map[string]*slot
	free   map[string][]*session
	all    map[*session]struct{}
}

// slot is a shared session that is there or on its way.
type slot struct {
	ready chan struct{}
	s     *session
	err   error
}

// lease returns a session for a call and how to give it back.
func (u *Upstream) lease(ctx context.Context, c *call.Call) (*session, func(), error) {
	if s := u.stateless.Load(); s != nil && s.usable() {
		return s, func() {}, nil // every request stands for itself
	}
	caps := noCapabilities
	if c != nil {
		caps = capabilitiesOf(&c.Client)
	}
	key := string(caps)
	if c != nil && c.Principal != nil && u.config.PerUser {
		key = c.Principal.Tenant + "\x00" + c.Principal.ID + "\x00" + key
	}
	if u.single() && string(caps) != string(noCapabilities) {
		return u.exclusive(ctx, key, caps)
	}
	s, err := u.sharedSession(ctx, key, caps)
	return s, func() {}, err
}

// sharedSession returns the shared session of a key, opening it once for all who wait.
func (u *Upstream) sharedSession(ctx context.Context, key string, caps jsontext.Value) (*session, error) {
	p := &u.pool
	p.mu.Lock()
	at := p.shared[key]
	if at != nil && at.s != nil && !at.s.usable() {
		delete(p.all, at.s)
		at = nil
	}
	if at == nil {
		at = &slot{ready: make(chan struct{})}
		p.shared[key] = at
		go func() { // who waits may go away: the others still need it
			s, err := u.open(u.life, caps)
			p.mu.Lock()
			at.s, at.err = s, err
			if err != nil {
				delete(p.shared, key)
			} else {
				p.all[s] = struct{}{}
				if s.stateless {
					u.stateless.Store(s)
				}
			}
			p.mu.Unlock()
			close(at.ready)
		}()
	}
	p.mu.Unlock()
	select {
	case <-at.ready:
		return at.s, at.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// exclusive returns a session that nobody else uses until it is given back: what such a server
// asks does not say which call it is for.
func (u *Upstream) exclusive(ctx context.Context, key string, caps jsontext.Value) (*session, func(), error) {
	p := &u.pool
	p.mu.Lock()
	for len(p.free[key]) > 0 {
		last := len(p.free[key]) - 1
		s := p.free[key][last]
		p.free[key] = p.free[key][:last]
		if s.usable() {
			p.mu.Unlock()
			return s, func() { u.giveBack(key, s) }, nil
		}
		delete(p.all, s)
	}
	for other, list := range p.free { // make room: sessions of other keys that nobody uses
		if other != key && len(list) > 0 {
			s := list[len(list)-1]
			p.free[other] = list[:len(list)-1]
			delete(p.all, s)
			defer s.link.close(u.life)
			break
		}
	}
	p.mu.Unlock()
	if u.full() {
		if u.parked.evict() {
			return u.exclusive(ctx, key, caps) // the session that was freed may be of this very key
		}
		if u.processes == nil { // a supervisor waits for a free place
			return nil, nil, call.Errorf(call.Exhausted, "the server %q behind this has as many streams as it may have; try again in a moment", u.name)
		}
	}
	s, err := u.open(ctx, caps)
	if err != nil {
		return nil, nil, err
	}
	if s.stateless {
		u.stateless.Store(s)
		p.mu.Lock()
		p.all[s] = struct{}{}
		p.mu.Unlock()
		return s, func() {}, nil
	}
	p.mu.Lock()
	p.all[s] = struct{}{}
	p.mu.Unlock()
	return s, func() { u.giveBack(key, s) }, nil
}

func (u *Upstream) giveBack(key string, s *session) {
	p := &u.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.usable() {
		p.free[key] = append(p.free[key], s)
	} else {
		delete(p.all, s)
	}
}

// expire closes sessions that nobody used for a while.
func (u *Upstream) expire(now time.Time) {
	old := func(s *session) bool {
		return s.users.Load() == 0 && now.Sub(time.Unix(0, s.lastUsed.Load())) > u.config.IdleTimeout || !s.usable()
	}
	var closing []*session
	p := &u.pool
	p.mu.Lock()
	for key, at := range p.shared {
		if at.s != nil && old(at.s) && !at.s.stateless {
			delete(p.shared, key)
			delete(p.all, at.s)
			closing = append(closing, at.s)
		}
	}
	for key, list := range p.free {
		p.free[key] = slices.DeleteFunc(list, func(s *session) bool {
			if !old(s) {
				return false
			}
			delete(p.all, s)
			closing = append(closing, s)
			return true
		})
		if len(p.free[key]) == 0 {
			delete(p.free, key)
		}
	}
	p.mu.Unlock()
	for _, s := range closing {
		s.link.close(u.life)
	}
}

// closeAll ends every session.
func (u *Upstream) closeAll(ctx context.Context) {
	p := &u.pool
	p.mu.Lock()
	var closing []*session
	for s := range p.all {
		closing = append(closing, s)
	}
	clear(p.all)
	clear(p.shared)
	clear(p.free)
	p.mu.Unlock()
	u.stateless.Store(nil)
	var done sync.WaitGroup
	for _, s := range closing {
		done.Go(func() { s.link.close(ctx) })
	}
	done.Wait()
}
