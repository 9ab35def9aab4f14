package audit

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// An Eraser is a log whose values can be erased. The tree stays as it is: it has digests alone.
type Eraser interface {
	Source
	// Erase puts [Mark] in the place of the values of records, in the transaction that appends entry,
	// which says so. Records without values, or that are not there, stay as they are. It returns the
	// index of entry.
	Erase(ctx context.Context, records []int64, entry Entry) (int64, error)
	// Append adds records. It returns the index of the first.
	Append(ctx context.Context, entries []Entry) (int64, error)
}

// MaxErase bounds the records that are erased in one transaction: their list fits a record.
const MaxErase = 500

// MarkSize is the length of a mark. Sealed values are longer.
const MarkSize = 16

const markHead = "erased\x00\x01"

// Mark stands in the place of values that the record by says were erased.
func Mark(by int64) []byte { return binary.BigEndian.AppendUint64([]byte(markHead), uint64(by)) }

// ErasedBy returns the record by which values were erased; ok is false if they were not.
func ErasedBy(private []byte) (by int64, ok bool) {
	if len(private) != MarkSize || string(private[:len(markHead)]) != markHead {
		return 0, false
	}
	return int64(binary.BigEndian.Uint64(private[len(markHead):])), true
}

// hasValues reports whether there is something to erase.
func (r *Row) hasValues() bool {
	_, erased := ErasedBy(r.Private)
	return len(r.Private) > 0 && !erased
}

// Ranges writes indexes, in order and each once, as 3,7-9.
func Ranges(indexes []int64) string {
	var b strings.Builder
	for i := 0; i < len(indexes); {
		last := i
		for last+1 < len(indexes) && indexes[last+1] == indexes[last]+1 {
			last++
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(strconv.FormatInt(indexes[i], 10))
		if last > i {
			b.WriteString("-" + strconv.FormatInt(indexes[last], 10))
		}
		i = last + 1
	}
	return b.String()
}

// eachRange calls f for every range of indexes in text, or returns an error if it is none.
func eachRange(text string, f func(from, to int64) error) error {
	for part := range strings.SplitSeq(text, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		from, err := strconv.ParseInt(first, 10, 64)
		to, err2 := strconv.ParseInt(last, 10, 64)
		if errors.Join(err, err2) != nil || from < 0 || to < from {
			return fmt.Errorf("%q are not the records of a record", text)
		}
		if err := f(from, to); err != nil {
			return err
		}
	}
	return nil
}

// Erases reports whether r says that the values of a record were erased.
func (r *Record) Erases(index int64) bool {
	found := false
	return r.Act == Erased && eachRange(r.Records, func(from, to int64) error {
		found = found || from <= index && index <= to
		return nil
	}) == nil && found
}

// A Selection chooses records. Empty fields choose all; one that is all empty is refused.
type Selection struct {
	Records   []int64 `json:"records,omitempty"` // indexes
	Principal string  `json:"principal,omitzero"`
	Tenant    string  `json:"tenant,omitzero"`
	Tool      string  `json:"tool,omitzero"`  // name of a tool or prompt, URI of a resource
	Class     string  `json:"class,omitzero"` // effect: read, write, destructive or unknown
	Since     string  `json:"since,omitzero"` // not before this time, as records write it, or its beginning
	Until     string  `json:"until,omitzero"` // before this time
}

// Check refuses a selection that makes no sense.
func (s *Selection) Check() error {
	if len(s.Records) == 0 && s.Principal == "" && s.Tenant == "" && s.Tool == "" && s.Class == "" && s.Since == "" && s.Until == "" {
		return errors.New("say what to erase: records, principal, tenant, tool, class or time")
	}
	if len(s.Records) > MaxErase {
		return fmt.Errorf("at most %d records can be named at once", MaxErase)
	}
	if s.Class != "" && !slices.Contains([]string{"read", "write", "destructive", "unknown"}, s.Class) {
		return fmt.Errorf("%q is no class: read, write, destructive or unknown", s.Class)
	}
	for _, text := range []string{s.Since, s.Until} {
		if text != "" && (len(text) < 4 || strings.Trim(text[:4], "0123456789") != "" || len(text) > 32) {
			return fmt.Errorf("%q is no time: write it in UTC, such as 2026-11-21T08", text)
		}
	}
	return nil
}

func (s *Selection) chooses(index int64, r *Record) bool {
	return (len(s.Records) == 0 || slices.Contains(s.Records, index)) && (s.Principal == "" || s.Principal == r.Principal) && (s.Tenant == "" || s.Tenant == r.Tenant) &&
		(s.Tool == "" || s.Tool == r.Capability) && (s.Class == "" || s.Class == r.Effect) && (s.Since == "" || r.Time >= s.Since) && (s.Until == "" || r.Time < s.Until)
}

// An Erasure is one step of erasing.
type Erasure struct {
	Selection
	From   int64  `json:"from,omitzero"` // index to begin with
	By     string `json:"-"`             // who
	Reason string `json:"reason"`        // why
	Dry    bool   `json:"dry_run,omitzero"`
}

// Erasing is what one step did.
type Erasing struct {
	Erased int   `json:"erased"` // records whose values are gone; or, of a dry run, would be
	Next   int64 `json:"next"`   // where the next step begins; 0: that was all
}

// Bounds of one step.
const (
	stepRows = 20_000 // records looked at
	readRows = 64     // at once: values may be as long as arguments
)

// Erase erases values, and says so in the log, in one transaction for each [MaxErase] records.
func Erase(ctx context.Context, l Eraser, e *Erasure) (Erasing, error) {
	var done Erasing
	if err := e.Check(); err != nil {
		return done, err
	}
	if strings.TrimSpace(e.Reason) == "" && !e.Dry {
		return done, errors.New("say why: the reason is written down")
	}
	err := choose(ctx, l, &done, e.From, func(row *Row, r *Record) (bool, error) { return e.chooses(row.Index, r), nil }, func(records []int64) error {
		if e.Dry {
			return nil
		}
		return erase(ctx, l, records, e.By, e.Reason)
	})
	return done, err
}

// choose takes one step over the log and gives the records with values that are wanted to f.
func choose(ctx context.Context, l Eraser, done *Erasing, from int64, want func(*Row, *Record) (bool, error), f func(records []int64) error) error {
	head, err := l.Head(ctx)
	if err != nil {
		return err
	}
	var due []int64
	flush := func() error {
		if len(due) == 0 {
			return nil
		}
		if err := f(due); err != nil {
			return err
		}
		done.Erased += len(due)
		due = nil
		return nil
	}
	end := min(head.Size, from+stepRows)
	for from < end {
		rows, err := l.Read(ctx, from, int(min(readRows, end-from)))
		if err != nil {
			return err
		}
		if len(rows) == 0 {
			break
		}
		for i := range rows {
			row := &rows[i]
			from = row.Index + 1
			if !row.hasValues() {
				continue
			}
			r, err := Decode(row.Record)
			if err != nil {
				return fmt.Errorf("%w: record %d: %w", ErrTampered, row.Index, err)
			}
			wanted, err := want(row, r)
			if err != nil {
				return err
			}
			if wanted {
				if due = append(due, row.Index); len(due) == MaxErase {
					if err := flush(); err != nil {
						return err
					}
				}
			}
		}
	}
	if from < head.Size {
		done.Next = from
	}
	return flush()
}

func erase(ctx context.Context, l Eraser, records []int64, by, reason string) error {
	r := Record{Act: Erased, By: clip(by), Count: int64(len(records)), Reason: clip(reason), Records: Ranges(records), Time: Time(time.Now())}
	b, err := r.Encode()
	if err != nil {
		return err
	}
	_, err = l.Erase(ctx, records, Entry{Record: b})
	return err
}

// clip makes text fit a record.
func clip(s string) string {
	const most = 1024
	return strings.ToValidUTF8(s[:min(len(s), most)], "�")
}

// NoteRead writes down that somebody looks at the values of records, from first to last, before they
// see them. count is how many have values.
func NoteRead(ctx context.Context, l Eraser, by string, first, last, count int64) error {
	r := Record{Act: AuditRead, By: clip(by), Count: count, Records: strconv.FormatInt(first, 10), Time: Time(time.Now())}
	if last > first {
		r.Records += "-" + strconv.FormatInt(last, 10)
	}
	b, err := r.Encode()
	if err != nil {
		return err
	}
	_, err = l.Append(ctx, []Entry{{Record: b}})
	return err
}

// Retention says how long values are kept, by the effect of their calls; 0: until somebody erases
// them. What nobody knows the effect of counts as destructive.
type Retention struct{ Read, Write, Destructive time.Duration }

// Forever reports whether nothing is erased by age.
func (t *Retention) Forever() bool { return *t == Retention{} }

func (t *Retention) of(r *Record) time.Duration {
	switch r.Effect {
	case "read":
		return t.Read
	case "write":
		return t.Write
	}
	return t.Destructive
}

const retainEvery = 10 * time.Minute

// Run erases values past their time, until ctx ends. failed is told of errors; the next round tries
// again.
func (t *Retention) Run(ctx context.Context, l Eraser, failed func(error)) {
	tick := time.NewTicker(retainEvery)
	defer tick.Stop()
	from := int64(0) // all before have no values, or are kept for ever
	for {
		var err error
		if from, _, err = t.Prune(ctx, l, from); err != nil && ctx.Err() == nil {
			failed(err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Prune erases values past their time, of records from index from on. It returns where the next round
// has to begin, and how many records it erased.
func (t *Retention) Prune(ctx context.Context, l Eraser, from int64) (next int64, erased int, err error) {
	if t.Forever() {
		return from, 0, nil
	}
	now := time.Now()
	waits := int64(-1) // the first that is not due yet
	for at := from; ; {
		var done Erasing
		err := choose(ctx, l, &done, at, func(row *Row, r *Record) (bool, error) {
			keep := t.of(r)
			if keep == 0 {
				return false, nil
			}
			due := r.Time < Time(now.Add(-keep))
			if !due && waits < 0 {
				waits = row.Index
			}
			return due, nil
		}, func(records []int64) error { return erase(ctx, l, records, "retention", "audit.retention") })
		erased += done.Erased
		if err != nil {
			return from, erased, err
		}
		if done.Next == 0 {
			head, err := l.Head(ctx)
			if err != nil {
				return from, erased, err
			}
			if waits < 0 {
				waits = min(head.Size, max(at, from))
			}
			return waits, erased, nil
		}
		at = done.Next
	}
}

// ErrValues says that the tree is whole, but values are not as it says.
var ErrValues = errors.New("the records are whole, but values are not as they say")

// erasures are what a check knows of values that were erased.
type erasures struct {
	gone   map[int64]int64 // by which record
	back   []int64         // that should be gone
	said   map[int64]int64 // by which record back should be
	listed map[int64]bool
	lost   []int64 // gone, and nobody says so
}

func newErasures() *erasures {
	return &erasures{gone: map[int64]int64{}, said: map[int64]int64{}, listed: map[int64]bool{}}
}

// see takes note of one row.
func (e *erasures) see(row *Row, r *Record) error {
	if by, ok := ErasedBy(row.Private); ok {
		e.gone[row.Index] = by
	} else if len(row.Private) == 0 && len(r.Digests) > 0 && (r.Act == Intent || r.Act == Outcome) { // of others only digests are kept
		e.lost = append(e.lost, row.Index)
	}
	if r.Act != Erased {
		return nil
	}
	return eachRange(r.Records, func(from, to int64) error {
		if to >= row.Index || to-from >= MaxErase {
			return fmt.Errorf("%w: record %d erases what was not there", ErrTampered, row.Index)
		}
		for i := from; i <= to; i++ {
			if by, gone := e.gone[i]; !gone {
				e.back, e.said[i] = append(e.back, i), row.Index
			} else if by == row.Index {
				e.listed[i] = true
			}
		}
		return nil
	})
}

// check says what is wrong. What was erased while the log was read is looked at once more.
func (e *erasures) check(ctx context.Context, s Source) error {
	var errs []error
	problem := func(format string, args ...any) {
		if len(errs) < 20 {
			errs = append(errs, fmt.Errorf("%w: "+format, append([]any{ErrValues}, args...)...))
		}
	}
	for _, i := range e.back {
		rows, err := s.Read(ctx, i, 1)
		if err != nil {
			return err
		}
		if len(rows) == 1 && rows[0].Index == i && rows[0].hasValues() {
			problem("record %d says that those of record %d were erased, and they are there (from a backup?); erase them again", e.said[i], i)
		}
	}
	for _, i := range e.lost {
		problem("those of record %d are gone, and nobody erased them", i)
	}
	for i, by := range e.gone {
		if !e.listed[i] {
			problem("those of record %d should have been erased by record %d, which does not say so", i, by)
		}
	}
	return errors.Join(errs...)
}
