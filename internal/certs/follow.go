package certs

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// maxFile bounds a file with certificates or a key.
const maxFile = 1 << 20

// followed is a value read from files, read again when they change. It is not safe for concurrent
// use.
type followed[T any] struct {
	paths []string
	parse func(contents [][]byte) (T, error)
	value T
	sum   [sha256.Size]byte // of the files that value came from
	bad   [sha256.Size]byte // of files that are no good
	told  bool              // that they are not
}

// load reads the files for the first time.
func (f *followed[T]) load() error {
	v, sum, err := f.read()
	if err == nil {
		f.value, f.sum = v, sum
	}
	return err
}

// refresh reads the files again. What is wrong with new ones keeps the old value, and is an error
// once, when it was seen twice: files that are just being replaced do not belong together for a
// moment.
func (f *followed[T]) refresh() (changed bool, err error) {
	v, sum, err := f.read()
	switch {
	case err != nil && sum != f.bad:
		f.bad, f.told = sum, false
		return false, nil
	case err != nil && !f.told:
		f.told = true
		return false, err
	case err != nil:
		return false, nil
	}
	f.bad = [sha256.Size]byte{}
	if sum == f.sum {
		return false, nil
	}
	f.value, f.sum = v, sum
	return true, nil
}

// read reads and parses the files; the sum is that of their contents, or of what is wrong with
// reading them.
func (f *followed[T]) read() (v T, sum [sha256.Size]byte, err error) {
	h := sha256.New()
	contents := make([][]byte, len(f.paths))
	for i, p := range f.paths {
		contents[i], err = readFile(p)
		if err != nil {
			return v, sha256.Sum256([]byte(err.Error())), err
		}
		one := sha256.Sum256(contents[i])
		h.Write(one[:])
	}
	h.Sum(sum[:0])
	if sum == f.sum {
		return f.value, sum, nil
	}
	v, err = f.parse(contents)
	return v, sum, err
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path) //nolint:gosec // the operator names it
	if err != nil {
		return nil, fmt.Errorf("the file cannot be read: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("%s has more than %d bytes", path, maxFile)
	}
	return b, nil
}

// followPair follows a certificate and its key. After the first time, a pair that is not valid now
// is no good.
func followPair(certificate, key string) *followed[*tls.Certificate] {
	var f *followed[*tls.Certificate]
	f = &followed[*tls.Certificate]{paths: []string{certificate, key}, parse: func(c [][]byte) (*tls.Certificate, error) {
		pair, err := tls.X509KeyPair(c[0], c[1])
		if err != nil {
			return nil, fmt.Errorf("%s and %s are not a certificate and its key: %w", certificate, key, err)
		}
		if f.value != nil {
			if err := current(pair.Leaf); err != nil {
				return nil, fmt.Errorf("%s: %w", certificate, err)
			}
		}
		return &pair, nil
	}}
	return f
}

// current fails for a certificate that is not valid now.
func current(c *x509.Certificate) error {
	switch now := time.Now(); {
	case now.After(c.NotAfter):
		return fmt.Errorf("the certificate expired at %s", c.NotAfter.Format(time.RFC3339))
	case now.Before(c.NotBefore):
		return fmt.Errorf("the certificate is not valid before %s", c.NotBefore.Format(time.RFC3339))
	}
	return nil
}

// followPool follows a file with certificates of authorities.
func followPool(path string) *followed[*x509.CertPool] {
	return &followed[*x509.CertPool]{paths: []string{path}, parse: func(c [][]byte) (*x509.CertPool, error) {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(c[0]) {
			return nil, errors.New(path + " holds no certificate in PEM form")
		}
		return pool, nil
	}}
}
