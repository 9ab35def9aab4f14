package verify

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Bounds of what an issuer may answer, and how often it is asked.
const (
	maxDocument  = 1 << 20 // bytes
	maxKeys      = 100
	minRSABits   = 2048
	fetchTimeout = 10 * time.Second

	refreshEvery = 5 * time.Minute  // while all is well
	unknownEvery = 10 * time.Second // because of a key nobody knows
	retryFirst   = time.Second      // after a failure, doubled each time
	retryMost    = 30 * time.Second
	staleAfter   = 24 * time.Hour // keys of an issuer that is down are trusted no longer
)

// keySet is the signing keys of one issuer. It is safe for concurrent use.
type keySet struct {
	issuer string
	uri    string // of the JWKS; "" until discovered
	local  KeySource
	http   *http.Client
	now    func() time.Time
	lost   func() // called when a key is no longer among the issuer's

	mu      sync.Mutex // guards what is below
	keys    []jose.JSONWebKey
	fetched time.Time     // last success
	next    time.Time     // no fetch before this
	pause   time.Duration // after the last failure
	problem error         // that failure, until a success
	flight  chan struct{} // closed when the fetch under way is done
}

// errUnknownKey is a key that the issuer may have, but that cannot be asked for now.
type errUnknownKey struct {
	after   time.Duration
	problem error // why the last time brought no keys, or nil
}

// Error implements error.
func (e errUnknownKey) Error() string {
	if e.problem != nil {
		return "no key of this id is known yet: " + e.problem.Error()
	}
	return "no key of this id is known yet"
}

var errNoKey = errors.New("the issuer has no such key")

// find returns the keys a signature may be of. An id nobody knows makes it ask the issuer, at most
// once every ten seconds however many such tokens come: then it says to try again, because the
// token may be good.
func (k *keySet) find(ctx context.Context, id string) ([]jose.JSONWebKey, error) {
	for {
		k.mu.Lock()
		now := k.now()
		if len(k.keys) > 0 && now.Sub(k.fetched) > staleAfter {
			k.keys = nil
		}
		if found := k.byID(id); len(found) > 0 {
			k.mu.Unlock()
			return found, nil
		}
		if k.flight != nil {
			wait := k.flight
			k.mu.Unlock()
			select {
			case <-wait:
				continue
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		if left := k.next.Sub(now); left > 0 {
			problem := k.problem
			k.mu.Unlock()
			return nil, errUnknownKey{left, problem}
		}
		done := make(chan struct{})
		k.flight = done
		k.mu.Unlock()
		err := k.fetch(ctx)
		k.mu.Lock()
		k.flight = nil
		close(done)
		found := k.byID(id)
		k.mu.Unlock()
		switch {
		case err != nil:
			return nil, err
		case len(found) == 0 && k.local != nil:
			return nil, fmt.Errorf("%w: the token is forged, or of a node with other signing keys, which all nodes must have", errNoKey)
		case len(found) == 0:
			return nil, errNoKey
		}
		return found, nil
	}
}

// again returns the keys that a signature may be of after it was of none of had: an issuer may have
// another key under the same id now. It asks as find does, no more often, and returns nil if there is
// nothing new.
func (k *keySet) again(ctx context.Context, id string, had []jose.JSONWebKey) []jose.JSONWebKey {
	for asked := false; ; asked = true {
		k.mu.Lock()
		now := k.now()
		if found := k.byID(id); !slices.EqualFunc(found, had, func(a, b jose.JSONWebKey) bool { return sameKey(&a, &b) }) {
			k.mu.Unlock()
			return found
		}
		wait := k.flight
		if asked || wait == nil && k.next.After(now) {
			k.mu.Unlock()
			return nil
		}
		if wait != nil {
			k.mu.Unlock()
			select {
			case <-wait:
				continue
			case <-ctx.Done():
				return nil
			}
		}
		done := make(chan struct{})
		k.flight = done
		k.mu.Unlock()
		_ = k.fetch(ctx) // then there is nothing new
		k.mu.Lock()
		k.flight = nil
		close(done)
		k.mu.Unlock()
	}
}

// byID returns the keys with an id, or all if the token names none. mu is held.
func (k *keySet) byID(id string) []jose.JSONWebKey {
	if id == "" {
		return k.keys
	}
	var out []jose.JSONWebKey
	for _, key := range k.keys {
		if key.KeyID == id {
			out = append(out, key)
		}
	}
	return out
}

// refresh asks the issuer if it is time, and returns when to come again.
func (k *keySet) refresh(ctx context.Context) time.Duration {
	k.mu.Lock()
	now := k.now()
	left := max(k.fetched.Add(refreshEvery).Sub(now), k.next.Sub(now))
	if k.flight != nil || !k.fetched.IsZero() && left > 0 {
		k.mu.Unlock()
		return max(left, time.Second)
	}
	done := make(chan struct{})
	k.flight = done
	k.mu.Unlock()
	_ = k.fetch(ctx) // who needs the keys says why they are not there
	k.mu.Lock()
	defer k.mu.Unlock()
	k.flight = nil
	close(done)
	return max(k.next.Sub(k.now()), time.Second)
}

// fetch asks the issuer for its keys. Of a failure the old ones stay.
func (k *keySet) fetch(ctx context.Context) error {
	// Who waits may go away; what is learned is for all.
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), fetchTimeout)
	defer stop()
	keys, err := k.ask(ctx)
	k.mu.Lock()
	now := k.now()
	if err != nil {
		k.pause = min(max(2*k.pause, retryFirst), retryMost)
		k.next = now.Add(k.pause)
		k.problem = fmt.Errorf("the keys of %s: %w", k.issuer, err)
		err = k.problem
		k.mu.Unlock()
		return err
	}
	removed := false
	for _, old := range k.keys {
		kept := false
		for _, n := range keys {
			kept = kept || sameKey(&old, &n)
		}
		removed = removed || !kept
	}
	k.keys, k.fetched, k.pause, k.problem, k.next = keys, now, 0, nil, now.Add(unknownEvery)
	k.mu.Unlock()
	if removed {
		k.lost()
	}
	return nil
}

func sameKey(a, b *jose.JSONWebKey) bool {
	ja, errA := a.MarshalJSON()
	jb, errB := b.MarshalJSON()
	return errA == nil && errB == nil && string(ja) == string(jb)
}

func (k *keySet) ask(ctx context.Context) ([]jose.JSONWebKey, error) {
	raw, uri, err := k.document(ctx)
	if err != nil {
		return nil, err
	}
	var set struct {
		Keys []jsontext.Value `json:"keys"`
	}
	if err := json.Unmarshal(raw, &set); err != nil || set.Keys == nil {
		return nil, fmt.Errorf("%s is no key set", uri)
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("%s holds more than %d keys", uri, maxKeys)
	}
	var keys []jose.JSONWebKey
	for _, raw := range set.Keys { // one that is not understood is no reason to lose the others
		var key jose.JSONWebKey
		if key.UnmarshalJSON(raw) == nil && usable(&key) && verifies(raw) {
			keys = append(keys, key)
		}
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("%s holds no key that can be used", uri)
	}
	return keys, nil
}

// document reads the key set, and says where it stands.
func (k *keySet) document(ctx context.Context) (raw []byte, uri string, err error) {
	if k.local != nil {
		raw, err = k.local()
		return raw, "the key set in memory", err
	}
	if uri = k.uri; uri == "" {
		if uri, err = k.discover(ctx); err != nil {
			return nil, "", err
		}
	}
	raw, err = get(ctx, k.http, uri)
	return raw, uri, err
}

// usable reports whether a key may sign tokens: public, strong enough, and not for encryption.
func usable(k *jose.JSONWebKey) bool {
	if k.Use == "enc" || !k.IsPublic() || !k.Valid() {
		return false
	}
	switch key := k.Key.(type) {
	case *rsa.PublicKey:
		return key.N.BitLen() >= minRSABits
	case *ecdsa.PublicKey, ed25519.PublicKey:
		return true
	}
	return false
}

// verifies reports whether a key is published for signatures, as far as it says (RFC 7517, section
// 4.3; go-jose does not read it).
func verifies(raw jsontext.Value) bool {
	var key struct {
		Operations []string `json:"key_ops"`
	}
	return json.Unmarshal(raw, &key) == nil && (key.Operations == nil || slices.Contains(key.Operations, "verify"))
}

// discover finds the key set in the issuer's metadata (RFC 8414, then OpenID Connect Discovery).
func (k *keySet) discover(ctx context.Context) (string, error) {
	_, jwks, err := k.describe(ctx)
	return jwks, err
}

// describe reads the metadata of the issuer, and returns it with the address of the keys.
func (k *keySet) describe(ctx context.Context) (document []byte, jwks string, err error) {
	var problems []error
	for _, at := range metadataURLs(k.issuer) {
		raw, err := get(ctx, k.http, at)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		var doc struct {
			Issuer string `json:"issuer"`
			JWKS   string `json:"jwks_uri"`
		}
		switch err := json.Unmarshal(raw, &doc); {
		case err != nil:
			problems = append(problems, fmt.Errorf("%s: %w", at, err))
		case doc.Issuer != k.issuer: // RFC 8414, section 3.3: exactly, or it is somebody else's
			problems = append(problems, fmt.Errorf("%s is of the issuer %q", at, doc.Issuer))
		case !secure(doc.JWKS):
			problems = append(problems, fmt.Errorf("%s: jwks_uri is not https", at))
		default:
			return raw, doc.JWKS, nil
		}
	}
	return nil, "", errors.Join(problems...)
}

// metadataURLs are the places of an issuer's metadata, as MCP orders them.
func metadataURLs(issuer string) []string {
	scheme, rest, _ := strings.Cut(issuer, "://")
	host, path, _ := strings.Cut(rest, "/")
	root := scheme + "://" + host
	if path = strings.TrimSuffix(path, "/"); path == "" {
		return []string{root + "/.well-known/oauth-authorization-server", root + "/.well-known/openid-configuration"}
	}
	return []string{
		root + "/.well-known/oauth-authorization-server/" + path,
		root + "/.well-known/openid-configuration/" + path,
		root + "/" + path + "/.well-known/openid-configuration",
	}
}

// get reads a bounded JSON document. Redirects are not followed.
func get(ctx context.Context, client *http.Client, url string) ([]byte, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	r.Header.Set("Accept", "application/json")
	return do(client, r)
}

func do(client *http.Client, r *http.Request) ([]byte, error) {
	resp, err := client.Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers with status %d", r.URL.Redacted(), resp.StatusCode)
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxDocument+1))
	if err != nil {
		return nil, err
	}
	if len(raw) > maxDocument {
		return nil, fmt.Errorf("%s answers with more than %d bytes", r.URL.Redacted(), maxDocument)
	}
	return raw, nil
}
