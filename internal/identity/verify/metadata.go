package verify

import (
	"context"
	"errors"
	"sync"
	"time"
)

// A Description is the metadata of an issuer (RFC 8414), for clients that look for it at this server:
// those of revision 2025-03-26 know no other place. It is safe for concurrent use.
type Description struct {
	keys *keySet

	mu       sync.Mutex // held while the issuer is asked: the others wait for the same answer
	document []byte
	until    time.Time
	failed   error
}

// Times for which a description, or that there is none, is remembered.
const (
	describedFor    = 5 * time.Minute
	notDescribedFor = 10 * time.Second
)

// Describe returns the description of one of the issuers.
func (v *Verifier) Describe(issuer string) (*Description, error) {
	is := v.issuers[issuer]
	if is == nil {
		return nil, errors.New("the issuer is not configured")
	}
	return &Description{keys: is.keys}, nil
}

// Document returns what the issuer says of itself, at most five minutes old. Whoever asks, the issuer
// is asked once in ten seconds at most.
func (d *Description) Document(ctx context.Context) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now := d.keys.now(); !now.Before(d.until) {
		document, _, err := d.keys.describe(context.WithoutCancel(ctx)) // it is for all who wait
		if err != nil {
			d.failed, d.until = err, now.Add(notDescribedFor)
			return nil, err
		}
		d.document, d.failed, d.until = document, nil, now.Add(describedFor)
	}
	return d.document, d.failed
}
