// Package broker is an authorization server for production whose login is that of a company's
// identity provider: for providers that do not fit MCP themselves.
//
// Start reading at [Broker.Handler], which names the endpoints of the login; the issuer package has
// all others. provider.go speaks to the provider, cookie.go keeps a login with its browser, people.go
// says what people may, page.go asks them, assertion.go takes the assertions of other issuers.
//
// A person is sent to the provider (OpenID Connect: authorization code, PKCE, nonce, state), and
// comes back to a page that asks whether this client may act in their name. Only then the client
// gets a code, and tokens of this server's own, for its own resources. What the provider issued is
// looked at once and never leaves here.
//
// Refuses: a login that another browser began, that was finished before, that took longer than ten
// minutes, or that another provider answers; ID tokens that are not for this server and this login;
// people whom no rule names. Needs: the provider at every login. While it is down nobody logs in;
// who has is not affected until the login ends. A login under way is in a sealed cookie, so
// strangers can leave nothing here; consents and finished logins are in the store of the issuer, where
// nodes that share it and the key of the cookie find them: any of them goes on with a login.
package broker

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/identity/issuer"
	"newel.dev/newel/internal/secret"
)

// Signatures checks who signed a JWT, and returns what its header says of its type, and its payload.
// Errors with the code Unavailable mean that nobody can tell now.
type Signatures interface {
	VerifySignature(ctx context.Context, token string) (typ string, payload []byte, err error)
}

// Provider is the company's identity provider.
type Provider struct {
	URL      string // issuer identifier, exactly as in its ID tokens
	ClientID string // of this server there; its redirect address is URL + /oauth/callback
	Secret   secret.String
	Scopes   []string // that are asked for beside openid
}

// A Rule says what people may. All rules that fit somebody count.
type Rule struct {
	Group  string // whose members it is for; "": everybody
	Tenant string // they are of, or ""
	Scopes []string
	Roles  []string
}

// Options configure a Broker. Issuer, Provider, Rules and Signatures are required.
type Options struct {
	Issuer      issuer.Options // URL is https, or http on loopback; its Assertion is set here
	Provider    Provider
	Rules       []Rule
	TenantClaim string     // claim of the provider that names the tenant; default: none
	GroupsClaim string     // claim that lists groups; default: groups
	Assertions  []string   // issuers whose ID-JAGs are accepted (draft-ietf-oauth-identity-assertion-authz-grant)
	Signatures  Signatures // of the provider and of those issuers
	CookieKey   []byte     // 32 bytes, seals logins under way; nodes that share it go on with each other's; default: random
	HTTP        *http.Client
}

// How long things last, and how many there may be.
const (
	loginLife   = 10 * time.Minute // from the first request of a browser to the answer of its person
	consentLife = 30 * 24 * time.Hour
	skew        = 30 * time.Second
	callback    = "/oauth/callback"
)

// What is kept in the store of the issuer.
var (
	spent    = &issuer.Kind{Name: "spent", Most: 100_000} // finished logins, and assertions
	consents = &issuer.Kind{Name: "consent", Most: 100_000, Forget: true}
)

// A Broker is an authorization server. It is safe for concurrent use.
type Broker struct {
	o        Options
	issuer   *issuer.Server
	provider *provider
	cookie   *cookie
	now      func() time.Time
	logger   *slog.Logger
	store    issuer.Store
}

// consent is what somebody allowed a client before.
type consent struct {
	Scopes  []string  `json:"o"`
	Expires time.Time `json:"e"`
}

// New checks the options; nothing is asked for yet.
func New(o Options) (*Broker, error) {
	u, err := url.Parse(o.Issuer.URL)
	switch {
	case err != nil || u.Scheme != "https" && (u.Scheme != "http" || !issuer.Loopback(u.Hostname())):
		return nil, errors.New("broker: the address of this server must be https (http only on loopback)")
	case o.Provider.URL == "" || o.Provider.ClientID == "":
		return nil, errors.New("broker: the provider needs an address and a client id")
	case len(o.Rules) == 0:
		return nil, errors.New("broker: without rules nobody could log in")
	case o.Signatures == nil:
		return nil, errors.New("broker: Signatures is required")
	}
	if o.GroupsClaim == "" {
		o.GroupsClaim = "groups"
	}
	if o.Issuer.Now == nil {
		o.Issuer.Now = time.Now
	}
	if o.Issuer.Logger == nil {
		o.Issuer.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Issuer.Store == nil {
		o.Issuer.Store = issuer.NewMemory(o.Issuer.Now)
	}
	if o.CookieKey == nil {
		o.CookieKey = make([]byte, 32)
		_, _ = rand.Read(o.CookieKey) // never fails
	}
	if o.HTTP == nil {
		o.HTTP = egress.Client(egress.Options{})
	}
	b := &Broker{o: o, now: o.Issuer.Now, logger: o.Issuer.Logger, store: o.Issuer.Store}
	b.provider = &provider{Provider: o.Provider, redirect: o.Issuer.URL + callback, http: o.HTTP, now: b.now, signatures: o.Signatures}
	if b.cookie, err = newCookie(u.Scheme == "https", o.CookieKey); err != nil {
		return nil, err
	}
	if len(o.Assertions) > 0 {
		o.Issuer.Assertion = b.assertion
	}
	b.issuer, err = issuer.New(o.Issuer)
	return b, err
}

// Handler serves everything below the issuer.
func (b *Broker) Handler() http.Handler {
	return b.issuer.Handler(map[string]http.HandlerFunc{
		"GET /oauth/authorize": b.authorize,
		"GET " + callback:      b.callback,
		"POST /oauth/consent":  b.consent,
	})
}

// authorize sends a browser to the provider.
func (b *Broker) authorize(w http.ResponseWriter, r *http.Request) {
	a, refusal, err := b.issuer.Read(r.Context(), r.URL.Query())
	switch {
	case errors.Is(err, issuer.ErrAway):
		w.Header().Set("Retry-After", "1")
		fail(w, http.StatusServiceUnavailable, "Nobody can log in now. Try again in a moment.")
		return
	case err != nil:
		fail(w, http.StatusBadRequest, err.Error())
		return
	case refusal != nil:
		b.early(w, r, a, refusal)
		return
	}
	l := newLogin(a, b.now().Add(loginLife))
	to, err := b.provider.begin(r.Context(), l)
	if err != nil {
		b.log(r, "the identity provider cannot be reached", err)
		b.early(w, r, a, unavailable)
		return
	}
	if err := b.cookie.set(w, l); err != nil {
		b.early(w, r, a, &issuer.Refusal{Code: "invalid_request", Why: err.Error()})
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Referrer-Policy", "no-referrer")
	http.Redirect(w, r, to, http.StatusSeeOther)
}

// early refuses a request before anybody has logged in. Only clients of the configuration are told:
// otherwise a link to this server would be one to wherever a stranger likes (RFC 9700, section 4.11.2).
func (b *Broker) early(w http.ResponseWriter, r *http.Request, a *issuer.Ask, refusal *issuer.Refusal) {
	if a.Known {
		b.issuer.Back(w, r, a, refusal)
		return
	}
	status := http.StatusBadRequest
	if refusal == unavailable {
		status = http.StatusServiceUnavailable
	}
	fail(w, status, "The app "+a.ClientName+" cannot log you in: "+refusal.Why+".")
}

var unavailable = &issuer.Refusal{Code: "temporarily_unavailable", Why: "the identity provider cannot be reached; try again later"}

// again is what a person reads whose login cannot go on.
const again = "This login cannot go on: it took too long, was finished already, or began in another browser or window. Go back to the app and log in again."

// callback takes a browser that comes back from the provider.
func (b *Broker) callback(w http.ResponseWriter, r *http.Request) {
	l := b.cookie.get(r)
	q := r.URL.Query()
	now := b.now()
	if l == nil || l.Person != nil || !now.Before(l.Expires) || !same(l.State, q.Get("state")) || len(q["state"]) != 1 {
		fail(w, http.StatusBadRequest, again)
		return
	}
	said, err := b.provider.finish(r.Context(), l, q)
	var refused *refusedError
	switch {
	case errors.As(err, &refused): // the person said no there, or may not log in
		b.log(r, "the identity provider logs nobody in", err)
		b.cookie.clear(w)
		b.issuer.Back(w, r, l.Ask, &issuer.Refusal{Code: "access_denied", Why: "the identity provider logged nobody in"})
		return
	case isUnavailable(err):
		b.log(r, "the identity provider cannot be reached", err)
		b.cookie.clear(w)
		b.issuer.Back(w, r, l.Ask, unavailable)
		return
	case err != nil: // an answer that is not of our provider, or not to us, goes nowhere
		b.log(r, "an answer of the identity provider is refused", err)
		b.cookie.clear(w)
		fail(w, http.StatusBadRequest, "What the identity provider answered does not fit this login. Go back to the app and log in again.")
		return
	}
	person, err := b.o.person(b.o.Provider.URL, said)
	if err != nil {
		b.log(r, "somebody may not log in", err)
		b.cookie.clear(w)
		b.issuer.Back(w, r, l.Ask, &issuer.Refusal{Code: "access_denied", Why: "this person has no access here"})
		return
	}
	l.agreed(person, said.name(), now.Add(loginLife))
	allowed, err := b.consented(r.Context(), l.Ask, person)
	if err != nil {
		b.away(w, r, l, err)
		return
	}
	if allowed {
		b.grant(w, r, l)
		return
	}
	if err := b.cookie.set(w, l); err != nil {
		b.issuer.Back(w, r, l.Ask, &issuer.Refusal{Code: "invalid_request", Why: err.Error()})
		return
	}
	show(w, l)
}

// consent takes what a person answered. A page of another origin cannot send it: browsers say where
// a form comes from, and the token of the page is known to the page and the cookie alone.
func (b *Broker) consent(w http.ResponseWriter, r *http.Request) {
	if !b.issuer.OwnForm(r) {
		fail(w, http.StatusForbidden, "This form was not sent from its own page.")
		return
	}
	l := b.cookie.get(r)
	if l == nil || l.Person == nil || !b.now().Before(l.Expires) || !same(l.State, r.PostFormValue("token")) {
		fail(w, http.StatusBadRequest, again)
		return
	}
	if r.PostFormValue("answer") != "allow" {
		if b.done(w, r, l) {
			b.issuer.Back(w, r, l.Ask, &issuer.Refusal{Code: "access_denied", Why: "the person said no"})
		}
		return
	}
	b.grant(w, r, l)
}

// grant ends a login, once.
func (b *Broker) grant(w http.ResponseWriter, r *http.Request, l *login) {
	if !b.done(w, r, l) {
		return
	}
	if err := b.remember(r.Context(), l.Ask, l.Person); err != nil {
		b.log(r, "what a person allowed is not remembered; they are asked again", err)
	}
	b.issuer.Grant(w, r, l.Ask, l.Person)
}

// done ends a login in its browser. ok is false if it was answered: it ended before, or nobody can tell.
func (b *Broker) done(w http.ResponseWriter, r *http.Request, l *login) (ok bool) {
	ok, err := b.spend(r.Context(), l.ID, l.Expires)
	switch {
	case err != nil:
		b.away(w, r, l, err)
	case !ok:
		fail(w, http.StatusBadRequest, again)
	default:
		b.cookie.clear(w)
	}
	return ok && err == nil
}

// away sends somebody back whose login cannot be finished now.
func (b *Broker) away(w http.ResponseWriter, r *http.Request, l *login, err error) {
	b.log(r, "what is known of logins cannot be read or written", err)
	b.cookie.clear(w)
	b.issuer.Back(w, r, l.Ask, issuer.Away)
}

// spend notes that something is done with; ok is false if it was before. Only what somebody we trust
// signed comes here, so strangers cannot fill the room for it.
func (b *Broker) spend(ctx context.Context, id string, until time.Time) (ok bool, err error) {
	return issuer.Keep(ctx, b.store, issuer.Place{Kind: spent, Name: id}, true, until.Sub(b.now()))
}

// consentOf is where it stands what somebody allowed to whom.
func consentOf(a *issuer.Ask, p *issuer.Person) issuer.Place {
	return issuer.Place{Kind: consents, Name: hash(strings.Join([]string{p.Tenant, p.Subject, a.ClientID, issuer.HostOf(a.Redirect), a.Resource}, "\x00"))}
}

// lasts reports whether an answer may be remembered. On loopback, and with a scheme that any app can
// claim, another program could come in the name of the client (RFC 8252, section 8.6): there people
// are asked every time.
func lasts(a *issuer.Ask) bool {
	u, err := url.Parse(a.Redirect)
	return err == nil && u.Scheme == "https" && !issuer.Loopback(u.Hostname())
}

func (b *Broker) consented(ctx context.Context, a *issuer.Ask, p *issuer.Person) (bool, error) {
	var c consent
	found, err := issuer.Change(ctx, b.store, consentOf(a, p), func(kept *consent) time.Duration {
		c = *kept
		return 0
	})
	return found && b.now().Before(c.Expires) && !slices.ContainsFunc(p.Allowed(a.Scopes), func(s string) bool { return !slices.Contains(c.Scopes, s) }), err
}

func (b *Broker) remember(ctx context.Context, a *issuer.Ask, p *issuer.Person) error {
	if !lasts(a) {
		return nil
	}
	until := b.now().Add(consentLife)
	found, err := issuer.Change(ctx, b.store, consentOf(a, p), func(kept *consent) time.Duration {
		for _, s := range p.Allowed(a.Scopes) {
			if !slices.Contains(kept.Scopes, s) {
				kept.Scopes = append(kept.Scopes, s)
			}
		}
		kept.Expires = until
		return consentLife
	})
	if err == nil && !found { // another one who adds it now is asked again at worst
		_, err = issuer.Keep(ctx, b.store, consentOf(a, p), &consent{p.Allowed(a.Scopes), until}, consentLife)
	}
	return err
}

// log records why: who is refused learns less.
func (b *Broker) log(r *http.Request, what string, err error) {
	b.logger.LogAttrs(r.Context(), slog.LevelWarn, what, slog.Any("error", err))
}

func same(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

func hash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}
