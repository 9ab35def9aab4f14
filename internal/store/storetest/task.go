package storetest

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/task"
)

// newTask is a task of an owner, kept for an hour.
func newTask(owner string) *task.Write {
	id := fmt.Sprintf("%012x", time.Now().UnixMilli()) + rand.Text()
	e := Entry(audit.TaskMade, id)
	return &task.Write{Record: task.Record{
		ID: id, Print: sum("asked"), Owner: sum(owner), State: task.Queued, Holder: rand.Text(), Created: time.Now().UnixMicro(), Updated: time.Now().UnixMicro(),
		Request: []byte("request"), Tenant: "acme", Principal: owner, Server: "/mcp", Tool: "export",
	}, Keep: time.Hour, Entry: &e}
}

func put(t *testing.T, e Engine, w *task.Write) (task.Record, bool) {
	t.Helper()
	r, ok, err := e.PutTask(t.Context(), w)
	if err != nil {
		t.Fatal(err)
	}
	return r, ok
}

// next is a change of a task as it was read.
func next(r task.Record, state task.State) *task.Write {
	w := &task.Write{Record: r}
	w.State, w.Holder, w.Updated = state, rand.Text(), time.Now().UnixMicro()
	return w
}

func dueIDs(t *testing.T, e Engine) []string {
	t.Helper()
	due, err := e.DueTasks(t.Context(), 100)
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, r := range due {
		ids = append(ids, r.ID)
	}
	return ids
}

func tasks(t *testing.T, e, other Engine) {
	w := newTask("alice")
	if r, err := e.Task(t.Context(), w.ID); err != nil || r.ID != "" {
		t.Errorf("an empty store has %+v, %v", r, err)
	}
	made, ok := put(t, e, w)
	if !ok || made.Version != 1 || made.Expires == 0 {
		t.Fatalf("made: %+v, %v", made, ok)
	}
	if again, ok := put(t, e, w); !ok || again.Version != 1 {
		t.Errorf("the same write again: %+v, %v", again, ok)
	}
	seen, err := other.Task(t.Context(), w.ID)
	if err != nil || seen.Version != 1 || string(seen.Request) != "request" || seen.Notes != nil || seen.Answer != nil || seen.Tool != "export" || seen.Principal != "alice" || seen.Over {
		t.Errorf("seen: %+v, %v", seen, err)
	}
	if head, err := e.Head(t.Context()); err != nil || head.Size != 1 {
		t.Errorf("the log has %d records, want 1: %v", head.Size, err)
	}
	take := next(made, task.Running)
	take.Take, take.Lease = true, time.Hour
	taken, ok := put(t, e, take)
	if !ok || taken.Version != 2 || taken.State != task.Running || taken.Expires != made.Expires {
		t.Fatalf("taken: %+v, %v", taken, ok)
	}
	stale := next(made, task.Cancelled)
	if now, ok := put(t, other, stale); ok || now.Version != 2 {
		t.Errorf("a change of what it was before: %+v, %v", now, ok)
	}
	end := next(taken, task.Completed)
	end.Answer, end.Notes = []byte("answer"), []byte("notes")
	entry := Entry(audit.TaskEnded, w.ID)
	end.Entry = &entry
	ended, ok := put(t, e, end)
	if !ok || !bytes.Equal(ended.Answer, []byte("answer")) {
		t.Fatalf("ended: %+v, %v", ended, ok)
	}
	if now, ok := put(t, e, next(ended, task.Queued)); ok || now.State != task.Completed {
		t.Errorf("a task that had ended goes on: %+v", now)
	}
	if v, err := other.TaskVersions(t.Context(), []string{w.ID, "nothing"}); err != nil || len(v) != 1 || v[w.ID] != 3 {
		t.Errorf("versions: %v, %v", v, err)
	}
	if r, ok := put(t, e, next(task.Record{ID: "nothing", Version: 3}, task.Queued)); ok || r.ID != "" {
		t.Errorf("a change of nothing: %+v, %v", r, ok)
	}
}

// taskScopes is one key that many use at once: they get the same task.
func taskScopes(t *testing.T, e, other Engine) {
	var all sync.WaitGroup
	ids := make([]string, 8)
	made := make([]bool, 8)
	for i := range ids {
		node := e
		if i%2 == 1 {
			node = other
		}
		all.Go(func() {
			w := newTask("alice")
			w.Scope = sum("key")
			r, ok, err := node.PutTask(t.Context(), w)
			if err != nil {
				t.Error(err)
			}
			ids[i], made[i] = r.ID, ok
		})
	}
	all.Wait()
	slices.Sort(ids)
	if len(slices.Compact(ids)) != 1 || len(slices.DeleteFunc(made, func(ok bool) bool { return !ok })) != 1 {
		t.Errorf("tasks %v", ids)
	}
}

// taskClaims is one task that many workers take at once.
func taskClaims(t *testing.T, e, other Engine) {
	made, _ := put(t, e, newTask("alice"))
	var all sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for i := range 12 {
		node := e
		if i%2 == 1 {
			node = other
		}
		all.Go(func() {
			w := next(made, task.Running)
			w.Take, w.Lease = true, time.Hour
			_, ok, err := node.PutTask(t.Context(), w)
			if err != nil {
				t.Error(err)
			}
			if ok {
				mu.Lock()
				won++
				mu.Unlock()
			}
		})
	}
	all.Wait()
	if won != 1 {
		t.Errorf("%d workers have one task", won)
	}
}

func dueTasks(t *testing.T, e, other Engine) {
	first, _ := put(t, e, newTask("alice"))
	later := newTask("alice")
	later.Lease = time.Hour // tried again later
	put(t, e, later)
	if ids := dueIDs(t, other); !slices.Equal(ids, []string{first.ID}) {
		t.Errorf("due %v, want the first", ids)
	}
	take := next(first, task.Running)
	take.Take, take.Lease = true, time.Hour
	running, _ := put(t, e, take)
	if ids := dueIDs(t, other); len(ids) != 0 {
		t.Errorf("due while it runs: %v", ids)
	}
	if n, err := other.CountTasks(t.Context()); err != nil || n.Queued != 1 || n.Running != 1 || n.Waiting != 0 || n.Oldest <= 0 {
		t.Errorf("counts %+v, %v", n, err)
	}
	if n, err := other.OpenTasks(t.Context(), sum("alice"), 10); err != nil || n != 2 {
		t.Errorf("open %d, %v", n, err)
	}
	if n, err := other.OpenTasks(t.Context(), sum("alice"), 1); err != nil || n != 1 {
		t.Errorf("open, at most one: %d, %v", n, err)
	}
	if n, err := other.OpenTasks(t.Context(), sum("bob"), 10); err != nil || n != 0 {
		t.Errorf("open of another: %d, %v", n, err)
	}
	progress := next(running, task.Running)
	progress.Lease = time.Microsecond
	running, _ = put(t, e, progress)
	eventually(t, "the lease ends", func() bool { return len(dueIDs(t, other)) == 1 })
	over := next(running, task.Running)
	over.Take, over.Lease = true, time.Hour
	if _, ok := put(t, other, over); !ok {
		t.Error("a task whose lease had ended cannot be taken")
	}
	if _, ok := put(t, e, next(running, task.Completed)); ok {
		t.Error("who had it before still writes")
	}
}

func taskPages(t *testing.T, e, other Engine) {
	const many = 25
	var want []string
	for range many {
		w := newTask("alice")
		put(t, e, w)
		put(t, e, newTask("bob"))
		want = append(want, w.ID)
	}
	slices.Sort(want)
	slices.Reverse(want)
	var got []string
	before := ""
	for {
		page, err := other.TasksOf(t.Context(), sum("alice"), before, 10)
		if err != nil {
			t.Fatal(err)
		}
		if len(page) == 0 {
			break
		}
		for _, r := range page {
			got = append(got, r.ID)
		}
		before = page[len(page)-1].ID
	}
	if !slices.Equal(got, want) {
		t.Errorf("pages hold %v, want %v", got, want)
	}
}

// taskExpiry is time that passes: what waits is due, what ended is gone, and its key is free.
func taskExpiry(t *testing.T, e, other Engine) {
	w := newTask("alice")
	w.Keep, w.Scope = time.Microsecond, sum("key")
	made, _ := put(t, e, w)
	wait := next(made, task.Waiting)
	waiting, ok := put(t, e, wait)
	if !ok {
		t.Fatal("it cannot wait")
	}
	eventually(t, "its time is over", func() bool { return len(dueIDs(t, other)) == 1 })
	due, err := other.DueTasks(t.Context(), 1)
	if err != nil || len(due) != 1 || !due[0].Over {
		t.Fatalf("due %+v, %v", due, err)
	}
	end := next(waiting, task.Failed)
	end.Take, end.Keep = true, time.Microsecond
	if _, ok := put(t, other, end); !ok {
		t.Fatal("it cannot be ended")
	}
	eventually(t, "it is gone", func() bool {
		r, err := e.Task(t.Context(), w.ID)
		return err == nil && r.ID == ""
	})
	if page, err := e.TasksOf(t.Context(), sum("alice"), "", 10); err != nil || len(page) != 0 {
		t.Errorf("a list has what is gone: %v, %v", page, err)
	}
	again := newTask("alice")
	again.Scope = sum("key")
	if r, ok := put(t, other, again); !ok || r.ID != again.ID {
		t.Errorf("its key is not free: %+v, %v", r, ok)
	}
	gone := newTask("alice")
	gone.Keep = time.Microsecond
	made, _ = put(t, e, gone)
	end = next(made, task.Cancelled)
	put(t, e, end)
	eventually(t, "it is deleted", func() bool {
		n, err := e.Prune(t.Context())
		return err == nil && n == 1
	})
	if v, err := e.TaskVersions(t.Context(), []string{gone.ID, again.ID}); err != nil || len(v) != 1 {
		t.Errorf("after deletion there are %v, %v", v, err)
	}
}
