package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/config"
	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/redact"
	"newel.dev/newel/internal/redact/leaks"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/postgres"
	"newel.dev/newel/internal/store/sqlite"
)

// state is what a house remembers with, opened.
type state struct {
	store *assembly.Published // nil: in memory
	key   secret.Key
	io.Closer
}

// maxLocal bounds how many processes may serve one configuration over stdio at once.
const maxLocal = 16

// restartTime is how long the server before this one may take to let go of its state.
const restartTime = 5 * time.Second

// openState opens what the configuration names. Over stdio every client starts a process of its
// own, so those take the first free file beside the server's.
func openState(ctx context.Context, f *config.File, local bool) (*state, error) {
	c := &f.Config.State
	if c.Engine == "memory" {
		return &state{Closer: io.NopCloser(nil)}, nil
	}
	key, err := secret.OpenKey(from(f.Dir, c.KeyFile))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Position("state.key_file"), err)
	}
	if c.Engine == "postgres" {
		return openPostgres(ctx, f, key)
	}
	if !c.DSN.IsZero() {
		return nil, fmt.Errorf("%s: the dsn is for the engine postgres", f.Position("state.dsn"))
	}
	file := from(f.Dir, c.Path)
	db, err := openFile(ctx, &file, key, local)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; state.path names the file, state.engine: memory does without", f.Position("state"), err)
	}
	heads := from(f.Dir, c.Heads)
	if file != from(f.Dir, c.Path) {
		heads += "-" + filepath.Base(file) // each log has its own
	}
	return newState(ctx, f, db, key, heads)
}

// openFile opens the file of the server, or over stdio the first free one of those beside it, which
// it puts into file.
func openFile(ctx context.Context, file *string, key secret.Key, local bool) (*sqlite.DB, error) {
	if !local {
		return sqlite.Open(ctx, *file, key, restartTime)
	}
	ext := filepath.Ext(*file)
	base := strings.TrimSuffix(*file, ext)
	err := sqlite.ErrInUse
	for i := 1; errors.Is(err, sqlite.ErrInUse) && i <= maxLocal; i++ {
		var db *sqlite.DB
		*file = fmt.Sprintf("%s-stdio%d%s", base, i, ext)
		if db, err = sqlite.Open(ctx, *file, key, 0); err == nil {
			return db, nil
		}
	}
	return nil, err
}

func openPostgres(ctx context.Context, f *config.File, key secret.Key) (*state, error) {
	if f.Config.State.DSN.IsZero() {
		return nil, fmt.Errorf("%s: the engine postgres needs a dsn: dsn: ${env:STATE_DSN}", f.Position("state"))
	}
	db, err := postgres.Open(ctx, f.Config.State.DSN, key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Position("state"), err)
	}
	return newState(ctx, f, db, key, from(f.Dir, f.Config.State.Heads))
}

func newState(ctx context.Context, f *config.File, db assembly.Engine, key secret.Key, heads string) (*state, error) {
	signer, err := signerOf(f, key)
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	p := &audit.Publisher{Signer: signer, File: heads}
	if p.Witness, err = witness(f); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	published, err := assembly.Publish(ctx, db, p)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; if a new log begins on purpose, move %s away", f.Position("state"), err, heads)
	}
	return &state{published, key, db}, nil
}

// witness posts heads of the audit log to where the configuration says; nil: nowhere.
func witness(f *config.File) (func(ctx context.Context, head []byte) error, error) {
	c := &f.Config.State
	if c.Witness == "" {
		return nil, nil
	}
	u, err := url.Parse(c.Witness)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil {
		return nil, fmt.Errorf("%s: %q is not an address to post to, such as https://witness.example.com/newel", f.Position("state.witness"), c.Witness)
	}
	private, err := ranges(f, c.Private, "state.private_ranges")
	if err != nil {
		return nil, err
	}
	out := egress.Client(egress.Options{Allow: private, Loopback: true, Timeout: 10 * time.Second})
	return func(ctx context.Context, head []byte) error {
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), bytes.NewReader(head))
		if err != nil {
			return err
		}
		r.Header.Set("Content-Type", "text/plain; charset=utf-8")
		resp, err := out.Do(r)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode/100 != 2 {
			return fmt.Errorf("the witness answers with status %d", resp.StatusCode)
		}
		return nil
	}, nil
}

func signerOf(f *config.File, key secret.Key) (*audit.Signer, error) {
	s, err := assembly.Signer(f.Config.State.Origin, key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Position("state.origin"), err)
	}
	return s, nil
}

func from(dir, file string) string {
	if filepath.IsAbs(file) {
		return file
	}
	return filepath.Join(dir, file)
}

var recoveries = map[string]call.Recovery{"none": call.RecoverNone, "safe": call.RecoverSafe, "resend_same_key": call.RecoverResend, "lookup": call.RecoverLookup}

// redactor takes secrets out of what the audit log gets.
func redactor(f *config.File) (*redact.Redactor, error) {
	c := &f.Config.Audit.Redact
	o := redact.Options{Members: c.Members}
	for _, p := range c.Patterns {
		o.Patterns = append(o.Patterns, redact.Pattern{Name: p.Name, Expr: p.Pattern})
	}
	if c.Secrets {
		o.Secrets = leaks.New()
	}
	r, err := redact.New(o)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Position("audit.redact"), err)
	}
	return r, nil
}

// effects are what the configuration says of calls with effects.
func effects(c *config.Effects) assembly.Effects {
	e := assembly.Effects{Wait: c.Wait, Retention: c.Retention}
	for _, class := range c.Confirm {
		e.Confirm = append(e.Confirm, map[string]call.Effect{"write": call.Write, "destructive": call.Destructive}[class])
	}
	for _, t := range c.Tools {
		var undo *call.Undo
		if t.Undo.Tool != "" {
			undo = &call.Undo{Tool: t.Undo.Tool, Args: t.Undo.Args}
		}
		e.Rules = append(e.Rules, effect.Rule{Undo: undo, Tool: t.Tool, Recovery: recoveries[t.Recovery], Lookup: t.Lookup, Settle: t.Settle, Required: t.Key == "required", Once: t.Once})
	}
	return e
}

// tasks are what the configuration says of calls that go on after their caller was answered.
func tasks(c *config.Tasks) assembly.Tasks {
	t := assembly.Tasks{Workers: c.Workers, MaxQueued: c.MaxQueued, MaxPerUser: c.MaxPerCaller, TTL: c.TTL, MaxTTL: c.MaxTTL, Timeout: c.Timeout, Poll: c.Poll}
	for _, r := range c.Tools {
		support, _ := call.ParseTaskSupport(r.Support) // the configuration knows these names alone
		t.Rules = append(t.Rules, assembly.TaskRule{Tool: r.Tool, Support: support})
	}
	return t
}

// resilience is what the configuration says of backends that fail or are slow.
func resilience(c *config.Resilience) assembly.Resilience {
	bounds := func(calls, queue int, wait, timeout time.Duration, b *config.Breaker, r *config.Retries) assembly.Bounds {
		return assembly.Bounds{Concurrent: calls, Queued: queue, QueueTimeout: wait, Timeout: timeout, Failures: b.Failures, Delay: b.Delay, Attempts: r.Attempts, Budget: r.Budget}
	}
	r := assembly.Resilience{Bounds: bounds(c.Concurrency, c.Queue, c.QueueTimeout, c.Timeout, &c.Breaker, &c.Retries), Backends: map[string]assembly.Bounds{}}
	for i := range c.Backends {
		b := &c.Backends[i]
		r.Backends[b.Backend] = bounds(b.Concurrency, b.Queue, b.QueueTimeout, b.Timeout, &b.Breaker, &b.Retries)
	}
	return r
}
