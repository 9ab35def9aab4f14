package storetest

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"newel.dev/newel/internal/audit"
)

// record appends a record with a value, of alice's calls of pay unless change says otherwise.
func record(t *testing.T, e Engine, change func(r *audit.Record)) int64 {
	t.Helper()
	v := audit.NewValue("arguments", []byte(`{"to":"bob"}`))
	r := &audit.Record{Act: audit.Intent, Capability: "pay", Principal: "alice", Tenant: "acme", Effect: "write", Digests: []audit.Digest{v.Digest()}, Time: audit.Time(time.Now())}
	change(r)
	b, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	i, err := e.Append(t.Context(), []audit.Entry{{Record: b, Private: []byte(private)}})
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// kept returns the records that have values.
func kept(t *testing.T, e Engine) (out []int64) {
	t.Helper()
	rows, err := e.Read(t.Context(), 0, 10_000)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rows {
		if _, erased := audit.ErasedBy(r.Private); len(r.Private) > 0 && !erased {
			out = append(out, r.Index)
		}
	}
	return out
}

// last returns the newest record.
func last(t *testing.T, e Engine) (int64, *audit.Record) {
	t.Helper()
	head, err := e.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	rows, err := e.Read(t.Context(), head.Size-1, 1)
	if err != nil || len(rows) != 1 {
		t.Fatal(rows, err)
	}
	r, err := audit.Decode(rows[0].Record)
	if err != nil {
		t.Fatal(err)
	}
	return head.Size - 1, r
}

// erases takes values away: what was chosen and nothing else, with a record that says so, and the tree
// stays as it was.
func erases(t *testing.T, e, other Engine) {
	at := func(day string) func(*audit.Record) {
		return func(r *audit.Record) { r.Time = "2026-11-" + day + "T10:00:00.000000Z" }
	}
	record(t, e, at("01"))                                                                              // 0
	record(t, e, func(r *audit.Record) { at("02")(r); r.Principal = "mallory" })                        // 1
	record(t, e, func(r *audit.Record) { at("03")(r); r.Capability, r.Effect = "wipe", "destructive" }) // 2
	record(t, other, func(r *audit.Record) { at("04")(r); r.Tenant = "other" })                         // 3
	record(t, e, at("05"))                                                                              // 4
	head, err := e.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	before := head.Tree()
	step := func(want string, n int, s audit.Selection, left ...int64) {
		t.Helper()
		for _, dry := range []bool{true, false} {
			size, _ := last(t, e)
			done, err := audit.Erase(t.Context(), other, &audit.Erasure{Selection: s, By: "root", Reason: "asked for", Dry: dry})
			if err != nil || done.Erased != n || done.Next != 0 {
				t.Fatalf("%+v (dry: %v): %+v, %v", s, dry, done, err)
			}
			if now, r := last(t, e); dry && now != size || !dry && n > 0 && (now != size+1 || r.Act != audit.Erased || r.By != "root" || r.Reason != "asked for" || r.Records != want || r.Count != int64(n)) {
				t.Errorf("%+v (dry: %v) left %d, %+v", s, dry, now, r)
			}
		}
		if got := kept(t, e); !slices.Equal(got, left) {
			t.Errorf("%+v left the values of %d, want %d", s, got, left)
		}
		Check(t, e)
	}
	step("", 0, audit.Selection{Principal: "nobody"}, 0, 1, 2, 3, 4)
	step("1", 1, audit.Selection{Principal: "mallory"}, 0, 2, 3, 4)
	step("2", 1, audit.Selection{Class: "destructive", Tool: "wipe"}, 0, 3, 4)
	step("3", 1, audit.Selection{Tenant: "other"}, 0, 4)
	step("0", 1, audit.Selection{Since: "2026-11-01", Until: "2026-11-02"}, 4)
	step("4", 1, audit.Selection{Records: []int64{4, 3, 1000}})
	step("", 0, audit.Selection{Tool: "pay"})
	for name, e := range map[string]*audit.Erasure{
		"everything": {Reason: "r"},
		"no reason":  {Selection: audit.Selection{Tool: "pay"}, Reason: " "},
		"no class":   {Selection: audit.Selection{Class: "both"}, Reason: "r"},
		"no time":    {Selection: audit.Selection{Since: "yesterday"}, Reason: "r"},
		"too many":   {Selection: audit.Selection{Records: make([]int64, audit.MaxErase+1)}, Reason: "r"},
	} {
		if _, err := audit.Erase(t.Context(), other, e); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	// Every record is still where it was.
	rows := audit.RowsOf(t.Context(), e)
	now, err := e.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	proof, err := audit.ProveConsistency(now.Size, before.N, rows)
	if err == nil {
		err = audit.Consistent(proof, now.Tree(), before)
	}
	if err != nil {
		t.Error(err)
	}
	many := make([]audit.Entry, audit.MaxErase+100)
	for i := range many {
		many[i] = Entry(audit.Intent, "many")
	}
	first, err := e.Append(t.Context(), many)
	if err != nil {
		t.Fatal(err)
	}
	if done, err := audit.Erase(t.Context(), e, &audit.Erasure{Selection: audit.Selection{Since: "2026-11-06"}, By: "root", Reason: "many"}); err != nil || done.Erased != len(many) {
		t.Fatal(done, err)
	}
	size, r := last(t, e)
	if want := audit.Ranges([]int64{first + audit.MaxErase, first + audit.MaxErase + 1}); !strings.HasPrefix(r.Records, strings.Split(want, "-")[0]+"-") || size != first+int64(len(many))+1 {
		t.Errorf("many were erased by %d: %+v", size, r)
	}
	if got := kept(t, e); len(got) != 0 {
		t.Errorf("values are left: %d", got)
	}
}

// erasedByAge is retention: by class, and what is kept for ever stays.
func erasedByAge(t *testing.T, e, other Engine) {
	ago := func(d time.Duration, class string) func(*audit.Record) {
		return func(r *audit.Record) { r.Time, r.Effect = audit.Time(time.Now().Add(-d)), class }
	}
	for _, class := range []string{"write", "destructive", "read", "unknown"} {
		record(t, e, ago(50*time.Hour, class)) // 0-3
		record(t, e, ago(30*time.Hour, class)) // 4-7, in turn with those
	}
	keep := audit.Retention{Write: 40 * time.Hour, Destructive: 20 * time.Hour}
	next, erased, err := keep.Prune(t.Context(), e, 0)
	if err != nil || erased != 5 || next != 1 {
		t.Fatal(next, erased, err)
	}
	if got := kept(t, other); !slices.Equal(got, []int64{1, 4, 5}) {
		t.Errorf("the values of %d are left", got)
	}
	if _, r := last(t, e); r.By != "retention" || r.Records != "0,2-3,6-7" {
		t.Errorf("it says %+v", r)
	}
	size, _ := last(t, e)
	if next, erased, err := keep.Prune(t.Context(), other, next); err != nil || erased != 0 || next != 1 {
		t.Error(next, erased, err)
	}
	if now, _ := last(t, e); now != size {
		t.Error("nothing was erased, and that was written down")
	}
}

// Restored puts values back that were erased, or takes some away, as somebody with the database can;
// set does it. The check has to say so, and that the tree is whole all the same.
func Restored(t *testing.T, e Engine, set func(index int64, private []byte)) {
	for range 3 {
		record(t, e, func(*audit.Record) {})
	}
	ctx := t.Context()
	if _, err := audit.Erase(ctx, e, &audit.Erasure{Selection: audit.Selection{Records: []int64{1}}, By: "root", Reason: "asked for"}); err != nil {
		t.Fatal(err)
	}
	finds := func(what, want string) {
		t.Helper()
		tree, err := audit.Check(ctx, e)
		if !errors.Is(err, audit.ErrValues) || errors.Is(err, audit.ErrTampered) || tree.N == 0 || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v", what, tree.N, err)
		}
	}
	mark := audit.Mark(3)
	set(1, []byte(private))
	finds("a value came back", "record 3 says that those of record 1 were erased, and they are there")
	if _, err := audit.Erase(ctx, e, &audit.Erasure{Selection: audit.Selection{Records: []int64{1}}, By: "root", Reason: "it came back"}); err != nil {
		t.Fatal(err)
	}
	Check(t, e)
	set(0, nil)
	finds("a value went", "those of record 0 are gone, and nobody erased them")
	set(0, mark)
	finds("a value went, with a mark", "those of record 0 should have been erased by record 3, which does not say so")
	set(0, []byte(private))
	Check(t, e)
	rows, err := e.Read(context.WithoutCancel(ctx), 1, 1)
	if err != nil || len(rows) != 1 {
		t.Fatal(rows, err)
	}
	if by, ok := audit.ErasedBy(rows[0].Private); !ok || by != 4 {
		t.Errorf("it was erased by %d, %v", by, ok)
	}
}
