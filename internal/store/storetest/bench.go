package storetest

import (
	"context"
	"crypto/rand"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/secret"
)

// Writers is how many callers write at once in benchmarks.
const Writers = 64

// Bench measures calls with a key, through the whole step, of as many writers as Writers: each is
// two grouped commits with their audit records. It reports calls a second.
func Bench(b *testing.B, e Engine) {
	b.Helper()
	effects, err := effect.New(effect.Options{Store: e, Key: secret.RandomKey()})
	if err != nil {
		b.Fatal(err)
	}
	pay := &call.Capability{Kind: call.Tool, Name: "update_order_status", Effect: call.Write, Description: "Move an order to its next status.",
		Input: []byte(`{"type":"object","properties":{"id":{"type":"integer"},"status":{"type":"string"}}}`)}
	answer := call.Text(`{"id":10042,"status":"shipped","updated_at":"2026-11-21T08:00:00Z"}`)
	step := effects.Guard("/mcp", nil)(func(context.Context, *call.Call) (*call.Result, error) { return answer, nil })
	who := &call.Principal{Tenant: "acme", ID: "https://login.example.com#alice", Client: "agent"}
	Parallel(b, func(i int64) error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		_, err := step(ctx, &call.Call{Kind: call.Tool, Name: pay.Name, Args: fmt.Appendf(nil, `{"id":%d,"status":"shipped"}`, i), Key: rand.Text(), Target: pay, Principal: who, Door: "http", Sink: call.Discard, Asker: call.NoAsker})
		return err
	})
}

// Parallel runs f b.N times on as many goroutines as Writers and reports how often a second.
func Parallel(b *testing.B, f func(i int64) error) {
	b.Helper()
	var next atomic.Int64
	var all sync.WaitGroup
	b.ResetTimer()
	start := time.Now()
	for range Writers {
		all.Go(func() {
			for {
				i := next.Add(1)
				if i > int64(b.N) {
					return
				}
				if err := f(i); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "calls/s")
}

// RowBytes is what one call with a key leaves behind: an operation and two audit records.
const RowBytes = 1950

// GroupCommit measures an engine's own commits of rows, of as many writers as Writers, each of which
// waits for the commit of its row. The first 32 bytes of a row are random. It reports rows a second.
func GroupCommit(b *testing.B, commit func(ctx context.Context, rows [][]byte) error) {
	b.Helper()
	type row struct {
		data []byte
		done chan error
	}
	queue := make(chan row, Writers)
	var writer sync.WaitGroup
	writer.Go(func() {
		for first := range queue {
			batch := []row{first}
			for len(batch) < Writers {
				select {
				case r, ok := <-queue:
					if ok {
						batch = append(batch, r)
						continue
					}
				default:
				}
				break
			}
			rows := make([][]byte, len(batch))
			for i := range batch {
				rows[i] = batch[i].data
			}
			err := commit(context.Background(), rows)
			for _, r := range batch {
				r.done <- err
			}
		}
	})
	Parallel(b, func(int64) error {
		r := row{make([]byte, RowBytes), make(chan error, 1)}
		_, _ = rand.Read(r.data[:32]) // its key
		queue <- r
		return <-r.done
	})
	close(queue)
	writer.Wait()
}
