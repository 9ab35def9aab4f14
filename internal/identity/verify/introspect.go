package verify

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
)

// rememberOpaque is how long the answer about an opaque token holds.
const rememberOpaque = 30 * time.Second

// introspect asks issuers about an opaque token (RFC 7662).
func (v *Verifier) introspect(ctx context.Context, token string) (remembered, error) {
	if len(v.opaque) == 0 {
		return remembered{}, errors.New("it is no JWT, and no issuer can be asked about it")
	}
	var problem error
	for _, is := range v.opaque {
		c, err := v.about(ctx, is, token)
		if err != nil {
			problem = err
			continue
		}
		if c != nil {
			return remembered{issuer: is, claims: c, until: v.now().Add(rememberOpaque)}, nil
		}
	}
	if problem != nil {
		return remembered{}, &unavailableError{problem}
	}
	return remembered{}, errors.New("no issuer knows it")
}

// about returns what an issuer says of a token, or nil if it is not active.
func (v *Verifier) about(ctx context.Context, is *issuer, token string) (*claims, error) {
	ctx, stop := context.WithTimeout(ctx, fetchTimeout)
	defer stop()
	form := url.Values{"token": {token}, "token_type_hint": {"access_token"}}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, is.Introspect, strings.NewReader(form.Encode()))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.Header.Set("Accept", "application/json")
	if is.ClientID != "" {
		r.SetBasicAuth(url.QueryEscape(is.ClientID), url.QueryEscape(is.ClientSecret.Reveal()))
	}
	raw, err := do(v.http, r)
	if err != nil {
		return nil, err
	}
	var active struct {
		Active bool   `json:"active"`
		Type   string `json:"token_type"`
	}
	if err := json.Unmarshal(raw, &active); err != nil {
		return nil, err
	}
	if !active.Active || active.Type != "" && !strings.EqualFold(active.Type, "Bearer") && !strings.EqualFold(active.Type, "DPoP") && !strings.EqualFold(active.Type, "access_token") {
		return nil, nil
	}
	c := &claims{}
	if err := json.Unmarshal(raw, c); err != nil {
		return nil, err
	}
	if strings.EqualFold(active.Type, "DPoP") && c.Bound == nil {
		return nil, nil // bound, and nobody says to what
	}
	if c.Issuer == "" { // it is optional here: the one who answers is meant
		c.Issuer = is.URL
	}
	c.opaque = true
	return c, nil
}
