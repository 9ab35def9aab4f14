package access

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"newel.dev/newel/test/program"
)

// brokered configures a server at base whose people log in at the provider, where it registers itself.
func (p *idp) brokered(base, keys, life string) string {
	p.t.Helper()
	body := fmt.Sprintf(`{"application_type":"native","redirect_uris":["%s/oauth/callback"],"response_types":["code"],"grant_types":["authorization_code"],"token_endpoint_auth_method":"client_secret_basic"}`, base)
	resp, err := http.Post(p.issuer+"/reg", "application/json", strings.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	var client struct {
		ID     string `json:"client_id"`
		Secret string `json:"client_secret"`
		Error  string `json:"error_description"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&client); err != nil || client.Secret == "" {
		p.t.Fatalf("%s: %s %v", resp.Status, client.Error, err)
	}
	secret := filepath.Join(p.t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte(client.Secret), 0o600); err != nil {
		p.t.Fatal(err)
	}
	return fmt.Sprintf(`
auth:
  mode: broker
  public_url: %q
  scopes: ["a:read"]
  broker:
    provider: {url: %q, client_id: %q, client_secret: "${file:%s}"}
    access: [{scopes: ["a:read", "a:admin"]}]
    state_dir: %s
    registration: true
    token_life: %s
    clients: [{id: desk, name: Desk, redirects: ["http://127.0.0.1/callback"]}]
`, base, p.issuer, client.ID, secret, keys, life)
}

// broker starts such a server.
func (p *idp) broker(more string) *world {
	p.t.Helper()
	address := program.Address(p.t) // the provider has to know it before the server starts
	return serveNotes(p.t, p.brokered("http://"+address, "keys", "3s")+more, "--listen", address)
}

// The official client logs a person in at a provider that is not ours, through our own authorization
// server; it renews its tokens, and steps up, in both eras, with and without a key of its own.
func TestClientAtBroker(t *testing.T) {
	t.Parallel()
	p := startIDP(t)
	for _, tt := range []struct{ revision, mode, bound string }{
		{"2026-07-28", "2026-07-28", ""},
		{"2025-11-25", "legacy", ""},
		{"2026-07-28", "2026-07-28", "dpop"},
	} {
		t.Run(tt.revision+" "+tt.bound, func(t *testing.T) {
			q := *p
			q.t = t
			w := q.broker("")
			q.officialClient(w, tt.revision, tt.mode, tt.bound)
		})
	}
}

// officialClient has the official client log a person in at w, read and change notes, renew its tokens
// and step up.
func (p *idp) officialClient(w *world, revision, mode, bound string) {
	t := p.t
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var out, complaints bytes.Buffer
	cmd := node(ctx, append([]string{"client.mjs", mode, w.base + "/mcp"}, strings.Fields(bound)...)...)
	cmd.Stdout, cmd.Stderr = &out, &complaints
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s%s", errors.Join(err, ctx.Err()), complaints.Bytes(), out.Bytes())
	}
	var got struct {
		Revision, Type, Subject, Audience, Read, Later, Changed, Scope string
		Refreshed                                                      bool
		Pages                                                          []string
	}
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatalf("%v\n%s", err, out.Bytes())
	}
	wantType := "Bearer"
	if bound != "" {
		wantType = "DPoP"
	}
	if got.Revision != revision || got.Type != wantType || got.Subject != p.issuer+"#ada" || got.Audience != w.base+"/mcp" {
		t.Errorf("%+v", got)
	}
	if !strings.Contains(got.Read, "first") || !strings.Contains(got.Later, "first") || !got.Refreshed || !strings.Contains(got.Changed, mode) || !strings.Contains(got.Scope, "a:admin") {
		t.Errorf("%+v", got)
	}
	if all := strings.Join(got.Pages, " "); !strings.HasPrefix(all, "login consent allow") || strings.Count(all, "allow") != 2 {
		t.Errorf("the person saw %v", got.Pages)
	}
}

// newBrowser is one person's. It follows no redirect by itself.
func newBrowser(t *testing.T) *http.Client {
	t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	return &http.Client{Jar: jar, CheckRedirect: still.CheckRedirect}
}

var formAction = regexp.MustCompile(`<form[^>]* action="([^"]+)"`)

// browse follows redirects from an address and logs in at the provider, until a page or address of
// which stop is true.
func browse(t *testing.T, c *http.Client, address string, stop func(*url.URL) bool) *url.URL {
	t.Helper()
	at, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	var form url.Values
	for range 20 {
		if stop(at) {
			return at
		}
		method, body := http.MethodGet, io.Reader(nil)
		if form != nil {
			method, body = http.MethodPost, strings.NewReader(form.Encode())
		}
		r, err := http.NewRequestWithContext(t.Context(), method, at.String(), body)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		resp, err := c.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		form = nil
		if to, err := resp.Location(); err == nil {
			at = to
			continue
		}
		action := formAction.FindSubmatch(raw)
		if action == nil {
			t.Fatalf("%s answers %s without a form: %s", at, resp.Status, raw)
		}
		if at, err = at.Parse(string(action[1])); err != nil {
			t.Fatal(err)
		}
		form = url.Values{"login": {"ada"}, "password": {"any"}}
		for _, name := range []string{"prompt", "token"} {
			if found := regexp.MustCompile(`name="` + name + `" value="([^"]+)"`).FindSubmatch(raw); found != nil {
				form.Set(name, string(found[1]))
			}
		}
		if form.Has("token") {
			form.Set("answer", "allow")
		}
	}
	t.Fatalf("sent in circles, the last time to %s", at)
	return nil
}

// What a real provider answers counts in the browser that asked, and once.
func TestAnswersOfRealProvider(t *testing.T) {
	t.Parallel()
	p := startIDP(t)
	w := p.broker("")
	browser := func() *http.Client { return newBrowser(t) }
	status := func(c *http.Client, address string) (int, string) {
		t.Helper()
		resp, err := c.Get(address)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		return resp.StatusCode, resp.Header.Get("Location")
	}
	ask := w.base + "/oauth/authorize?" + url.Values{
		"response_type": {"code"}, "client_id": {"desk"}, "redirect_uri": {"http://127.0.0.1:9/callback"}, "state": {"xyz"},
		"code_challenge": {strings.Repeat("A", 43)}, "code_challenge_method": {"S256"},
	}.Encode()
	callback := func(u *url.URL) bool { return u.Path == "/oauth/callback" }
	client := func(u *url.URL) bool { return u.Path == "/callback" }

	victim, other := browser(), browser()
	answer := browse(t, victim, ask, callback).String()
	if code, to := status(other, answer); code != http.StatusBadRequest || to != "" {
		t.Errorf("another browser: %d, sent to %q", code, to)
	}
	if code, to := status(victim, strings.Replace(answer, "iss=", "iss=x", 1)); code != http.StatusBadRequest || to != "" {
		t.Errorf("another provider: %d, sent to %q", code, to)
	}
	victim = browser()
	answer = browse(t, victim, ask, callback).String()
	if to := browse(t, victim, answer, client); to.Query().Get("code") == "" || to.Query().Get("iss") != w.base || to.Query().Get("state") != "xyz" {
		t.Errorf("sent to %s", to)
	}
	if code, to := status(victim, answer); code != http.StatusBadRequest || to != "" {
		t.Errorf("a second time: %d, sent to %q", code, to)
	}
}
