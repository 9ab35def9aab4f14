package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/go-jose/go-jose/v4"

	"newel.dev/newel/test/program"
)

// An issuance is what the issuer of the test answers from now on.
type issuance struct {
	Down   bool            `json:"down"`   // every connection ends without an answer
	Keys   json.RawMessage `json:"keys"`   // the JWK Set
	Pad    int             `json:"pad"`    // bytes that the key set is too large by
	Opaque json.RawMessage `json:"opaque"` // what introspection says of any token
	Asked  int             `json:"asked"`  // how often the keys were asked for
}

// serveIssuer is the process of an authorization server: its keys and what it says of opaque tokens.
// What it answers is put to /control, which says how often the keys were asked for.
func serveIssuer(addr, _ string) error {
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0) // the driver is gone
	}()
	var mu sync.Mutex
	var now issuance
	mux := http.NewServeMux()
	mux.HandleFunc("/control", func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if r.Method == http.MethodPut {
			asked := now.Asked
			now = issuance{}
			if err := json.NewDecoder(r.Body).Decode(&now); err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
			}
			now.Asked = asked
		}
		_ = json.NewEncoder(w).Encode(now)
	})
	answer := func(f func(w http.ResponseWriter)) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			mu.Lock()
			defer mu.Unlock()
			if now.Down {
				panic(http.ErrAbortHandler)
			}
			w.Header().Set("Content-Type", "application/json")
			f(w)
		}
	}
	mux.HandleFunc("/jwks", func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		now.Asked++
		mu.Unlock()
		answer(func(w http.ResponseWriter) {
			_, _ = w.Write(now.Keys)
			_, _ = io.CopyN(w, spaces{}, int64(now.Pad)) // white space is JSON, too
		})(w, r)
	})
	mux.HandleFunc("POST /introspect", answer(func(w http.ResponseWriter) { _, _ = w.Write(now.Opaque) }))
	srv := &http.Server{Addr: addr, Handler: mux, ReadHeaderTimeout: time.Minute}
	return srv.ListenAndServe()
}

type spaces struct{}

// Read implements io.Reader.
func (spaces) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = ' '
	}
	return len(b), nil
}

// An authority is the issuer as its operator has it: its process and its private keys.
type authority struct {
	*program.Process
	url   string
	state issuance
	count atomic.Int64 // of tokens
}

// issuer starts an authority.
func (l *lane) issuer() (*authority, error) {
	addr, err := program.FreeAddress()
	if err != nil {
		return nil, err
	}
	a := &authority{url: "http://" + addr}
	if a.Process, err = part("issuer", addr, "-"); err != nil {
		return nil, err
	}
	l.others = append(l.others, a.Process)
	if err := a.Until(l.host.Context(), "the issuer", func() bool { _, err := a.control(nil); return err == nil }); err != nil {
		return nil, err
	}
	return a, nil
}

// auth is the section of a configuration that takes its tokens.
func (a *authority) auth() string {
	return fmt.Sprintf(`auth:
  mode: tokens
  issuers:
    - {url: "%[1]s", jwks: "%[1]s/jwks", introspection: "%[1]s/introspect", audiences: [faults], skew: 1s}
`, a.url)
}

// control tells the issuer what to answer, if anything, and returns what it does.
func (a *authority) control(to *issuance) (now issuance, err error) {
	method, body := http.MethodGet, []byte(nil)
	if to != nil {
		method = http.MethodPut
		if body, err = json.Marshal(to); err != nil {
			return now, err
		}
	}
	r, err := http.NewRequestWithContext(context.Background(), method, a.url+"/control", bytes.NewReader(body))
	if err != nil {
		return now, err
	}
	resp, err := client.Do(r)
	if err != nil {
		return now, err
	}
	defer resp.Body.Close()
	return now, json.NewDecoder(resp.Body).Decode(&now)
}

// publish has the issuer answer with these keys.
func (a *authority) publish(keys ...jose.JSONWebKey) error {
	var set jose.JSONWebKeySet
	for _, k := range keys {
		set.Keys = append(set.Keys, k.Public())
	}
	var err error
	if a.state.Keys, err = json.Marshal(set); err != nil {
		return err
	}
	_, err = a.control(&a.state)
	return err
}

// asked is how often the keys were asked for.
func (a *authority) asked() (int, error) {
	now, err := a.control(nil)
	return now.Asked, err
}

func newKey(id string) (jose.JSONWebKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	return jose.JSONWebKey{Key: key, KeyID: id, Algorithm: "ES256", Use: "sig"}, err
}

// sign makes an access token that counts for so long.
func (a *authority) sign(k jose.JSONWebKey, life time.Duration) (string, error) {
	return a.signAs(jose.SigningKey{Algorithm: jose.ES256, Key: k}, (&jose.SignerOptions{}).WithType("at+jwt"), life)
}

func (a *authority) signAs(k jose.SigningKey, o *jose.SignerOptions, life time.Duration) (string, error) {
	signer, err := jose.NewSigner(k, o)
	if err != nil {
		return "", err
	}
	payload, err := json.Marshal(a.claims(life))
	if err != nil {
		return "", err
	}
	s, err := signer.Sign(payload)
	if err != nil {
		return "", err
	}
	return s.CompactSerialize()
}

func (a *authority) claims(life time.Duration) map[string]any {
	now := time.Now()
	return map[string]any{
		"iss": a.url, "sub": "ada", "aud": "faults", "client_id": "driver", "jti": strconv.FormatInt(a.count.Add(1), 10),
		"iat": now.Unix(), "exp": now.Add(life).Unix(),
	}
}

// later sets the clock by which a node judges issuers and tokens.
func (n *node) later(by time.Duration) error {
	name := n.armed() + ".clock"
	if err := os.WriteFile(name+".new", []byte(by.String()), 0o600); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}

// written reports which calls with a prefix of their name are in the ledger.
func (l *lane) written(prefix string) (int, error) {
	b, err := os.ReadFile(l.ledgerFile())
	return bytes.Count(b, []byte(`"op":"`+prefix)), err
}

// tokenLife outlives everything that the scenarios have happen.
const tokenLife = 72 * time.Hour

// providerGoes has the identity provider go away: what it said before counts until its time is over,
// and nothing else does.
func providerGoes(l *lane) error {
	n := l.nodes[0]
	a, err := l.issuer()
	if err != nil {
		return err
	}
	if err := l.rewrite(n, a.auth()+"backends:\n"+backend("ledger", l.ledgers, "")); err != nil {
		return err
	}
	k, err := newKey("k1")
	if err != nil {
		return err
	}
	stranger, err := newKey("k2")
	if err != nil {
		return err
	}
	a.state.Opaque, err = json.Marshal(a.with(map[string]any{"active": true}))
	if err != nil {
		return err
	}
	if err := errors.Join(a.publish(k), l.restart(n, false)); err != nil {
		return err
	}
	calls, open := 0, 0
	do := func(token string, allowed bool, when string) reply {
		calls++
		name := map[bool]string{true: "may", false: "may not"}[allowed] + fmt.Sprint(calls)
		r := ask(client, n.addr, token, "plain", map[string]any{"op": name, "nonce": ""})
		switch {
		case r.err != nil:
			l.expect("E7", "%s: %v", when, r.err)
		case allowed != (r.code == ""):
			if !allowed {
				open++
			}
			l.expect("E7", "I9: %s: allowed %v, and it is: %+v", when, allowed, r)
		case !allowed && r.status != http.StatusUnauthorized && (r.status != http.StatusServiceUnavailable || r.after <= 0):
			l.expect("E7", "%s: it was refused with %+v", when, r)
		}
		return r
	}
	good, err := a.sign(k, tokenLife)
	if err != nil {
		return err
	}
	fresh := func(life time.Duration) string {
		var t string
		if t, err = a.sign(k, life); err != nil {
			panic(err) // it could before
		}
		return t
	}
	unseen, err := a.sign(stranger, tokenLife)
	if err != nil {
		return err
	}
	do(good, true, "before")
	do("opaque", true, "before, an opaque token")
	a.state.Down = true
	if _, err := a.control(&a.state); err != nil {
		return err
	}
	l.incident("E7")
	do(good, true, "with the provider away")
	do(fresh(tokenLife), true, "a token that was not seen, of a key that was")
	do(unseen, false, "a key that was not seen")
	do("opaque too", false, "an opaque token that was not seen")
	do("", false, "no token")
	short := fresh(2 * time.Second)
	do(short, true, "a token that ends soon")
	<-time.After(3200 * time.Millisecond)
	if r := do(short, false, "a token that has ended"); r.status != http.StatusUnauthorized {
		l.expect("E7", "a token that has ended: %+v", r)
	}
	// Hanging is worse than refusing: whoever needs no answer of the provider does not wait for one.
	if err := halt(a.PID()); err != nil {
		return err
	}
	if err := n.later(time.Minute); err != nil {
		return err
	}
	waiting := make(chan reply, 1)
	go func() { waiting <- do(unseen, false, "a key that was not seen, of a provider that hangs") }()
	var longest time.Duration
	for range 20 {
		longest = max(longest, do(fresh(tokenLife), true, "while somebody waits for the provider").took)
	}
	if longest > 5*time.Second {
		l.expect("E7", "a call whose key is known waits %v for a provider that hangs", longest)
	}
	if err := syscall.Kill(a.PID(), syscall.SIGCONT); err != nil {
		return err
	}
	<-waiting
	l.incident("E7")
	if r := do("opaque", false, "an opaque token, after its answer is old"); r.status != http.StatusServiceUnavailable {
		l.expect("E7", "an opaque token that cannot be asked about: %+v", r)
	}
	// Keys grow old.
	const step, most = 30 * time.Minute, 24 * time.Hour
	grace := time.Duration(0)
	for at := step; at <= most+2*step; at += step {
		if err := n.later(at); err != nil {
			return err
		}
		if r := ask(client, n.addr, good, "plain", map[string]any{"op": "grace" + at.String(), "nonce": ""}); r.code != "" {
			break
		}
		grace = at
	}
	if grace > most || grace < most-step {
		l.expect("E7", "I9: keys of a provider that is away count for %v, and should for %v", grace, most)
	}
	if err := n.later(most + 2*step); err != nil {
		return err
	}
	for range 5 {
		do(good, false, "after the keys are old")
		do(fresh(tokenLife), false, "after the keys are old, a fresh token")
	}
	l.incident("E7")
	a.state.Down = false
	if _, err := a.control(&a.state); err != nil {
		return err
	}
	back := time.Now()
	if err := n.later(most + 3*step); err != nil { // past the pause before it is asked again
		return err
	}
	for ask(client, n.addr, good, "find", map[string]any{"operation": "x"}).code != "" && time.Since(back) < 10*time.Second {
		<-time.After(20 * time.Millisecond)
	}
	do(good, true, "with the provider back")
	if bad, err := l.written("may not"); err != nil || bad > 0 {
		l.expect("E7", "I9: %d calls that were refused are in the ledger (%v)", bad, err)
	}
	l.measure("E7", "%d of %d calls allowed beyond their time; grace time: keys %v (in steps of %v), answers about opaque tokens 30 s; while the provider hung the longest call of a known key took %.0f ms", open, calls, grace, step, millis(longest))
	return nil
}

// with are the claims of a token and more.
func (a *authority) with(more map[string]any) map[string]any {
	c := a.claims(tokenLife)
	for k, v := range more {
		c[k] = v
	}
	return c
}

// keysTurn has the issuer's keys change in every way, while tokens come that are good, and a great
// many that are not.
func keysTurn(l *lane) error {
	n := l.nodes[0]
	a, err := l.issuer()
	if err != nil {
		return err
	}
	if err := l.rewrite(n, a.auth()+"backends:\n"+backend("ledger", l.ledgers, "")); err != nil {
		return err
	}
	var keys []jose.JSONWebKey
	for _, id := range []string{"k1", "k2", "k3", "k3", "none of its"} {
		k, err := newKey(id)
		if err != nil {
			return err
		}
		keys = append(keys, k)
	}
	k1, k2, k3, other, forger := keys[0], keys[1], keys[2], keys[3], keys[4]
	if err := errors.Join(a.publish(k1), l.restart(n, false)); err != nil {
		return err
	}
	begun := time.Now()
	before, err := a.asked()
	if err != nil {
		return err
	}
	var clock time.Duration
	pass := func(d time.Duration) error { clock += d; return n.later(clock) }

	// Good tokens come all the time, signed by whatever key the issuer signs with now.
	var signs atomic.Pointer[jose.JSONWebKey]
	signs.Store(&k1)
	var good, rejected, told atomic.Int64
	var longest atomic.Int64
	stop := make(chan struct{})
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(5 * time.Millisecond):
				}
				token, err := a.sign(*signs.Load(), tokenLife)
				if err != nil {
					l.expect("E8", "%v", err)
					return
				}
				first := time.Now()
				for {
					r := ask(client, n.addr, token, "find", map[string]any{"operation": "x"})
					if r.status == http.StatusServiceUnavailable && r.after > 0 {
						told.Add(1)
						select {
						case <-stop:
							return
						case <-time.After(250 * time.Millisecond):
						}
						continue
					}
					if r.code != "" || r.err != nil {
						rejected.Add(1)
						l.expect("E8", "a token of a key that the issuer has was rejected: %+v", r)
					}
					break
				}
				good.Add(1)
				for took := int64(time.Since(first)); ; {
					if most := longest.Load(); took <= most || longest.CompareAndSwap(most, took) {
						break
					}
				}
			}
		})
	}
	done := func() { close(stop); all.Wait() }
	bad, names := 0, 0
	deny := func(token, what string) {
		bad++
		r := ask(client, n.addr, token, "plain", map[string]any{"op": fmt.Sprintf("bad%d", bad), "nonce": ""})
		if r.status != http.StatusUnauthorized && (r.status != http.StatusServiceUnavailable || r.after <= 0) {
			l.expect("E8", "%s: %+v", what, r)
		}
	}
	forged := func() string {
		names++
		k := forger
		k.KeyID = fmt.Sprint("unknown", names)
		token, err := a.sign(k, tokenLife)
		if err != nil {
			panic(err) // it could before
		}
		return token
	}
	failed := func() error {
		first, err := a.sign(k1, tokenLife)
		if err != nil {
			return err
		}
		// A new key, with nothing to shorten the wait: tokens of it are told to come again, not refused.
		deny(forged(), "a forged token")
		if err := a.publish(k1, k2); err != nil {
			return err
		}
		signs.Store(&k2)
		for at := told.Load() + good.Load(); told.Load()+good.Load() < at+30; {
			<-time.After(10 * time.Millisecond)
		}
		if err := pass(11 * time.Second); err != nil {
			return err
		}
		l.incident("E8")
		// The old one goes.
		if err := errors.Join(a.publish(k2), pass(11*time.Second)); err != nil {
			return err
		}
		deny(forged(), "a forged token") // has the issuer be asked
		deny(first, "a token of a key that was taken away")
		if err := pass(11 * time.Second); err != nil {
			return err
		}
		r := ask(client, n.addr, first, "plain", map[string]any{"op": "bad old", "nonce": ""})
		if r.status != http.StatusUnauthorized {
			l.expect("E8", "a token of a key that was taken away: %+v", r)
		}
		l.incident("E8")
		// Another key under the same id.
		if err := errors.Join(a.publish(k2, k3), pass(11*time.Second)); err != nil {
			return err
		}
		signs.Store(&k3)
		for at := good.Load(); good.Load() < at+30; {
			<-time.After(10 * time.Millisecond)
		}
		if err := errors.Join(a.publish(k2), pass(11*time.Second)); err != nil { // so that none of k3 is under way
			return err
		}
		signs.Store(&k2)
		for at := good.Load(); good.Load() < at+10; {
			<-time.After(10 * time.Millisecond)
		}
		if err := errors.Join(a.publish(k2, other), pass(11*time.Second)); err != nil {
			return err
		}
		signs.Store(&other)
		for at := good.Load(); good.Load() < at+30; {
			<-time.After(10 * time.Millisecond)
		}
		l.incident("E8")
		// Ten megabytes.
		memory, err := resident(n.PID())
		if err != nil {
			return err
		}
		a.state.Pad = 10 << 20
		if err := errors.Join(a.publish(k2, other, k1), pass(11*time.Second)); err != nil {
			return err
		}
		for range 20 {
			deny(forged(), "a forged token")
		}
		deny(first, "a token whose key is only in a key set that is too large")
		after, err := resident(n.PID())
		if err != nil {
			return err
		}
		if after-memory > 16<<20 {
			l.expect("E8", "a key set of 10 MB costs %d KiB of memory", (after-memory)>>10)
		}
		a.state.Pad = 0
		if err := errors.Join(a.publish(k2, other), pass(31*time.Second)); err != nil {
			return err
		}
		l.incident("E8")
		return l.floods(a, n, other, forged, deny)
	}()
	done()
	if failed != nil {
		return failed
	}
	now, err := a.asked()
	if err != nil {
		return err
	}
	if written, err := l.written("bad"); err != nil || written > 0 {
		l.expect("E8", "I9: %d calls with tokens that count for nothing are in the ledger (%v)", written, err)
	}
	minutes := (time.Since(begun) + clock).Minutes()
	if rate := float64(now-before) / minutes; rate > 7 {
		l.expect("E8", "the issuer was asked %.1f times a minute", rate)
	}
	l.measure("E8", "valid tokens rejected %d of %d (%d times told to come again, at most %.1f s until done); %d bad tokens; the issuer was asked %d times in %.1f minutes of its clock",
		rejected.Load(), good.Load(), told.Load(), time.Duration(longest.Load()).Seconds(), bad, now-before, minutes)
	return nil
}

// floods sends tokens that are forged in every way, many at once.
func (l *lane) floods(a *authority, n *node, k jose.JSONWebKey, forged func() string, deny func(token, what string)) error {
	before, err := a.asked()
	if err != nil {
		return err
	}
	begun := time.Now()
	for range 300 {
		deny(forged(), "an unknown key")
	}
	same, err := newKey(k.KeyID)
	if err != nil {
		return err
	}
	for range 100 {
		token, err := a.sign(same, tokenLife)
		if err != nil {
			return err
		}
		deny(token, "a bad signature")
	}
	after, err := a.asked()
	if err != nil {
		return err
	}
	if most := 2 + int(time.Since(begun)/(10*time.Second)); after-before > most {
		l.expect("E8", "400 forged tokens had the issuer asked %d times, which may be %d", after-before, most)
	}
	// The algorithm is the issuer's to choose.
	public, err := k.Public().MarshalJSON()
	if err != nil {
		return err
	}
	typ := func() *jose.SignerOptions {
		return (&jose.SignerOptions{}).WithType("at+jwt").WithHeader("kid", k.KeyID)
	}
	mac, err := a.signAs(jose.SigningKey{Algorithm: jose.HS256, Key: public}, typ(), tokenLife)
	if err != nil {
		return err
	}
	own := same
	own.KeyID = ""
	embedded, err := a.signAs(jose.SigningKey{Algorithm: jose.ES256, Key: own}, &jose.SignerOptions{EmbedJWK: true, ExtraHeaders: map[jose.HeaderKey]any{"typ": "at+jwt"}}, tokenLife)
	if err != nil {
		return err
	}
	elsewhere, err := a.signAs(jose.SigningKey{Algorithm: jose.ES256, Key: same}, typ().WithHeader("jku", a.url+"/evil"), tokenLife)
	if err != nil {
		return err
	}
	right, err := a.sign(k, tokenLife)
	if err != nil {
		return err
	}
	parts := strings.Split(right, ".")
	head := func(alg string) string {
		return base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"alg":%q,"typ":"at+jwt","kid":%q}`, alg, k.KeyID))
	}
	for what, token := range map[string]string{
		"HS256 with the public key": mac, "a key in the token": embedded, "a key elsewhere": elsewhere,
		"none": head("none") + "." + parts[1] + ".", "None": head("None") + "." + parts[1] + "." + parts[2],
		"RS256 over ES256": head("RS256") + "." + parts[1] + "." + parts[2], "without a signature": parts[0] + "." + parts[1] + ".",
	} {
		deny(token, "alg confusion: "+what)
	}
	l.incident("E8")
	if r := ask(client, n.addr, right, "find", map[string]any{"operation": "x"}); r.code != "" {
		l.expect("E8", "after all of that a good token: %+v", r)
	}
	return nil
}

// resident is the memory of a process, in bytes.
func resident(pid int) (int, error) {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "statm"))
	if err != nil {
		return 0, err
	}
	var size, pages int
	if _, err := fmt.Sscan(string(b), &size, &pages); err != nil {
		return 0, err
	}
	return pages * os.Getpagesize(), nil
}
