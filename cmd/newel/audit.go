package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/spf13/cobra"
	"golang.org/x/mod/sumdb/tlog"

	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/config"
	"newel.dev/newel/internal/door/approvals"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/postgres"
	"newel.dev/newel/internal/store/sqlite"
)

func auditCommand(env *environment) *cobra.Command {
	c := &cobra.Command{
		Use:   "audit",
		Short: "Search, prove, check and export what was done, and erase values",
		Args:  cobra.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(auditSearch(env), auditShow(env), auditVerify(env), auditExport(env), auditErase(env))
	return c
}

// A trail is the audit log that a configuration names, opened to read. A server may run meanwhile.
type trail struct {
	audit.Source
	io.Closer
	key    secret.Key
	signer *audit.Signer
}

// trail opens the log; file, if not empty, stands for that of the configuration.
func (e *environment) trail(ctx context.Context, path, file string) (*trail, error) {
	f, err := e.load(path, e.secrets(path))
	if err != nil {
		return nil, err
	}
	t, err := openTrail(ctx, f, file)
	if err != nil {
		return nil, exit(exitFailed, fmt.Errorf("%s: %w", f.Position("state"), err))
	}
	return t, nil
}

func openTrail(ctx context.Context, f *config.File, file string) (*trail, error) {
	c := &f.Config.State
	if c.Engine == "memory" {
		return nil, errors.New("the audit log is in the memory of the server and ends with it; state.engine: sqlite keeps it")
	}
	if _, err := os.Stat(from(f.Dir, c.KeyFile)); err != nil {
		return nil, fmt.Errorf("there is no key, so nothing was written yet: %w", err)
	}
	key, err := secret.OpenKey(from(f.Dir, c.KeyFile))
	if err != nil {
		return nil, err
	}
	signer, err := signerOf(f, key)
	if err != nil {
		return nil, err
	}
	if c.Engine == "postgres" {
		log, err := postgres.OpenLog(ctx, c.DSN)
		if err != nil {
			return nil, err
		}
		return &trail{log, log, key, signer}, nil
	}
	if file == "" {
		file = from(f.Dir, c.Path)
	}
	log, err := sqlite.OpenLog(file)
	if err != nil {
		return nil, err
	}
	return &trail{log, log, key, signer}, nil
}

// each calls f for every record from index from on, up to the size that the log has now.
func (t *trail) each(ctx context.Context, from int64, f func(r *audit.Row, rec *audit.Record) error) (audit.Edge, error) {
	head, err := t.Head(ctx)
	if err != nil {
		return head, err
	}
	const atOnce = 64 // values may be as long as arguments
	for from < head.Size {
		rows, err := t.Read(ctx, from, int(min(atOnce, head.Size-from)))
		if err != nil {
			return head, err
		}
		if len(rows) == 0 {
			return head, fmt.Errorf("%w: record %d is missing", audit.ErrTampered, from)
		}
		for i := range rows {
			rec, err := audit.Decode(rows[i].Record)
			if err != nil {
				return head, fmt.Errorf("record %d: %w", rows[i].Index, err)
			}
			if err := f(&rows[i], rec); err != nil {
				return head, err
			}
		}
		from = rows[len(rows)-1].Index + 1
	}
	return head, nil
}

// where are the flags that all verbs have.
type where struct{ config, state string }

func (w *where) flags(c *cobra.Command) {
	c.Flags().StringVarP(&w.config, "config", "c", defaultConfig, "configuration file")
	c.Flags().StringVar(&w.state, "state", "", "file of the state, instead of the configuration's")
}

// with runs f on the log and closes it.
func (w *where) with(ctx context.Context, e *environment, f func(t *trail) error) error {
	t, err := e.trail(ctx, w.config, w.state)
	if err != nil {
		return err
	}
	if err := errors.Join(f(t), t.Close()); err != nil {
		return exit(exitFailed, err)
	}
	return nil
}

// A line is one record as --output json prints it.
type auditLine struct {
	Index  int64          `json:"index"`
	Record jsontext.Value `json:"record"`
}

func auditSearch(env *environment) *cobra.Command {
	var w where
	var want audit.Record
	var since, until, output string
	var limit int
	c := &cobra.Command{
		Use:   "search",
		Short: "Find records",
		Example: `  newel audit search --tool update_order_status --since 2026-11-01
  newel audit search --outcome outcome_unknown`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return w.with(cmd.Context(), env, func(t *trail) error {
				var found []auditLine
				tw := tabwriter.NewWriter(env.out, 0, 4, 2, ' ', 0)
				_, err := t.each(cmd.Context(), 0, func(row *audit.Row, r *audit.Record) error {
					if !matchesRecord(r, &want) || since != "" && r.Time < since || until != "" && r.Time >= until || len(found) >= limit {
						return nil
					}
					found = append(found, auditLine{row.Index, row.Record})
					if output != "json" {
						what := r.Outcome
						if r.Count > 0 {
							what = strconv.FormatInt(r.Count, 10) + " calls"
						}
						who := r.Principal
						if r.By != "" {
							who = strings.TrimSpace(who + " by " + r.By)
						}
						fmt.Fprintf(tw, "%d\t%s\t%s\t%s\t%s\t%s\t%s\n", row.Index, r.Time, r.Act, r.Capability, who, what, r.Code)
					}
					return nil
				})
				if err != nil {
					return err
				}
				if output == "json" {
					return env.print(map[string]any{"records": append([]auditLine{}, found...)})
				}
				return tw.Flush()
			})
		},
	}
	w.flags(c)
	c.Flags().StringVar(&want.Capability, "tool", "", "name of a tool or prompt, or URI of a resource")
	c.Flags().StringVar(&want.Principal, "principal", "", "who called")
	c.Flags().StringVar(&want.Tenant, "tenant", "", "of the caller")
	c.Flags().StringVar(&want.Operation, "operation", "", "name of an operation")
	c.Flags().StringVar(&want.Correlation, "correlation", "", "correlation id of a call")
	c.Flags().StringVar(&want.Act, "act", "", "intent, outcome, reads, denied, approval, undo, configured, task_made, task_ended, erased or audit_read")
	c.Flags().StringVar(&want.Approval, "approval", "", "name of an approval")
	c.Flags().StringVar(&want.By, "by", "", "who decided, undid or configured")
	c.Flags().StringVar(&want.Outcome, "outcome", "", "completed, failed_not_executed or outcome_unknown; of approvals requested, approved, denied or expired")
	c.Flags().StringVar(&since, "since", "", "not before this time (UTC, such as 2026-11-21T08)")
	c.Flags().StringVar(&until, "until", "", "before this time (UTC)")
	c.Flags().IntVar(&limit, "limit", 100, "most records")
	c.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return c
}

// matchesRecord compares what is wanted.
func matchesRecord(r, want *audit.Record) bool {
	for _, p := range [...][2]string{{want.Capability, r.Capability}, {want.Principal, r.Principal}, {want.Tenant, r.Tenant}, {want.Operation, r.Operation},
		{want.Correlation, r.Correlation}, {want.Act, r.Act}, {want.Outcome, r.Outcome}, {want.Approval, r.Approval}, {want.By, r.By}} {
		if p[0] != "" && p[0] != p[1] {
			return false
		}
	}
	return true
}

func auditShow(env *environment) *cobra.Command {
	var w where
	c := &cobra.Command{
		Use:   "show INDEX",
		Short: "Show one record, its values, and the proof that it is in the log",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			index, err := strconv.ParseInt(args[0], 10, 64)
			if err != nil {
				return fmt.Errorf("%q is not the index of a record", args[0])
			}
			return w.with(cmd.Context(), env, func(t *trail) error { return env.showRecord(cmd.Context(), t, &clerk{&w, cmd, env}, index) })
		},
	}
	w.flags(c)
	return c
}

func (e *environment) showRecord(ctx context.Context, t *trail, k *clerk, index int64) error {
	head, err := t.Head(ctx)
	if err != nil {
		return err
	}
	proof, err := audit.Prove(head.Size, index, audit.RowsOf(ctx, t))
	if err != nil {
		return err
	}
	rows, err := t.Read(ctx, index, 1)
	if err != nil || len(rows) != 1 {
		return errors.Join(fmt.Errorf("%w: record %d is missing", audit.ErrTampered, index), err)
	}
	if err := audit.Included(proof, head.Tree(), index, rows[0].Record); err != nil {
		return err
	}
	rec, err := audit.Decode(rows[0].Record)
	if err != nil {
		return err
	}
	erased, err := t.erasure(ctx, &rows[0])
	if err != nil {
		return err
	}
	values, err := t.values(&rows[0], rec)
	if err != nil {
		return err
	}
	if len(values) > 0 {
		if err := k.looks(ctx, approvals.Looking{First: index, Last: index, Count: 1}); err != nil {
			return err
		}
	}
	checkpoint, err := t.signer.Sign(head.Tree())
	if err != nil {
		return err
	}
	shown := map[string]jsontext.Value{}
	for _, v := range values {
		if v.Data != nil && jsontext.Value(v.Data).IsValid() {
			shown[v.Name] = v.Data
		}
	}
	hashes := make([]string, len(proof))
	for i, h := range proof {
		hashes[i] = h.String()
	}
	out := map[string]any{"index": index, "record": jsontext.Value(rows[0].Record), "values": shown, "proof": hashes, "checkpoint": string(checkpoint), "key": t.signer.VerifierKey()}
	if erased != nil {
		out["erased"] = erased
	}
	return e.print(out)
}

// values opens the values of a record: those that are kept. Those that do not match their digests are an
// error. A salt without its value says nothing to a reader but what to try, so it stays where it is.
func (t *trail) values(row *audit.Row, rec *audit.Record) ([]audit.Value, error) {
	if _, erased := audit.ErasedBy(row.Private); erased {
		return nil, nil
	}
	values, err := effect.OpenValues(t.key, rec.Operation, row.Private)
	if err != nil {
		return nil, fmt.Errorf("record %d: %w", row.Index, err)
	}
	for i := range values {
		for _, d := range rec.Digests {
			if d.Name == values[i].Name && values[i].Data != nil && !values[i].Matches(d) {
				return nil, fmt.Errorf("%w: the value %q of record %d is not the one that was recorded", audit.ErrTampered, d.Name, row.Index)
			}
		}
	}
	return slices.DeleteFunc(values, func(v audit.Value) bool { return v.Data == nil }), nil
}

func auditVerify(env *environment) *cobra.Command {
	var w where
	var copied, key string
	var heads []string
	c := &cobra.Command{
		Use:   "verify",
		Short: "Check that nothing in the log was changed",
		Long: `Without --copy, the log that the configuration names is computed anew, and compared with all that is stored and with the heads
given. With --copy, an exported copy (JSON lines) is checked without server or configuration, against signed heads and the
public key that "newel audit export --checkpoint" prints.`,
		Example: `  newel audit verify --checkpoint 2026-11-01.checkpoint
  newel audit verify --copy log.jsonl --checkpoint log.checkpoint --key newel+1a2b3c4d+…`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if copied != "" {
				if key == "" || len(heads) == 0 {
					return errors.New("a copy is checked with --checkpoint and --key")
				}
				if err := env.verifyCopy(copied, key, heads); err != nil {
					return exit(exitFailed, err)
				}
				return nil
			}
			return w.with(cmd.Context(), env, func(t *trail) error {
				tree, wrong := audit.Check(cmd.Context(), t)
				if wrong != nil && !errors.Is(wrong, audit.ErrValues) {
					return wrong
				}
				if key == "" {
					key = t.signer.VerifierKey()
				}
				trees, err := checkpoints(heads, key)
				if err != nil {
					return err
				}
				for i, earlier := range trees {
					if earlier.N == 0 {
						continue
					}
					proof, err := audit.ProveConsistency(tree.N, earlier.N, audit.RowsOf(cmd.Context(), t))
					if err == nil {
						err = audit.Consistent(proof, tree, earlier)
					}
					if err != nil {
						return fmt.Errorf("%s: %w", heads[i], err)
					}
				}
				fmt.Fprintf(env.out, "The log is whole: %d records, %d heads.\n", tree.N, len(trees))
				return wrong
			})
		},
	}
	w.flags(c)
	c.Flags().StringVar(&copied, "copy", "", "exported copy to check (JSON lines)")
	c.Flags().StringArrayVar(&heads, "checkpoint", nil, "file with a signed head; may be given several times")
	c.Flags().StringVar(&key, "key", "", "public key of the log")
	return c
}

func checkpoints(files []string, key string) ([]tlog.Tree, error) {
	var trees []tlog.Tree
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		tree, err := audit.OpenCheckpoint(b, key)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		trees = append(trees, tree)
	}
	return trees, nil
}

func (e *environment) verifyCopy(file, key string, heads []string) (err error) {
	trees, err := checkpoints(heads, key)
	if err != nil {
		return err
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	r, err := audit.Verify(f, trees...)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	fmt.Fprintf(e.out, "The copy is whole: %d records, %d values; %d values are not in it.\n", r.Tree.N, r.Values, r.Erased)
	return nil
}

func auditExport(env *environment) *cobra.Command {
	var w where
	var format, head string
	var from int64
	var values bool
	c := &cobra.Command{
		Use:   "export",
		Short: "Write the log for keeping or for another system",
		Example: `  newel audit export --checkpoint log.checkpoint > log.jsonl
  newel audit export --format cef --from 1200`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if head != "" && (from != 0 || format != "jsonl") {
				return errors.New("--checkpoint belongs to a whole copy: --format jsonl, from 0")
			}
			if values && format != "jsonl" {
				return errors.New("--values belongs to --format jsonl")
			}
			return w.with(cmd.Context(), env, func(t *trail) error {
				known := int64(-1) // the last record whose values may be read
				if values {
					var err error
					if known, err = t.announce(cmd.Context(), &clerk{&w, cmd, env}, from); err != nil {
						return err
					}
				}
				out := bufio.NewWriter(env.out)
				edge, err := t.each(cmd.Context(), from, func(row *audit.Row, rec *audit.Record) error {
					line, err := t.line(format, row.Index <= known, row, rec)
					if err != nil {
						return err
					}
					_, err = out.Write(line)
					return err
				})
				if err = errors.Join(err, out.Flush()); err != nil || head == "" {
					return err
				}
				signed, err := t.signer.Sign(edge.Tree())
				if err != nil {
					return err
				}
				fmt.Fprintf(env.err, "Check the copy with --key %s\n", t.signer.VerifierKey())
				return os.WriteFile(head, signed, 0o600)
			})
		},
	}
	w.flags(c)
	c.Flags().StringVar(&format, "format", "jsonl", "jsonl, cef, ocsf or syslog")
	c.Flags().Int64Var(&from, "from", 0, "index of the first record")
	c.Flags().BoolVar(&values, "values", false, "with the values, decrypted (jsonl)")
	c.Flags().StringVar(&head, "checkpoint", "", "file that gets the signed head of the copy")
	return c
}

// announce writes down that the values of all records from index from on are read, and returns the last
// of them: what comes later was not announced.
func (t *trail) announce(ctx context.Context, k *clerk, from int64) (last int64, _ error) {
	l := approvals.Looking{First: from, Last: from}
	_, err := t.each(ctx, from, func(row *audit.Row, rec *audit.Record) error {
		values, err := t.values(row, rec)
		if len(values) > 0 {
			l.Count++
		}
		l.Last = row.Index
		return err
	})
	if err != nil {
		return 0, err
	}
	return l.Last, k.looks(ctx, l)
}

// line is one record in a format.
func (t *trail) line(format string, withValues bool, row *audit.Row, rec *audit.Record) ([]byte, error) {
	e := audit.Event{Index: row.Index, Record: rec}
	switch format {
	case "cef":
		return audit.AppendCEF(nil, e), nil
	case "ocsf":
		return audit.AppendOCSF(nil, e)
	case "syslog":
		host, err := os.Hostname()
		if err != nil {
			host = "-"
		}
		return audit.AppendSyslog(nil, e, host), nil
	case "jsonl":
		l := &audit.Line{Index: row.Index, Record: row.Record}
		if withValues {
			var err error
			if l.Values, err = t.values(row, rec); err != nil {
				return nil, err
			}
		}
		return audit.AppendLine(nil, l)
	}
	return nil, fmt.Errorf("there is no format %q; jsonl, cef, ocsf and syslog are known", format)
}
