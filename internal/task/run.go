package task

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/answer"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/faultpoint"
)

const (
	lookEvery   = time.Second      // for work, and for what other nodes changed
	countEvery  = 2 * time.Second  // tasks of all nodes
	drainTime   = 10 * time.Second // for tasks that run when the node stops
	leeway      = 30 * time.Second // of a lease, beyond the longest run
	graceTTL    = 10 * time.Minute // a task whose time is over can still be looked at
	maxAttempts = 6                // of a task whose tool says that nothing was done
	maxRounds   = 16               // questions of one task
	ahead       = 4                // tasks that are looked for at once, for each worker; what others take meanwhile is passed over
	storeTime   = 10 * time.Second
)

// Why a run is stopped.
var (
	errCancelled = call.ErrTaskCancelled
	errTaken     = errors.New("the task was changed by somebody else")
	errStopping  = errors.New("this node stops")
)

// Queued, Running, Waiting and Oldest (seconds) are of all nodes, as of a moment ago.
func (t *Tasks) Queued() int64  { return t.counts.Load().Queued }
func (t *Tasks) Running() int64 { return t.counts.Load().Running }
func (t *Tasks) Waiting() int64 { return t.counts.Load().Waiting }
func (t *Tasks) Oldest() int64  { return int64(t.counts.Load().Oldest.Seconds()) }

// run is one task that a worker of this node has.
type run struct {
	cancel context.CancelCauseFunc

	mu      sync.Mutex // guards what is below
	rec     Record     // as last written
	notes   notes
	flushed time.Time
}

func (t *Tasks) wake() {
	select {
	case t.kick <- struct{}{}:
	default:
	}
}

// Accept says that Run is about to work: from now on tasks are made.
func (t *Tasks) Accept() { t.running.Store(true) }

// Run works on tasks until ctx ends. Then those that run get a moment to end; the others go back to
// the queue, for other nodes or the next start. Where it is called more than once, one works and the
// others wait to take over.
func (t *Tasks) Run(ctx context.Context) error {
	select {
	case t.turn <- struct{}{}:
		defer func() { <-t.turn }()
	case <-ctx.Done():
		return nil
	}
	t.Accept()
	defer t.running.Store(false)
	t.count(ctx)
	work, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stop(errStopping)
	var workers sync.WaitGroup
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	counted := time.Now()
	for ctx.Err() == nil {
		t.fill(ctx, work, &workers)
		select {
		case <-ctx.Done():
		case <-t.kick:
		case <-look.C:
			t.compare(ctx)
			if time.Since(counted) >= countEvery {
				counted = time.Now()
				t.count(ctx)
			}
		}
	}
	t.running.Store(false)
	timer := time.AfterFunc(drainTime, func() { stop(errStopping) })
	defer timer.Stop()
	workers.Wait()
	return nil
}

func (t *Tasks) count(ctx context.Context) {
	n, err := t.store.CountTasks(ctx)
	if err != nil {
		return // the gauges stay; making tasks fails by itself
	}
	t.since.Store(0)
	t.counts.Store(&n)
}

// fill has free workers take what is due.
func (t *Tasks) fill(ctx, work context.Context, workers *sync.WaitGroup) {
	t.mu.Lock()
	free := t.o.Load().Workers - len(t.runs)
	busy := len(t.runs)
	t.mu.Unlock()
	if free <= 0 {
		return
	}
	if len(t.backlog) < free {
		due, err := t.store.DueTasks(ctx, busy+ahead*t.o.Load().Workers)
		if err != nil {
			if ctx.Err() == nil {
				t.log.LogAttrs(ctx, slog.LevelWarn, "tasks cannot be looked for", slog.String("error", err.Error()))
			}
			return
		}
		t.backlog = due
	}
	for len(t.backlog) > 0 {
		r := &t.backlog[0]
		path := t.path(r.Server)
		if path == nil && !r.Over {
			t.backlog = t.backlog[1:]
			continue // of a server that other nodes have
		}
		runs, cancel := context.WithCancelCause(work)
		one := &run{cancel: cancel, rec: *r}
		t.mu.Lock()
		_, mine := t.runs[r.ID]
		full := len(t.runs) >= t.o.Load().Workers
		if !mine && !full {
			t.runs[r.ID] = one
		}
		t.mu.Unlock()
		if full {
			cancel(nil)
			return
		}
		t.backlog = t.backlog[1:]
		if mine {
			cancel(nil)
			continue
		}
		workers.Go(func() {
			defer func() {
				cancel(nil)
				t.mu.Lock()
				delete(t.runs, one.rec.ID)
				t.mu.Unlock()
				t.wake()
			}()
			t.work(runs, one, path)
		})
	}
}

// stop ends the run of a task, if it is here.
func (t *Tasks) stop(id string, why error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r := t.runs[id]; r != nil {
		r.cancel(why)
	}
}

// compare looks at what other nodes did: to tasks that run here, and to those that somebody follows.
func (t *Tasks) compare(ctx context.Context) {
	t.mu.Lock()
	watched := slices.Collect(maps.Keys(t.watchers))
	runs := maps.Clone(t.runs)
	t.mu.Unlock()
	ids := slices.AppendSeq(watched, maps.Keys(runs))
	if len(ids) == 0 {
		return
	}
	versions, err := t.store.TaskVersions(ctx, ids)
	if err != nil {
		return // the next look tells
	}
	for id, r := range runs {
		r.mu.Lock()
		lost := versions[id] > r.rec.Version // our own writes hold the lock
		r.mu.Unlock()
		if lost {
			r.cancel(t.why(ctx, id))
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, id := range watched {
		if _, still := t.watchers[id]; !still || t.versions[id] == versions[id] {
			continue
		}
		t.versions[id] = versions[id]
		for f := range t.watchers[id] {
			f.hear(id)
		}
	}
}

// why says what became of a task that is not the run's any more.
func (t *Tasks) why(ctx context.Context, id string) error {
	if r, err := t.store.Task(ctx, id); err == nil && r.State == Cancelled {
		return errCancelled
	}
	return errTaken
}

// put writes the task of a run anew. ok is false if the task is not the run's any more.
func (t *Tasks) put(r *run, w *Write) (ok bool, err error) {
	if w.Notes, err = t.seal("notes", w.ID, &r.notes); err != nil {
		return false, err
	}
	if w.Holder == r.rec.Holder { // otherwise it is the same write again
		w.Holder, w.Updated = rand.Text(), time.Now().UnixMicro()
	}
	ctx, cancel := context.WithTimeout(context.Background(), storeTime) // what was done is written, whoever stops
	defer cancel()
	rec, ok, err := t.store.PutTask(ctx, w)
	if err != nil || !ok {
		return false, err
	}
	r.rec = rec
	t.changed(w.ID)
	return true, nil
}

// insist writes until the store says yes or no, or the node stops. In doubt the write has been made.
func (t *Tasks) insist(ctx context.Context, r *run, w *Write) (ok bool, err error) {
	for {
		r.mu.Lock()
		ok, err = t.put(r, w)
		r.mu.Unlock()
		if err == nil {
			return ok, nil
		}
		t.log.LogAttrs(ctx, slog.LevelError, "a task could not be stored; it is tried again", slog.String("task", w.ID), slog.String("error", err.Error()))
		pause := time.NewTimer(lookEvery)
		select {
		case <-ctx.Done():
			pause.Stop()
			return false, err
		case <-pause.C:
		}
	}
}

// work runs one task. The steps:
//
//  1. the task is taken, by its version: of all workers that try, one does. A crash after: the lease ends
//     with the node, and another one takes it.
//  2. the call takes the path, with the task's own key: what had an effect is not done again.
//  3. how it went on is written. A crash before: the next one finds it in the operation of the call.
func (t *Tasks) work(ctx context.Context, r *run, path call.Handler) {
	fail := func(what string, err error) {
		t.log.LogAttrs(ctx, slog.LevelError, what, slog.String("task", r.rec.ID), slog.String("tool", r.rec.Tool), slog.String("error", err.Error()))
	}
	if r.rec.Over {
		if err := t.expire(r); err != nil {
			fail("a task whose time is over could not be ended", err)
		}
		return
	}
	var req request
	err := t.open("request", r.rec.ID, r.rec.Request, &req)
	if err == nil && r.rec.Notes != nil {
		err = t.open("notes", r.rec.ID, r.rec.Notes, &r.notes)
	}
	if err != nil {
		fail("a task cannot be read", err)
		return
	}
	limit := min(t.o.Load().Timeout, time.Until(time.UnixMicro(r.rec.Created).Add(time.Duration(req.TTL)*time.Millisecond)))
	limit = max(limit, time.Second)
	w := &Write{Record: r.rec, Take: true, Lease: limit + leeway}
	w.State = Running
	if ok, err := t.insist(ctx, r, w); err != nil || !ok {
		return // another worker has it, or this node stops
	}
	timed, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	res, err := path(timed, t.callOf(r, &req))
	if err == nil && res.Elsewhere != "" { // it is done here; what it left is followed, by whichever node
		r.mu.Lock()
		r.notes.Elsewhere = res.Elsewhere
		more := &Write{Record: r.rec, Lease: limit + leeway}
		r.mu.Unlock()
		if ok, err := t.insist(ctx, r, more); err != nil || !ok {
			return
		}
		res, err = path(timed, t.callOf(r, &req))
		if err == nil && res.Elsewhere != "" {
			err = call.Errorf(call.Internal, "internal error").Because(errors.New("what is followed leads elsewhere again"))
		}
	}
	faultpoint.Reached(faultpoint.TaskDone)
	if why := context.Cause(ctx); errors.Is(why, errCancelled) || errors.Is(why, errTaken) {
		return // it is somebody else's now
	}
	if w, err = t.outcome(timed, r, res, err); err != nil {
		fail("how a task ended cannot be recorded", err)
		return
	}
	_, _ = t.insist(ctx, r, w) // it says itself what went wrong
}

// callOf is the call that a task is.
func (t *Tasks) callOf(r *run, req *request) *call.Call {
	answers := maps.Clone(req.Answers)
	if answers == nil {
		answers = map[string]jsontext.Value{}
	}
	maps.Copy(answers, r.notes.Answers)
	c := &call.Call{
		Kind: call.Tool, Name: req.Name, Args: req.Args, Key: req.Key, Client: req.Client.Client, Meta: req.Meta, Unknown: req.Unknown, Trace: req.Trace,
		Elsewhere: r.notes.Elsewhere, Door: "task", Revision: req.Revision, Size: len(req.Args), Progress: true, Resume: r.notes.Resume, TaskID: r.rec.ID,
		Credential: call.Credential{Peer: "task", Known: req.Principal},
		Sink:       &sink{t: t, r: r},
	}
	c.Client.Raw = req.Client.Raw
	c.Asker = &asker{client: &c.Client, answers: answers}
	return c
}

// outcome is what is to be written of a run.
func (t *Tasks) outcome(ctx context.Context, r *run, res *call.Result, err error) (*Write, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	w := &Write{Record: r.rec}
	var ask *call.InputRequired
	e := call.AsError(err)
	switch {
	case errors.As(err, &ask) && r.notes.Rounds < maxRounds:
		w.State = Waiting
		r.notes.asks(ask)
	case errors.Is(context.Cause(ctx), errStopping) && err != nil:
		w.State = Queued // whoever goes on finds out what was done
	case err != nil && ask == nil && again(e) && r.notes.Attempts+1 < maxAttempts:
		r.notes.Attempts++ // nothing was done: once more, later
		w.State, w.Lease = Queued, max(e.RetryAfter, time.Second<<r.notes.Attempts)
		r.notes.Message = "It is tried again: " + clip(e.Message)
	default:
		if ask != nil {
			e = call.Errorf(call.Exhausted, "the task asked %d times without coming to an end", maxRounds)
			err = e
		}
		a := &answer.Answer{Result: res}
		rec := w.audited(audit.TaskEnded)
		rec.Outcome = "completed"
		if err != nil {
			a, rec.Outcome, rec.Code = &answer.Answer{Err: e}, "failed", e.Code.String()
		} else if res.IsError {
			rec.Code = call.Failed.String()
		}
		raw := a.Encode()
		value := audit.NewValue("answer", raw)
		rec.Digests = []audit.Digest{value.Digest()}
		if len(raw) > maxAnswer {
			raw = (&answer.Answer{Lost: true}).Encode()
		}
		w.State, w.Answer = Completed, t.box.Seal(raw, "answer of "+w.ID)
		r.notes.Message = ""
		if w.Entry, err = entry(&rec); err != nil {
			return nil, err
		}
	}
	return w, nil
}

// again reports whether another run may fare better: this one did nothing, somebody else is at the same
// call, by its key, or it is not known what it did and the tool has a recovery that finds out. Nobody but
// a worker can try: whoever sends the key again gets the same task.
func again(e *call.Error) bool {
	return e.Code == call.Unavailable || e.Code == call.Exhausted || e.Retryable && (e.Code == call.Conflict || e.Code == call.OutcomeUnknown)
}

// expire ends a task whose time is over.
func (t *Tasks) expire(r *run) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	w := &Write{Record: r.rec, Take: true, Keep: graceTTL}
	w.State = Failed
	r.notes = notes{Message: "The task did not end within its time."}
	rec := w.audited(audit.TaskEnded)
	rec.Outcome, rec.Code = "failed", call.Timeout.String()
	var err error
	if w.Entry, err = entry(&rec); err != nil {
		return err
	}
	_, err = t.put(r, w)
	return err
}

// asks takes down what the handler wants to know. A key that its caller has seen gets another one.
func (n *notes) asks(ask *call.InputRequired) {
	n.Rounds++
	n.Attempts = 0
	n.Message = ""
	n.Resume, n.Pending = ask.State, nil
	if ask.State != "" {
		n.Answers = nil // only the answers to these questions are for the handler
	}
	for _, q := range ask.Questions {
		shown := q.Key
		for i := 2; slices.Contains(n.Used, shown); i++ {
			shown = q.Key + "-" + strconv.Itoa(i)
		}
		n.Used = append(n.Used, shown)
		n.Pending = append(n.Pending, pending{Shown: shown, Key: q.Key, Method: q.Method, Params: q.Params})
	}
}

// asker answers from what the task was told, or says what to ask.
type asker struct {
	client  *call.Client
	answers map[string]jsontext.Value
}

// Ask implements call.Asker.
func (a *asker) Ask(_ context.Context, questions ...call.Question) (map[string]jsontext.Value, error) {
	out := make(map[string]jsontext.Value, len(questions))
	var open []call.Question
	for _, q := range questions {
		if q.Key == "" || slices.ContainsFunc(open, func(o call.Question) bool { return o.Key == q.Key }) {
			return nil, call.Errorf(call.Internal, "internal error").Because(errors.New("a question key is empty or used twice: " + q.Key))
		}
		if err := a.client.Supports(q); err != nil {
			return nil, err
		}
		answer, ok := a.answers[q.Key]
		if !ok {
			open = append(open, q)
			continue
		}
		out[q.Key] = answer
	}
	if len(open) > 0 {
		return nil, &call.InputRequired{Questions: open}
	}
	return out, nil
}

// sink makes progress the message of the task. Log messages go nowhere: tasks have none.
type sink struct {
	t *Tasks
	r *run
}

// flushEvery is how often progress is written at most.
const flushEvery = time.Second

// Progress implements call.Sink.
func (s *sink) Progress(_ context.Context, p call.Progress) error {
	text := p.Message
	if p.Total > 0 {
		part := strconv.FormatFloat(100*p.Done/p.Total, 'f', 0, 64) + " %"
		if text == "" {
			text = part
		} else {
			text += " (" + part + ")"
		}
	} else if text == "" {
		text = strconv.FormatFloat(p.Done, 'g', 6, 64)
	}
	r := s.r
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.rec.State != Running {
		return errors.New("the task has ended")
	}
	r.notes.Message = clip(text)
	if time.Since(r.flushed) < flushEvery {
		return nil
	}
	r.flushed = time.Now()
	w := &Write{Record: r.rec, Lease: s.t.o.Load().Timeout + leeway}
	ok, err := s.t.put(r, w)
	if err == nil && !ok {
		r.cancel(errTaken)
		return errTaken
	}
	return err
}

// Log implements call.Sink.
func (*sink) Log(context.Context, call.LogMessage) error { return nil }

// Notify implements call.Sink.
func (*sink) Notify(context.Context, call.Notification) error {
	return call.Errorf(call.Internal, "internal error").Because(errors.New("not a subscription"))
}

func clip(s string) string {
	if len(s) <= maxMessage {
		return s
	}
	return string([]rune(s[:maxMessage])[:len([]rune(s[:maxMessage]))-1]) + "…"
}
