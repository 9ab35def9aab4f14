// Command secured is Newel with everything that asks who is calling and whether they may: access
// tokens of an issuer, and a policy of fifty rules. Its issuer is in the same process; GET /token
// returns a token. With -costs it serves nothing and prints what each guard costs.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/go-jose/go-jose/v4"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/identity/verify"
	"newel.dev/newel/internal/policy"
)

const resource = "http://127.0.0.1/mcp"

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "address to serve on")
	costs := flag.Bool("costs", false, "print what each guard costs, and end")
	flag.Parse()
	if err := run(*addr, *costs); err != nil {
		fmt.Fprintln(os.Stderr, "secured:", err)
		os.Exit(1)
	}
}

func run(addr string, costs bool) error {
	is, err := newIssuer()
	if err != nil {
		return err
	}
	tokens, err := verify.New(verify.Options{Resource: resource, Issuers: []verify.Issuer{{URL: is.url}}})
	if err != nil {
		return err
	}
	rules, err := fiftyRules()
	if err != nil {
		return err
	}
	who := &assembly.Identities{Tokens: tokens}
	if costs {
		return printCosts(who, rules, is.token)
	}
	records, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer records.Close()
	house, err := assembly.Build(context.Background(), &assembly.Options{
		Name: "bench", Version: "1.0.0", Backends: []call.Backend{echo{}}, Identity: who, Policy: rules,
		Logger: slog.New(slog.NewJSONHandler(records, nil)),
	})
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle("/mcp", house.Handler())
	mux.HandleFunc("GET /token", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, is.token) })
	return http.ListenAndServe(addr, mux) //nolint:gosec // a measurement
}

// issuer is an authorization server as far as a resource server sees it.
type issuer struct{ url, token string }

func newIssuer() (*issuer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	is := &issuer{url: "http://" + l.Addr().String()}
	keys := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "1", Algorithm: "ES256", Use: "sig"}}}
	mux := http.NewServeMux()
	answer := func(path string, v any) {
		mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(v) })
	}
	answer("/.well-known/oauth-authorization-server", map[string]string{"issuer": is.url, "jwks_uri": is.url + "/jwks"})
	answer("/jwks", keys)
	go func() { _ = http.Serve(l, mux) }() //nolint:gosec // ends with the process

	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "1"}}, (&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		return nil, err
	}
	now := time.Now()
	claims, err := json.Marshal(map[string]any{
		"iss": is.url, "sub": "ada", "aud": resource, "client_id": "bench", "jti": "1", "scope": "echo:say orders:read",
		"roles": []string{"support"}, "iat": now.Unix(), "exp": now.Add(24 * time.Hour).Unix(),
	})
	if err != nil {
		return nil, err
	}
	signed, err := signer.Sign(claims)
	if err != nil {
		return nil, err
	}
	is.token, err = signed.CompactSerialize()
	return is, err
}

// fiftyRules are like a company's: most are about other tools, one has a condition.
func fiftyRules() (*policy.Policy, error) {
	rules := []policy.Rule{
		{Name: "support reads", Then: "allow", Effects: []string{"read"}, Roles: []string{"support"}},
		{Name: "nothing long", Then: "deny", Tools: []string{"echo"}, When: `args.text.size() > 1000`},
	}
	for i := range 48 {
		rules = append(rules, policy.Rule{Name: fmt.Sprintf("area %d", i), Then: "deny", Tools: []string{fmt.Sprintf("area_%d_*", i)}})
	}
	p, problems := policy.Compile(policy.Set{Rules: rules})
	return p, errors.Join(problems...)
}

// echo is the tool of the other servers, with a scope.
type echo struct{}

func (echo) Name() string { return "bench" }

func (echo) Capabilities(context.Context) ([]*call.Capability, error) {
	return []*call.Capability{{
		Kind: call.Tool, Name: "echo", Description: "Says what it was told.", Effect: call.Read, Scopes: []string{"echo:say"},
		Input: []byte(`{"type":"object","properties":{"text":{"type":"string","description":"what to say"}},"required":["text"],"additionalProperties":false}`),
		Run: func(_ context.Context, c *call.Call) (*call.Result, error) {
			var in struct{ Text string }
			if err := json.Unmarshal(c.Args, &in); err != nil {
				return nil, err
			}
			return call.Text(in.Text), nil
		},
	}}, nil
}
