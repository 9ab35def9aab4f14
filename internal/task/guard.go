package task

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/secret"
)

// Extension is the id of the Tasks extension of MCP 2026-07-28.
const Extension = "io.modelcontextprotocol/tasks"

// Options configure tasks. Zero means the default in brackets; below zero is refused.
type Options struct {
	Store      Store         // required
	Key        secret.Key    // seals what is stored
	Workers    int           // tasks that run at once on this node [16]
	MaxQueued  int           // tasks that wait for a worker, on all nodes; as far as this node knows [10,000]
	MaxPerUser int           // tasks of one caller at one server that have not ended [1,000]
	TTL        time.Duration // how long a task is kept whose caller does not say [24 h]
	MaxTTL     time.Duration // longest time a caller may ask for; at least a minute [7 days]
	Timeout    time.Duration // longest run [1 h]
	Poll       time.Duration // how often callers are told to ask [1 s]
	Logger     *slog.Logger  // nil discards
	// Path is the path that a run takes now at a server; nil: there is none, and other nodes have it.
	Path func(server string) call.Handler // required
}

// check refuses what makes no sense, and fills in defaults.
func (o *Options) check() error {
	if o.Workers < 0 || o.MaxQueued < 0 || o.MaxPerUser < 0 || o.TTL < 0 || o.MaxTTL < 0 || o.Timeout < 0 || o.Poll < 0 {
		return errors.New("task: Workers, MaxQueued, MaxPerUser, TTL, MaxTTL, Timeout and Poll must not be below zero")
	}
	o.Workers, o.MaxQueued, o.MaxPerUser = or(o.Workers, 16), or(o.MaxQueued, 10_000), or(o.MaxPerUser, 1000)
	o.MaxTTL = max(or(o.MaxTTL, 7*24*time.Hour), minTTL)
	o.TTL = min(max(or(o.TTL, 24*time.Hour), minTTL), o.MaxTTL)
	o.Timeout, o.Poll = or(o.Timeout, time.Hour), or(o.Poll, time.Second)
	return nil
}

const (
	minTTL     = time.Minute
	answered   = 20 * time.Minute // a task that was made with answers is there at least as long as those are taken
	maxRequest = 1 << 20          // bytes of a request as stored
	maxAnswer  = 1 << 20          // and of an answer: bound has made it smaller, if it could
	maxMessage = 1000             // bytes of a status message
)

// Tasks makes, runs and tells of tasks. It is safe for concurrent use.
type Tasks struct {
	o       atomic.Pointer[Options]
	store   Store
	box     *secret.Box
	log     *slog.Logger
	path    func(server string) call.Handler
	kick    chan struct{}
	turn    chan struct{} // held by whoever works
	counts  atomic.Pointer[Counts]
	since   atomic.Int64 // made since counts were read
	running atomic.Bool
	backlog []Record // of Run alone: what was due when it looked

	mu       sync.Mutex // guards what is below
	runs     map[string]*run
	watchers map[string]map[*Follower]struct{}
	versions map[string]int64 // of watched tasks, as last seen
}

// New returns tasks that nobody works on yet, or an error that names the option that makes no sense.
func New(o Options) (*Tasks, error) {
	if o.Store == nil || o.Path == nil {
		return nil, errors.New("task: Store and Path are required")
	}
	if err := o.check(); err != nil {
		return nil, err
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	box, err := o.Key.Box("newel tasks")
	if err != nil {
		return nil, err
	}
	t := &Tasks{
		store: o.Store, box: box, log: o.Logger, path: o.Path, kick: make(chan struct{}, 1), turn: make(chan struct{}, 1),
		runs: map[string]*run{}, watchers: map[string]map[*Follower]struct{}{}, versions: map[string]int64{},
	}
	t.o.Store(&o)
	t.counts.Store(&Counts{})
	return t, nil
}

// Bound checks other bounds for the same tasks and returns what takes them over: they count for
// what begins after. Store, Key, Logger and Path stay.
func (t *Tasks) Bound(o Options) (take func(), err error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	return func() { t.o.Store(&o) }, nil
}

// Timeout is the longest run.
func (t *Tasks) Timeout() time.Duration { return t.o.Load().Timeout }

func or[T ~int | ~int64](v, otherwise T) T {
	if v == 0 {
		return otherwise
	}
	return v
}

// A request is what a task is to do.
type request struct {
	Name      string                    `json:"name"`
	Args      jsontext.Value            `json:"args,omitzero"`
	Key       string                    `json:"key,omitzero"`
	Client    client                    `json:"client"`
	Principal *call.Principal           `json:"principal,omitzero"`
	Meta      jsontext.Value            `json:"meta,omitzero"`
	Unknown   jsontext.Value            `json:"unknown,omitzero"`
	Trace     call.Trace                `json:"trace"`
	Revision  string                    `json:"revision"`
	Answers   map[string]jsontext.Value `json:"answers,omitzero"` // to what Prepare asked
	TTL       int64                     `json:"ttl"`              // milliseconds
}

// client is a call.Client whose absent capabilities stay absent.
type client struct {
	call.Client `json:",inline"`
	Raw         jsontext.Value `json:"raw,omitzero"`
}

// notes are how far a task has come.
type notes struct {
	Message  string                    `json:"message,omitzero"`
	Answers  map[string]jsontext.Value `json:"answers,omitzero"` // by the handler's keys
	Pending  []pending                 `json:"pending,omitzero"`
	Used     []string                  `json:"used,omitzero"` // keys that callers have seen
	Resume   string                    `json:"resume,omitzero"`
	Rounds   int                       `json:"rounds,omitzero"`
	Attempts int                       `json:"attempts,omitzero"` // since it last did not fail
	// Elsewhere is what the call left running where it was sent to.
	Elsewhere string `json:"elsewhere,omitzero"`
}

// pending is a question that waits for its answer.
type pending struct {
	Shown  string         `json:"shown"` // its key for the caller: never used twice in one task
	Key    string         `json:"key"`
	Method string         `json:"method"`
	Params jsontext.Value `json:"params,omitzero"`
}

func (p *pending) question() call.Question {
	return call.Question{Key: p.Shown, Method: p.Method, Params: p.Params}
}

func (t *Tasks) seal(what, id string, v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, call.Errorf(call.Internal, "internal error").Because(err)
	}
	return t.box.Seal(b, what+" of "+id), nil
}

func (t *Tasks) open(what, id string, sealed []byte, v any) error {
	b, err := t.box.Open(sealed, what+" of "+id)
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		return call.Errorf(call.Internal, "internal error").Because(fmt.Errorf("task: the %s of %s cannot be opened: %w", what, id, err))
	}
	return nil
}

// put adds parts to a hash so that no other parts give the same bytes.
func hash(parts ...string) []byte {
	h := sha256.New()
	var n [8]byte
	for _, p := range parts {
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write([]byte(p))
	}
	return h.Sum(nil)
}

func whoIs(p *call.Principal) (tenant, principal string) {
	if p == nil {
		return "", ""
	}
	return p.Tenant, p.ID
}

// ownerOf is whose a task is: one principal of one tenant, at one server.
func ownerOf(p *call.Principal, server string) []byte {
	tenant, principal := whoIs(p)
	return hash("newel task owner 1", tenant, principal, server)
}

// Guard returns the guard of the step for one server. check refuses a call that could not run later,
// for its key alone.
func (t *Tasks) Guard(server string, check func(*call.Call) error) call.Guard {
	return func(next call.Handler) call.Handler {
		return func(ctx context.Context, c *call.Call) (*call.Result, error) {
			if c.Kind != call.Tool || c.TaskID != "" {
				return next(ctx, c)
			}
			support, wish := c.Target.Tasks, c.AsTask
			takes := wish.Accepts || wish.Asks
			switch {
			case wish.Asks && support == call.TaskForbidden:
				e := call.Errorf(call.Unsupported, "the tool %q is not run as a task; call it without one", c.Target.Name)
				e.RPC = wish.Refusal
				return nil, e
			case support == call.TaskRequired && !takes:
				return nil, required(c)
			case support == call.TaskForbidden || !takes:
				return next(ctx, c)
			case !t.running.Load() && support == call.TaskOptional && !wish.Asks:
				return next(ctx, c) // nobody works on tasks here
			case !t.running.Load():
				e := call.Errorf(call.Unavailable, "this server takes no tasks now; try again in a moment")
				e.RetryAfter = time.Second
				return nil, e
			}
			if a := c.Approval; a != nil && (a.ID == "" || a.Spent && c.Key == "") {
				return nil, call.Errorf(call.Denied, "nobody approved this call").Because(call.ErrUnapproved)
			}
			return t.create(ctx, server, c, check)
		}
	}
}

// required refuses a caller that cannot take a handle.
func required(c *call.Call) error {
	e := call.Errorf(call.Unsupported, "the tool %q only runs as a task, and the client did not say that it takes one", c.Target.Name)
	e.Data = jsontext.Value(`{"requiredCapabilities":{"extensions":{"` + Extension + `":{}}}}`)
	e.RPC = c.AsTask.Refusal
	return e
}

// create makes a task of a call. It is durable when this returns.
func (t *Tasks) create(ctx context.Context, server string, c *call.Call, check func(*call.Call) error) (*call.Result, error) {
	if err := check(c); err != nil {
		return nil, err
	}
	answers, err := prepare(ctx, c)
	if err != nil {
		return nil, err
	}
	owner := ownerOf(c.Principal, server)
	if err := t.room(ctx, owner); err != nil {
		return nil, err
	}
	w, err := t.record(c, server, owner, answers)
	if err != nil {
		return nil, err
	}
	r, made, err := t.store.PutTask(ctx, w)
	if err != nil {
		return nil, away(ctx, err)
	}
	if !made && (r.ID == "" || !bytes.Equal(r.Print, w.Print)) {
		e := call.Errorf(call.Failed, "this idempotency key was used for a call with other arguments; use a new key for a new call")
		e.Data = jsontext.Value(`{"code":"failed","retryable":false,"idempotency":{"reason":"key_reused"}}`)
		return nil, e
	}
	if made {
		t.since.Add(1)
		t.wake()
	}
	view, err := t.view(&r)
	if err != nil {
		return nil, err
	}
	c.Event.Operation, c.Event.Replayed = r.ID, !made
	return &call.Result{Task: view}, nil
}

// prepare asks what has to be asked before the task is made.
func prepare(ctx context.Context, c *call.Call) (map[string]jsontext.Value, error) {
	if c.Target.Prepare == nil {
		return nil, nil
	}
	heard := &recorder{Asker: c.Asker, answers: map[string]jsontext.Value{}}
	before := *c
	before.Asker = heard
	if err := c.Target.Prepare(ctx, &before); err != nil {
		return nil, err
	}
	return heard.answers, nil
}

// recorder keeps the answers that it passes on.
type recorder struct {
	call.Asker
	mu      sync.Mutex
	answers map[string]jsontext.Value
}

// Ask implements call.Asker.
func (r *recorder) Ask(ctx context.Context, questions ...call.Question) (map[string]jsontext.Value, error) {
	a, err := r.Asker.Ask(ctx, questions...)
	if err == nil {
		r.mu.Lock()
		maps.Copy(r.answers, a)
		r.mu.Unlock()
	}
	return a, err
}

// room refuses new tasks while too many wait.
func (t *Tasks) room(ctx context.Context, owner []byte) error {
	n := t.counts.Load()
	if n.Queued+t.since.Load() >= int64(t.o.Load().MaxQueued) {
		e := call.Errorf(call.Exhausted, "as many tasks wait as may wait; try again later")
		e.RetryAfter = min(max(n.Oldest, time.Second), time.Minute)
		return e
	}
	mine, err := t.store.OpenTasks(ctx, owner, t.o.Load().MaxPerUser)
	if err != nil {
		return away(ctx, err)
	}
	if mine >= t.o.Load().MaxPerUser {
		e := call.Errorf(call.Exhausted, "this caller has as many tasks as it may have; wait for some of them to end, or cancel some")
		e.RetryAfter = t.o.Load().Poll
		return e
	}
	return nil
}

// away says that the store does not answer.
func away(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return call.AsError(ctx.Err()).Because(err)
	}
	e := call.Errorf(call.Unavailable, "tasks cannot be stored or read right now; try again in a moment").Because(err)
	e.RetryAfter = time.Second
	return e
}

// record is the new task.
func (t *Tasks) record(c *call.Call, server string, owner []byte, answers map[string]jsontext.Value) (*Write, error) {
	ttl := t.o.Load().TTL
	if c.AsTask.TTL > 0 {
		ttl = min(max(c.AsTask.TTL, minTTL), t.o.Load().MaxTTL)
	}
	if c.Asked != "" {
		ttl = max(ttl, answered)
	}
	id := fmt.Sprintf("%012x", time.Now().UnixMilli()) + rand.Text()
	args := c.Args
	if len(args) == 0 {
		args = jsontext.Value("{}")
	}
	canonical := args.Clone()
	if err := canonical.Canonicalize(jsontext.CanonicalizeRawInts(false)); err != nil {
		return nil, call.Errorf(call.Malformed, "the arguments are not valid JSON").Because(err)
	}
	req := request{
		Name: c.Name, Args: c.Args, Key: c.Key, Client: client{Client: c.Client, Raw: c.Client.Raw}, Principal: c.Principal, Meta: c.Meta, Unknown: c.Unknown,
		Trace: c.Trace, Revision: c.Revision, Answers: answers, TTL: ttl.Milliseconds(),
	}
	req.Client.Client.Raw = nil
	if req.Trace.Correlation == "" {
		req.Trace.Correlation = c.Event.Correlation
	}
	sealed, err := t.seal("request", id, &req)
	if err != nil {
		return nil, err
	}
	if len(sealed) > maxRequest {
		return nil, call.Errorf(call.TooLarge, "the arguments of a task may have %d bytes at most", maxRequest)
	}
	w := &Write{Record: Record{
		ID: id, Owner: owner, Print: hash("newel task print 1", c.Target.Name, string(canonical)), State: Queued, Holder: rand.Text(), Request: sealed,
		Server: server, Tool: c.Target.Name,
	}, Keep: ttl}
	w.Tenant, w.Principal = whoIs(c.Principal)
	switch {
	case c.Key != "":
		w.Scope = hash("newel task scope 1", string(owner), c.Target.Name, c.Key)
	case c.Asked != "": // the same answers sent again are the same task
		w.Scope = hash("newel task of answers 1", string(owner), c.Target.Name, c.Asked)
	}
	w.Created = time.Now().UnixMicro()
	w.Updated = w.Created
	rec := w.audited(audit.TaskMade)
	rec.Correlation, rec.Door, rec.Rule, rec.Effect = c.Event.Correlation, c.Door, c.Event.Rule, c.Target.Effect.String()
	value := audit.NewValue("arguments", c.Args)
	rec.Digests = []audit.Digest{value.Digest()}
	w.Entry, err = entry(&rec)
	return w, err
}

// audited begins the record of a change in the audit log.
func (r *Record) audited(act string) audit.Record {
	return audit.Record{
		Act: act, Capability: r.Tool, Fence: r.Version + 1, Kind: call.Tool.String(), Operation: r.ID, Principal: r.Principal, Server: r.Server, Tenant: r.Tenant,
		Time: audit.Time(time.Now()),
	}
}

func entry(r *audit.Record) (*audit.Entry, error) {
	b, err := r.Encode()
	if err != nil {
		return nil, call.Errorf(call.Internal, "internal error").Because(err)
	}
	return &audit.Entry{Record: b}, nil
}
