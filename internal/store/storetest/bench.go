package storetest

import (
	"context"
	"crypto/rand"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"newel.dev/newel/call"

	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/secret"
)

// Writers is how many callers write at once in benchmarks.
const Writers = 64

// slice is how long one side of a comparison runs before the next one does: what else the machine
// does hits all of them.
const slice = 50 * time.Millisecond

// heapFloor is what newel's own process holds so that its collector does not run all the time (see
// internal/assembly): what is measured here is to have it as well.
const heapFloor = 16 << 20

// A side is one of what is compared.
type side struct {
	name  string
	run   func(i int64) error
	calls int64
	took  time.Duration
	cpu   time.Duration // of this process
	rates []float64     // a second, of each slice
}

// Compare measures calls with a key, through the whole step, with the full guarantee on engine e: each
// of them two grouped commits, one after the other, with their audit records. Beside it:
//
//   - plain: the same calls of a tool that has no effect, and so without the guarantee;
//   - row: rows of the size that one call leaves behind, each in one commit with those that wait when
//     the last commit ended;
//   - packed: the same, where a commit also waits for those who are about to come, as ours do;
//   - own, if there is one: the same, each committed by its writer, on a connection of its own: what
//     engines call group commit is that such commits share a sync.
//
// All have as many callers as Writers, each of which waits for its call or row. They take turns; b.N
// is how many each has. Of each it reports how many a second and the CPU time of this process, and of
// calls and rows the median ratio of a turn, with the tenth and the ninetieth of a hundred turns.
func Compare(b *testing.B, e Engine, commit func(ctx context.Context, rows [][]byte) error, own func(ctx context.Context, row []byte) error) {
	b.Helper()
	floor := make([]byte, heapFloor)
	defer runtime.KeepAlive(floor)
	row, packed := newGroup(commit, false), newGroup(commit, true)
	defer row.close()
	defer packed.close()
	keyed := &side{name: "call", run: calls(b, e, call.Write)}
	plain := &side{name: "plain", run: calls(b, e, call.Read)}
	rows, most := &side{name: "row", run: row.row}, &side{name: "packed", run: packed.row}
	sides := []*side{keyed, rows, plain, most}
	if own != nil {
		sides = append(sides, &side{name: "own", run: func(int64) error { return own(context.Background(), newRow()) }})
	}
	for _, s := range sides {
		s.turn(b, slice) // what is done once
		s.calls, s.took, s.cpu, s.rates = 0, 0, 0, nil
	}
	b.ResetTimer()
	for i := range b.N {
		for j := range sides {
			sides[(i+j)%len(sides)].turn(b, slice)
		}
	}
	b.StopTimer()
	for _, s := range sides {
		b.ReportMetric(float64(s.calls)/s.took.Seconds(), s.name+"s/s")
		b.ReportMetric(float64(s.cpu.Microseconds())/float64(s.calls), "cpu-µs/"+s.name)
	}
	over(b, keyed, rows)
	over(b, keyed, most)
	if own != nil {
		over(b, keyed, sides[len(sides)-1])
	}
}

// over reports the ratio of two sides, taken in each turn.
func over(b *testing.B, a, c *side) {
	ratios := make([]float64, len(a.rates))
	for i := range ratios {
		ratios[i] = a.rates[i] / c.rates[i]
	}
	slices.Sort(ratios)
	name := a.name + "-over-" + c.name
	b.ReportMetric(ratios[len(ratios)/2], name)
	b.ReportMetric(ratios[len(ratios)/10], name+"-p10")
	b.ReportMetric(ratios[len(ratios)*9/10], name+"-p90")
}

// turn runs a side for about d. What was begun is waited for.
func (s *side) turn(b *testing.B, d time.Duration) {
	var all sync.WaitGroup
	var n atomic.Int64
	before, start := processTime(), time.Now()
	for range Writers {
		all.Go(func() {
			for time.Since(start) < d {
				if err := s.run(s.calls + n.Add(1)); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	took := time.Since(start)
	s.calls += n.Load()
	s.took += took
	s.cpu += processTime() - before
	s.rates = append(s.rates, float64(n.Load())/took.Seconds())
}

// processTime is the CPU time that this process has used.
func processTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0 // never for oneself
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// calls returns a call with a new key, of a tool of a class.
func calls(b *testing.B, e Engine, class call.Effect) func(i int64) error {
	effects, err := effect.New(effect.Options{Store: e, Key: secret.RandomKey()})
	if err != nil {
		b.Fatal(err)
	}
	tool := &call.Capability{Kind: call.Tool, Name: "update_order_status", Effect: class, Description: "Move an order to its next status.",
		Input: []byte(`{"type":"object","properties":{"id":{"type":"integer"},"status":{"type":"string"}}}`)}
	answer := call.Text(`{"id":10042,"status":"shipped","updated_at":"2026-11-21T08:00:00Z"}`)
	step := effects.Guard("/mcp", nil)(func(context.Context, *call.Call) (*call.Result, error) { return answer, nil })
	who := &call.Principal{Tenant: "acme", ID: "https://login.example.com#alice", Client: "agent"}
	return func(i int64) error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		_, err := step(ctx, &call.Call{Kind: call.Tool, Name: tool.Name, Args: fmt.Appendf(nil, `{"id":%d,"status":"shipped"}`, i), Key: rand.Text(), Target: tool, Principal: who, Door: "http", Sink: call.Discard, Asker: call.NoAsker})
		return err
	}
}

// RowBytes is what one call with a key leaves behind: an operation and two audit records.
const RowBytes = 1950

// A group commits the rows of many callers together.
type group struct {
	queue  chan queued
	commit func(ctx context.Context, rows [][]byte) error
	packed bool // waits for who is about to come
	ended  sync.WaitGroup
}

type queued struct {
	data []byte
	done chan error
}

func newGroup(commit func(ctx context.Context, rows [][]byte) error, packed bool) *group {
	g := &group{queue: make(chan queued, Writers), commit: commit, packed: packed}
	g.ended.Go(g.run)
	return g
}

func (g *group) run() {
	for first := range g.queue {
		batch := g.gather(first)
		rows := make([][]byte, len(batch))
		for i := range batch {
			rows[i] = batch[i].data
		}
		err := g.commit(context.Background(), rows)
		for _, r := range batch {
			r.done <- err
		}
	}
}

func (g *group) gather(first queued) []queued {
	batch := []queued{first}
	for last := 0; len(batch) < Writers; {
		select {
		case r, ok := <-g.queue:
			if ok {
				batch = append(batch, r)
				continue
			}
		default:
			if g.packed && len(batch) != last {
				last = len(batch)
				runtime.Gosched()
				continue
			}
		}
		break
	}
	return batch
}

// newRow returns a row. Its first 32 bytes are random: its key.
func newRow() []byte {
	row := make([]byte, RowBytes)
	_, _ = rand.Read(row[:32]) // it never fails
	return row
}

// row has a row committed.
func (g *group) row(int64) error {
	r := queued{newRow(), make(chan error, 1)}
	g.queue <- r
	return <-r.done
}

func (g *group) close() {
	close(g.queue)
	g.ended.Wait()
}
