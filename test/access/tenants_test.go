package access

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/identity/verify"
	"newel.dev/newel/internal/policy"
)

// callAt calls the tool open at an address; host, if not empty, is the name that the caller uses.
func (w *world) callAt(token, path, host string) response {
	w.t.Helper()
	body := `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"open","arguments":{},` + meta + `}}`
	r, err := http.NewRequestWithContext(w.t.Context(), http.MethodPost, w.base+path, strings.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	if host != "" {
		r.Host = host + w.base[strings.LastIndex(w.base, ":"):]
	}
	for k, v := range map[string]string{"Content-Type": "application/json", "Authorization": "Bearer " + token, "Mcp-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/call", "Mcp-Name": "open"} {
		r.Header.Set(k, v)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return response{status: resp.StatusCode, challenge: resp.Header.Get("WWW-Authenticate"), body: string(raw)}
}

// Who belongs to a tenant reaches its server by path or host, and no other does. A tenant is named
// by a claim, by the issuer, or by the address that a token is for; they have to agree.
func TestTenants(t *testing.T) {
	is := newBoundIssuer(t)
	w := startSet(t, []verify.Issuer{{URL: is.url, JWKS: is.url + "/jwks", Audiences: []string{"https://all.example.com"}}}, policy.Set{},
		assembly.Server{Path: "/mcp/acme", Tenant: "acme"}, assembly.Server{Host: "other.example.com", Path: "/mcp", Tenant: "other"})
	alice, eve := w.token("alice"), w.token("eve") // of acme and other, by claim
	for name, tt := range map[string]struct {
		token, path, host string
		status            int
	}{
		"alice at her server":   {alice, "/mcp/acme", "", 200},
		"eve at her host":       {eve, "/mcp", "other.example.com", 200},
		"alice at eve's host":   {alice, "/mcp", "other.example.com", 401},
		"eve at alice's server": {eve, "/mcp/acme", "", 401},
		"alice at everybody's":  {alice, "/mcp", "", 200},
	} {
		if r := w.callAt(tt.token, tt.path, tt.host); r.status != tt.status || strings.Contains(r.body, "open for") != (tt.status == 200) {
			t.Errorf("%s: %+v", name, r)
		}
	}
	port := w.base[strings.LastIndex(w.base, ":"):]
	if r := w.callAt("garbage", "/mcp", "other.example.com"); !strings.Contains(r.challenge, "http://other.example.com"+port+"/.well-known/oauth-protected-resource/mcp") {
		t.Errorf("the challenge is %s", r.challenge)
	}
}

// A token without a claim is of the tenant whose address it is for.
func TestTenantsByAddress(t *testing.T) {
	is := newBoundIssuer(t)
	v, err := verify.New(verify.Options{
		Resource: "https://mcp.example.com/mcp", Tenants: map[string]string{"https://acme.example.com/mcp": "acme", "https://mcp.example.com/mcp/other": "other"},
		Issuers: []verify.Issuer{
			{URL: is.url, JWKS: is.url + "/jwks", Audiences: []string{"https://mcp.example.com/mcp", "https://acme.example.com/mcp", "https://mcp.example.com/mcp/other"}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	for i, tt := range []struct {
		aud    any
		tenant string
		bad    bool
	}{
		{"https://mcp.example.com/mcp", "", false},
		{"https://acme.example.com/mcp", "acme", false},
		{[]string{"https://mcp.example.com/mcp/other", "https://mcp.example.com/mcp"}, "other", false},
		{[]string{"https://mcp.example.com/mcp/other", "https://acme.example.com/mcp"}, "", true},
	} {
		now := time.Now().Unix()
		token := sign(t, is.key, (&jose.SignerOptions{}).WithType("at+jwt"), map[string]any{
			"iss": is.url, "sub": "ada", "aud": tt.aud, "exp": now + 300, "iat": now, "jti": fmt.Sprint(i), "client_id": "c",
		})
		id, err := v.Verify(t.Context(), token)
		if (err != nil) != tt.bad || err == nil && id.Tenant != tt.tenant {
			t.Errorf("%v: %+v, %v", tt.aud, id, err)
		}
	}
}
