package inmem

import (
	"bytes"
	"context"
	"slices"
	"strings"

	"newel.dev/newel/internal/durable"
	"newel.dev/newel/internal/guard/approve"
)

// loadedApprovals returns the approvals that the work names. The lock is held.
func (db *DB) loadedApprovals(work []*durable.Work) []approve.Approval {
	var out []approve.Approval
	add := func(a *approve.Approval) {
		if a != nil && !slices.ContainsFunc(out, func(o approve.Approval) bool { return o.ID == a.ID }) {
			out = append(out, *a)
		}
	}
	for _, u := range work {
		add(db.approvals[u.ApprovalID()])
		if b := u.Binding(); b != nil {
			add(db.boundTo(b))
		}
	}
	return out
}

// boundTo looks at all: there are few. The lock is held.
func (db *DB) boundTo(binding []byte) *approve.Approval {
	for _, a := range db.approvals {
		if bytes.Equal(a.Binding, binding) {
			return a
		}
	}
	return nil
}

// Bound implements approve.Store.
func (db *DB) Bound(_ context.Context, binding []byte) (approve.Approval, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	return db.shown(db.boundTo(binding)), nil
}

// Approval implements approve.Store.
func (db *DB) Approval(_ context.Context, id string) (approve.Approval, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	a := db.approvals[id]
	if a == nil {
		return approve.Approval{}, approve.ErrNone
	}
	return db.shown(a), nil
}

// shown is an approval as readers get it.
func (db *DB) shown(a *approve.Approval) approve.Approval {
	if a == nil {
		return approve.Approval{}
	}
	out := *a
	out.Late(db.now())
	return out
}

// Approvals implements approve.Store.
func (db *DB) Approvals(_ context.Context, q approve.Query) ([]approve.Approval, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	var out []approve.Approval
	for _, a := range db.approvals {
		if (q.State == 0 || a.State == q.State) && (q.Tenant == nil || a.Tenant == *q.Tenant) && (q.Principal == nil || a.Principal == *q.Principal) {
			out = append(out, db.shown(a))
		}
	}
	slices.SortFunc(out, func(a, b approve.Approval) int { return strings.Compare(b.ID, a.ID) })
	if q.Oldest {
		slices.Reverse(out)
	}
	return out[:min(len(out), q.Limit)], nil
}
