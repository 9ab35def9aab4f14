package access

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"newel.dev/newel/test/program"
)

// nodeDir is where the parts are that run on Node.
const nodeDir = "idp"

var installing sync.Mutex // tests run side by side

// installNode runs npm ci, unless what is installed already is what the lock file says.
func installNode(t *testing.T) {
	t.Helper()
	installing.Lock()
	defer installing.Unlock()
	lock, err := os.ReadFile(filepath.Join(nodeDir, "package-lock.json"))
	if err != nil {
		t.Fatal(err)
	}
	stamp := filepath.Join(nodeDir, "node_modules", ".installed-lock")
	if have, err := os.ReadFile(stamp); err == nil && bytes.Equal(have, lock) {
		return
	}
	cmd := exec.CommandContext(t.Context(), "npm", "ci", "--no-fund", "--no-audit", "--loglevel=error")
	cmd.Dir = nodeDir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("npm ci: %v; these tests need npm, and the network once\n%s", err, out)
	}
	if err := os.WriteFile(stamp, lock, 0o644); err != nil {
		t.Fatal(err)
	}
}

// node makes a command that runs a script with the pinned Node.
func node(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join("node_modules", ".bin", "node"), args...)
	cmd.Dir, cmd.WaitDelay = nodeDir, time.Second
	return cmd
}

func TestMain(m *testing.M) { os.Exit(program.Run(m)) }

// serveNotes starts the real program with this part of a configuration, and notes to read and change.
func serveNotes(t *testing.T, auth string, more ...string) *world {
	t.Helper()
	dir := t.TempDir()
	files := map[string]string{"schema.sql": notesSchema, "newel.yaml": auth + notesConfig}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w := &world{t: t}
	cmd := exec.Command(program.Built(t, program.Newel), append([]string{"serve", "--listen", "127.0.0.1:0"}, more...)...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "IDP_SECRET="+machineSecret, "NO_COLOR=1")
	var out program.Log
	cmd.Stdout = &out
	w.process = program.Serve(t, cmd, func() bool {
		_, at, _ := strings.Cut(out.String(), "Serving MCP at ")
		line, _, ok := strings.Cut(at, "\n")
		w.base = strings.TrimSuffix(strings.TrimSpace(line), "/mcp")
		return ok
	})
	return w
}

// idp is oidc-provider in a process of its own.
type idp struct {
	t      *testing.T
	issuer string
	in     io.WriteCloser
	out    *bufio.Scanner
}

const machineSecret = "hush hush hush hush hush hush hush"

func startIDP(t *testing.T) *idp {
	t.Helper()
	installNode(t)
	cmd := node(context.Background(), "provider.mjs")
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &idp{t: t, in: in, out: bufio.NewScanner(out)}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil || t.Failed() {
			t.Errorf("the provider ended: %v\n%s", err, complaints.Bytes())
		}
	})
	if !p.out.Scan() {
		t.Fatalf("the provider did not start: %v", p.out.Err())
	}
	p.issuer = p.out.Text()
	return p
}

// order tells the provider something and waits until it is so.
func (p *idp) order(what map[string]any) {
	p.t.Helper()
	line, err := json.Marshal(what)
	if err != nil {
		p.t.Fatal(err)
	}
	if _, err := p.in.Write(append(line, '\n')); err != nil {
		p.t.Fatal(err)
	}
	if !p.out.Scan() || p.out.Text() != "done" {
		p.t.Fatalf("the provider says %q, %v", p.out.Text(), p.out.Err())
	}
}

func (p *idp) knows(resource, format string, seconds int) {
	p.t.Helper()
	p.order(map[string]any{"resource": resource, "format": format, "seconds": seconds})
}

// machineToken gets a token without a person (client credentials).
func (p *idp) machineToken(resource, scope string, headers ...string) string {
	p.t.Helper()
	form := url.Values{"grant_type": {"client_credentials"}, "resource": {resource}, "scope": {scope}}
	r, err := http.NewRequestWithContext(p.t.Context(), http.MethodPost, p.issuer+"/token", strings.NewReader(form.Encode()))
	if err != nil {
		p.t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.SetBasicAuth("newel", url.QueryEscape(machineSecret))
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	var got struct {
		Token string `json:"access_token"`
		Error string `json:"error_description"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&got); err != nil || got.Token == "" {
		p.t.Fatalf("%s: %s %v", resp.Status, got.Error, err)
	}
	return got.Token
}

// notes is a server that takes tokens of the provider.
func (p *idp) notes() *world {
	p.t.Helper()
	return serveNotes(p.t, tokensOf(p.issuer))
}

const notesSchema = `CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT NOT NULL) STRICT;
INSERT INTO notes VALUES (1, 'first');`

// tokensOf configures an issuer that is also asked about opaque tokens.
func tokensOf(issuer string) string {
	return fmt.Sprintf(`
auth:
  mode: tokens
  scopes: ["a:read"]
  issuers:
    - {url: %q, skew: 1s, introspection: "%s/token/introspection", client_id: newel, client_secret: "${env:IDP_SECRET}"}`, issuer, issuer)
}

const notesConfig = `
backends:
  - type: sql
    name: notes
    driver: sqlite
    file: notes.db
    init: schema.sql
    tools:
      - name: read_note
        description: Read a note.
        params: [{name: id, type: integer, required: true, description: Number of the note.}]
        scopes: ["a:read"]
        result: row
        sql: SELECT id, text FROM notes WHERE id = :id
      - name: change_note
        description: Change a note.
        effect: write
        params:
          - {name: id, type: integer, required: true, description: Number of the note.}
          - {name: text, type: string, required: true, description: The new text.}
        scopes: ["a:read", "a:admin"]
        result: row
        sql: UPDATE notes SET text = :text WHERE id = :id RETURNING id, text
`

// read calls the tool that needs one scope.
func (w *world) read(token string) response {
	w.t.Helper()
	return w.stateless(token, "tools/call", "read_note", `{"id":1}`)
}

func (r response) reads() bool {
	return r.status == http.StatusOK && strings.Contains(r.body, `first`)
}

// later reports whether the token cannot be judged now.
func (r response) later() bool {
	return strings.Contains(r.body, `"retryable":true`) && strings.Contains(r.body, "the access token cannot be checked now")
}

// The official client finds its way to tokens of a provider that is not ours, renews them, and
// steps up, in both eras, with and without a key of its own.
func TestClientAtRealProvider(t *testing.T) {
	t.Parallel()
	p := startIDP(t)
	for _, tt := range []struct{ revision, mode, bound string }{
		{"2026-07-28", "2026-07-28", ""},
		{"2025-11-25", "legacy", ""},
		{"2026-07-28", "2026-07-28", "dpop"},
		{"2025-11-25", "legacy", "dpop"},
	} {
		t.Run(tt.revision+" "+tt.bound, func(t *testing.T) {
			q := *p
			q.t = t
			w := q.notes()
			q.knows(w.base+"/mcp", "jwt", 3)
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			var out, complaints bytes.Buffer
			cmd := node(ctx, append([]string{"client.mjs", tt.mode, w.base + "/mcp"}, strings.Fields(tt.bound)...)...)
			cmd.Stdout, cmd.Stderr = &out, &complaints
			if err := cmd.Run(); err != nil {
				t.Fatalf("%v\n%s%s", errors.Join(err, ctx.Err()), complaints.Bytes(), out.Bytes())
			}
			var got struct {
				Revision, Type, Subject, Audience, Read, Later, Changed, Scope string
				Refreshed                                                      bool
				Registered                                                     int
				Asked, Pages                                                   []string
			}
			if err := json.Unmarshal(out.Bytes(), &got); err != nil {
				t.Fatalf("%v\n%s", err, out.Bytes())
			}
			wantType := "Bearer"
			if tt.bound != "" {
				wantType = "DPoP"
			}
			if got.Revision != tt.revision || got.Type != wantType || got.Subject != "ada" || got.Audience != w.base+"/mcp" || got.Registered != 2 {
				t.Errorf("%+v", got)
			}
			if !strings.Contains(got.Read, "first") || !strings.Contains(got.Later, "first") || !got.Refreshed {
				t.Errorf("reading, and reading again after the token expired: %+v", got)
			}
			if len(got.Asked) != 2 || strings.Contains(got.Asked[0], "a:admin") || !strings.Contains(got.Asked[1], "a:admin") || !strings.Contains(got.Changed, tt.mode) || !strings.Contains(got.Scope, "a:admin") {
				t.Errorf("stepping up: %+v", got)
			}
			if strings.Join(got.Pages[:2], " ") != "login consent" {
				t.Errorf("the person saw %v", got.Pages)
			}
		})
	}
}

// Tokens of the same provider for somebody else, changed, or without the proof they need, open
// nothing; opaque ones are asked about.
func TestTokensOfRealProvider(t *testing.T) {
	t.Parallel()
	p := startIDP(t)
	w := p.notes()
	here, elsewhere := w.base+"/mcp", "https://elsewhere.example/mcp"
	p.knows(here, "jwt", 300)
	p.knows(elsewhere, "jwt", 300)

	good := p.machineToken(here, "a:read")
	if r := w.read(good); !r.reads() {
		t.Fatalf("%+v", r)
	}
	if r := w.stateless(good, "tools/call", "change_note", `{"id":1,"text":"x"}`); r.status != http.StatusForbidden || !strings.Contains(r.challenge, `scope="a:read a:admin"`) {
		t.Errorf("without the scope: %+v", r)
	}
	parts := strings.Split(good, ".")
	forged := parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"iss":"`+p.issuer+`"}`)) + "." + parts[2]
	for name, token := range map[string]string{"another audience": p.machineToken(elsewhere, "a:read"), "another payload": forged, "no signature": parts[0] + "." + parts[1] + "."} {
		if r := w.read(token); r.status != http.StatusUnauthorized || !strings.Contains(r.challenge, `error="invalid_token"`) {
			t.Errorf("%s: %+v", name, r)
		}
	}

	h := &holder{t: t, w: w, key: newKey(t)}
	h.token = p.machineToken(here, "a:read", "DPoP", sign(t, h.key, (&jose.SignerOptions{EmbedJWK: true}).WithType("dpop+jwt"),
		map[string]any{"jti": "for the provider", "htm": "POST", "htu": p.issuer + "/token", "iat": time.Now().Unix()}))
	if r := w.read(h.token); r.status != http.StatusUnauthorized {
		t.Errorf("a bound token as Bearer: %+v", r)
	}
	if bound := thumbprint(t, h.key); !strings.Contains(decoded(t, h.token), bound) {
		t.Errorf("the provider does not bind tokens to %s", bound)
	}
	const message = `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"read_note","arguments":{"id":1},` + meta + `}}`
	stateless := []string{"Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "tools/call", "Mcp-Name", "read_note"}
	h.nonce = w.send("", message, append(stateless[:6:6], h.headers("POST")...)...).nonce
	if r := w.send("", message, append(stateless[:6:6], h.headers("POST")...)...); !r.reads() {
		t.Errorf("with its proof: %+v", r)
	}

	p.knows(here, "opaque", 300)
	p.knows(elsewhere, "opaque", 300)
	if r := w.read(p.machineToken(here, "a:read")); !r.reads() {
		t.Errorf("an opaque token: %+v", r)
	}
	for name, token := range map[string]string{"an opaque token for another audience": p.machineToken(elsewhere, "a:read"), "one it never issued": "invented"} {
		if r := w.read(token); r.status != http.StatusUnauthorized {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

// When the provider signs with a new key no valid token is rejected: the first ones are at most
// told to try again. What a key signed that is published no more counts for nothing.
func TestRealProviderRotatesKeys(t *testing.T) {
	t.Parallel()
	p := startIDP(t)
	w := p.notes()
	p.knows(w.base+"/mcp", "jwt", 300)
	before := p.machineToken(w.base+"/mcp", "a:read")
	if r := w.read(before); !r.reads() {
		t.Fatalf("%+v", r)
	}
	p.order(map[string]any{"rotate": true})
	after := p.machineToken(w.base+"/mcp", "a:read")
	w.eventually("the new key", after, before)

	p.order(map[string]any{"rotate": true})
	p.order(map[string]any{"retire": true})
	newest := p.machineToken(w.base+"/mcp", "a:read")
	w.eventually("the newest key", newest, "")
	for name, token := range map[string]string{"the first": before, "the second": after} {
		if r := w.read(token); r.reads() || r.status != http.StatusUnauthorized && !r.later() {
			t.Errorf("%s key is gone: %+v", name, r)
		}
	}
}

// eventually presents a token until it is taken, for at most 20 s; a refusal fails the test. always
// is one that is taken all the while, if it is not empty.
func (w *world) eventually(what, token, always string) {
	w.t.Helper()
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	limit := time.After(20 * time.Second)
	for {
		r := w.read(token)
		if r.reads() {
			return
		}
		if !r.later() {
			w.t.Fatalf("%s: %+v", what, r)
		}
		if always != "" {
			if r := w.read(always); !r.reads() {
				w.t.Fatalf("beside %s: %+v", what, r)
			}
		}
		select {
		case <-again.C:
		case <-limit:
			w.t.Fatalf("%s is not known within 20 s", what)
		}
	}
}

func thumbprint(t *testing.T, key jose.JSONWebKey) string {
	t.Helper()
	sum, err := key.Thumbprint(crypto.SHA256)
	if err != nil || len(sum) != sha256.Size {
		t.Fatal(err)
	}
	return base64.RawURLEncoding.EncodeToString(sum)
}

// decoded returns the claims of a token as text.
func decoded(t *testing.T, token string) string {
	t.Helper()
	raw, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}
