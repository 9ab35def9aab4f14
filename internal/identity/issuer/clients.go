package issuer

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/internal/secret"
)

// A Client is a program that may ask for tokens.
type Client struct {
	ID        string
	Name      string        // for people; default: ID
	Secret    secret.String // of a client that can keep one; zero: it is public
	Redirects []string      // where people may come back to; none: it logs nobody in
}

// Bounds of what strangers may make this server keep and do.
const (
	maxCards     = 1000
	maxRedirects = 10
	maxName      = 100 // characters
	maxFetches   = 8   // at once
	clientIdle   = 30 * 24 * time.Hour
	clientUsed   = time.Minute // how exactly it is known when a client was here last
	registerMost = 60          // in a minute, by everybody together
	cardLife     = 5 * time.Minute
	cardRetry    = 30 * time.Second // after a document that could not be read
)

// registry is the clients of a server: configured, registered, or described at their id. It is
// safe for concurrent use.
type registry struct {
	fetch *http.Client
	now   func() time.Time
	store Store              // of registered clients
	known map[string]*Client // by configuration
	busy  chan struct{}      // one element per fetch under way

	mu     sync.Mutex      // guards what is below
	cards  map[string]card // client id metadata documents, by address
	minute time.Time
	count  int // registrations since minute
}

// registered is what is kept of a client that registered itself.
type registered struct {
	Name      string    `json:"n"`
	Redirects []string  `json:"r"`
	Used      time.Time `json:"u"`
}

// registeredID begins the ids of clients that registered themselves.
const registeredID = "dyn-"

// card is what was found at a client's id.
type card struct {
	client  *Client
	problem error
	expires time.Time
}

func newRegistry(o *Options) (*registry, error) {
	r := &registry{
		fetch: o.Fetch, now: o.Now, store: o.Store, busy: make(chan struct{}, maxFetches),
		known: map[string]*Client{}, cards: map[string]card{},
	}
	for _, c := range o.Clients {
		switch {
		case c.ID == "" || r.known[c.ID] != nil:
			return nil, fmt.Errorf("issuer: the client %q has no id of its own", c.ID)
		case slices.ContainsFunc(c.Redirects, func(u string) bool { return !ValidRedirect(u) }):
			return nil, fmt.Errorf("issuer: the client %q has a redirect that is not valid", c.ID)
		}
		c.Name = cmp.Or(c.Name, c.ID)
		r.known[c.ID] = &c
	}
	return r, nil
}

// errUnknown is of a client that was never here, or that was forgotten.
var errUnknown = errors.New("the client is not known, or was forgotten; it has to register again")

// errUnread is of a client whose description cannot be read; why is for the log.
var errUnread = errors.New("the client is described at its id, and that could not be read")

// find returns a client. A client id metadata document describes the client whose id is its
// address: https, with a path.
func (r *registry) find(ctx context.Context, id string) (*Client, error) {
	if c := r.known[id]; c != nil {
		return c, nil
	}
	if strings.HasPrefix(id, registeredID) {
		return r.returning(ctx, id)
	}
	now := r.now()
	r.mu.Lock()
	have := r.cards[id]
	r.mu.Unlock()
	switch {
	case now.Before(have.expires):
		return have.client, have.problem
	case !strings.HasPrefix(id, "https://"):
		return nil, errUnknown
	}
	u, err := url.Parse(id)
	if err != nil || len(id) > maxParam || u.User != nil || u.Fragment != "" || u.Path == "" || u.Path == "/" || strings.Contains(u.Path, "/.") {
		return nil, errors.New("the client id is an address, but none of a client id metadata document")
	}
	return r.ask(ctx, id)
}

// returning returns a client that registered itself, and notes that it was here.
func (r *registry) returning(ctx context.Context, id string) (*Client, error) {
	var c registered
	found, err := Change(ctx, r.store, Place{Kind: registrations, Name: id}, func(kept *registered) time.Duration {
		c = *kept
		now := r.now()
		if now.Sub(c.Used) < clientUsed {
			return 0
		}
		kept.Used = now
		return clientIdle
	})
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrAway, err)
	case !found:
		return nil, errUnknown
	}
	return &Client{ID: id, Name: c.Name, Redirects: c.Redirects}, nil
}

// ask fetches a description and keeps what was found: strangers choose these addresses, so a bad
// one is not asked again at once either.
func (r *registry) ask(ctx context.Context, id string) (*Client, error) {
	select {
	case r.busy <- struct{}{}:
		defer func() { <-r.busy }()
	default:
		return nil, fmt.Errorf("%w: %d others are being read", errUnread, maxFetches)
	}
	c, err := r.read(ctx, id)
	if err != nil && ctx.Err() != nil {
		return nil, fmt.Errorf("%w: %w", errUnread, err) // who asked went away: this says nothing about the client
	}
	now := r.now()
	one := card{client: c, expires: now.Add(cardLife)}
	if err != nil {
		one = card{problem: fmt.Errorf("%w: %w", errUnread, err), expires: now.Add(cardRetry)}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.cards) >= maxCards {
		clear(r.cards) // it is a cache
	}
	r.cards[id] = one
	return one.client, one.problem
}

// read fetches and checks a client id metadata document.
func (r *registry) read(ctx context.Context, id string) (*Client, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, id, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	resp, err := r.fetch.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %d", resp.StatusCode)
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxBody+1))
	if err != nil || len(raw) > maxBody {
		return nil, errors.Join(errors.New("the document is too long"), err)
	}
	var doc struct {
		ID        string   `json:"client_id"`
		Name      string   `json:"client_name"`
		Redirects []string `json:"redirect_uris"`
	}
	switch err := json.Unmarshal(raw, &doc); {
	case err != nil:
		return nil, err
	case doc.ID != id:
		return nil, fmt.Errorf("the document is of the client %.200q", doc.ID)
	case doc.Name == "" || !validRedirects(doc.Redirects):
		return nil, errors.New("the document lacks a name or valid redirect_uris")
	}
	return &Client{ID: id, Name: shown(doc.Name) + " (" + HostOf(id) + ")", Redirects: doc.Redirects}, nil
}

// errTooMany is of registrations of which there were too many in this minute.
var errTooMany = errors.New("too many clients register; try again in a minute")

// add registers a public client.
func (r *registry) add(ctx context.Context, name string, redirects []string) (id string, err error) {
	now := r.now()
	r.mu.Lock()
	if now.Sub(r.minute) >= time.Minute {
		r.minute, r.count = now, 0
	}
	r.count++
	many := r.count > registerMost
	r.mu.Unlock()
	if many {
		return "", errTooMany
	}
	id = registeredID + rand.Text()
	c := &registered{Name: cmp.Or(shown(name), id), Redirects: redirects, Used: now}
	if _, err := Keep(ctx, r.store, Place{Kind: registrations, Name: id}, c, clientIdle); err != nil {
		return "", err
	}
	return id, nil
}

// shown is a name that a stranger chose, made fit to be shown: short, and without characters that
// turn a line around or hide.
func shown(name string) string {
	name = strings.Map(func(c rune) rune {
		if !unicode.IsGraphic(c) {
			return -1
		}
		return c
	}, name)
	if all := []rune(name); len(all) > maxName {
		name = string(all[:maxName])
	}
	return strings.TrimSpace(name)
}

// register registers a public client (RFC 7591). The scope it names is no ceiling: clients put
// there what they happened to be challenged for.
func (s *Server) register(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Name      string   `json:"client_name"`
		Redirects []string `json:"redirect_uris"`
	}
	if err := json.UnmarshalRead(r.Body, &in); err != nil {
		refuse(w, http.StatusBadRequest, &Refusal{"invalid_client_metadata", "the body is not a JSON object of client metadata"})
		return
	}
	if !validRedirects(in.Redirects) {
		refuse(w, http.StatusBadRequest, &Refusal{"invalid_redirect_uri", "redirect_uris must be one to ten addresses: https, http on loopback, or a scheme of the app's own; without fragment"})
		return
	}
	id, err := s.clients.add(r.Context(), in.Name, in.Redirects)
	switch {
	case errors.Is(err, errTooMany):
		w.Header().Set("Retry-After", "60")
		refuse(w, http.StatusTooManyRequests, &Refusal{"temporarily_unavailable", err.Error()})
		return
	case err != nil:
		w.Header().Set("Retry-After", "1")
		refuse(w, http.StatusServiceUnavailable, s.away(r.Context(), err))
		return
	}
	reply(w, http.StatusCreated, map[string]any{
		"client_id": id, "client_name": in.Name, "redirect_uris": in.Redirects, "token_endpoint_auth_method": "none",
		"grant_types": []string{"authorization_code", "refresh_token"}, "response_types": []string{"code"}, "client_id_issued_at": s.o.Now().Unix(),
	})
}

// authenticate returns the id of the client that asks for tokens (RFC 6749, section 2.3), and
// whether it proved that with a secret. A public client is bound by its codes and refresh tokens
// alone.
func (r *registry) authenticate(req *http.Request, f url.Values) (id string, proved bool, problem *Refusal) {
	id, given := f.Get("client_id"), f.Get("client_secret")
	if name, password, ok := req.BasicAuth(); ok {
		u, errU := url.QueryUnescape(name)
		p, errP := url.QueryUnescape(password)
		if errU != nil || errP != nil || f.Has("client_secret") || id != "" && id != u {
			return "", false, &Refusal{"invalid_request", "a client says in one way who it is"}
		}
		id, given = u, p
	}
	c := r.known[id]
	want := ""
	if c != nil {
		want = c.Secret.Reveal()
	}
	a, b := sha256.Sum256([]byte(given)), sha256.Sum256([]byte(want)) // sums, so that the length is not told either
	if subtle.ConstantTimeCompare(a[:], b[:]) != 1 || id == "" {
		return "", false, &Refusal{"invalid_client", "the client is not known, or its secret is not right"}
	}
	return id, want != "", nil
}

func validRedirects(all []string) bool {
	return len(all) > 0 && len(all) <= maxRedirects && !slices.ContainsFunc(all, func(u string) bool { return !ValidRedirect(u) })
}

// ValidRedirect reports whether a person may be sent to an address after a login: https, http on
// loopback, or a scheme of an app's own, without fragment.
func ValidRedirect(address string) bool {
	u, err := url.Parse(address)
	if err != nil || u.Fragment != "" || u.Scheme == "" || u.User != nil || len(address) > maxParam {
		return false
	}
	switch u.Scheme {
	case "https":
		return u.Host != ""
	case "http":
		return Loopback(u.Hostname())
	case "javascript", "data", "file", "vbscript", "blob", "about", "view-source", "ws", "wss", "ftp":
		return false
	}
	return true
}

// Loopback reports whether a host is this machine.
func Loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// sameRedirect compares exactly, but for the port of loopback addresses (RFC 8252, section 7.3).
func sameRedirect(registered, given string) bool {
	if registered == given {
		return true
	}
	a, errA := url.Parse(registered)
	b, errB := url.Parse(given)
	return errA == nil && errB == nil && a.Scheme == "http" && b.Scheme == "http" && a.Hostname() == b.Hostname() && Loopback(a.Hostname()) &&
		a.EscapedPath() == b.EscapedPath() && a.RawQuery == b.RawQuery && b.Fragment == "" && b.User == nil && !strings.Contains(given, "#")
}
