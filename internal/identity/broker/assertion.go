package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/internal/identity/claim"
	"newel.dev/newel/internal/identity/issuer"
)

// How long an assertion may count, and how long its id may be.
const (
	maxAssertionLife = 10 * time.Minute
	maxID            = 256 // bytes
)

// assertion judges an ID-JAG: the statement of a provider that a client may act for somebody at our
// resource (draft-ietf-oauth-identity-assertion-authz-grant, section 4.4.1). It counts once.
func (b *Broker) assertion(ctx context.Context, client, token string) (*issuer.Assertion, error) {
	typ, payload, err := b.o.Signatures.VerifySignature(ctx, token)
	if err != nil {
		if isUnavailable(err) {
			return nil, &issuer.Refusal{Code: "temporarily_unavailable", Why: "the assertion cannot be checked now; try again in a moment"}
		}
		return nil, err
	}
	c := &claims{All: payload}
	if err := json.Unmarshal(payload, c); err != nil {
		return nil, err
	}
	now, expires, issued := b.now(), claim.Time(c.Expires), claim.Time(c.Issued)
	switch {
	case strings.TrimPrefix(strings.ToLower(typ), "application/") != "oauth-id-jag+jwt":
		return nil, fmt.Errorf("its type is %.40q, not oauth-id-jag+jwt", typ)
	case !slices.Contains(b.o.Assertions, c.Issuer):
		return nil, fmt.Errorf("assertions of %.200q are not accepted", c.Issuer)
	case len(c.Audience) != 1 || c.Audience[0] != b.o.Issuer.URL:
		return nil, fmt.Errorf("it is for %.200q", c.Audience)
	case c.Client == "" || c.Client != client:
		return nil, fmt.Errorf("it is for the client %.200q, and %.200q presents it", c.Client, client)
	case c.ID == "" || len(c.ID) > maxID:
		return nil, errors.New("it has no id, or one too long")
	case expires.IsZero() || !now.Before(expires.Add(skew)):
		return nil, errors.New("it has expired, or does not say when")
	case expires.Sub(now) > maxAssertionLife+skew:
		return nil, fmt.Errorf("it counts longer than %v", maxAssertionLife)
	case issued.IsZero() || now.Add(skew).Before(issued):
		return nil, errors.New("it does not say when it was issued, or in the future")
	case c.NotYet != nil && now.Add(skew).Before(claim.Time(c.NotYet)):
		return nil, errors.New("it is not valid yet")
	case len(c.Resource) != 1:
		return nil, &issuer.Refusal{Code: "invalid_target", Why: "the assertion must name exactly one resource"}
	}
	p, err := b.o.person(c.Issuer, c)
	if err != nil {
		return nil, err
	}
	ok, err := b.spend(ctx, "jag "+c.Issuer+" "+c.ID, expires.Add(skew)) // last: only one that is good is used up
	switch {
	case errors.Is(err, issuer.ErrFull):
		return nil, errors.New("too many are in use")
	case err != nil:
		b.logger.LogAttrs(ctx, slog.LevelWarn, "what is known of assertions cannot be read or written", slog.Any("error", err))
		return nil, issuer.Away
	case !ok:
		return nil, errors.New("it was used before")
	}
	return &issuer.Assertion{Person: p, Resource: c.Resource[0], Scope: c.Scope, Thumbprint: c.Bound.Thumbprint}, nil
}
