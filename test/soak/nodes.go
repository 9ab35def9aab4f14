package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"newel.dev/newel/test/engines"
	"newel.dev/newel/test/program"
)

// What two nodes go through.
const (
	killEvery   = time.Minute
	downFor     = 5 * time.Second
	configEvery = time.Second
	patience    = 30 * time.Second // of a caller, for one call with all its attempts
	inFlight    = 512              // calls that may wait for an answer at once
)

// fleet is two nodes with one PostgreSQL and one Redis.
type fleet struct {
	dir, bin string
	env      []string
	nodes    [2]*replica
	db       *pgx.Conn

	reloads, kills int
}

// A replica is one place for a process of newel.
type replica struct {
	base, config, text string // text: its configuration, with %d for what changes
	up                 bool
	*server
}

// endure sends calls at a constant rate to two nodes for a time, while their configuration changes
// every second and one of them is killed every minute. A caller does what its revision says: it sends a
// call whose answer it lost once more, to the other node; writes have a key. No call may fail.
func endure(ctx context.Context, length time.Duration, perSecond int, seed uint64) error {
	if perSecond < 1 || perSecond > 100_000 {
		return errors.New("the rate must be from 1 to 100000 calls a second")
	}
	return engines.Hosted(ctx, func(h *engines.Host) (err error) {
		f := &fleet{}
		if err := f.start(ctx, h); err != nil {
			return errors.Join(err, f.stop())
		}
		defer func() { err = errors.Join(err, f.stop()) }()
		load, cancel := context.WithTimeout(ctx, length)
		defer cancel()
		t := &traffic{fleet: f, client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: inFlight}, Timeout: patience}}
		broken := make(chan error, 1)
		go func() { broken <- f.disturb(load) }()
		shown := make(chan struct{})
		go func() { t.show(load, length); close(shown) }()
		took := t.run(load, perSecond, seed)
		<-shown
		if err := <-broken; err != nil {
			return err
		}
		if ctx.Err() != nil {
			return errors.New("interrupted")
		}
		return t.judge(ctx, took, perSecond, seed)
	})
}

// start starts what two nodes need, and the nodes.
func (f *fleet) start(ctx context.Context, h *engines.Host) (err error) {
	if f.dir, err = os.MkdirTemp("", "newel-soak-"); err != nil {
		return err
	}
	h.Cleanup(func() { _ = os.RemoveAll(f.dir) })
	f.bin = filepath.Join(f.dir, "newel")
	if err := program.Build(ctx, f.bin, program.Newel); err != nil {
		return err
	}
	database, redis := engines.StartSynced(h), engines.Redis(h)
	state, shop := database.Database(h), database.Database(h)
	f.env = append(os.Environ(), "STATE_DSN="+state, "SHOP_DSN="+shop, "REDIS_URL="+redis.URL)
	if f.db, err = pgx.Connect(ctx, shop); err != nil {
		return err
	}
	_, err = f.db.Exec(ctx, `CREATE TABLE items (id bigint PRIMARY KEY, name text NOT NULL);
		INSERT INTO items SELECT n, 'item ' || n FROM generate_series(1, 10000) n;
		CREATE TABLE orders (nonce text PRIMARY KEY, item bigint NOT NULL)`)
	if err != nil {
		return err
	}
	for i := range f.nodes {
		addr, err := program.FreeAddress()
		if err != nil {
			return err
		}
		r := &replica{base: "http://" + addr, config: filepath.Join(f.dir, fmt.Sprintf("node%d.yaml", i)), text: fmt.Sprintf(nodeConfig, addr, i, addr)}
		f.nodes[i] = r
		if err := f.launch(ctx, r); err != nil {
			return err
		}
	}
	return nil
}

// nodeConfig is that of one node; the text of %%d changes with every reload.
const nodeConfig = `listen: %s
state: {engine: postgres, dsn: "${env:STATE_DSN}", key_file: key, checkpoint: heads-%d}
server: {name: soak, instructions: "configuration %%d"}
redis: {url: "${env:REDIS_URL}", sessions: true, advertise: "http://%s"}
quotas:
  rules:
    - {name: all, rate: 100000/s, burst: 100000}
cache:
  rules:
    - {names: [cached_item], ttl: 2s, for: everybody, refresh_on: [order_item]}
effects:
  wait: 2s
  tools:
    - {tool: order_item, recovery: safe, key: required}
backends:
  - type: sql
    name: shop
    driver: postgres
    dsn: ${env:SHOP_DSN}
    tools:
      - name: get_item
        description: One item.
        params: [{name: id, type: integer, required: true}]
        result: row
        sql: SELECT id, name FROM items WHERE id = :id
      - name: cached_item
        description: One item, from before.
        params: [{name: id, type: integer, required: true}]
        result: row
        sql: SELECT id, name FROM items WHERE id = :id
      - name: order_item
        description: Orders an item.
        effect: write
        params:
          - {name: id, type: integer, required: true}
          - {name: nonce, type: string, required: true, max_length: 64}
        result: row
        sql: INSERT INTO orders (nonce, item) VALUES (:nonce, :id) ON CONFLICT (nonce) DO UPDATE SET item = :id RETURNING nonce
`

// write gives a node the n-th configuration. Whoever reads it sees the old one or the new one.
func (r *replica) write(n int) error {
	if err := os.WriteFile(r.config+".new", fmt.Appendf(nil, r.text, n), 0o600); err != nil {
		return err
	}
	return os.Rename(r.config+".new", r.config)
}

func (f *fleet) launch(ctx context.Context, r *replica) error {
	if err := r.write(f.reloads); err != nil {
		return err
	}
	cmd := exec.Command(f.bin, "serve", "--config", r.config)
	cmd.Dir, cmd.Env = f.dir, f.env
	s, err := await(ctx, r.base, cmd)
	if err != nil {
		return err
	}
	r.server = s
	r.up = true
	return nil
}

// disturb reloads every second, and kills one node after the other.
func (f *fleet) disturb(ctx context.Context) error {
	tick := time.NewTicker(configEvery)
	defer tick.Stop()
	killed, victim := time.Now(), 0
	var back time.Time // when the victim is started again; zero: it runs
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		f.reloads++
		for _, r := range f.nodes {
			if !r.up {
				continue
			}
			if err := errors.Join(r.write(f.reloads), r.Signal(syscall.SIGHUP)); err != nil {
				return fmt.Errorf("reloading: %w", err)
			}
		}
		r := f.nodes[victim]
		switch {
		case back.IsZero() && time.Since(killed) >= killEvery:
			r.up = false
			killed, back = time.Now(), time.Now().Add(downFor)
			if r.Ended(0) {
				return fmt.Errorf("a node ended by itself: %v", r.Err())
			}
			r.Kill()
			f.kills++
		case !back.IsZero() && time.Now().After(back):
			if err := f.launch(ctx, r); err != nil {
				if ctx.Err() != nil {
					return nil
				}
				return err
			}
			back, victim = time.Time{}, 1-victim
		}
	}
}

func (f *fleet) stop() error {
	var errs []error
	for _, r := range f.nodes {
		if r != nil && r.up {
			errs = append(errs, r.stop())
		}
	}
	if f.db != nil {
		errs = append(errs, f.db.Close(context.Background()))
	}
	return errors.Join(errs...)
}

// traffic is the load and what became of it.
type traffic struct {
	fleet  *fleet
	client *http.Client

	sent, again, failed, late atomic.Int64 // calls, attempts after the first, calls that failed, calls that had to wait for their turn

	mu      sync.Mutex
	first   string // failure
	written []string
	took    []time.Duration
}

func (t *traffic) fail(why string) {
	t.failed.Add(1)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.first == "" {
		t.first = why
	}
}

// run starts calls at a constant rate, whether those before are answered or not, and waits for all. It
// returns for how long it started calls.
func (t *traffic) run(ctx context.Context, perSecond int, seed uint64) time.Duration {
	r := rand.New(rand.NewPCG(seed, 0))
	room := make(chan struct{}, inFlight)
	var all sync.WaitGroup
	defer all.Wait()
	begun := time.Now()
	for n := 0; ; n++ {
		due := begun.Add(time.Duration(n) * time.Second / time.Duration(perSecond))
		if wait := time.Until(due); wait > 0 {
			select {
			case <-ctx.Done():
				return time.Since(begun)
			case <-time.After(wait):
			}
		} else if ctx.Err() != nil {
			return time.Since(begun)
		}
		select {
		case room <- struct{}{}:
		default:
			t.late.Add(1)
			room <- struct{}{}
		}
		kind, id, node := r.IntN(10), 1+r.IntN(10_000), r.IntN(2)
		all.Go(func() {
			t.one(kind, id, node, fmt.Sprintf("%d-%d", seed, n), due)
			<-room
		})
	}
}

// one makes a call, with as many attempts as it takes.
func (t *traffic) one(kind, id, node int, nonce string, due time.Time) {
	t.sent.Add(1)
	var last string
	for attempt := 0; ; attempt++ {
		if attempt > 0 {
			t.again.Add(1)
		}
		r := t.fleet.nodes[(node+attempt)%2] // nobody tells which one is down
		ok, after, why := t.try(r.base, kind, id, nonce)
		if ok {
			break
		}
		last = why
		if after < 0 || time.Since(due) > patience {
			t.fail(last)
			return
		}
		<-time.After(max(after, 10*time.Millisecond))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.took = append(t.took, time.Since(due))
	if kind < 2 {
		t.written = append(t.written, nonce)
	}
}

// try makes one attempt. after says when the next one makes sense; below zero: never.
func (t *traffic) try(base string, kind, id int, nonce string) (ok bool, after time.Duration, why string) {
	method, tool, args, more, want := "tools/call", "get_item", fmt.Sprintf(`{"id":%d}`, id), "", fmt.Sprintf("item %d", id)
	switch {
	case kind < 2:
		tool, args, more, want = "order_item", fmt.Sprintf(`{"id":%d,"nonce":%q}`, id, nonce), fmt.Sprintf(`,"dev.newel/idempotencyKey":%q`, nonce), nonce
	case kind == 2:
		method, tool, want = "tools/list", "", `"order_item"`
	case kind == 3:
		tool = "cached_item"
	}
	params := ""
	if tool != "" {
		params = fmt.Sprintf(`"name":%q,"arguments":%s,`, tool, args)
	}
	body := fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":%q,"params":{%s`+meta+`}}`, method, params, more)
	req, err := http.NewRequest(http.MethodPost, base+"/mcp", strings.NewReader(body))
	if err != nil {
		return false, -1, err.Error()
	}
	for name, value := range map[string]string{"Content-Type": "application/json", "Accept": "application/json, text/event-stream", "Mcp-Protocol-Version": "2026-07-28", "Mcp-Method": method, "Mcp-Name": tool} {
		if value != "" {
			req.Header.Set(name, value)
		}
	}
	resp, err := t.client.Do(req)
	if err != nil {
		return false, 0, err.Error() // the answer is lost: sent again, as the revision says
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 8<<20))
	if err != nil {
		return false, 0, err.Error()
	}
	if resp.StatusCode == http.StatusOK && !bytes.Contains(raw, []byte(`"isError":true`)) && bytes.Contains(raw, []byte(want)) {
		return true, 0, ""
	}
	why = fmt.Sprintf("%s %s: %d %.300s", method, tool, resp.StatusCode, raw)
	return false, retryAfter(resp, raw), why
}

// retryAfter reads when the caller is told to come again, or returns -1.
func retryAfter(resp *http.Response, raw []byte) time.Duration {
	if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil {
		return time.Duration(s) * time.Second
	}
	if !bytes.Contains(raw, []byte(`"retryable":true`)) {
		return -1
	}
	_, tail, found := bytes.Cut(raw, []byte(`"retryAfterSeconds":`))
	if !found {
		return 0
	}
	end := bytes.IndexAny(tail, ",}")
	s, err := strconv.ParseFloat(string(tail[:max(end, 0)]), 64)
	if err != nil {
		return 0
	}
	return time.Duration(s * float64(time.Second))
}

// show draws how far it is.
func (t *traffic) show(ctx context.Context, length time.Duration) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for begun := time.Now(); ; {
		select {
		case <-ctx.Done():
			clearBar()
			return
		case <-tick.C:
			drawBar(time.Since(begun), length, "%d calls, %d attempts more, %d failed", t.sent.Load(), t.again.Load(), t.failed.Load())
		}
	}
}

// judge prints what happened and looks whether every write that was acknowledged is there.
func (t *traffic) judge(ctx context.Context, took time.Duration, perSecond int, seed uint64) error {
	rows, err := t.fleet.db.Query(ctx, "SELECT nonce FROM orders")
	if err != nil {
		return err
	}
	kept, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	there := make(map[string]bool, len(kept))
	for _, nonce := range kept {
		there[nonce] = true
	}
	lost := 0
	for _, nonce := range t.written {
		if !there[nonce] {
			lost++
		}
	}
	slices.Sort(t.took)
	at := func(share float64) float64 {
		if len(t.took) == 0 {
			return 0
		}
		return float64(t.took[int(share*float64(len(t.took)-1))].Microseconds()) / 1000
	}
	result := struct {
		Seconds float64 `json:"seconds"`
		Seed    uint64  `json:"seed"`
		Rate    float64 `json:"calls_per_second"`
		Calls   int64   `json:"calls"`
		Again   int64   `json:"attempts_again"`
		Failed  int64   `json:"failed"`
		Writes  int     `json:"writes_acknowledged"`
		Lost    int     `json:"writes_lost"`
		Reloads int     `json:"reloads"`
		Kills   int     `json:"kills"`
		P50     float64 `json:"p50_ms"`
		P99     float64 `json:"p99_ms"`
		Max     float64 `json:"max_ms"`
	}{took.Seconds(), seed, float64(t.sent.Load()) / took.Seconds(), t.sent.Load(), t.again.Load(), t.failed.Load(), len(t.written), lost, t.fleet.reloads, t.fleet.kills, at(0.5), at(0.99), at(1)}
	line, err := json.Marshal(result)
	if err != nil {
		return err
	}
	fmt.Printf("%s\n", line)
	var problems []error
	if result.Failed > 0 {
		problems = append(problems, fmt.Errorf("%d calls failed; the first: %s", result.Failed, t.first))
	}
	if lost > 0 {
		problems = append(problems, fmt.Errorf("%d writes that were acknowledged are not there", lost))
	}
	if result.Rate < 0.95*float64(perSecond) {
		problems = append(problems, fmt.Errorf("%.0f calls a second were sent instead of %d: the machine is too slow for this", result.Rate, perSecond))
	}
	if result.Kills == 0 && took > 2*killEvery {
		problems = append(problems, errors.New("no node was killed"))
	}
	return errors.Join(problems...)
}
