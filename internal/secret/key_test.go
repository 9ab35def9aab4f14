package secret

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func TestOpenKey(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state", "key")
	keys := make([]Key, 8)
	var all sync.WaitGroup
	for i := range keys {
		all.Go(func() {
			k, err := OpenKey(file)
			if err != nil {
				t.Error(err)
			}
			keys[i] = k
		})
	}
	all.Wait()
	for _, k := range keys {
		if k != keys[0] || k == (Key{}) {
			t.Fatal("processes that start together have different keys")
		}
	}
	if left, err := os.ReadDir(filepath.Dir(file)); err != nil || len(left) != 1 {
		t.Errorf("files are left: %v, %v", left, err)
	}
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenKey(file); err == nil || !strings.Contains(err.Error(), "0600") {
		t.Errorf("a key that others can read: %v", err)
	}
	if err := os.WriteFile(file, []byte("short\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenKey(file); err == nil {
		t.Error("a broken key is accepted")
	}
	if s := fmt.Sprintf("%v %+v %#v %s", keys[0], keys[0], keys[0], keys[0]); s != "[redacted] [redacted] [redacted] [redacted]" {
		t.Error("a key prints as", s)
	}
}

func TestBox(t *testing.T) {
	k := RandomKey()
	b, err := k.Box("test")
	if err != nil {
		t.Fatal(err)
	}
	sealed := b.Seal([]byte("value"), "here")
	if bytes.Contains(sealed, []byte("value")) {
		t.Error("it is not encrypted")
	}
	if v, err := b.Open(sealed, "here"); err != nil || string(v) != "value" {
		t.Errorf("got %q, %v", v, err)
	}
	if _, err := b.Open(sealed, "there"); err == nil {
		t.Error("opened elsewhere")
	}
	for i := range sealed {
		changed := bytes.Clone(sealed)
		changed[i] ^= 1
		if _, err := b.Open(changed, "here"); err == nil {
			t.Fatalf("byte %d changed: opened", i)
		}
	}
	other, err := k.Box("other")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Open(sealed, "here"); err == nil {
		t.Error("opened with the key of another purpose")
	}
}
