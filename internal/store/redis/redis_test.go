package redis

import (
	"context"
	"log/slog"
	"strconv"
	"strings"
	"testing"
	"time"

	"newel.dev/newel/internal/guard/quota"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/quotatest"
	"newel.dev/newel/test/engines"
)

func open(t *testing.T, address string) *DB {
	t.Helper()
	db, err := Open(secret.New(address))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return db
}

func TestQuota(t *testing.T) {
	db := open(t, engines.Redis(t).URL)
	if err := db.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	quotatest.Run(t, db)
}

// Everything that counts goes away by itself.
func TestNothingStays(t *testing.T) {
	db := open(t, engines.Redis(t).URL)
	until := time.Now().Add(time.Hour)
	_, err := db.Take(t.Context(), time.Now(), []quota.Claim{
		{Key: "r", Kind: quota.KindRate, Limit: 1, Every: time.Hour, Amount: 1},
		{Key: "c", Kind: quota.KindConcurrent, Limit: 1, Every: time.Hour, Amount: 1, ID: "a"},
		{Key: "b", Kind: quota.KindBudget, Limit: 1, Amount: 1, Until: until},
	})
	if err != nil {
		t.Fatal(err)
	}
	keys, err := db.client.Keys(t.Context(), "*").Result()
	if err != nil || len(keys) != 3 {
		t.Fatalf("%q, %v", keys, err)
	}
	for _, k := range keys {
		if ttl := db.client.PTTL(t.Context(), k).Val(); ttl <= 0 || ttl > time.Hour+time.Second || !strings.HasPrefix(k, "{newel}:") {
			t.Errorf("%s stays for %v", k, ttl)
		}
	}
}

func TestAway(t *testing.T) {
	s := engines.Redis(t)
	db := open(t, s.URL)
	claim := []quota.Claim{{Key: "r", Kind: quota.KindRate, Limit: 9, Every: time.Hour, Amount: 1}}
	if _, err := db.Take(t.Context(), time.Now(), claim); err != nil {
		t.Fatal(err)
	}
	s.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := db.Take(ctx, time.Now(), claim); err == nil {
		t.Error("a server that is gone counts")
	}
	s.Restart(t)
	for ctx.Err() == nil {
		if _, err := db.Take(ctx, time.Now(), claim); err == nil {
			return
		}
	}
	t.Error("it does not come back")
}

func TestAddress(t *testing.T) {
	for _, address := range []string{"", "http://x", "localhost:6379", "redis://:hunter2@host:port"} {
		if _, err := Open(secret.New(address)); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: %v", address, err)
		}
	}
}

// Events of a stream are read again from where a client lost it; what is gone is said to be gone.
func TestEvents(t *testing.T) {
	s := engines.Redis(t)
	e := open(t, s.URL).Events(time.Hour, slog.New(slog.DiscardHandler))
	read := func(stream string, index int) (string, error) {
		var all []string
		for data, err := range e.After(t.Context(), "s", stream, index) {
			if err != nil {
				return "", err
			}
			all = append(all, string(data))
		}
		return strings.Join(all, " "), nil
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(e.Open(t.Context(), "s", "one"))
	for _, data := range []string{"a", "b", "c"} {
		must(e.Append(t.Context(), "s", "one", []byte(data)))
	}
	for index, want := range map[int]string{-1: "a b c", 0: "b c", 2: "", 9: ""} {
		if got, err := read("one", index); err != nil || got != want {
			t.Errorf("after %d: %q, %v", index, got, err)
		}
	}
	if got, err := read("other", 0); err == nil {
		t.Errorf("a stream that is none: %q", got)
	}
	must(e.Append(t.Context(), "s", "one", make([]byte, maxEventBytes-1)))
	if got, err := read("one", -1); err == nil {
		t.Errorf("the first event is gone: %d bytes", len(got))
	}
	if _, err := read("one", 2); err != nil {
		t.Errorf("the last event: %v", err)
	}
	must(e.SessionClosed(t.Context(), "s"))
	if _, err := read("one", 2); err == nil {
		t.Error("a session that ended")
	}
	if left, err := e.db.client.Keys(t.Context(), "*").Result(); err != nil || len(left) > 0 {
		t.Errorf("a session that ended leaves %q, %v", left, err)
	}
	brief := e.db.Events(time.Millisecond, e.log)
	for i := range 1000 { // a session that lives for long makes a stream for each request
		must(brief.Open(t.Context(), "s", strconv.Itoa(i)))
		must(brief.Append(t.Context(), "s", strconv.Itoa(i), []byte("x")))
	}
	if n, err := e.db.client.ZCard(t.Context(), e.keys("s", "")[2]).Result(); err != nil || n > 500 {
		t.Errorf("%d streams of a session are remembered, %v", n, err)
	}
	s.Stop()
	must(e.Open(t.Context(), "s", "two"))
	must(e.Append(t.Context(), "s", "two", []byte("x")))
	if _, err := read("two", -1); err == nil {
		t.Error("Redis is away, and knows the stream")
	}
}
