package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"

	"github.com/go-json-experiment/json"
	"github.com/spf13/cobra"

	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/door/approvals"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/postgres"
	"newel.dev/newel/internal/store/sqlite"
)

// A clerk writes to the audit log of a configuration: the server that runs does it, because it may have
// the state to itself, and this process if none runs.
type clerk struct {
	w   *where
	cmd *cobra.Command
	env *environment
}

// copied reports whether --state names a file that is not the configuration's: reading that is nobody
// else's business, and nothing is written to it.
func (k *clerk) copied() (bool, error) {
	if k.w.state == "" {
		return false, nil
	}
	f, err := k.env.load(k.w.config, k.env.secrets(k.w.config))
	if err != nil {
		return false, err
	}
	if f.Config.State.Engine != "sqlite" {
		return false, nil
	}
	named, err := os.Stat(k.w.state)
	if err != nil {
		return false, exit(exitFailed, err)
	}
	live, err := os.Stat(from(f.Dir, f.Config.State.Path))
	return err != nil || !os.SameFile(named, live), nil
}

// running reports whether the server of the configuration runs here.
func (k *clerk) running(ctx context.Context) bool {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", socketOf(k.w.config))
	if err != nil {
		return false
	}
	_ = c.Close()
	return true
}

// ask has the server do it.
func (k *clerk) ask(path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	raw, err := (&office{config: k.w.config}).ask(k.cmd, k.env, http.MethodPost, path, body)
	if err != nil {
		return err
	}
	return json.Unmarshal(raw, out)
}

// open opens the log to write to it; nil: the server that has it does that.
func (k *clerk) open(ctx context.Context) (_ audit.Eraser, done func() error, _ error) {
	if k.running(ctx) {
		return nil, nil, nil
	}
	f, err := k.env.load(k.w.config, k.env.secrets(k.w.config))
	if err != nil {
		return nil, nil, err
	}
	key, err := secret.OpenKey(from(f.Dir, f.Config.State.KeyFile))
	if err != nil {
		return nil, nil, err
	}
	if f.Config.State.Engine == "postgres" {
		db, err := postgres.Open(ctx, f.Config.State.DSN, key)
		if err != nil {
			return nil, nil, err
		}
		return db, db.Close, nil
	}
	db, err := sqlite.Open(ctx, from(f.Dir, f.Config.State.Path), key, 0)
	if errors.Is(err, sqlite.ErrInUse) {
		return nil, nil, nil // a server without a socket: it listens on its address
	}
	if err != nil {
		return nil, nil, err
	}
	return db, db.Close, nil
}

// looks writes down that values are read, before they are. A copy is read by whoever has it.
func (k *clerk) looks(ctx context.Context, l approvals.Looking) error {
	copied, err := k.copied()
	if err != nil || l.Count == 0 {
		return err
	}
	if copied {
		fmt.Fprintln(k.env.err, "This is a copy of the state, so that it is read is written down nowhere.")
		return nil
	}
	if err := k.looked(ctx, l); err != nil {
		return fmt.Errorf("that values are read cannot be written down, so they are not shown: %w", err)
	}
	return nil
}

func (k *clerk) looked(ctx context.Context, l approvals.Looking) error {
	log, done, err := k.open(ctx)
	if err != nil {
		return err
	}
	if log == nil {
		var said struct{}
		return k.ask("/audit/reads", l, &said)
	}
	return errors.Join(audit.NoteRead(ctx, log, operatorName(), l.First, l.Last, l.Count), done())
}

// erase erases all that e chooses, step by step.
func (k *clerk) erase(ctx context.Context, e *audit.Erasure) (total int, err error) {
	e.By = operatorName()
	log, closed, err := k.open(ctx)
	if err != nil {
		return 0, err
	}
	step := func() (done audit.Erasing, err error) {
		err = k.ask("/audit/erase", e, &done)
		return done, err
	}
	if log != nil {
		defer func() { err = errors.Join(err, closed()) }()
		step = func() (audit.Erasing, error) { return audit.Erase(ctx, log, e) }
	}
	for {
		done, err := step()
		total += done.Erased
		if err != nil || done.Next == 0 {
			return total, err
		}
		e.From = done.Next
	}
}

func auditErase(env *environment) *cobra.Command {
	var w where
	var e audit.Erasure
	var records []int64
	var yes bool
	var output string
	c := &cobra.Command{
		Use:   "erase",
		Short: "Erase values of records; the records stay",
		Long: `Erases the arguments that the audit log keeps of the calls chosen, for good: no call, answer or record depends on them, and
the log stays provable. That they were erased, by whom and why is a record of its own. Backups are not reached.`,
		Example: `  newel audit erase --principal alice --dry-run --reason "request 4711"
  newel audit erase --record 17 --reason "a password in a note" --yes`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			e.Records = records
			switch {
			case output != "text" && output != "json":
				return fmt.Errorf("--output must be text or json, not %q", output)
			case e.Reason == "":
				return errors.New("--reason says why; it is written down")
			case !e.Dry && !yes:
				return errors.New("what is erased is gone: --dry-run counts it, --yes erases it")
			}
			if err := e.Check(); err != nil {
				return err
			}
			k := &clerk{&w, cmd, env}
			if copied, err := k.copied(); err != nil || copied {
				return errors.Join(err, errors.New("values are erased from the state of the configuration, not from a copy: delete that"))
			}
			n := 0
			err := w.with(cmd.Context(), env, func(*trail) (err error) { // which says so if there is no log
				n, err = k.erase(cmd.Context(), &e)
				return err
			})
			if err != nil && n > 0 {
				err = fmt.Errorf("after %d records: %w", n, err)
			}
			if err != nil {
				return err
			}
			if output == "json" {
				return env.print(map[string]any{"erased": n, "dryRun": e.Dry})
			}
			if e.Dry {
				fmt.Fprintf(env.out, "The values of %d records would be erased.\n", n)
				return nil
			}
			fmt.Fprintf(env.out, "The values of %d records are erased.\n", n)
			return nil
		},
	}
	w.flags(c)
	c.Flags().Int64SliceVar(&records, "record", nil, "index of a record; may be given several times")
	c.Flags().StringVar(&e.Principal, "principal", "", "who called")
	c.Flags().StringVar(&e.Tenant, "tenant", "", "of the caller")
	c.Flags().StringVar(&e.Tool, "tool", "", "name of a tool or prompt, or URI of a resource")
	c.Flags().StringVar(&e.Class, "class", "", "read, write, destructive or unknown")
	c.Flags().StringVar(&e.Since, "since", "", "not before this time (UTC, such as 2026-11-21T08)")
	c.Flags().StringVar(&e.Until, "until", "", "before this time (UTC)")
	c.Flags().StringVar(&e.Reason, "reason", "", "why; required, and written down")
	c.Flags().BoolVar(&e.Dry, "dry-run", false, "say how many there are, and erase nothing")
	c.Flags().BoolVar(&yes, "yes", false, "erase them")
	c.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return c
}

// erasure says who erased the values of a record, when and why; nil: nobody did.
func (t *trail) erasure(ctx context.Context, row *audit.Row) (map[string]any, error) {
	by, ok := audit.ErasedBy(row.Private)
	if !ok {
		return nil, nil
	}
	rows, err := t.Read(ctx, by, 1)
	if err != nil {
		return nil, err
	}
	if len(rows) != 1 || rows[0].Index != by || by <= row.Index {
		return nil, fmt.Errorf("%w: the values of record %d should have been erased by record %d, which is not there", audit.ErrValues, row.Index, by)
	}
	r, err := audit.Decode(rows[0].Record)
	if err != nil {
		return nil, err
	}
	if !r.Erases(row.Index) {
		return nil, fmt.Errorf("%w: the values of record %d should have been erased by record %d, which does not say so", audit.ErrValues, row.Index, by)
	}
	return map[string]any{"record": by, "time": r.Time, "by": r.By, "reason": r.Reason}, nil
}
