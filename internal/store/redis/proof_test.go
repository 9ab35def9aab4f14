package redis

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"

	"newel.dev/newel/internal/identity/dpop"
	"newel.dev/newel/test/engines"
)

const shownAt = "https://mcp.example.com/mcp"

// proofOf signs a DPoP proof with a key of its own.
func proofOf(t *testing.T, nonce string) *dpop.Request {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, (&jose.SignerOptions{EmbedJWK: true}).WithType("dpop+jwt"))
	if err != nil {
		t.Fatal(err)
	}
	payload, err := json.Marshal(map[string]any{"jti": rand.Text(), "htm": "POST", "htu": shownAt, "iat": time.Now().Unix(), "nonce": nonce})
	if err != nil {
		t.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	proof, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return &dpop.Request{Proofs: []string{proof}, Method: "POST", URL: shownAt}
}

// show presents a proof to a node.
func show(t *testing.T, node *dpop.Checker, r *dpop.Request) error {
	t.Helper()
	p, err := node.Judge(t.Context(), r, "", time.Now())
	if err != nil {
		return err
	}
	return node.Spend(t.Context(), p, time.Now())
}

// nonce gets one the way clients do: with a proof that lacks it.
func nonce(t *testing.T, node *dpop.Checker) string {
	t.Helper()
	if err := show(t, node, proofOf(t, "")); !errors.Is(err, dpop.ErrNonce) {
		t.Fatalf("without a nonce: %v", err)
	}
	return node.Nonce(time.Now())
}

// proofNode is a node of its own: all that it shares is in Redis, but for the key.
func proofNode(t *testing.T, address, place string) *dpop.Checker {
	t.Helper()
	return dpop.New(place, &dpop.Shared{Key: []byte("a key that nodes share"), Store: open(t, address).Proofs()})
}

// A proof is good for one time at all nodes together, also when it comes to all of them at once.
func TestProofsCountOnce(t *testing.T) {
	s := engines.Redis(t)
	nodes := []*dpop.Checker{proofNode(t, s.URL, "resource"), proofNode(t, s.URL, "resource"), proofNode(t, s.URL, "resource")}
	n := nonce(t, nodes[0])
	proof := proofOf(t, n)
	if err := show(t, nodes[1], proof); err != nil {
		t.Fatalf("with the nonce of another node: %v", err)
	}
	for i, node := range nodes {
		if err := show(t, node, proof); err == nil || errors.Is(err, dpop.ErrNonce) || errors.Is(err, dpop.ErrBusy) {
			t.Errorf("again, at node %d: %v", i, err)
		}
	}
	if err := show(t, proofNode(t, s.URL, "issuer"), proof); err != nil {
		t.Errorf("ids at another place are another matter: %v", err)
	}
	for range 50 {
		proof := proofOf(t, n)
		var taken atomic.Int32
		var all sync.WaitGroup
		gate := make(chan struct{})
		for _, node := range append(nodes, nodes...) {
			all.Go(func() {
				<-gate
				if show(t, node, proof) == nil {
					taken.Add(1)
				}
			})
		}
		close(gate)
		all.Wait()
		if taken.Load() != 1 {
			t.Fatalf("at once: taken %d times", taken.Load())
		}
	}
}

// While Redis is away no proof passes; after it came back none that it may have forgotten.
func TestProofsWithoutRedis(t *testing.T) {
	s := engines.Redis(t)
	a, b := proofNode(t, s.URL, "resource"), proofNode(t, s.URL, "resource")
	n := nonce(t, a)
	shown, kept := proofOf(t, n), proofOf(t, n)
	if err := show(t, a, shown); err != nil {
		t.Fatal(err)
	}
	again := func(when string) string {
		t.Helper()
		for _, p := range []*dpop.Request{shown, kept} {
			if err := show(t, b, p); !errors.Is(err, dpop.ErrNonce) {
				t.Fatalf("%s: %v", when, err)
			}
		}
		fresh := b.Nonce(time.Now())
		for _, node := range []*dpop.Checker{b, a} { // a has not heard of it
			if err := show(t, node, proofOf(t, fresh)); err != nil {
				t.Errorf("%s, with a new nonce: %v", when, err)
			}
		}
		return fresh
	}
	s.Stop()
	for _, p := range []*dpop.Request{shown, kept, proofOf(t, "")} {
		if err := show(t, b, p); !errors.Is(err, dpop.ErrBusy) {
			t.Errorf("Redis is away: %v", err)
		}
	}
	s.Restart(t)
	n = again("Redis came back empty")
	// One that reads back what it had saved before it ended is another run with the keys of the one before.
	db := open(t, s.URL)
	shown, kept = proofOf(t, n), proofOf(t, n)
	if err := show(t, a, shown); err != nil {
		t.Fatal(err)
	}
	if err := db.client.HSet(t.Context(), db.prefix+"proofs", "run", "0123").Err(); err != nil {
		t.Fatal(err)
	}
	again("Redis came back with what it had saved")
	keys, err := db.client.Keys(t.Context(), "*").Result()
	if err != nil || len(keys) < 3 {
		t.Fatalf("%q, %v", keys, err)
	}
	for _, k := range keys {
		if ttl := db.client.PTTL(t.Context(), k).Val(); ttl <= 0 || ttl > time.Hour {
			t.Errorf("%s stays for %v", k, ttl)
		}
	}
}

// Rights that many give to programs do: without dangerous commands.
func TestProofsWithFewRights(t *testing.T) {
	s := engines.Redis(t)
	if err := open(t, s.URL).client.Do(t.Context(), "ACL", "SETUSER", "few", "on", ">walnut", "~{newel}:*", "+@all", "-@dangerous").Err(); err != nil {
		t.Fatal(err)
	}
	_, host, _ := strings.Cut(s.URL, "@")
	node := proofNode(t, "redis://few:walnut@"+host, "resource")
	proof := proofOf(t, nonce(t, node))
	if err := show(t, node, proof); err != nil {
		t.Fatal(err)
	}
	if err := show(t, node, proof); err == nil {
		t.Error("a proof was taken twice")
	}
}
