package redis

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/guard/cache"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/test/engines"
)

var (
	readOrders  = &call.Capability{Kind: call.Tool, Name: "read_orders", Effect: call.Read, Depends: call.OnArguments}
	writeOrders = &call.Capability{Kind: call.Tool, Name: "write_orders", Effect: call.Write}
	mine        = &call.Capability{Kind: call.Tool, Name: "read_mine", Effect: call.Read}
	page        = &call.Capability{Kind: call.Resource, URI: "kb://page", Depends: call.OnArguments}
)

// A cacheNode is a cache of one node, in front of a world that all share.
type cacheNode struct {
	t      *testing.T
	cache  *cache.Cache
	shared *cache.Shared
	h      call.Handler
	world  *atomic.Int64
	asked  atomic.Int64
}

func newCacheNode(t *testing.T, db *DB, k secret.Key, scope string, world *atomic.Int64) *cacheNode {
	t.Helper()
	shared, err := cache.NewShared(db, k, scope, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return newCacheNodeWith(t, shared, world)
}

func newCacheNodeWith(t *testing.T, shared *cache.Shared, world *atomic.Int64) *cacheNode {
	t.Helper()
	c, err := cache.New(cache.Options{Shared: shared, MaxEntry: 10_000, Rules: []cache.Rule{
		{Names: []string{"read_*", "kb://*"}, TTL: time.Minute, For: cache.Everybody, RefreshOn: []string{"write_*"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	n := &cacheNode{t: t, cache: c, shared: shared, world: world}
	n.h = c.Guard("/mcp")(func(_ context.Context, cl *call.Call) (*call.Result, error) {
		if cl.Target.Effect == call.Write {
			return call.Text(fmt.Sprint(world.Add(1))), nil
		}
		n.asked.Add(1)
		cl.Event.Tokens = 7
		return &call.Result{Content: call.TextContent(fmt.Sprint(world.Load())), Structured: jsontext.Value(`{"a": 1.0}`)}, nil
	})
	return n
}

// call returns the text of an answer, and whether it was a kept one.
func (n *cacheNode) call(target *call.Capability, who string) (string, bool) {
	n.t.Helper()
	name := target.Name
	if target.URI != "" {
		name = target.URI
	}
	c := &call.Call{Kind: target.Kind, Name: name, Target: target, Args: jsontext.Value(`{"secret":"walnut"}`), Principal: &call.Principal{ID: who}, Asker: call.NoAsker}
	r, err := n.h(n.t.Context(), c)
	if err != nil {
		n.t.Fatal(err)
	}
	if target.Effect != call.Write && (c.Event.Tokens != 7 || string(r.Structured) != `{"a": 1.0}`) {
		n.t.Errorf("%+v, %s", c.Event, r.Structured)
	}
	text := strings.TrimSuffix(strings.TrimPrefix(string(r.Content), `[{"type":"text","text":"`), `"}]`)
	return text, c.Event.Cached
}

func (n *cacheNode) want(target *call.Capability, who, text string, cached bool) {
	n.t.Helper()
	if got, was := n.call(target, who); got != text || was != cached {
		n.t.Errorf("got %q (cached %v), want %q (cached %v)", got, was, text, cached)
	}
}

// Two nodes give each other's results again, and a write through one is seen at the other at once.
func TestSharedCache(t *testing.T) {
	db := open(t, engines.Redis(t).URL)
	var world atomic.Int64
	k := secret.RandomKey()
	a, b := newCacheNode(t, db, k, "one", &world), newCacheNode(t, db, k, "one", &world)
	a.want(readOrders, "grace", "0", false)
	b.want(readOrders, "bob", "0", true)
	b.want(readOrders, "bob", "0", true)
	if b.asked.Load() != 0 {
		t.Error("the second node asked its backend")
	}
	for i := range 5 { // each node writes in turn; the other must not give what was before
		writer, reader := a, b
		if i%2 == 1 {
			writer, reader = b, a
		}
		writer.call(writeOrders, "grace")
		now := fmt.Sprint(i + 1)
		reader.want(readOrders, "bob", now, false)
		writer.want(readOrders, "grace", now, true)
		reader.want(readOrders, "bob", now, true)
	}
	// What is one caller's alone stays so everywhere.
	a.want(mine, "grace", "5", false)
	b.want(mine, "bob", "5", false)
	b.want(mine, "grace", "5", true)
	// An update of a resource that one node hears of.
	a.want(page, "grace", "5", false)
	b.want(page, "grace", "5", true)
	world.Add(1)
	b.cache.Updated(t.Context(), page.URI)
	a.want(page, "grace", "6", false)
	b.want(page, "grace", "6", true)
	// Nodes with another configuration, or another key, have nothing in common with them.
	newCacheNode(t, db, k, "two", &world).want(page, "grace", "6", false)
	newCacheNode(t, db, secret.RandomKey(), "one", &world).want(page, "grace", "6", false)
	// Everything goes away by itself, and says nothing of what was asked.
	keys, err := db.client.Keys(t.Context(), "*").Result()
	if err != nil || len(keys) == 0 {
		t.Fatal(keys, err)
	}
	for _, key := range keys {
		value, err := db.client.Get(t.Context(), key).Result()
		if ttl := db.client.PTTL(t.Context(), key).Val(); err != nil || ttl <= 0 || ttl > 2*time.Hour {
			t.Errorf("%s stays for %v, %v", key, ttl, err)
		}
		if all := key + value; strings.Contains(all, "walnut") || strings.Contains(all, "grace") || strings.Contains(all, "orders") || strings.Contains(all, "text") {
			t.Errorf("%q says what was asked or answered", all)
		}
	}
}

// Whoever can write to Redis can plant nothing: not bytes of their own, not an answer to another
// question, not one of before a refresh.
func TestTamperedCache(t *testing.T) {
	db := open(t, engines.Redis(t).URL)
	var world atomic.Int64
	k := secret.RandomKey()
	a := newCacheNode(t, db, k, "one", &world)
	results := func() []string {
		t.Helper()
		all, err := db.client.Keys(t.Context(), "*cache:result:*").Result()
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	set := func(key string, value any) {
		t.Helper()
		if err := db.client.Set(t.Context(), key, value, time.Minute).Err(); err != nil {
			t.Fatal(err)
		}
	}
	fresh := func() *cacheNode { return newCacheNode(t, db, k, "one", &world) } // one that has nothing of its own
	a.want(readOrders, "ada", "0", false)
	first := results()[0]
	old, err := db.client.Get(t.Context(), first).Result()
	if err != nil {
		t.Fatal(err)
	}
	fresh().want(readOrders, "ada", "0", true)
	round, err := db.client.Keys(t.Context(), "*cache:round:*").Result()
	if err != nil || len(round) != 1 {
		t.Fatal(round, err)
	}
	before := db.client.Get(t.Context(), round[0]).Val()
	flipped := []byte(old)
	flipped[len(flipped)/2] ^= 1
	for what, value := range map[string]any{"a changed bit": flipped, "a part": old[:len(old)/2], "garbage": "garbage", "too much": strings.Repeat("x", 1<<20)} {
		set(first, value)
		n := fresh()
		if _, cached := n.call(readOrders, "ada"); cached {
			t.Errorf("%s is given as a result", what)
		}
	}
	// The answer to another question.
	a.call(page, "ada")
	for _, other := range results() {
		if other == first {
			continue
		}
		world.Add(1)
		set(other, old)
		fresh().want(page, "ada", fmt.Sprint(world.Load()), false)
	}
	// An answer of before a refresh, with the round of before it too: the node that knows of the refresh
	// does not take it.
	world.Store(0)
	set(first, old)
	fresh().want(readOrders, "ada", "0", true)
	a.call(writeOrders, "ada")
	set(first, old)
	fresh().want(readOrders, "ada", "1", false)
	set(first, old)
	set(round[0], before)
	a.want(readOrders, "ada", "1", false)
	// Something else than a text.
	for _, key := range append(round, first) {
		if err := db.client.Del(t.Context(), key).Err(); err != nil {
			t.Fatal(err)
		}
		if err := db.client.LPush(t.Context(), key, "x").Err(); err != nil {
			t.Fatal(err)
		}
	}
	fresh().want(readOrders, "ada", "1", false)
}

// Without Redis each node goes by its own, and does not give again what it knows to be old when Redis
// is back.
func TestCacheWithoutRedis(t *testing.T) {
	s := engines.Redis(t)
	db := open(t, s.URL)
	var world atomic.Int64
	k := secret.RandomKey()
	a, b := newCacheNode(t, db, k, "one", &world), newCacheNode(t, db, k, "one", &world)
	a.want(readOrders, "ada", "0", false)
	b.want(readOrders, "ada", "0", true)
	old, err := db.client.Keys(t.Context(), "*").Result()
	if err != nil {
		t.Fatal(err)
	}
	kept := map[string]string{}
	for _, key := range old {
		kept[key] = db.client.Get(t.Context(), key).Val()
	}
	s.Stop()
	start := time.Now()
	a.want(readOrders, "ada", "0", true)
	b.call(writeOrders, "bob")
	b.want(readOrders, "bob", "1", false)
	b.want(readOrders, "bob", "1", true)
	t.Logf("four calls without Redis took %v", time.Since(start))
	b = newCacheNodeWith(t, b.shared, &world) // another configuration that answers the same
	s.Restart(t)
	for key, value := range kept { // Redis comes back with what it had before
		for limit := time.Now().Add(5 * time.Second); ; {
			if err := db.client.Set(t.Context(), key, value, time.Minute).Err(); err == nil {
				break
			} else if time.Now().After(limit) {
				t.Fatal(err)
			}
		}
	}
	for limit := time.Now().Add(10 * time.Second); ; { // the node that wrote tells of it, and never gives what was before
		if got, _ := b.call(readOrders, "bob"); got != "1" {
			t.Fatalf("the node that wrote gives %q again", got)
		}
		if got, _ := a.call(readOrders, "ada"); got == "1" {
			break
		}
		if time.Now().After(limit) {
			t.Fatal("the other node never hears of it")
		}
	}
}

// Redis that comes and goes under load fails no call, and a node never gives again what it wrote over.
func TestCacheWithFlappingRedis(t *testing.T) {
	s := engines.Redis(t)
	db := open(t, s.URL)
	var world atomic.Int64
	n := newCacheNode(t, db, secret.RandomKey(), "one", &world)
	stop := make(chan struct{})
	var all sync.WaitGroup
	var calls, kept atomic.Int64
	for i := range 4 {
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				written := world.Load()
				if i == 0 && calls.Load()%16 == 0 {
					n.call(writeOrders, "ada")
					written = world.Load()
				}
				// A write that ended before this call began is in its answer, unless another one runs now.
				text, cached := n.call(readOrders, fmt.Sprint(i))
				if got, err := strconv.ParseInt(text, 10, 64); err != nil || got < written-1 {
					t.Errorf("%d was written, and %q is given (kept %v)", written, text, cached)
					return
				}
				if calls.Add(1); cached {
					kept.Add(1)
				}
			}
		})
	}
	for range 4 {
		for before := calls.Load(); calls.Load() < before+500 && !t.Failed(); {
			runtime.Gosched()
		}
		s.Stop()
		for before := calls.Load(); calls.Load() < before+500 && !t.Failed(); {
			runtime.Gosched()
		}
		s.Restart(t)
	}
	close(stop)
	all.Wait()
	t.Logf("%d calls, %d of them answered again", calls.Load(), kept.Load())
	if kept.Load() == 0 {
		t.Error("nothing was kept: the test shows nothing")
	}
}
