package audit

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"golang.org/x/mod/sumdb/tlog"
)

// A Line is one record of an exported copy, as JSON lines have it.
type Line struct {
	Index  int64          `json:"index"`
	Record jsontext.Value `json:"record"` // canonical, byte for byte
	Values []Value        `json:"values,omitempty"`
}

// AppendLine appends the line and its end.
func AppendLine(dst []byte, l *Line) ([]byte, error) {
	b, err := json.Marshal(l)
	if err != nil {
		return nil, fmt.Errorf("audit: a line cannot be encoded: %w", err)
	}
	return append(append(dst, b...), '\n'), nil
}

// maxLine bounds a line of a copy: values may be as long as answers.
const maxLine = 8 << 20

// A Report is what checking a copy found.
type Report struct {
	Tree   tlog.Tree // of the copy
	Values int       // that were there and are those of their digests
	Erased int       // digests whose value is gone
}

// Verify checks a copy of the log against checkpoints, without the server: every record is in
// canonical form and in its place, every value is that of its digest, every checkpoint is the
// copy's tree at its size. The copy must reach to the largest checkpoint; what it has beyond is
// not vouched for by anybody, and refused. The error wraps [ErrTampered] if the copy does not fit.
func Verify(copied io.Reader, checkpoints ...tlog.Tree) (*Report, error) {
	if len(checkpoints) == 0 {
		return nil, errors.New("audit: a copy is checked against a checkpoint, and there is none")
	}
	roots := map[int64]tlog.Hash{}
	newest := int64(0)
	for _, c := range checkpoints {
		if h, ok := roots[c.N]; ok && h != c.Hash {
			return nil, fmt.Errorf("%w: two checkpoints of size %d have different roots", ErrTampered, c.N)
		}
		roots[c.N] = c.Hash
		newest = max(newest, c.N)
	}
	var edge Edge
	var r Report
	check := func() error {
		if h, ok := roots[edge.Size]; ok && h != edge.Root() {
			return fmt.Errorf("%w: the records up to %d are not those of the checkpoint", ErrTampered, edge.Size-1)
		}
		return nil
	}
	if err := check(); err != nil {
		return nil, err
	}
	lines := bufio.NewScanner(copied)
	lines.Buffer(make([]byte, 0, 64<<10), maxLine)
	for lines.Scan() {
		text := bytes.TrimSpace(lines.Bytes())
		if len(text) == 0 {
			continue
		}
		if edge.Size >= newest {
			return nil, fmt.Errorf("%w: the copy has records after the %d of the checkpoint", ErrTampered, newest)
		}
		var l Line
		if err := json.Unmarshal(text, &l); err != nil {
			return nil, fmt.Errorf("%w: line %d of the copy is not a record: %w", ErrTampered, edge.Size+1, err)
		}
		if l.Index != edge.Size {
			return nil, fmt.Errorf("%w: record %d stands where %d should", ErrTampered, l.Index, edge.Size)
		}
		if err := r.record(&l); err != nil {
			return nil, err
		}
		edge.Append(Entry{Record: l.Record})
		if err := check(); err != nil {
			return nil, err
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("audit: the copy cannot be read: %w", err)
	}
	if edge.Size < newest {
		return nil, fmt.Errorf("%w: the copy ends after %d records, the checkpoint has %d", ErrTampered, edge.Size, newest)
	}
	r.Tree = edge.Tree()
	return &r, nil
}

// record checks one record and its values.
func (r *Report) record(l *Line) error {
	rec, err := Decode(l.Record)
	if err != nil {
		return fmt.Errorf("%w: record %d: %w", ErrTampered, l.Index, err)
	}
	for _, d := range rec.Digests {
		found := false
		for i := range l.Values {
			v := &l.Values[i]
			if v.Name != d.Name {
				continue
			}
			if found = true; v.Data == nil {
				r.Erased++
			} else if !v.Matches(d) {
				return fmt.Errorf("%w: the value %q of record %d is not the one that was recorded", ErrTampered, d.Name, l.Index)
			} else {
				r.Values++
			}
		}
		if !found {
			r.Erased++
		}
	}
	return nil
}
