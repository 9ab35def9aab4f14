// Package issuer is an authorization server but for the login: what is the same whoever says who
// a person is.
//
// Start reading at [Server.Handler], which names every endpoint. A login is what calls
// [Server.Read], finds out who is there, and ends with [Server.Grant] or [Server.Back]. clients.go
// knows clients, authorize.go reads their requests and sends browsers back, token.go makes tokens,
// keys.go keeps what signs them, store.go what is remembered.
//
// It does authorization code with PKCE (S256 only), resource indicators (RFC 8707), dynamic client
// registration (RFC 7591), client id metadata documents, metadata (RFC 8414), the iss parameter
// (RFC 9207), short-lived access tokens (RFC 9068), bound to a key of their client if it shows a
// proof (RFC 9449), and rotating refresh tokens whose reuse ends the login. Everything a client or browser sends may be hostile: bodies, tables and times are
// bounded, and who is refused learns no more than the RFC's error code and what to do. It starts
// no goroutine: what has expired goes when something comes. Logins, codes and registered clients
// are in a [Store]: of one node in memory, where they end with the process, of several where all find
// them. While that cannot be asked clients are told to try again.
package issuer

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/identity/dpop"
)

// Options configure a Server. URL and Keys are required.
type Options struct {
	URL       string   // issuer identifier: the address under which it is reached, without path
	Resources []string // that tokens may be for; the first is meant when a client names none
	Scopes    []string // that exist; others are ignored in requests
	Default   []string // scopes of a client that asks for none; default: all
	Keys      *Keys
	Clients   []Client // that are known by configuration
	Register  bool     // whether anybody may register a client (RFC 7591)

	TokenLife time.Duration // of access tokens [5 min], at most an hour
	LoginLife time.Duration // after which a person logs in again, however often tokens were refreshed [24 h]

	DPoPRequired bool         // whether tokens are bound to a key of their client only (RFC 9449)
	Proofs       *dpop.Shared // with other nodes that serve URL; nil: there are none

	Store Store // of logins, codes and registered clients; default: in memory

	Assertion AssertionFunc // for the grant of RFC 7523; nil: it is not offered

	Fetch  *http.Client     // for client id metadata documents; default: public addresses only
	Logger *slog.Logger     // why something was refused; default: nowhere
	Now    func() time.Time // default: time.Now
}

// A Person is who logged in, and what may be given in their name.
type Person struct {
	Subject string   `json:"s"`
	Tenant  string   `json:"t,omitzero"`  // "": tokens name none
	Scopes  []string `json:"o,omitempty"` // "*" stands for all
	Roles   []string `json:"r,omitempty"`
}

// An Assertion is what a signed statement of somebody else grants (RFC 7523).
type Assertion struct {
	Person     *Person
	Resource   string
	Scope      string // that it names; "" for none
	Thumbprint string // of the key it is bound to, or ""
}

// AssertionFunc judges the assertion of a client that has proved who it is. A [*Refusal] is told
// to the client; of any other error it learns invalid_grant alone.
type AssertionFunc func(ctx context.Context, client, assertion string) (*Assertion, error)

// How long things last, and how many there may be.
const (
	codeLife   = time.Minute
	endedFor   = 2 * codeLife // a login that ended before it began does not begin
	maxBody    = 64 << 10     // bytes
	maxParam   = 2000         // bytes of one address or state
	maxTokens  = time.Hour
	dayOfLogin = 24 * time.Hour
)

// A Server is an authorization server without a login. It is safe for concurrent use.
type Server struct {
	o       Options
	host    string
	clients *registry
	proofs  *dpop.Checker
}

// New checks the options.
func New(o Options) (*Server, error) {
	u, err := url.Parse(o.URL)
	switch {
	case err != nil || u.Host == "" || u.Path != "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil:
		return nil, errors.New("issuer: URL must be scheme and host, such as https://mcp.example.com")
	case o.Keys == nil:
		return nil, errors.New("issuer: Keys are required")
	case o.TokenLife < 0 || o.TokenLife > maxTokens || o.LoginLife < 0:
		return nil, errors.New("issuer: TokenLife must be at most an hour, LoginLife not below zero")
	}
	setDefaults(&o)
	clients, err := newRegistry(&o)
	if err != nil {
		return nil, err
	}
	return &Server{o: o, host: u.Host, clients: clients, proofs: dpop.New("issuer", o.Proofs)}, nil
}

func setDefaults(o *Options) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Fetch == nil {
		o.Fetch = egress.Client(egress.Options{Timeout: 5 * time.Second})
	}
	if o.Store == nil {
		o.Store = NewMemory(o.Now)
	}
	if o.TokenLife == 0 {
		o.TokenLife = 5 * time.Minute
	}
	if o.LoginLife == 0 {
		o.LoginLife = dayOfLogin
	}
	if o.Default == nil {
		o.Default = o.Scopes
	}
}

// Handler serves everything below the issuer. login holds the endpoints of the login, by pattern
// (such as "GET /oauth/authorize").
func (s *Server) Handler(login map[string]http.HandlerFunc) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/oauth-authorization-server", s.metadata)
	mux.HandleFunc("GET /.well-known/openid-configuration", s.metadata)
	mux.HandleFunc("GET /oauth/jwks", s.jwks)
	mux.HandleFunc("POST /oauth/token", s.token)
	if s.o.Register {
		mux.HandleFunc("POST /oauth/register", s.register)
		mux.HandleFunc("OPTIONS /oauth/register", preflight)
	}
	for _, path := range []string{"/.well-known/oauth-authorization-server", "/.well-known/openid-configuration", "/oauth/jwks", "/oauth/token"} {
		mux.HandleFunc("OPTIONS "+path, preflight)
	}
	for pattern, h := range login {
		mux.HandleFunc(pattern, h)
	}
	bounded := http.MaxBytesHandler(mux, maxBody)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Host != s.host { // a name that somebody else made point here (DNS rebinding)
			http.Error(w, "this server is reached as "+s.host+" only", http.StatusForbidden)
			return
		}
		w.Header().Set("X-Content-Type-Options", "nosniff")
		bounded.ServeHTTP(w, r)
	})
}

// preflight lets clients in browsers send what the endpoints read.
func preflight(w http.ResponseWriter, _ *http.Request) {
	h := w.Header()
	h.Set("Access-Control-Allow-Origin", "*")
	h.Set("Access-Control-Allow-Methods", "GET, POST")
	h.Set("Access-Control-Allow-Headers", "Authorization, Content-Type, DPoP, MCP-Protocol-Version")
	h.Set("Access-Control-Max-Age", "600")
	w.WriteHeader(http.StatusNoContent)
}

// A Refusal is an error of RFC 6749, section 4.1.2.1 or 5.2.
type Refusal struct {
	Code string // such as invalid_grant
	Why  string // for people; "" where a reason would help an attacker
}

// Error implements error.
func (r *Refusal) Error() string { return r.Code + ": " + r.Why }

func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Access-Control-Allow-Origin", "*") // clients in browsers; nothing here rests on cookies
	w.Header().Set("Access-Control-Expose-Headers", "DPoP-Nonce, Retry-After")
	w.WriteHeader(status)
	if err := json.MarshalWrite(w, v, json.Deterministic(true)); err != nil {
		return // the client is gone
	}
}

// refuse answers as RFC 6749, section 5.2 says.
func refuse(w http.ResponseWriter, status int, r *Refusal) {
	body := map[string]string{"error": r.Code}
	if r.Why != "" {
		body["error_description"] = r.Why
	}
	reply(w, status, body)
}

func (s *Server) metadata(w http.ResponseWriter, _ *http.Request) {
	grants, methods := []string{"authorization_code", "refresh_token"}, []string{"none"}
	if len(s.o.Clients) > 0 {
		methods = append(methods, "client_secret_basic", "client_secret_post")
	}
	doc := map[string]any{
		"issuer": s.o.URL, "authorization_endpoint": s.o.URL + "/oauth/authorize", "token_endpoint": s.o.URL + "/oauth/token", "jwks_uri": s.o.URL + "/oauth/jwks",
		"response_types_supported": []string{"code"}, "response_modes_supported": []string{"query"},
		"code_challenge_methods_supported": []string{"S256"}, "token_endpoint_auth_methods_supported": methods,
		"client_id_metadata_document_supported": true,
		"dpop_signing_alg_values_supported":     dpop.Algorithms,
		"scopes_supported":                      s.o.Scopes, "authorization_response_iss_parameter_supported": true,
		"subject_types_supported": []string{"public"}, "id_token_signing_alg_values_supported": []string{"ES256"},
	}
	if s.o.Register {
		doc["registration_endpoint"] = s.o.URL + "/oauth/register"
	}
	if s.o.Assertion != nil {
		grants = append(grants, grantAssertion)
		doc["authorization_grant_profiles_supported"] = []string{"urn:ietf:params:oauth:grant-profile:id-jag"}
	}
	doc["grant_types_supported"] = grants
	reply(w, http.StatusOK, doc)
}

func (s *Server) jwks(w http.ResponseWriter, r *http.Request) {
	raw, err := s.o.Keys.JWKS()
	if err != nil {
		s.log(r.Context(), "the signing keys cannot be shown", err)
		refuse(w, http.StatusInternalServerError, &Refusal{Code: "server_error"})
		return
	}
	reply(w, http.StatusOK, jsontext.Value(raw))
}

// log records why something was refused: who is refused is not told.
func (s *Server) log(ctx context.Context, what string, err error) {
	s.o.Logger.LogAttrs(ctx, slog.LevelWarn, what, slog.String("error", err.Error()))
}

// ErrAway is of what cannot be found out now, because the store does not answer.
var ErrAway = errors.New("what is known of clients and logins cannot be read now; try again in a moment")

// away is what a client is told while the store does not answer.
func (s *Server) away(ctx context.Context, err error) *Refusal {
	s.log(ctx, "what is known of clients and logins cannot be read or written", err)
	return Away
}

// Away is the refusal of what fails with ErrAway.
var Away = &Refusal{"temporarily_unavailable", ErrAway.Error()}

// OwnForm reports whether a form was sent from a page of this server, as browsers tell. A request
// that says nothing passes: it is of no browser, or of an old one.
func (s *Server) OwnForm(r *http.Request) bool {
	if site := r.Header.Get("Sec-Fetch-Site"); site != "" && site != "same-origin" && site != "none" {
		return false
	}
	o := r.Header.Get("Origin")
	return o == "" || o == "null" || o == s.o.URL
}

// Page sets the headers of a page for people: nobody may frame it, and it runs no script.
func Page(w http.ResponseWriter) {
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-store")
}

// HostOf is the host of an address, or the address if it has none.
func HostOf(address string) string {
	u, err := url.Parse(address)
	if err != nil || u.Host == "" {
		return address
	}
	return u.Host
}

// canonical is a resource as the configuration writes it.
func canonical(resource string) string { return strings.TrimSuffix(resource, "/") }
