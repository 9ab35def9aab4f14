package verify

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/identity/dpop"
)

// prover is a client with a key of its own.
type prover struct {
	t   *testing.T
	w   *world
	key jose.JSONWebKey
	n   int
}

func (p *prover) thumbprint() string {
	sum, err := p.key.Thumbprint(crypto.SHA256)
	if err != nil {
		p.t.Fatal(err)
	}
	return base64.RawURLEncoding.EncodeToString(sum)
}

// proof signs a DPoP proof with changes to what it says; a nil value takes one away.
func (p *prover) proof(token, nonce, typ string, changes map[string]any) string {
	p.t.Helper()
	p.n++
	hash := sha256.Sum256([]byte(token))
	said := map[string]any{
		"jti": fmt.Sprint(p.n), "htm": "POST", "htu": resource, "iat": p.w.clock().Unix(), "nonce": nonce,
		"ath": base64.RawURLEncoding.EncodeToString(hash[:]),
	}
	for k, v := range changes {
		if said[k] = v; v == nil {
			delete(said, k)
		}
	}
	payload, err := json.Marshal(said)
	if err != nil {
		p.t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(p.key.Algorithm), Key: p.key.Key},
		(&jose.SignerOptions{EmbedJWK: true}).WithType(jose.ContentType(typ)))
	if err != nil {
		p.t.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		p.t.Fatal(err)
	}
	out, err := jws.CompactSerialize()
	if err != nil {
		p.t.Fatal(err)
	}
	return out
}

func presented(token string, proofs ...string) *Presented {
	return &Presented{Token: token, Proofs: append([]string{}, proofs...), Method: "POST", URL: resource}
}

func TestProofs(t *testing.T) {
	w := newWorld(t)
	k := w.addKey("k", "ES256")
	v := w.verifier(nil)
	for _, algorithm := range []string{"ES256", "EdDSA", "RS256", "PS256"} {
		p := &prover{t: t, w: w, key: newKey(t, "", algorithm)}
		token := sign(t, k, "at+jwt", w.claimsOf(map[string]any{"cnf": map[string]any{"jkt": p.thumbprint()}}))
		for i, url := range []string{resource, "HTTPS://MCP.example.com:443/mcp", resource + "?x#y"} {
			proof := p.proof(token, v.Nonce(), "dpop+jwt", map[string]any{"htu": url})
			if id, err := v.VerifyPresented(t.Context(), presented(token, proof)); err != nil || id.Subject != "ada" {
				t.Errorf("%s, %d: %v, %v", algorithm, i, id, err)
			}
			if _, err := v.VerifyPresented(t.Context(), presented(token, proof)); code(err) != call.Unauthenticated {
				t.Errorf("%s, %d: the same proof again: %v", algorithm, i, err)
			}
		}
	}
}

func TestBadProofs(t *testing.T) {
	w := newWorld(t)
	k := w.addKey("k", "ES256")
	v := w.verifier(nil)
	p := &prover{t: t, w: w, key: newKey(t, "", "ES256")}
	token := sign(t, k, "at+jwt", w.claimsOf(map[string]any{"cnf": map[string]any{"jkt": p.thumbprint()}}))
	other := sign(t, k, "at+jwt", w.claimsOf(map[string]any{"jti": "2", "cnf": map[string]any{"jkt": p.thumbprint()}}))
	free := sign(t, k, "at+jwt", w.claimsOf(map[string]any{"jti": "3"}))
	stranger := &prover{t: t, w: w, key: newKey(t, "", "ES256")}
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	small := &prover{t: t, w: w, key: jose.JSONWebKey{Key: weak, Algorithm: "RS256"}}
	toSmall := sign(t, k, "at+jwt", w.claimsOf(map[string]any{"jti": "4", "cnf": map[string]any{"jkt": small.thumbprint()}}))
	now := w.clock().Unix()
	good := func(changes map[string]any) string { return p.proof(token, v.Nonce(), "dpop+jwt", changes) }
	signed := good(nil)
	parts := strings.Split(signed, ".")
	private := p.key
	raw, err := private.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	head := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"ES256","typ":"dpop+jwt","jwk":` + string(raw) + `}`))
	ed := &prover{t: t, w: w, key: newKey(t, "", "EdDSA")}
	toEd := sign(t, k, "at+jwt", w.claimsOf(map[string]any{"jti": "5", "cnf": map[string]any{"jkt": ed.thumbprint()}}))
	public := ed.key.Public()
	rawEd, err := public.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	extended := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"EdDSA","typ":"dpop+jwt","crit":["x"],"x":1,"jwk":`+string(rawEd)+`}`)) +
		"." + strings.Split(ed.proof(toEd, v.Nonce(), "dpop+jwt", nil), ".")[1]
	extended += "." + base64.RawURLEncoding.EncodeToString(ed25519.Sign(ed.key.Key.(ed25519.PrivateKey), []byte(extended)))
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","typ":"dpop+jwt"}`))
	for name, one := range map[string]*Presented{
		"as Bearer":           {Token: token, Method: "POST", URL: resource},
		"no proof":            presented(token),
		"two proofs":          presented(token, good(nil), good(nil)),
		"garbage":             presented(token, "garbage"),
		"too long":            presented(token, strings.Repeat("a", dpop.MaxProof+1)),
		"another type":        presented(token, p.proof(token, v.Nonce(), "JWT", nil)),
		"a stranger's":        presented(token, stranger.proof(token, v.Nonce(), "dpop+jwt", nil)),
		"a weak key":          presented(toSmall, small.proof(toSmall, v.Nonce(), "dpop+jwt", nil)),
		"a private key in it": presented(token, head+"."+parts[1]+"."+parts[2]),
		"extensions":          presented(toEd, extended),
		"alg none":            presented(token, none+"."+parts[1]+"."),
		"for another token":   presented(other, signed),
		"no hash":             presented(token, good(map[string]any{"ath": nil})),
		"another method":      presented(token, good(map[string]any{"htm": "GET"})),
		"another address":     presented(token, good(map[string]any{"htu": "https://other.example.com/mcp"})),
		"a longer address":    presented(token, good(map[string]any{"htu": resource + "/x"})),
		"no address":          presented(token, good(map[string]any{"htu": ""})),
		"no id":               presented(token, good(map[string]any{"jti": nil})),
		"a long id":           presented(token, good(map[string]any{"jti": strings.Repeat("j", dpop.MaxID+1)})),
		"old":                 presented(token, good(map[string]any{"iat": now - 61})),
		"of the future":       presented(token, good(map[string]any{"iat": now + 61})),
		"of no time":          presented(token, good(map[string]any{"iat": nil})),
		"time beyond time":    presented(token, good(map[string]any{"iat": 1e300})),
		"token bound to none": presented(free, p.proof(free, v.Nonce(), "dpop+jwt", nil)),
	} {
		if id, err := v.VerifyPresented(t.Context(), one); code(err) != call.Unauthenticated || call.AsError(err).Message != "the access token is not valid" || call.AsError(err).OAuth != "" {
			t.Errorf("%s: %v, %v", name, id, err)
		}
	}
	if _, err := v.VerifyPresented(t.Context(), presented(token, signed)); err != nil {
		t.Errorf("what the bad ones were made of is not good: %v", err)
	}
}

// A proof without a nonce of now is asked for again, with the nonce that comes along.
func TestNonces(t *testing.T) {
	w := newWorld(t)
	k := w.addKey("k", "ES256")
	v, stranger := w.verifier(nil), w.verifier(nil)
	p := &prover{t: t, w: w, key: newKey(t, "", "ES256")}
	token := sign(t, k, "at+jwt", w.claimsOf(map[string]any{"exp": w.clock().Unix() + 3600, "cnf": map[string]any{"jkt": p.thumbprint()}}))
	old := v.Nonce()
	ask := func(nonce string) error {
		_, err := v.VerifyPresented(t.Context(), presented(token, p.proof(token, nonce, "dpop+jwt", nil)))
		return err
	}
	changed := []byte(old)
	changed[len(changed)-2] ^= 1
	for _, nonce := range []string{"", "x", string(changed), stranger.Nonce(), old + "A"} {
		if err := ask(nonce); code(err) != call.Unauthenticated || call.AsError(err).OAuth != dpop.UseNonce {
			t.Errorf("%q: %v", nonce, err)
		}
	}
	if err := ask(old); err != nil {
		t.Error(err)
	}
	w.pass(dpop.NonceLife + time.Second)
	if err := ask(old); code(err) != call.Unauthenticated || call.AsError(err).OAuth != dpop.UseNonce {
		t.Errorf("an old nonce: %v", err)
	}
}

func TestBoundToCertificates(t *testing.T) {
	w := newWorld(t)
	k := w.addKey("k", "ES256")
	v := w.verifier(nil)
	token := sign(t, k, "at+jwt", w.claimsOf(map[string]any{"cnf": map[string]any{"x5t#S256": "the-thumbprint"}}))
	if _, err := v.VerifyPresented(t.Context(), &Presented{Token: token, Certificate: "the-thumbprint"}); err != nil {
		t.Error(err)
	}
	for _, certificate := range []string{"", "another"} {
		if _, err := v.VerifyPresented(t.Context(), &Presented{Token: token, Certificate: certificate}); code(err) != call.Unauthenticated {
			t.Errorf("%q: %v", certificate, err)
		}
	}
	for _, cnf := range []any{map[string]any{}, map[string]any{"jwk": map[string]any{}}, "text", 1} {
		token := sign(t, k, "at+jwt", w.claimsOf(map[string]any{"cnf": cnf}))
		if _, err := v.VerifyPresented(t.Context(), &Presented{Token: token, Certificate: "the-thumbprint"}); code(err) != call.Unauthenticated {
			t.Errorf("%v: %v", cnf, err)
		}
	}
}

func TestBoundTokensOnly(t *testing.T) {
	w := newWorld(t)
	k := w.addKey("k", "ES256")
	v, err := New(Options{Resource: resource, Issuers: []Issuer{{URL: w.url}}, Now: w.clock, DPoPRequired: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(t.Context(), sign(t, k, "at+jwt", w.claimsOf(nil))); code(err) != call.Unauthenticated {
		t.Errorf("a bearer token: %v", err)
	}
	p := &prover{t: t, w: w, key: newKey(t, "", "ES256")}
	token := sign(t, k, "at+jwt", w.claimsOf(map[string]any{"cnf": map[string]any{"jkt": p.thumbprint()}}))
	if _, err := v.VerifyPresented(t.Context(), presented(token, p.proof(token, v.Nonce(), "dpop+jwt", nil))); err != nil {
		t.Error(err)
	}
}
