package issuer

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// signs returns the id of the key that signs now, and those that are shown.
func signs(t *testing.T, ks *Keys) (kid string, shown []string) {
	t.Helper()
	raw, err := ks.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(raw, &set); err != nil {
		t.Fatal(err)
	}
	for _, k := range set.Keys {
		if !k.IsPublic() {
			t.Fatal("a private key is shown")
		}
		shown = append(shown, k.KeyID)
	}
	token, err := ks.sign([]byte("{}"))
	if err != nil {
		t.Fatal(err)
	}
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.ES256, jose.RS256, jose.EdDSA})
	if err != nil {
		t.Fatal(err)
	}
	kid = jws.Signatures[0].Header.KeyID
	if found := set.Key(kid); len(found) != 1 {
		t.Fatalf("the key %q signs and is not shown", kid)
	} else if _, err := jws.Verify(found[0]); err != nil {
		t.Fatal(err)
	}
	return kid, shown
}

// Processes that start at the same time may each make a key. They agree on one as soon as they look again.
func TestKeysMadeAtOnce(t *testing.T) {
	dir := t.TempDir()
	now := time.Unix(1_800_000_000, 0)
	var nodes [4]*Keys
	var all sync.WaitGroup
	for i := range nodes {
		all.Go(func() {
			var err error
			if nodes[i], err = OpenKeys(dir, func() time.Time { return now }); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if t.Failed() {
		return
	}
	for _, wait := range []time.Duration{lookEvery, publishLead} {
		now = now.Add(wait)
		first, shown := signs(t, nodes[0])
		for _, ks := range nodes[1:] {
			if kid, all := signs(t, ks); kid != first || !slices.Equal(all, shown) {
				t.Errorf("after %v: %s of %v, and %s of %v", wait, first, shown, kid, all)
			}
		}
	}
}

func TestKeysTurn(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	now := time.Unix(1_800_000_000, 0)
	clock := func() time.Time { return now }
	open := func() *Keys {
		ks, err := OpenKeys(dir, clock)
		if err != nil {
			t.Fatal(err)
		}
		return ks
	}
	a, b := open(), open()
	first, shown := signs(t, a)
	if other, _ := signs(t, b); other != first || len(shown) != 1 {
		t.Fatalf("two processes with one directory sign with %s and %s", first, other)
	}
	names, _ := filepath.Glob(filepath.Join(dir, "*"))
	for _, name := range append(names, dir) {
		if info, err := os.Stat(name); err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}

	now = now.Add(rotateEvery)
	if kid, shown := signs(t, a); kid != first || len(shown) != 2 {
		t.Errorf("a key signs before it was shown: %s of %v", kid, shown)
	}
	now = now.Add(publishLead)
	second, _ := signs(t, a)
	if kid, shown := signs(t, b); second == first || kid != second || len(shown) != 2 {
		t.Errorf("after the turn: %s, %s of %v", second, kid, shown)
	}
	now = now.Add(keepAfter + 2*lookEvery)
	if kid, shown := signs(t, a); kid != second || slices.Contains(shown, first) {
		t.Errorf("a key stays for ever: %v", shown)
	}
	if kid, _ := signs(t, open()); kid != second {
		t.Errorf("after a restart: %s", kid)
	}

	// What goes wrong later leaves the keys as they are.
	if err := os.WriteFile(filepath.Join(dir, "signing-1-x.pem"), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	now = now.Add(2 * lookEvery)
	if err := a.turn(); err == nil {
		t.Error("garbage among the keys is no error")
	}
	if kid, _ := signs(t, a); kid != second {
		t.Errorf("%s signs", kid)
	}
	if _, err := OpenKeys(dir, clock); err == nil {
		t.Error("a start with garbage among the keys")
	}
}

func TestKeysOfFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, mode os.FileMode, kind string, key any) string {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), mode); err != nil {
			t.Fatal(err)
		}
		return file
	}
	ec := func(c elliptic.Curve) any {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	bits := func(n int) any {
		k, err := rsa.GenerateKey(rand.Reader, n)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	strong := bits(2048)
	ks, err := LoadKeys([]string{write("rsa.pem", 0o600, "PRIVATE KEY", strong), write("ec.pem", 0o600, "PRIVATE KEY", ec(elliptic.P256()))})
	if err != nil {
		t.Fatal(err)
	}
	if kid, shown := signs(t, ks); len(shown) != 2 || shown[0] != kid {
		t.Errorf("%s signs of %v", kid, shown)
	}
	for want, file := range map[string]string{
		"others can read it": write("open.pem", 0o644, "PRIVATE KEY", strong), "2048": write("weak.pem", 0o600, "PRIVATE KEY", bits(1024)),
		"P-256": write("p384.pem", 0o600, "PRIVATE KEY", ec(elliptic.P384())), "no private key": write("public.pem", 0o600, "CERTIFICATE", strong), "no such": "missing.pem",
	} {
		if _, err := LoadKeys([]string{file}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", file, err)
		}
	}
	if _, err := LoadKeys(nil); err == nil {
		t.Error("no keys are enough")
	}
}
