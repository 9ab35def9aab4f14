package postgres

import (
	"time"

	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/durable"
	"newel.dev/newel/internal/guard/effect"
)

// known is what this node remembers of what it wrote last: the head of the tree, and operations that
// it began and that have not ended. Work that needs no more is written at once, and the server
// refuses all of it if anything stands otherwise. The zero value knows nothing.
type known struct {
	fresh  bool // edge is the head, for all we know
	edge   audit.Edge
	ops    map[string]*effect.Operation
	clock  int64     // of the database, in microseconds
	at     time.Time // when it was that
	doubts int       // for how many commits it is not relied on
}

const (
	// manyDoubts is for how many commits the server is asked first after something stood otherwise: other
	// nodes write, or callers come again.
	manyDoubts = 16
	// clockAge is how long the database's clock is counted on from here, and not asked for.
	clockAge = 10 * time.Second
	// maxKnown bounds the operations: some end elsewhere, and are never heard of.
	maxKnown = 4096
)

func (k *known) now() int64 { return k.clock + time.Since(k.at).Microseconds() }

func (k *known) setClock(now int64) { k.clock, k.at = now, time.Now() }

// usable reports whether a commit may rely on what is remembered.
func (k *known) usable() bool {
	if k.doubts > 0 {
		k.doubts--
		return false
	}
	return k.fresh && time.Since(k.at) <= clockAge
}

// recall returns the operations that work changes, and whether all of it is of a kind that either
// changes what is stored as it would if everything stood as it is remembered, or is refused.
func (k *known) recall(work []*durable.Work) (ops []effect.Operation, ok bool) {
	ops = make([]effect.Operation, 0, len(work))
	seen := make(map[string]bool, len(work))
	for _, u := range work {
		switch id := u.Fresh(); {
		case u.Append != nil:
		case id != "":
			if _, again := k.ops[id]; again {
				return nil, false
			}
		case u.Complete != nil:
			o := u.Complete
			op, ours := k.ops[o.ID]
			if !ours || o.Abandoned || o.Approval != "" || op.Fence != o.Fence {
				return nil, false
			}
			if !seen[o.ID] {
				seen[o.ID] = true
				ops = append(ops, *op)
			}
		default:
			return nil, false
		}
	}
	return ops, true
}

// learn remembers what was committed.
func (k *known) learn(b *durable.Batch, changed []*effect.Operation) {
	k.fresh, k.edge = true, b.Edge
	if k.ops == nil || len(k.ops) > maxKnown {
		k.ops = map[string]*effect.Operation{}
	}
	for _, op := range changed {
		if op.State == effect.Dispatched {
			k.ops[op.ID] = op // nobody changes it: the next batch gets a copy
		} else {
			delete(k.ops, op.ID)
		}
	}
}

// forget is for when it is not known what was committed.
func (k *known) forget() { k.fresh = false }

func (k *known) doubt() { k.doubts = manyDoubts }
