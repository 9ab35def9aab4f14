package access

import (
	"bytes"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/cluster"
	"newel.dev/newel/internal/identity/verify"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/redis"
	"newel.dev/newel/test/engines"
)

// startNode starts one of several nodes, and returns how to stop it.
func startNode(t *testing.T, is *boundIssuer, shared *redis.DB, key []byte) (*world, func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	base := "http://" + l.Addr().String()
	tokens, err := verify.New(verify.Options{Issuers: []verify.Issuer{{URL: is.url, JWKS: is.url + "/jwks", Audiences: []string{"https://mcp.example.com/mcp"}, TenantClaim: "tenant"}}})
	if err != nil {
		t.Fatal(err)
	}
	nodes, err := cluster.New(cluster.Options{Address: base, Key: key, Store: shared, Transport: &http.Transport{}})
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	h, err := assembly.Build(t.Context(), &assembly.Options{
		Name: "nodes", Logger: log, Identity: &assembly.Identities{Tokens: tokens}, Cluster: nodes, Events: shared.Events(time.Hour, log),
		Access:   &assembly.Access{Resource: "https://mcp.example.com/mcp", Issuers: []string{is.url}, Nonce: tokens.Nonce},
		Backends: []call.Backend{tools{tool("open", call.Read)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return &world{t: t, base: base}, serve(t, l, h)
}

// A session is its user's alone at every node: by way of another one, and after its own has gone.
func TestSessionsBelongToTheirUserEverywhere(t *testing.T) {
	is := newBoundIssuer(t)
	shared, err := redis.Open(secret.New(engines.Redis(t).URL))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = shared.Close() })
	n := 0
	token := func(user, tenant string) string {
		n++
		now := time.Now().Unix()
		return sign(t, is.key, (&jose.SignerOptions{}).WithType("at+jwt"), map[string]any{
			"iss": is.url, "sub": user, "tenant": tenant, "aud": "https://mcp.example.com/mcp", "exp": now + 300, "iat": now, "jti": fmt.Sprint(n), "client_id": "c",
		})
	}
	key := bytes.Repeat([]byte{7}, 32)
	a, stop := startNode(t, is, shared, key)
	b, _ := startNode(t, is, shared, key)
	alice := token("alice", "acme")
	session, _ := a.session(alice)
	id := 100
	at := func(w *world, token string) response {
		id++
		return w.send(token, fmt.Sprintf(`{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":"open","arguments":{}}}`, id), "Mcp-Session-Id", session, "Mcp-Protocol-Version", "2025-11-25")
	}
	check := func(when string) {
		t.Helper()
		if r := at(b, alice); r.status != http.StatusOK || !strings.Contains(r.body, "open for alice@acme") {
			t.Errorf("%s, alice: %+v", when, r)
		}
		for _, other := range []string{token("eve", "acme"), token("alice", "other")} {
			if r := at(b, other); r.status != http.StatusForbidden || strings.Contains(r.body, "open for") {
				t.Errorf("%s, somebody else: %+v", when, r)
			}
		}
		if r := at(b, "garbage"); r.status != http.StatusUnauthorized {
			t.Errorf("%s, nobody: %+v", when, r)
		}
	}
	check("while the node is there")
	stranger, _ := startNode(t, is, shared, bytes.Repeat([]byte{8}, 32)) // a node with another key
	if r := at(stranger, alice); r.status != http.StatusForbidden {
		t.Errorf("by way of a node with another key: %+v", r)
	}
	stop()
	check("after the node has gone")
}
