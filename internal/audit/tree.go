package audit

import (
	"context"
	"errors"
	"fmt"
	"math/bits"

	"golang.org/x/mod/sumdb/tlog"
)

// An Edge is the right edge of a tree: the hashes of its complete subtrees, largest first, one for
// each bit of its size. It is all that appending needs, so an engine keeps it beside the size in
// one row. The zero value is the empty tree.
type Edge struct {
	Size   int64
	Hashes []tlog.Hash
}

// A Row is what an engine stores for one leaf. Hashes are those that the leaf completes: its own,
// then those of the subtrees that end with it.
type Row struct {
	Index int64
	Entry
	Hashes []byte // 32 bytes each
}

// Append adds one entry and returns its row.
func (e *Edge) Append(entry Entry) Row {
	h := Leaf(entry.Record)
	row := Row{Index: e.Size, Entry: entry, Hashes: append(make([]byte, 0, 2*tlog.HashSize), h[:]...)}
	for n := e.Size; n&1 == 1; n >>= 1 {
		last := len(e.Hashes) - 1
		h = tlog.NodeHash(e.Hashes[last], h)
		e.Hashes = e.Hashes[:last]
		row.Hashes = append(row.Hashes, h[:]...)
	}
	e.Hashes = append(e.Hashes, h)
	e.Size++
	return row
}

// Root is the hash of the whole tree.
func (e *Edge) Root() tlog.Hash {
	if len(e.Hashes) == 0 {
		h, _ := tlog.TreeHash(0, nil) // the empty tree has a defined hash and reads nothing
		return h
	}
	h := e.Hashes[len(e.Hashes)-1]
	for i := len(e.Hashes) - 2; i >= 0; i-- {
		h = tlog.NodeHash(e.Hashes[i], h)
	}
	return h
}

// Tree is size and root.
func (e *Edge) Tree() tlog.Tree { return tlog.Tree{N: e.Size, Hash: e.Root()} }

// Clone returns a copy to try things on.
func (e *Edge) Clone() Edge { return Edge{e.Size, append([]tlog.Hash(nil), e.Hashes...)} }

// MarshalBinary returns the hashes, for a column beside the size.
func (e *Edge) MarshalBinary() ([]byte, error) {
	out := make([]byte, 0, len(e.Hashes)*tlog.HashSize)
	for _, h := range e.Hashes {
		out = append(out, h[:]...)
	}
	return out, nil
}

// ParseEdge is the way back. It fails if the hashes cannot belong to a tree of that size.
func ParseEdge(size int64, hashes []byte) (Edge, error) {
	if size < 0 || len(hashes) != bits.OnesCount64(uint64(size))*tlog.HashSize {
		return Edge{}, fmt.Errorf("audit: %d bytes of hashes do not fit a tree of size %d", len(hashes), size)
	}
	e := Edge{Size: size, Hashes: make([]tlog.Hash, len(hashes)/tlog.HashSize)}
	for i := range e.Hashes {
		copy(e.Hashes[i][:], hashes[i*tlog.HashSize:])
	}
	return e, nil
}

// A Source is a log that is kept somewhere. Its methods are safe for concurrent use.
type Source interface {
	// Head returns the right edge of the tree.
	Head(ctx context.Context) (Edge, error)
	// Read returns at most limit records from index from on, in order.
	Read(ctx context.Context, from int64, limit int) ([]Row, error)
}

// Check computes the whole tree of a log anew and compares everything that is stored with it. The
// log may grow meanwhile. Check returns the tree, or an error that wraps [ErrTampered] and names the
// first place that differs. If the tree is whole but values are there that were erased, or gone that
// were not, it returns the tree and an error that wraps [ErrValues].
func Check(ctx context.Context, s Source) (tlog.Tree, error) {
	var edge Edge
	values := newErasures()
	for {
		head, err := s.Head(ctx)
		if err != nil {
			return tlog.Tree{}, err
		}
		if err := checkTo(ctx, s, &edge, head, values); err != nil {
			return tlog.Tree{}, err
		}
		more, err := s.Read(ctx, head.Size, 1)
		if err != nil {
			return tlog.Tree{}, err
		}
		if len(more) == 0 {
			return edge.Tree(), values.check(ctx, s)
		}
		if now, err := s.Head(ctx); err != nil || now.Size == head.Size {
			return tlog.Tree{}, errors.Join(fmt.Errorf("%w: there are records after the head", ErrTampered), err)
		}
	}
}

// checkTo goes on from edge to head.
func checkTo(ctx context.Context, s Source, edge *Edge, head Edge, values *erasures) error {
	for edge.Size < head.Size {
		rows, err := s.Read(ctx, edge.Size, int(min(head.Size-edge.Size, checkAtOnce)))
		if err != nil {
			return err
		}
		if len(rows) == 0 {
			return fmt.Errorf("%w: record %d is missing", ErrTampered, edge.Size)
		}
		for _, r := range rows {
			if r.Index != edge.Size {
				return fmt.Errorf("%w: record %d is missing", ErrTampered, edge.Size)
			}
			rec, err := Decode(r.Record)
			if err != nil {
				return fmt.Errorf("%w: record %d: %w", ErrTampered, r.Index, err)
			}
			if err := values.see(&r, rec); err != nil {
				return err
			}
			if want := edge.Append(r.Entry); string(want.Hashes) != string(r.Hashes) {
				return fmt.Errorf("%w: record %d is not the one that was written", ErrTampered, r.Index)
			}
		}
	}
	if edge.Size != head.Size || edge.Root() != head.Root() {
		return fmt.Errorf("%w: the head is not that of the records", ErrTampered)
	}
	return nil
}

const checkAtOnce = 512

// RowsOf returns the hashes of a source, for proofs.
func RowsOf(ctx context.Context, s Source) Rows {
	return func(indexes []int64) (map[int64][]byte, error) {
		out := make(map[int64][]byte, len(indexes))
		for _, i := range indexes { // some fifty in a log of a million million
			rows, err := s.Read(ctx, i, 1)
			if err != nil {
				return nil, err
			}
			if len(rows) == 1 && rows[0].Index == i {
				out[i] = rows[0].Hashes
			}
		}
		return out, nil
	}
}

// Rows reads the hashes of stored rows; an engine implements it with one query.
type Rows func(indexes []int64) (hashes map[int64][]byte, err error)

// ReadHashes implements tlog.HashReader.
func (r Rows) ReadHashes(stored []int64) ([]tlog.Hash, error) {
	want := make([]int64, 0, len(stored))
	seen := map[int64]bool{}
	for _, s := range stored {
		if row, _ := rowOf(s); !seen[row] {
			seen[row] = true
			want = append(want, row)
		}
	}
	got, err := r(want)
	if err != nil {
		return nil, err
	}
	out := make([]tlog.Hash, len(stored))
	for i, s := range stored {
		row, level := rowOf(s)
		b := got[row]
		if len(b) < (level+1)*tlog.HashSize {
			return nil, fmt.Errorf("audit: the hashes of leaf %d are missing", row)
		}
		copy(out[i][:], b[level*tlog.HashSize:])
	}
	return out, nil
}

// rowOf returns which leaf completes a stored hash, and its place among that leaf's hashes.
func rowOf(stored int64) (row int64, level int) {
	level, n := tlog.SplitStoredHashIndex(stored)
	return (n+1)<<level - 1, level
}

// ErrTampered says that what is stored does not belong to the tree.
var ErrTampered = errors.New("the log was changed")

// Prove returns the proof that leaf index is in the tree of size.
func Prove(size, index int64, rows Rows) (tlog.RecordProof, error) {
	if index < 0 || index >= size {
		return nil, fmt.Errorf("audit: there is no record %d in a log of %d", index, size)
	}
	return tlog.ProveRecord(size, index, rows)
}

// ProveConsistency returns the proof that the tree of size earlier is a prefix of that of size.
func ProveConsistency(size, earlier int64, rows Rows) (tlog.TreeProof, error) {
	if earlier < 1 || earlier > size {
		return nil, fmt.Errorf("audit: a log of %d has no earlier size %d", size, earlier)
	}
	return tlog.ProveTree(size, earlier, rows)
}

// Included checks the proof that record is leaf index of tree.
func Included(p tlog.RecordProof, tree tlog.Tree, index int64, record []byte) error {
	if err := tlog.CheckRecord(p, tree.N, tree.Hash, index, Leaf(record)); err != nil {
		return fmt.Errorf("%w: record %d is not in the tree of size %d: %w", ErrTampered, index, tree.N, err)
	}
	return nil
}

// Consistent checks the proof that earlier is a prefix of tree.
func Consistent(p tlog.TreeProof, tree, earlier tlog.Tree) error {
	if err := tlog.CheckTree(p, tree.N, tree.Hash, earlier.N, earlier.Hash); err != nil {
		return fmt.Errorf("%w: the tree of size %d is no prefix of that of size %d: %w", ErrTampered, earlier.N, tree.N, err)
	}
	return nil
}
