package audit

import (
	"errors"
	"math"
	"testing"
)

func TestRanges(t *testing.T) {
	for want, in := range map[string][]int64{"": nil, "7": {7}, "3,7-9,11": {3, 7, 8, 9, 11}, "0-1": {0, 1}} {
		if got := Ranges(in); got != want {
			t.Errorf("%d: %q, want %q", in, got, want)
		}
		r := Record{Act: Erased, Records: want}
		for i := range int64(13) {
			is := false
			for _, v := range in {
				is = is || v == i
			}
			if r.Erases(i) != is {
				t.Errorf("%q erases %d: %v", want, i, !is)
			}
		}
	}
	for _, bad := range []string{"x", "1-", "-1", "2-1", "1,,2", "1 ", "9223372036854775808"} {
		if r := (Record{Act: Erased, Records: bad}); r.Erases(1) {
			t.Errorf("%q is taken", bad)
		}
	}
	if r := (Record{Act: AuditRead, Records: "1"}); r.Erases(1) {
		t.Error("reading erases")
	}
	worst := make([]int64, MaxErase)
	for i := range worst {
		worst[i] = math.MaxInt64 - int64(2*(len(worst)-i))
	}
	r := Record{Act: Erased, Records: Ranges(worst), Time: "2026-11-21T10:00:00.000000Z"}
	if b, err := r.Encode(); err != nil {
		t.Errorf("what is erased at once does not fit a record: %d, %v", len(b), err)
	}
}

func TestMark(t *testing.T) {
	for _, by := range []int64{0, 1, math.MaxInt64} {
		if got, ok := ErasedBy(Mark(by)); !ok || got != by {
			t.Errorf("%d: %d, %v", by, got, ok)
		}
	}
	for _, other := range [][]byte{nil, {}, make([]byte, MarkSize), Mark(1)[1:], append(Mark(1), 0)} {
		if _, ok := ErasedBy(other); ok {
			t.Errorf("%q is a mark", other)
		}
	}
}

// A record that erases what comes after it was written by nobody.
func TestErasesTheFuture(t *testing.T) {
	var edge Edge
	b, err := (&Record{Act: Erased, Records: "0-5", Time: "2026-11-21T10:00:00.000000Z"}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	row := edge.Append(Entry{Record: b})
	if _, err := Check(t.Context(), &log{edge, []Row{row}}); !errors.Is(err, ErrTampered) {
		t.Errorf("got %v", err)
	}
}
