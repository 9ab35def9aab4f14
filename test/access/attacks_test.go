package access

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"newel.dev/newel/internal/identity/exchange"
	"newel.dev/newel/test/program"
)

// Attacks on who may call that worked on others, by the names under which they are known. None may
// work here.
func TestKnownAttacks(t *testing.T) {
	for _, tt := range []struct {
		ids, attack string
		refused     func(*testing.T)
	}{
		{"CVE-2025-6514", "an authorization endpoint that is a command for the shell", commandAsEndpoint},
		{"CVE-2025-49596 CVE-2026-34742 CVE-2025-64443", "a web page calls a local server under a name made to point at it", rebinding},
		{"CVE-2026-33252", "a web page sends a call that needs no preflight", crossSite},
		{"CVE-2026-25536 CVE-2026-48529", "two clients choose the same id, and one gets what is the other's", collidingIDs},
		{"CVE-2026-27896 GHSA-q382-vc8q-7jhj", "a second name in other letters, or with NUL: one is checked, the other called", secondName},
		{"CVE-2026-109527 CVE-2026-108395 GHSA-f897-62hf-6gxq", "a body or batch without end, before anybody asked who sends it", endlessBody},
		{"GHSA-g53w-w6mj-hrpp", "headers that only the gateway sets, set from outside", internalHeaders},
		{"GHSA-vw82-7fv8-r6gp CVE-2026-101084", "one path on which nobody asks", oneDoorOpen},
		{"CVE-2026-11719 CVE-2026-14537", "the older protocol does not look at scopes", olderProtocol},
		{"CVE-2026-58196 CVE-2026-54450", "an issuer's metadata sends the server to addresses inside, some hidden in NAT64", insideAddresses},
		{"CVE-2026-44430", "a client's address sends the server inside", insideClient},
		{"CVE-2026-59822", "a credential that fails falls through to a user without a name", namelessUser},
		{"CVE-2026-81094", "it listens to everybody and asks nobody", openToAll},
		{"CVE-2026-47427", "parameters that are not there end the server", missingParams},
		{"CVE-2026-44427", "a redirect to wherever the link says", openRedirect},
		{"CVE-2026-44428", "a token for one server is good at another of the same issuer", sharedIssuer},
		{"CVE-2026-44429", "a client's name is a script on the login page", scriptAsName},
		{"CVE-2026-45781", "the issuer answers 429, and the check is left out", issuerBusy},
	} {
		t.Run(tt.ids, func(t *testing.T) {
			t.Parallel()
			tt.refused(t)
			if t.Failed() {
				t.Logf("the attack: %s", tt.attack)
			}
		})
	}
}

const devNotes = `
auth:
  mode: dev
  scopes: ["a:read"]
  users:
    - {name: alice, tenant: acme, scopes: ["*"]}
    - {name: bob, tenant: acme, scopes: ["a:read"]}
    - {name: eve, tenant: other, scopes: ["*"]}`

// issuing is an issuer that signs whatever it is asked to, and answers as the test wants.
type issuing struct {
	*boundIssuer
	mux *http.ServeMux
}

func newIssuing(t *testing.T) *issuing {
	t.Helper()
	is := &issuing{&boundIssuer{t: t, key: newKey(t)}, http.NewServeMux()}
	is.key.KeyID = "k"
	s := httptest.NewServer(is.mux)
	t.Cleanup(s.Close)
	is.url = s.URL
	return is
}

// says makes it answer with status and text.
func (is *issuing) says(path string, status int, text string) {
	is.mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		fmt.Fprint(w, text)
	})
}

func (is *issuing) publishes() {
	is.t.Helper()
	keys, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{is.key.Public()}})
	if err != nil {
		is.t.Fatal(err)
	}
	is.says("/.well-known/oauth-authorization-server", http.StatusOK, fmt.Sprintf(`{"issuer":%q,"jwks_uri":"%s/jwks"}`, is.url, is.url))
	is.says("/jwks", http.StatusOK, string(keys))
}

// token is good at w, but for the changes.
func (is *issuing) token(w *world, changes map[string]any) string {
	is.t.Helper()
	now := time.Now().Unix()
	claims := map[string]any{"iss": is.url, "sub": "ada", "aud": w.base + "/mcp", "exp": now + 300, "iat": now, "jti": "t", "client_id": "c", "scope": "a:read"}
	for k, v := range changes {
		if claims[k] = v; v == nil {
			delete(claims, k)
		}
	}
	return sign(is.t, is.key, (&jose.SignerOptions{}).WithType("at+jwt"), claims)
}

// get opens a page of the server without following redirects.
func (w *world) get(path string) (*http.Response, string) {
	w.t.Helper()
	r, err := http.NewRequestWithContext(w.t.Context(), http.MethodGet, w.base+path, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.do(r)
}

func (w *world) do(r *http.Request) (*http.Response, string) {
	w.t.Helper()
	resp, err := still.Do(r)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return resp, string(body)
}

// register registers a client at the authorization server for development.
func (w *world) register(metadata string) (string, int) {
	w.t.Helper()
	r, err := http.NewRequestWithContext(w.t.Context(), http.MethodPost, w.base+"/oauth/register", strings.NewReader(metadata))
	if err != nil {
		w.t.Fatal(err)
	}
	resp, body := w.do(r)
	var out struct {
		ID string `json:"client_id"`
	}
	_ = json.Unmarshal([]byte(body), &out) // a refusal names none
	return out.ID, resp.StatusCode
}

// asks is the query of an authorization request.
func (w *world) asks(client, redirect string) string {
	return url.Values{"client_id": {client}, "redirect_uri": {redirect}, "response_type": {"code"}, "code_challenge": {strings.Repeat("a", 43)},
		"code_challenge_method": {"S256"}, "resource": {w.base + "/mcp"}, "state": {"s"}}.Encode()
}

func commandAsEndpoint(t *testing.T) {
	for _, bad := range []string{"file:///c:/windows/system32/calc.exe", "a:$(cmd.exe /c whoami >c:\\temp\\pwned.txt)?response_type=code", "javascript:alert(1)", "http://evil.example/authorize", "x-app://open"} {
		for _, where := range []string{"authorization_endpoint", "token_endpoint", "registration_endpoint"} {
			mux := http.NewServeMux()
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				mux.ServeHTTP(w, r)
			}))
			mux.HandleFunc("/.well-known/oauth-protected-resource/mcp", func(w http.ResponseWriter, _ *http.Request) {
				fmt.Fprintf(w, `{"resource":"%s/mcp","authorization_servers":[%q]}`, s.URL, s.URL)
			})
			mux.HandleFunc("/.well-known/oauth-authorization-server", func(w http.ResponseWriter, _ *http.Request) {
				m := map[string]any{"issuer": s.URL, "authorization_endpoint": s.URL + "/a", "token_endpoint": s.URL + "/t", "registration_endpoint": s.URL + "/r", "code_challenge_methods_supported": []string{"S256"}}
				m[where] = bad
				if err := json.NewEncoder(w).Encode(m); err != nil {
					t.Error(err)
				}
			})
			mux.HandleFunc("/r", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"client_id":"c"}`) })
			c, err := exchange.New(exchange.Options{Server: s.URL + "/mcp", HTTP: http.DefaultClient})
			if err != nil {
				t.Fatal(err)
			}
			if f, err := c.Begin(t.Context(), "http://127.0.0.1:1/callback"); err == nil || !strings.Contains(err.Error(), "https") {
				t.Errorf("%s %q: %v %v", where, bad, f, err)
			}
			s.Close()
		}
	}
}

func rebinding(t *testing.T) {
	w := serveNotes(t, devNotes)
	token := w.token("alice", "a:read")
	if r := w.read(token); !r.reads() {
		t.Fatalf("%+v", r)
	}
	if r := w.read(""); r.status != http.StatusUnauthorized {
		t.Errorf("on loopback without a token: %+v", r)
	}
	_, port, _ := strings.Cut(strings.TrimPrefix(w.base, "http://"), ":")
	for _, host := range []string{"evil.example:" + port, "evil.example", "127.0.0.1.evil.example:" + port, "localhost.evil.example"} {
		if r := w.send(token, `{}`, "Host", host); r.status != http.StatusForbidden {
			t.Errorf("as %s: %+v", host, r)
		}
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, w.base+"/oauth/register", strings.NewReader(`{"redirect_uris":["https://evil.example/"]}`))
		if err != nil {
			t.Fatal(err)
		}
		r.Host = host
		if resp, body := w.do(r); resp.StatusCode != http.StatusForbidden {
			t.Errorf("registering as %s: %s %s", host, resp.Status, body)
		}
	}
}

func crossSite(t *testing.T) {
	w := serveNotes(t, devNotes)
	token := w.token("alice", "a:read")
	const message = `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"read_note","arguments":{"id":1},` + meta + `}}`
	stateless := []string{"Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "tools/call", "Mcp-Name", "read_note"}
	for _, origin := range []string{"https://evil.example", "null", "http://127.0.0.1.evil.example", "file://"} {
		if r := w.send(token, message, append(stateless[:6:6], "Origin", origin)...); r.status != http.StatusForbidden {
			t.Errorf("from %s: %+v", origin, r)
		}
	}
	for _, kind := range []string{"text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""} { // what a form may send
		if r := w.send(token, message, append(stateless[:6:6], "Content-Type", kind)...); r.status != http.StatusUnsupportedMediaType {
			t.Errorf("as %q: %+v", kind, r)
		}
	}
	// Where there are no passwords, a form elsewhere could log the visitor in.
	id, _ := w.register(`{"redirect_uris":["https://evil.example/callback"]}`)
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, w.base+"/oauth/authorize?"+w.asks(id, "https://evil.example/callback"), strings.NewReader("user=alice"))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.Header.Set("Origin", "https://evil.example")
	r.Header.Set("Sec-Fetch-Site", "cross-site")
	if resp, body := w.do(r); resp.StatusCode != http.StatusForbidden || resp.Header.Get("Location") != "" {
		t.Errorf("logging in from another site: %s %s %s", resp.Status, resp.Header.Get("Location"), body)
	}
}

func collidingIDs(t *testing.T) {
	w := start(t)
	users := map[string]string{"alice": "open for alice@acme", "bob": "open for bob@acme", "eve": "open for eve@other"}
	var all sync.WaitGroup
	for user, want := range users {
		token := w.token(user)
		session := w.send(token, `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"t","version":"1"}}}`).session
		in := []string{"Mcp-Session-Id", session, "Mcp-Protocol-Version", "2025-11-25"}
		w.send(token, `{"jsonrpc":"2.0","method":"notifications/initialized"}`, in...)
		for range 4 {
			all.Go(func() {
				for range 50 { // every request has the id 1
					if r := w.stateless(token, "tools/call", "open", "{}"); !strings.Contains(r.body, want) {
						t.Errorf("%s got %+v", user, r)
					}
				}
			})
		}
		all.Go(func() {
			for range 50 {
				if r := w.send(token, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"open","arguments":{}}}`, in...); !strings.Contains(r.body, want) {
					t.Errorf("%s got in the session %+v", user, r)
				}
			}
		})
	}
	all.Wait()
}

func secondName(t *testing.T) {
	w := start(t)
	weak := w.token("bob", "a:read")
	session, _ := w.session(weak)
	in := []string{"Mcp-Session-Id", session, "Mcp-Protocol-Version", "2025-11-25"}
	stateless := []string{"Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "tools/call", "Mcp-Name", "open"}
	for _, params := range []string{
		`"name":"open","Name":"admin","arguments":{}`, `"name":"open","NAME":"admin","arguments":{}`, `"name":"open","name":"admin","arguments":{}`,
		`"Name":"admin","name":"open","arguments":{}`, `"name":"open","name\u0000":"admin","arguments":{}`, `"name":"open","n\u0061me":"admin","arguments":{}`,
		`"name":"open\u0000","arguments":{}`, `"name":"admin","Name":"open","arguments":{}`,
	} {
		for era, r := range map[string]response{
			"stateless": w.send(weak, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{`+params+`,`+meta+`}}`, stateless...),
			"sessions":  w.send(weak, `{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{`+params+`}}`, in...),
		} {
			if strings.Contains(r.body, "admin for") || r.status >= 500 {
				t.Errorf("%s, %s: %+v", era, params, r)
			}
		}
	}
	for _, message := range []string{
		`{"jsonrpc":"2.0","id":3,"method":"tools/list","Method":"tools/call","params":{"name":"admin","arguments":{}}}`,
		`{"jsonrpc":"2.0","id":4,"method":"ping","method":"tools/call","params":{"name":"admin","arguments":{}}}`,
		`{"jsonrpc":"2.0","id":5,"method":"tools/call","params":{"name":"open","arguments":{}},"Params":{"name":"admin","arguments":{}}}`,
	} {
		if r := w.send(weak, message, in...); strings.Contains(r.body, "admin for") || r.status >= 500 {
			t.Errorf("%s: %+v", message, r)
		}
	}
}

// endless is a body that never ends; it counts what was taken.
type endless struct{ taken atomic.Int64 }

// Read implements io.Reader.
func (e *endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = '['
	}
	e.taken.Add(int64(len(p)))
	return len(p), nil
}

func endlessBody(t *testing.T) {
	w := serveNotes(t, devNotes)
	for name, length := range map[string]int64{"chunked": -1, "announced": 1 << 40} {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		body := &endless{}
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, w.base+"/mcp", body)
		if err != nil {
			t.Fatal(err)
		}
		r.ContentLength = length
		r.Header.Set("Content-Type", "application/json")
		resp, err := http.DefaultClient.Do(r)
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode != http.StatusRequestEntityTooLarge && resp.StatusCode != http.StatusUnauthorized {
				t.Errorf("%s: %s", name, resp.Status)
			}
		} else if ctx.Err() != nil { // a connection that was cut is as good an answer
			t.Errorf("%s: %v", name, err)
		}
		if n := body.taken.Load(); n > 32<<20 { // the bound of 4 MiB, and what the system keeps on both sides
			t.Errorf("%s: the server took %d bytes", name, n)
		}
		cancel()
	}
	batch := "[" + strings.Repeat(`{"jsonrpc":"2.0","id":1,"method":"ping"},`, 50_000) + `{"jsonrpc":"2.0","id":1,"method":"ping"}]`
	if r := w.send("", batch, "Mcp-Protocol-Version", "2025-03-26"); r.status != http.StatusUnauthorized && r.status != http.StatusRequestEntityTooLarge {
		t.Errorf("a batch: %d", r.status)
	}
}

func internalHeaders(t *testing.T) {
	w := start(t)
	forged := []string{"X-Newel-Peer", "stdio", "X-Newel-User", "alice", "X-Newel-Principal", "alice", "X-Newel-Tenant", "acme", "X-Newel-Scopes", "a:admin", "X-Newel-Key", "k", "X-Newel-Size", "-1",
		"X-Forwarded-User", "alice", "X-Forwarded-Email", "alice@acme", "X-Auth-Request-User", "alice", "Remote-User", "alice", "Client-Cert", ":AAAA:"}
	const initialize = `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"t","version":"1"}}}`
	for _, authorization := range []string{"", "Bearer known", "Bearer verified", "Bearer", "Basic YWxpY2U6"} {
		with := append(forged[:len(forged):len(forged)], "Authorization", authorization)
		if r := w.send("", initialize, with...); r.status != http.StatusUnauthorized {
			t.Errorf("%q, sessions: %+v", authorization, r)
		}
		if r := w.send("", `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"open","arguments":{},`+meta+`}}`,
			append(with, "Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "tools/call", "Mcp-Name", "open")...); r.status != http.StatusUnauthorized {
			t.Errorf("%q, stateless: %+v", authorization, r)
		}
	}
	eve := w.token("eve", "a:read")
	session, _ := w.session(eve)
	if r := w.send(eve, `{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"open","arguments":{}}}`,
		append(forged, "Mcp-Session-Id", session, "Mcp-Protocol-Version", "2025-11-25")...); !strings.Contains(r.body, "open for eve@other") {
		t.Errorf("eve became another: %+v", r)
	}
}

func oneDoorOpen(t *testing.T) {
	w := serveNotes(t, devNotes)
	for _, method := range []string{"tools/call", "tools/list", "resources/list", "resources/read", "resources/templates/list", "prompts/list", "prompts/get", "completion/complete",
		"subscriptions/listen", "resources/subscribe", "server/discover", "logging/setLevel", "ping", "initialize", "tasks/get", "invented"} {
		if r := w.stateless("", method, "", ""); r.status != http.StatusUnauthorized && !r.nobody() {
			t.Errorf("stateless %s: %+v", method, r)
		}
		message := fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":%q,"params":{}}`, method)
		if r := w.send("", message, "Mcp-Protocol-Version", "2025-11-25", "Mcp-Session-Id", "guessed"); r.status != http.StatusUnauthorized && !r.nobody() {
			t.Errorf("in a session %s: %+v", method, r)
		}
		if r := w.send("", "["+message+"]", "Mcp-Protocol-Version", "2025-03-26"); r.status != http.StatusUnauthorized && !r.nobody() {
			t.Errorf("in a batch %s: %+v", method, r)
		}
	}
	for _, variant := range []string{"/mcp/", "//mcp", "/MCP", "/mcp/.", "/x/../mcp", "/mcp%2f", "/mcp;x", "/sse", "/messages", "/api/mcp", "/mcp/other"} {
		for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodPatch, http.MethodHead} {
			r, err := http.NewRequestWithContext(t.Context(), method, w.base+variant, strings.NewReader(`{"jsonrpc":"2.0","id":1,"method":"ping"}`))
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Content-Type", "application/json")
			if resp, body := w.do(r); resp.StatusCode < 300 {
				t.Errorf("%s %s: %s %s", method, variant, resp.Status, body)
			}
		}
	}
}

// nobody reports whether a message was refused for what it is, without a word of what is here.
func (r response) nobody() bool {
	return r.status >= 400 && r.status < 500 && !strings.Contains(r.body, `"result"`) && !strings.Contains(r.body, "note")
}

func olderProtocol(t *testing.T) {
	w := start(t)
	weak, strong := w.token("alice", "a:read"), w.token("alice", "a:read", "a:admin")
	for _, revision := range []string{"2025-03-26", "2025-06-18", "2025-11-25"} {
		session := w.send(strong, `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"`+revision+`","capabilities":{},"clientInfo":{"name":"t","version":"1"}}}`).session
		in := []string{"Mcp-Session-Id", session, "Mcp-Protocol-Version", revision}
		w.send(strong, `{"jsonrpc":"2.0","method":"notifications/initialized"}`, in...)
		const message = `{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"admin","arguments":{}}}`
		if r := w.send(strong, message, in...); !strings.Contains(r.body, "admin for alice") {
			t.Fatalf("%s: %+v", revision, r)
		}
		for name, body := range map[string]string{"alone": message, "in a batch": "[" + message + "]", "in a batch behind another": `[{"jsonrpc":"2.0","id":3,"method":"tools/call","params":{"name":"open","arguments":{}}},` + message + "]"} {
			if r := w.send(weak, body, in...); strings.Contains(r.body, "admin for") || name == "alone" && r.status != http.StatusForbidden {
				t.Errorf("%s, %s, in a session that a better token opened: %+v", revision, name, r)
			}
			if r := w.send(weak, body, "Mcp-Protocol-Version", revision); strings.Contains(r.body, "admin for") {
				t.Errorf("%s, %s, without a session: %+v", revision, name, r)
			}
		}
	}
}

func insideAddresses(t *testing.T) {
	for _, host := range []string{"169.254.169.254", "100.100.100.200", "168.63.129.16", "10.0.0.1", "[::ffff:169.254.169.254]", "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::a9fe:a9fe]", "[2002:a9fe:a9fe::]", "[fd00:ec2::254]"} {
		is := newIssuing(t)
		is.says("/.well-known/oauth-authorization-server", http.StatusOK, fmt.Sprintf(`{"issuer":%q,"jwks_uri":"https://%s/jwks"}`, is.url, host))
		w := serveNotes(t, tokensOf(is.url))
		if r := w.read(is.token(w, nil)); r.reads() || !r.later() && r.status != http.StatusUnauthorized {
			t.Errorf("keys at %s: %+v", host, r)
		}
		if log := w.process.Said(); !strings.Contains(log, "may not be reached from here") {
			t.Errorf("%s was dialled:\n%s", host, log)
		}
	}
	is := newIssuing(t)
	var followed atomic.Int64
	is.mux.HandleFunc("/.well-known/", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/inside", http.StatusFound) })
	is.mux.HandleFunc("/inside", func(http.ResponseWriter, *http.Request) { followed.Add(1) })
	w := serveNotes(t, tokensOf(is.url))
	if r := w.read(is.token(w, nil)); r.reads() || followed.Load() != 0 {
		t.Errorf("%d redirects were followed: %+v", followed.Load(), r)
	}
}

func insideClient(t *testing.T) {
	w := serveNotes(t, devNotes)
	var dialled atomic.Int64
	s := httptest.NewUnstartedServer(http.NotFoundHandler())
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			dialled.Add(1)
		}
	}
	s.StartTLS()
	defer s.Close()
	_, port, _ := strings.Cut(strings.TrimPrefix(s.URL, "https://"), ":")
	for _, host := range []string{"127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "[::1]", "0.0.0.0", "2130706433", "169.254.169.254", "[64:ff9b::7f00:1]"} {
		resp, body := w.get("/oauth/authorize?" + w.asks("https://"+host+":"+port+"/client.json", "https://evil.example/"))
		if resp.StatusCode != http.StatusBadRequest || dialled.Load() != 0 {
			t.Errorf("%s: %s %s, dialled %d times", host, resp.Status, body, dialled.Load())
		}
	}
}

func namelessUser(t *testing.T) {
	is := newIssuing(t)
	is.publishes()
	is.says("/token/introspection", http.StatusOK, `{"active":true}`)
	w := serveNotes(t, tokensOf(is.url))
	if r := w.read(is.token(w, nil)); !r.reads() {
		t.Fatalf("%+v", r)
	}
	past := time.Now().Unix() - 3600
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","typ":"at+jwt"}`)) + "." + strings.Split(is.token(w, nil), ".")[1] + "."
	for name, token := range map[string]string{
		"without a subject": is.token(w, map[string]any{"sub": nil}), "an empty subject": is.token(w, map[string]any{"sub": ""}), "expired": is.token(w, map[string]any{"exp": past}),
		"without expiry": is.token(w, map[string]any{"exp": nil}), "of the future": is.token(w, map[string]any{"nbf": past + 7200}), "without an audience": is.token(w, map[string]any{"aud": nil}),
		"another issuer": is.token(w, map[string]any{"iss": "https://evil.example"}), "alg none": none, "null": "null", "undefined": "undefined", "two words": "Bearer x", "opaque, and of nobody": "opaque",
	} {
		if r := w.read(token); r.status != http.StatusUnauthorized || strings.Contains(r.body, "first") {
			t.Errorf("%s: %+v", name, r)
		}
	}
	for _, authorization := range []string{"Bearer ", "Bearer", "bearer\t", "Basic OjA=", "Basic Og==", "DPoP ", ","} {
		if r := w.send("", `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"read_note","arguments":{"id":1},`+meta+`}}`,
			"Authorization", authorization, "Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "tools/call", "Mcp-Name", "read_note"); r.status != http.StatusUnauthorized {
			t.Errorf("%q: %+v", authorization, r)
		}
	}
}

func openToAll(t *testing.T) {
	for name, auth := range map[string]string{"no auth": "", "auth for development": devNotes} {
		for _, listen := range []string{"0.0.0.0:0", ":0", "[::]:0"} {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "schema.sql"), []byte(notesSchema), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "newel.yaml"), []byte(auth+notesConfig), 0o600); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			cmd := exec.CommandContext(ctx, program.Built(t, program.Newel), "serve", "--listen", listen)
			cmd.Dir = dir
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Run(); err == nil || ctx.Err() != nil || !strings.Contains(out.String(), "refusing to listen") {
				t.Errorf("%s at %s: %v\n%s", name, listen, err, out.Bytes())
			}
			cancel()
		}
	}
}

func missingParams(t *testing.T) {
	w := serveNotes(t, devNotes)
	token := w.token("alice", "a:read")
	session := w.send(token, `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"t","version":"1"}}}`).session
	in := []string{"Mcp-Session-Id", session, "Mcp-Protocol-Version", "2025-11-25"}
	w.send(token, `{"jsonrpc":"2.0","method":"notifications/initialized"}`, in...)
	id := 1
	for _, method := range []string{"initialize", "tools/call", "tools/list", "resources/read", "resources/subscribe", "resources/unsubscribe", "prompts/get", "prompts/list", "completion/complete", "logging/setLevel", "server/discover", "subscriptions/listen"} {
		for _, params := range []string{"", `,"params":null`, `,"params":{}`, `,"params":[]`, `,"params":{"name":null,"uri":null,"ref":null,"argument":null,"arguments":null,"_meta":null}`, `,"params":{"name":"read_note","arguments":null}`} {
			id++
			message := fmt.Sprintf(`{"jsonrpc":"2.0","id":%d,"method":%q%s}`, id, method, params)
			if r := w.send(token, message, in...); r.status >= 500 || strings.Contains(r.body, "internal error") {
				t.Errorf("in a session %s: %+v", message, r)
			}
			if r := w.send(token, message, "Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", method); r.status >= 500 || strings.Contains(r.body, "internal error") {
				t.Errorf("stateless %s: %+v", message, r)
			}
		}
	}
	if r := w.read(token); !r.reads() {
		t.Errorf("afterwards: %+v", r)
	}
}

func openRedirect(t *testing.T) {
	w := serveNotes(t, devNotes)
	const redirect = "http://127.0.0.1:4711/callback"
	id, _ := w.register(`{"redirect_uris":["` + redirect + `"]}`)
	if resp, body := w.get("/oauth/authorize?" + w.asks(id, redirect)); resp.StatusCode != http.StatusOK || !strings.Contains(body, "<form") {
		t.Fatalf("%s %s", resp.Status, body)
	}
	for _, other := range []string{"https://evil.example/callback", redirect + ".evil.example", redirect + "/../x", "http://127.0.0.1:4711@evil.example/callback", "//evil.example/callback", "http://127.0.0.1:4711/callback#x",
		"http://evil.example\\@127.0.0.1:4711/callback", redirect + "?next=https://evil.example", "javascript:alert(1)", "http://u@127.0.0.1:4711/callback"} {
		resp, body := w.get("/oauth/authorize?" + w.asks(id, other))
		if resp.StatusCode != http.StatusBadRequest || resp.Header.Get("Location") != "" {
			t.Errorf("asking for %s: %s to %s %s", other, resp.Status, resp.Header.Get("Location"), body)
		}
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, w.base+"/oauth/authorize?"+w.asks(id, other), strings.NewReader("user=alice"))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		if resp, _ := w.do(r); resp.StatusCode != http.StatusBadRequest || resp.Header.Get("Location") != "" {
			t.Errorf("logging in for %s: %s to %s", other, resp.Status, resp.Header.Get("Location"))
		}
	}
}

func sharedIssuer(t *testing.T) {
	is := newIssuing(t)
	is.publishes()
	one, other := serveNotes(t, tokensOf(is.url)), serveNotes(t, tokensOf(is.url))
	token := is.token(one, nil)
	if r := one.read(token); !r.reads() {
		t.Fatalf("%+v", r)
	}
	for name, token := range map[string]string{
		"the other server's": token, "of the issuer": is.token(one, map[string]any{"aud": is.url}), "its address as a prefix": is.token(one, map[string]any{"aud": other.base + "/mcp/x"}),
		"its origin": is.token(one, map[string]any{"aud": other.base}), "everybody": is.token(one, map[string]any{"aud": "*"}), "a list of others": is.token(one, map[string]any{"aud": []string{one.base, one.base + "/mcp"}}),
	} {
		if r := other.read(token); r.status != http.StatusUnauthorized {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

func scriptAsName(t *testing.T) {
	w := serveNotes(t, devNotes)
	const script = `<script>alert(1)</script>`
	for _, redirect := range []string{"javascript:alert(1)", "data:text/html," + script, "vbscript:x", "JAVASCRIPT:alert(1)", "file:///etc/passwd"} {
		if id, status := w.register(fmt.Sprintf(`{"redirect_uris":[%q]}`, redirect)); status != http.StatusBadRequest {
			t.Errorf("%s was registered as %s: %d", redirect, id, status)
		}
	}
	id, _ := w.register(`{"client_name":"` + script + `\"><img src=x onerror=alert(1)>","redirect_uris":["https://evil.example/callback"]}`)
	resp, body := w.get("/oauth/authorize?" + w.asks(id, "https://evil.example/callback") + "&x=%22%3E%3Cscript%3Ealert(1)%3C/script%3E")
	if resp.StatusCode != http.StatusOK || strings.Contains(body, "<script") || strings.Contains(body, "<img") || !strings.Contains(body, "&lt;script") {
		t.Errorf("%s %s", resp.Status, body)
	}
	if policy := resp.Header.Get("Content-Security-Policy"); !strings.Contains(policy, "default-src 'none'") || !strings.Contains(policy, "frame-ancestors 'none'") {
		t.Errorf("the page's policy is %q", policy)
	}
	if resp, body := w.get("/oauth/authorize?client_id=" + url.QueryEscape(script)); strings.Contains(body, "<script") && !strings.HasPrefix(resp.Header.Get("Content-Type"), "text/plain") {
		t.Errorf("an error is a page: %s", body)
	}
}

func issuerBusy(t *testing.T) {
	for _, status := range []int{http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusServiceUnavailable, http.StatusNoContent} {
		is := newIssuing(t)
		is.says("/.well-known/oauth-authorization-server", http.StatusOK, fmt.Sprintf(`{"issuer":%q,"jwks_uri":"%s/jwks"}`, is.url, is.url))
		is.says("/jwks", status, "")
		is.says("/token/introspection", status, "")
		w := serveNotes(t, tokensOf(is.url))
		for name, token := range map[string]string{"a token": is.token(w, nil), "an opaque one": "opaque"} {
			if r := w.read(token); r.reads() || !r.later() {
				t.Errorf("%s while the issuer says %d: %+v", name, status, r)
			}
			r := w.send(token, `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"t","version":"1"}}}`)
			if r.status != http.StatusServiceUnavailable || r.session != "" {
				t.Errorf("%s, sessions, while the issuer says %d: %+v", name, status, r)
			}
		}
	}
}
