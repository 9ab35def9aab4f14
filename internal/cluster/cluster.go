// Package cluster lets nodes that stand behind one address share sessions: a request goes to the node
// that has its session, and a session whose node is gone goes on at another.
//
// Start reading at [Cluster.Find]. A [Store] remembers who has what; nodes that are alive say so every
// two seconds. A request that is passed on carries who sent it, sealed with a key that all nodes
// share, so that nobody else can say so: a proof that came with it is good for one time only.
//
// A node that was stopped, and counted as gone meanwhile, is in another [Cluster.Term] when it goes on:
// it asks whose its sessions are before it uses them.
//
// Fails: while the store is away a node serves its own sessions, and says of others that it cannot
// tell. It keeps nothing durable.
package cluster

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/call"
)

// A Node is one process.
type Node struct {
	Name    string
	Address string // at which other nodes reach it, such as http://10.0.3.7:8080
}

// A Session is what is known of a session wherever its node is.
type Session struct {
	ID    string
	Owner string // name of the node that has it
	User  string // whose it is
	State []byte // what another node needs to go on with it
}

// A Store remembers nodes and sessions for all nodes. It is safe for concurrent use.
type Store interface {
	// Alive says that a node is there, for ttl.
	Alive(ctx context.Context, n Node, ttl time.Duration) error
	// Gone says that a node is not there any more.
	Gone(ctx context.Context, name string) error
	// Keep writes a session of its owner, for ttl. It changes nothing if another node has it by now; then
	// mine is false.
	Keep(ctx context.Context, s Session, ttl time.Duration) (mine bool, err error)
	// Find returns a session and its node; the node has no name if it is gone. ok is false if there is
	// no such session.
	Find(ctx context.Context, id string) (s Session, n Node, ok bool, err error)
	// TakeOver makes to the owner of a session, if from still is and is gone.
	TakeOver(ctx context.Context, id, from, to string) (bool, error)
	// Forget ends a session of owner. It changes nothing if another node has it by now.
	Forget(ctx context.Context, id, owner string) error
}

// Options configure a Cluster. All but Logger are required.
type Options struct {
	Address   string // of this node, for the others
	Key       []byte // 32 bytes that all nodes share
	Store     Store
	Transport http.RoundTripper // to other nodes
	Logger    *slog.Logger
}

// Times.
const (
	beat      = 2 * time.Second
	aliveFor  = 7 * time.Second
	forwardIn = 10 * time.Second // a request that is passed on arrives within this time
	storeTime = time.Second      // of one question to the store
)

// A Cluster is this node's view of all. It is safe for concurrent use.
type Cluster struct {
	o    Options
	node Node

	mu    sync.Mutex // guards what is below
	term  uint64
	held  bool      // nobody else takes sessions of this node
	until time.Time // while that lasts, without another word to the store
	tried time.Time // to say so again after it was over
	gone  bool      // it was said that this node is not there any more
	away  time.Time // it failed: until then it is not asked to keep anything
}

// New checks the options.
func New(o Options) (*Cluster, error) {
	u, err := url.Parse(o.Address)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.User != nil || u.RawQuery != "" {
		return nil, fmt.Errorf("%q is not an address at which other nodes reach this one, such as http://10.0.3.7:8080", o.Address)
	}
	if len(o.Key) != 32 || o.Store == nil || o.Transport == nil {
		return nil, errors.New("cluster: Key, Store and Transport are required")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Cluster{o: o, node: Node{Name: rand.Text(), Address: u.Scheme + "://" + u.Host}}, nil
}

// Run says that this node is there until ctx ends, and then that it is gone: others may take its
// sessions at once.
func (c *Cluster) Run(ctx context.Context) error {
	tick := time.NewTicker(beat)
	defer tick.Stop()
	for {
		c.alive(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			c.mu.Lock()
			c.gone = true
			c.mu.Unlock()
			limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTime)
			defer cancel()
			if err := c.o.Store.Gone(limited, c.node.Name); err != nil {
				c.o.Logger.LogAttrs(limited, slog.LevelWarn, "the other nodes are not told that this one ends; they notice", slog.String("error", err.Error()))
			}
			return nil
		}
	}
}

func (c *Cluster) alive(ctx context.Context) {
	if err := c.Start(ctx); err != nil && ctx.Err() == nil {
		c.o.Logger.LogAttrs(ctx, slog.LevelWarn, "the other nodes cannot be told that this one is there", slog.String("error", err.Error()))
	}
}

// Start says that this node is there, once, before it has sessions.
func (c *Cluster) Start(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	said := time.Now()
	if err := c.o.Store.Alive(limited, c.node, aliveFor); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.look()
	if !c.held {
		c.term++
	}
	c.held, c.until = true, said.Add(aliveFor)
	return nil
}

// Term returns a number that is another one after this node may have counted as gone, as one does that was
// stopped for a while: what it had before may be another node's by now, and [Cluster.Keep] says so. It
// says first that this node is there again, so that what Keep says then lasts.
func (c *Cluster) Term(ctx context.Context) uint64 {
	c.mu.Lock()
	c.look()
	again := !c.held && !c.gone && time.Since(c.tried) > storeTime // in vain once a second
	if again {
		c.tried = time.Now()
	}
	c.mu.Unlock()
	if again {
		c.alive(ctx)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gone {
		c.term++ // anything may be taken at any time
	}
	return c.term
}

// look finds out whether the time is over. It is over by either clock: a machine that sleeps may stop the
// one, and the other one may be set. mu is held.
func (c *Cluster) look() {
	if now := time.Now(); c.held && (now.After(c.until) || now.Round(0).After(c.until.Round(0))) {
		c.held = false
		c.term++
	}
}

// ErrAway says that the store has just failed, and was not asked.
var ErrAway = errors.New("the store has just failed")

// Keep writes a session of this node, for ttl. mine is false if another node has it by now. After the store
// failed it is asked again once a second, for one session: there are many. For all others it is [ErrAway]
// until it answers.
func (c *Cluster) Keep(ctx context.Context, s Session, ttl time.Duration) (mine bool, err error) {
	c.mu.Lock()
	now := time.Now()
	away := now.Before(c.away)
	if !away && !c.away.IsZero() {
		c.away = now.Add(2 * storeTime) // this one asks
	}
	c.mu.Unlock()
	if away {
		return false, ErrAway
	}
	s.Owner = c.node.Name
	limited, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	mine, err = c.o.Store.Keep(limited, s, ttl)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.away = time.Time{}
	if err != nil {
		c.away = time.Now().Add(storeTime)
	}
	return mine, err
}

// Forget ends a session of this node.
func (c *Cluster) Forget(ctx context.Context, id string) error {
	limited, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	return c.o.Store.Forget(limited, id, c.node.Name)
}

// Found is where a session is.
type Found struct {
	Session Session
	Node    Node // another one that has it; no name: this one has it now
}

// Find returns where a session is that this node does not have. One whose node is gone is this node's
// from now on. found is false if there is no such session.
func (c *Cluster) Find(ctx context.Context, id string) (f Found, found bool, err error) {
	limited, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	for range 3 { // another node may take it between two steps
		s, n, ok, err := c.o.Store.Find(limited, id)
		switch {
		case err != nil:
			return Found{}, false, err
		case !ok:
			return Found{}, false, nil
		case s.Owner == c.node.Name:
			return Found{Session: s}, true, nil
		case n.Name != "":
			return Found{Session: s, Node: n}, true, nil
		}
		if ok, err = c.o.Store.TakeOver(limited, id, s.Owner, c.node.Name); err != nil {
			return Found{}, false, err
		}
		if ok {
			return Found{Session: s}, true, nil
		}
	}
	return Found{}, false, errors.New("the session changes its node too often")
}

// header carries who sent a request that is passed on.
const header = "X-Newel-Forward"

// passed is who sent a request, and where it may go.
type passed struct {
	Principal *call.Principal `json:"p"`
	To        string          `json:"t"` // name of the node
	Session   string          `json:"s"`
	Method    string          `json:"m"`
	Until     int64           `json:"u"` // unix milliseconds
}

// ErrSilent says that a node took a request and did not begin to answer: it may have done what was
// asked for.
var ErrSilent = errors.New("it did not begin to answer in time")

// errFroze is why an answer that had begun is given up.
var errFroze = errors.New("it says nothing any more")

// Patience is how long another node may say nothing.
type Patience struct {
	Begin time.Duration // until its answer begins, from when it is asked
	Quiet time.Duration // while that goes on: an event stream has to give signs of life more often
}

// Forward passes a request on to another node and its answer back. failed answers the request when
// that does not begin in time, with [ErrSilent], or when the node cannot be reached. An answer that has
// begun may go on for as long as it likes. When nothing comes of it any more it ends here as if the
// node had died: the connection breaks before the end of the answer, so that the client knows that there
// is more to it, and Forward panics with [http.ErrAbortHandler].
func (c *Cluster) Forward(w http.ResponseWriter, r *http.Request, to Node, session string, who *call.Principal, p Patience, failed func(err error)) {
	target, err := url.Parse(to.Address)
	if err != nil {
		failed(err)
		return
	}
	token, err := c.seal(passed{Principal: who, To: to.Name, Session: session, Method: r.Method, Until: time.Now().Add(forwardIn).UnixMilli()})
	if err != nil {
		failed(err)
		return
	}
	// Not the transport's own bound, which begins when all is sent: a node that reads nothing is silent too.
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	silent := time.AfterFunc(p.Begin, func() { cancel(ErrSilent) })
	defer silent.Stop()
	proxy := &httputil.ReverseProxy{
		Transport: c.o.Transport, FlushInterval: -1,
		ErrorLog: slog.NewLogLogger(c.o.Logger.Handler(), slog.LevelDebug),
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.SetURL(target)
			pr.Out.Host = pr.In.Host // the name that the client used: the other node checks it too
			pr.Out.Header.Set(header, token)
		},
		ModifyResponse: func(resp *http.Response) error {
			if !silent.Stop() {
				return ErrSilent
			}
			resp.Body = watch(resp.Body, p.Quiet, func() {
				c.o.Logger.LogAttrs(r.Context(), slog.LevelWarn, "a session's node says nothing any more, and its answer is given up", slog.String("node", to.Address), slog.Duration("silence", p.Quiet))
				cancel(errFroze)
			})
			return nil
		},
		ErrorHandler: func(_ http.ResponseWriter, _ *http.Request, err error) {
			if errors.Is(context.Cause(ctx), ErrSilent) {
				err = ErrSilent // not what the transport makes of it
			}
			c.o.Logger.LogAttrs(r.Context(), slog.LevelWarn, "a session's node does not answer", slog.String("node", to.Address), slog.String("error", err.Error()))
			failed(err)
		},
	}
	proxy.ServeHTTP(w, r.WithContext(ctx))
}

// watched is an answer of which something has to come now and then. No goroutine waits for that: there
// are many streams. While the client takes what came before, the node owes nothing.
type watched struct {
	io.ReadCloser
	quiet time.Duration
	froze *time.Timer // runs while something is waited for
}

func watch(answer io.ReadCloser, quiet time.Duration, froze func()) *watched {
	return &watched{answer, quiet, time.AfterFunc(math.MaxInt64, froze)}
}

// Read implements io.Reader.
func (w *watched) Read(b []byte) (int, error) {
	w.froze.Reset(w.quiet)
	defer w.froze.Stop()
	return w.ReadCloser.Read(b)
}

// Accept returns who sent a request that another node passed on; ok is false if none did. It fails if
// somebody else says so.
func (c *Cluster) Accept(r *http.Request) (who *call.Principal, ok bool, err error) {
	given := r.Header[header]
	if len(given) == 0 {
		return nil, false, nil
	}
	r.Header.Del(header)
	p, err := c.open(given)
	switch {
	case err != nil:
		return nil, false, err
	case p.To != c.node.Name || p.Session != r.Header.Get("Mcp-Session-Id") || p.Method != r.Method:
		return nil, false, errors.New("it was meant for something else")
	case time.Now().UnixMilli() > p.Until:
		return nil, false, errors.New("it is too old; the clocks of nodes must agree within seconds")
	}
	return p.Principal, true, nil
}

func (c *Cluster) seal(p passed) (string, error) {
	b, err := json.Marshal(p)
	if err != nil {
		return "", err
	}
	return base64.RawURLEncoding.EncodeToString(b) + "." + base64.RawURLEncoding.EncodeToString(c.sum(b)), nil
}

func (c *Cluster) sum(b []byte) []byte {
	h := hmac.New(sha256.New, c.o.Key)
	h.Write([]byte("newel forward 1\x00"))
	h.Write(b)
	return h.Sum(nil)
}

func (c *Cluster) open(given []string) (p passed, err error) {
	body, sum, _ := strings.Cut(given[0], ".")
	b, errBody := base64.RawURLEncoding.Strict().DecodeString(body)
	s, errSum := base64.RawURLEncoding.Strict().DecodeString(sum)
	if len(given) != 1 || errBody != nil || errSum != nil || !hmac.Equal(s, c.sum(b)) {
		return p, errors.New("it does not come from a node that has the key")
	}
	return p, json.Unmarshal(b, &p)
}
