package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"golang.org/x/mod/sumdb/tlog"
)

func record(i int) Entry {
	r := Record{Act: Intent, Capability: "pay", Principal: "alice", Tenant: "acme", Operation: fmt.Sprint("op", i), Time: Time(time.Unix(1700000000, 0))}
	b, err := r.Encode()
	if err != nil {
		panic(err)
	}
	return Entry{Record: b}
}

// log is an engine for tests.
type log struct {
	edge Edge
	rows []Row
}

func (l *log) add(n int) {
	for range n {
		l.rows = append(l.rows, l.edge.Append(record(len(l.rows))))
	}
}

func (l *log) read(indexes []int64) (map[int64][]byte, error) {
	out := map[int64][]byte{}
	for _, i := range indexes {
		out[i] = l.rows[i].Hashes
	}
	return out, nil
}

// TestEncoding compares what is written by hand with what the library for JSON makes of it: each
// field alone, all together and none, so that no new field is forgotten.
func TestEncoding(t *testing.T) {
	same := func(r Record) {
		t.Helper()
		got, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		want, err := json.Marshal(&r)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != string(want) {
			t.Errorf("encoded\n%s, want\n%s", got, want)
		}
	}
	var all Record
	for i := range reflect.TypeFor[Record]().NumField() {
		var one Record
		for _, r := range []*Record{&one, &all} {
			switch f := reflect.ValueOf(r).Elem().Field(i); f.Kind() {
			case reflect.String:
				f.SetString(fmt.Sprintf("%d \"\\\x00\x1f\n\u2028<&>é😀", i))
			case reflect.Int, reflect.Int64:
				f.SetInt(-1<<53 - int64(i))
			default:
				f.Set(reflect.ValueOf([]Digest{{"a\t", "b"}, {"", "c"}}))
			}
		}
		same(one)
	}
	same(all)
	same(Record{})
	if _, err := (&Record{Rule: "\xff"}).Encode(); err == nil {
		t.Error("text that is not UTF-8 was taken")
	}
	for _, values := range [][]Value{{}, {{}}, {{Name: "a\"", Salt: []byte{1, 2}}, {Name: "b", Salt: []byte{3}, Data: []byte("data")}}} {
		got, err := EncodeValues(values)
		if err != nil {
			t.Fatal(err)
		}
		want, err := json.Marshal(values)
		if err != nil || string(got) != string(want) {
			t.Errorf("encoded %s, want %s (%v)", got, want, err)
		}
	}
}

func TestRecordIsCanonical(t *testing.T) {
	r := Record{Act: Outcome, Capability: "ü</script>\u2028\x01", Client: "c", Code: "failed", Correlation: "x", Count: 3, Digests: []Digest{{"args", "00"}},
		Door: "http", Effect: "write", Fence: 2, From: "f", Kind: "tool", Operation: "o", Outcome: "completed", Pin: "p", Principal: "p", Reason: "r", Records: "1-2", Rule: "r", Server: "/mcp", Tenant: "t", Time: Time(time.Now())}
	b, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	v := jsontext.Value(b).Clone()
	if err := v.Canonicalize(); err != nil || string(v) != string(b) {
		t.Errorf("encoded\n%s\ncanonical\n%s (%v)", b, v, err)
	}
	back, err := Decode(b)
	if err != nil || back.Capability != r.Capability || back.Fence != 2 {
		t.Errorf("got %+v, %v", back, err)
	}
	if _, err := Decode([]byte(`{"v":1,"act":"intent","time":""}`)); err == nil {
		t.Error("members out of order are accepted")
	}
	if _, err := (&Record{Capability: strings.Repeat("x", MaxRecord)}).Encode(); err == nil {
		t.Error("a record without bound is accepted")
	}
}

// TestTree holds the edge against the library, at every size to 70, and every proof between them.
func TestTree(t *testing.T) {
	var l log
	var roots []tlog.Tree
	for n := range 70 {
		want, err := tlog.TreeHash(int64(n), Rows(l.read))
		if err != nil || want != l.edge.Root() {
			t.Fatalf("size %d: root differs (%v)", n, err)
		}
		roots = append(roots, l.edge.Tree())
		b, err := l.edge.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		back, err := ParseEdge(l.edge.Size, b)
		if err != nil || back.Root() != want {
			t.Fatalf("size %d: the edge does not survive storing: %v", n, err)
		}
		l.edge = back
		l.add(1)
	}
	tree := l.edge.Tree()
	for i := range l.rows {
		p, err := Prove(tree.N, int64(i), l.read)
		if err != nil {
			t.Fatal(err)
		}
		if err := Included(p, tree, int64(i), l.rows[i].Record); err != nil {
			t.Error(err)
		}
		if err := Included(p, tree, int64(i), []byte("another")); !errors.Is(err, ErrTampered) {
			t.Errorf("another record is included: %v", err)
		}
	}
	for _, earlier := range roots[1:] {
		p, err := ProveConsistency(tree.N, earlier.N, l.read)
		if err != nil {
			t.Fatal(err)
		}
		if err := Consistent(p, tree, earlier); err != nil {
			t.Error(err)
		}
		earlier.Hash[3] ^= 1
		if err := Consistent(p, tree, earlier); !errors.Is(err, ErrTampered) {
			t.Errorf("another past is consistent: %v", err)
		}
	}
	if _, err := ParseEdge(3, make([]byte, 32)); err == nil {
		t.Error("an edge that does not fit its size is accepted")
	}
	if _, err := Prove(tree.N, tree.N, l.read); err == nil {
		t.Error("a record after the end is proved")
	}
}

func TestCheckpoint(t *testing.T) {
	s, err := NewSigner("newel.example/log", bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	var l log
	l.add(5)
	c, err := s.Sign(l.edge.Tree())
	if err != nil {
		t.Fatal(err)
	}
	tree, err := OpenCheckpoint(c, s.VerifierKey())
	if err != nil || tree != l.edge.Tree() {
		t.Fatalf("got %v, %v", tree, err)
	}
	for i := range c {
		changed := bytes.Clone(c)
		changed[i] ^= 1
		if tree, err := OpenCheckpoint(changed, s.VerifierKey()); err == nil && tree != l.edge.Tree() {
			t.Fatalf("byte %d changed: another tree is vouched for", i)
		}
	}
	other, err := NewSigner("newel.example/log", bytes.Repeat([]byte{8}, 32))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenCheckpoint(c, other.VerifierKey()); !errors.Is(err, ErrTampered) {
		t.Errorf("another key: %v", err)
	}
	if _, err := NewSigner("two words", bytes.Repeat([]byte{8}, 32)); err == nil {
		t.Error("a name with a space is accepted")
	}
}

func TestVerify(t *testing.T) {
	var l log
	var copied []byte
	var trees []tlog.Tree
	for i := range 12 {
		v := NewValue("arguments", []byte(`{"amount":12}`))
		r := Record{Act: Intent, Operation: fmt.Sprint(i), Time: "t", Digests: []Digest{v.Digest()}}
		b, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		l.rows = append(l.rows, l.edge.Append(Entry{Record: b}))
		line := &Line{Index: int64(i), Record: b, Values: []Value{v}}
		if i == 4 {
			line.Values = nil // erased
		}
		if copied, err = AppendLine(copied, line); err != nil {
			t.Fatal(err)
		}
		trees = append(trees, l.edge.Tree())
	}
	report, err := Verify(bytes.NewReader(copied), trees[5], trees[11])
	if err != nil || report.Tree != trees[11] || report.Values != 11 || report.Erased != 1 {
		t.Fatalf("got %+v, %v", report, err)
	}
	text := string(copied)
	lines := strings.SplitAfter(text, "\n")
	for name, bad := range map[string]string{
		"truncated":     strings.Join(lines[:11], ""),
		"cut in a line": text[:len(text)-20],
		"one missing":   strings.Join(append(append([]string{}, lines[:3]...), lines[4:]...), ""),
		"swapped":       lines[1] + lines[0] + strings.Join(lines[2:], ""),
		"record":        strings.Replace(text, `"operation":"7"`, `"operation":"8"`, 1),
		"value":         strings.Replace(text, `"data":"eyJ`, `"data":"eyK`, 1),
		"more":          text + lines[0],
		"garbage":       "x\n" + text,
	} {
		if _, err := Verify(strings.NewReader(bad), trees[11]); !errors.Is(err, ErrTampered) {
			t.Errorf("%s: %v", name, err)
		}
	}
	wrong := trees[5]
	wrong.Hash[0] ^= 1
	if _, err := Verify(strings.NewReader(text), wrong, trees[11]); !errors.Is(err, ErrTampered) {
		t.Errorf("an earlier checkpoint that is no prefix: %v", err)
	}
	if _, err := Verify(strings.NewReader(text), trees[5]); !errors.Is(err, ErrTampered) {
		t.Errorf("records that nobody vouches for: %v", err)
	}
	if _, err := Verify(strings.NewReader(text)); err == nil {
		t.Error("verified against nothing")
	}
}

func TestExports(t *testing.T) {
	e := Event{Index: 7, Record: &Record{Act: Outcome, Capability: `pay|=\"]`, Code: "failed", Operation: "op", Outcome: "completed", Principal: "al\nice", Tenant: "acme", Effect: "write", Server: "/mcp", Time: "2026-11-21T08:00:00.000000Z"}}
	ocsf, err := AppendOCSF(nil, e)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ got, want string }{
		{string(AppendCEF(nil, e)), `CEF:0|Newel|newel|1|outcome|call ended: completed|5|rt=1795248000000 externalId=7 suser=al\nice act=pay|\=\\"] outcome=completed reason=failed cs1Label=tenant cs1=acme cs2Label=operation cs2=op cs4Label=server cs4=/mcp cs6Label=effect cs6=write` + "\n"},
		{string(AppendSyslog(nil, e, "host a")), `<109>1 2026-11-21T08:00:00.000000Z hosta newel - outcome [newel@32473 index="7" operation="op" tenant="acme" principal="al ice" server="/mcp" capability="pay|=\\\"\]" effect="write" outcome="completed" code="failed"] call ended: completed` + "\n"},
		{string(ocsf), `{"activity_id":3,"activity_name":"outcome","actor":{"app_uid":"","user":{"org":{"uid":"acme"},"uid":"al\nice"}},"api":{"operation":"pay|=\\\"]","request":{"uid":"op"},"response":{"error":"failed"},"service":{"name":"/mcp"}},"category_name":"Application Activity","category_uid":6,"class_name":"API Activity","class_uid":6003,"count":1,"message":"call ended: completed","metadata":{"correlation_uid":"","product":{"name":"newel","vendor_name":"Newel"},"uid":"7","version":"1.3.0"},"severity_id":2,"src_endpoint":{"type":"Unknown","type_id":0},"status":"Failure","status_id":2,"time":1795248000000,"type_uid":600303}` + "\n"},
	} {
		if c.got != c.want {
			t.Errorf("got\n%swant\n%s", c.got, c.want)
		}
	}
}

func (l *log) Head(context.Context) (Edge, error) { return l.edge.Clone(), nil }

func (l *log) Read(_ context.Context, from int64, limit int) ([]Row, error) {
	return l.rows[min(int(from), len(l.rows)):min(int(from)+limit, len(l.rows))], nil
}

// TestPublish is a log that grows, and one that is put back.
func TestPublish(t *testing.T) {
	s, err := NewSigner("test", bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	var l log
	p := &Publisher{Source: &l, Signer: s, File: filepath.Join(t.TempDir(), "deep", "checkpoint")}
	for range 4 {
		if err := p.Publish(t.Context()); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(p.File)
		if err != nil {
			t.Fatal(err)
		}
		if tree, err := OpenCheckpoint(b, s.VerifierKey()); err != nil || tree != l.edge.Tree() {
			t.Errorf("published %v, %v", tree, err)
		}
		l.add(3)
	}
	good := l
	l = log{}
	l.add(2)
	if err := p.Publish(t.Context()); !errors.Is(err, ErrTampered) {
		t.Errorf("a log that was put back is vouched for: %v", err)
	}
	l.rows = append(l.rows, l.edge.Append(record(99)))
	l.add(20)
	if err := p.Publish(t.Context()); !errors.Is(err, ErrTampered) {
		t.Errorf("another log is vouched for: %v", err)
	}
	l = good
	if err := p.Publish(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestCheck(t *testing.T) {
	var l log
	l.add(20)
	if tree, err := Check(t.Context(), &l); err != nil || tree != l.edge.Tree() {
		t.Fatal(tree, err)
	}
	l.rows[7].Record = record(8).Record
	if _, err := Check(t.Context(), &l); !errors.Is(err, ErrTampered) || !strings.Contains(err.Error(), "record 7") {
		t.Errorf("got %v", err)
	}
}

// A witness gets every head that it does not have, in order, and one that failed again.
func TestWitness(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := NewSigner("test", bytes.Repeat([]byte{7}, 32))
		if err != nil {
			t.Fatal(err)
		}
		var l log
		l.add(1)
		var mu sync.Mutex
		var given []tlog.Tree
		away := true
		failures := 0
		p := &Publisher{Source: &l, Signer: s, File: filepath.Join(t.TempDir(), "checkpoint"), Witness: func(_ context.Context, head []byte) error {
			mu.Lock()
			defer mu.Unlock()
			tree, err := OpenCheckpoint(head, s.VerifierKey())
			if err != nil {
				t.Error(err)
			}
			if away {
				return errors.New("connection refused")
			}
			given = append(given, tree)
			return nil
		}}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- p.Run(ctx, func(error) { failures++ }) }()
		synctest.Wait()
		mu.Lock()
		away = false
		mu.Unlock()
		time.Sleep(publishEvery) // of the bubble's clock
		synctest.Wait()
		time.Sleep(publishEvery) // nothing is new
		synctest.Wait()
		l.add(2)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if failures != 1 || len(given) != 2 || given[0].N != 1 || given[1].N != 3 {
			t.Errorf("%d failures, given %v", failures, given)
		}
	})
}
