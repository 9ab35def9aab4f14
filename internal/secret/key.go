package secret

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
)

const keySize = 32

// A Key is a master key, from which a key for each purpose is derived. It prints as "[redacted]".
type Key struct{ master [keySize]byte }

// RandomKey returns a key that ends with the process.
func RandomKey() Key {
	var k Key
	_, _ = rand.Read(k.master[:]) // never fails
	return k
}

// OpenKey reads the key in a file of mode 0600, or makes the file and its folder. A file that
// others can read is refused, and so is one that holds anything else.
func OpenKey(file string) (Key, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		if err := createKey(file); err != nil {
			return Key{}, fmt.Errorf("the key file cannot be made: %w", err)
		}
		b, err = os.ReadFile(file) // that of whoever was first
	}
	if err != nil {
		return Key{}, fmt.Errorf("the key file cannot be read: %w", err)
	}
	info, err := os.Stat(file)
	if err != nil {
		return Key{}, fmt.Errorf("the key file cannot be read: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 && os.PathSeparator == '/' {
		return Key{}, fmt.Errorf("the key file %s can be read by others; make its mode 0600", file)
	}
	raw, err := base64.StdEncoding.Strict().DecodeString(strings.TrimSpace(string(b)))
	if err != nil || len(raw) != keySize {
		return Key{}, fmt.Errorf("the key file %s does not hold a key: 32 bytes in base64", file)
	}
	return Key{[keySize]byte(raw)}, nil
}

// createKey makes the file whole or not at all: what is sealed under a lost key is lost too.
func createKey(file string) (err error) {
	dir := filepath.Dir(file)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".key-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(f.Name())) }()
	k := RandomKey()
	_, err = f.WriteString(base64.StdEncoding.EncodeToString(k.master[:]) + "\n")
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), file); err != nil && !errors.Is(err, fs.ErrExist) {
		return err // unlike a rename, a link does not replace the key of another process
	}
	return nil
}

// Derive returns 32 bytes for one purpose (HKDF-SHA-256). Different purposes give keys that say
// nothing of each other.
func (k Key) Derive(purpose string) ([]byte, error) {
	return hkdf.Key(sha256.New, k.master[:], nil, purpose, keySize)
}

// String implements fmt.Stringer.
func (Key) String() string { return redacted }

// GoString implements fmt.GoStringer.
func (Key) GoString() string { return redacted }

// LogValue implements slog.LogValuer.
func (Key) LogValue() slog.Value { return slog.StringValue(redacted) }

// A Box seals values with AES-256-GCM and random nonces: at most 2³² values under one key. It is
// safe for concurrent use.
type Box struct{ aead cipher.AEAD }

// Box returns the box for one purpose.
func (k Key) Box(purpose string) (*Box, error) {
	derived, err := k.Derive(purpose)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(derived)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, err
	}
	return &Box{aead}, nil
}

// Seal encrypts value. It can only be opened under the same context: where the value belongs.
func (b *Box) Seal(value []byte, context string) []byte {
	return b.aead.Seal(nil, nil, value, []byte(context))
}

// Open is the way back. It fails for anything but what Seal returned for that context.
func (b *Box) Open(sealed []byte, context string) ([]byte, error) {
	v, err := b.aead.Open(nil, nil, sealed, []byte(context))
	if err != nil {
		return nil, errors.New("a stored value cannot be opened: it was changed, or sealed with another key")
	}
	return v, nil
}
