package redis

import (
	"bytes"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"newel.dev/newel/internal/identity/dpop"
	"newel.dev/newel/internal/identity/issuer"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/logintest"
	"newel.dev/newel/test/engines"
)

const loginServer = "https://mcp.example.com"

func loginNode(t *testing.T, address string, key secret.Key, server string) *Logins {
	t.Helper()
	l, err := open(t, address).Logins(key, server)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestLogins(t *testing.T) {
	s, key := engines.Redis(t), secret.RandomKey()
	logintest.Run(t, loginNode(t, s.URL, key, loginServer), loginNode(t, s.URL, key, loginServer))
}

// Nothing of a login can be read or made in Redis, everything goes away by itself, and servers with
// another key or address have nothing of it.
func TestLoginsAreSealed(t *testing.T) {
	s, key := engines.Redis(t), secret.RandomKey()
	a := loginNode(t, s.URL, key, loginServer)
	kind := &issuer.Kind{Name: "login", Most: 10, Forget: true, OfOne: 10}
	at, other := issuer.Place{Kind: kind, Name: "walnut-name", Owner: "walnut-owner"}, issuer.Place{Kind: kind, Name: "other", Owner: "walnut-owner"}
	for _, place := range []issuer.Place{at, other} {
		if ok, err := a.Add(t.Context(), place, []byte("walnut-value"), time.Hour); !ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	read := func(l *Logins, at issuer.Place) (value string, err error) {
		err = l.Change(t.Context(), at, func(now []byte) ([]byte, time.Duration, error) {
			value = string(now)
			return nil, 0, nil
		})
		return value, err
	}
	for name, l := range map[string]*Logins{"another key": loginNode(t, s.URL, secret.RandomKey(), loginServer), "another address": loginNode(t, s.URL, key, "https://other.example.com")} {
		if v, err := read(l, at); v != "" || err != nil {
			t.Errorf("%s: %q, %v", name, v, err)
		}
	}
	db := a.db
	keys, err := db.client.Keys(t.Context(), "*").Result()
	if err != nil || len(keys) != 4 {
		t.Fatalf("%q, %v", keys, err)
	}
	for _, k := range keys {
		dump, err := db.client.Dump(t.Context(), k).Result()
		if err != nil || strings.Contains(dump+k, "walnut") {
			t.Errorf("%s can be read: %q, %v", k, dump, err)
		}
		if ttl := db.client.PTTL(t.Context(), k).Val(); ttl <= 0 || ttl > time.Hour || !strings.HasPrefix(k, "{newel}:") {
			t.Errorf("%s stays for %v", k, ttl)
		}
	}
	first, second := a.values(kind)+a.name(kind.Name, at.Name), a.values(kind)+a.name(kind.Name, other.Name)
	stored, err := db.client.Get(t.Context(), first).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Clone(stored)
	changed[len(changed)-1] ^= 1
	for name, value := range map[string][]byte{"a bit": changed, "of nobody": []byte("x"), "too long": make([]byte, maxLogin+1), "of another place": stored} {
		if err := db.client.Set(t.Context(), second, value, time.Minute).Err(); err != nil {
			t.Fatal(err)
		}
		if v, err := read(a, other); v != "" || err == nil {
			t.Errorf("changed in Redis, %s: %q, %v", name, v, err)
		}
	}
	if v, err := read(a, at); v != "walnut-value" || err != nil {
		t.Errorf("%q, %v", v, err)
	}
	s.Stop()
	if _, err := read(a, at); err == nil {
		t.Error("Redis is away, and nobody says so")
	}
}

// A Redis that takes questions and never answers is away too, soon.
func TestSilence(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // the connections that wait in it are never taken
	address := "redis://" + l.Addr().String()
	logins, proofs := loginNode(t, address, secret.RandomKey(), loginServer), proofNode(t, address, "resource")
	began := time.Now()
	if ok, err := logins.Add(t.Context(), issuer.Place{Kind: &issuer.Kind{Name: "silent", Most: 1}}, []byte("1"), time.Minute); ok || err == nil {
		t.Errorf("a login is kept: %v, %v", ok, err)
	}
	if err := show(t, proofs, proofOf(t, "")); !errors.Is(err, dpop.ErrBusy) {
		t.Errorf("a proof: %v", err)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("both took %v", took)
	}
}
