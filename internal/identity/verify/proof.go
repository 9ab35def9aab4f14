package verify

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"time"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/identity/dpop"
)

// Presented is a token and what came with it. A token that is bound to a key counts only with the
// proof that its presenter has that key.
type Presented struct {
	Token       string
	Proofs      []string // DPoP headers, with the scheme DPoP (RFC 9449); nil with the scheme Bearer
	Method, URL string   // of the request, for the proof; URL without query and fragment
	Certificate string   // SHA-256 of the client's certificate, base64url (RFC 8705), or ""
}

// confirmed checks that who presents a token is whom it is bound to.
func (v *Verifier) confirmed(ctx context.Context, c *claims, p *Presented, now time.Time) error {
	var bound struct {
		Thumbprint  string `json:"jkt"`
		Certificate string `json:"x5t#S256"`
	}
	is := len(c.Bound) > 0 && c.Bound.Kind() != 'n'
	if is {
		if err := json.Unmarshal(c.Bound, &bound); err != nil {
			return fmt.Errorf("cnf: %w", err)
		}
	}
	switch {
	case is && bound.Thumbprint == "" && bound.Certificate == "":
		return errors.New("it is bound in a way that is not known")
	case bound.Certificate != "" && !same(bound.Certificate, p.Certificate):
		return errors.New("it is bound to another certificate (RFC 8705, section 3)")
	case bound.Thumbprint == "" && p.Proofs != nil:
		return errors.New("it is bound to no key, and was presented with one (RFC 9449, section 7.1)")
	case bound.Thumbprint == "" && v.dpopRequired:
		return errors.New("it is bound to no key, and this server takes no others")
	case bound.Thumbprint == "":
		return nil
	case p.Proofs == nil:
		return errors.New("it is bound to a key, and was presented without a proof (RFC 9449, section 7.2)")
	}
	proof, err := v.proofs.Judge(ctx, &dpop.Request{Proofs: p.Proofs, Method: p.Method, URL: p.URL, Token: p.Token}, bound.Thumbprint, now)
	if err == nil {
		err = v.proofs.Spend(ctx, proof, now)
	}
	switch {
	case errors.Is(err, dpop.ErrNonce):
		e := call.Errorf(call.Unauthenticated, "the proof needs the nonce that comes with this answer")
		e.OAuth = dpop.UseNonce
		return e
	case errors.Is(err, dpop.ErrBusy):
		return &unavailableError{err}
	}
	return err
}

func same(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

// Nonce returns a nonce for the next proof of a client.
func (v *Verifier) Nonce() string { return v.proofs.Nonce(v.now()) }
