package access

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"newel.dev/newel/test/engines"
	"newel.dev/newel/test/program"
)

// A balancer stands before several nodes and sends each request to another one than the last.
type balancer struct {
	t     *testing.T
	base  string
	redis *engines.RedisServer
	dir   string // has what all nodes share

	mu     sync.Mutex
	behind []*url.URL // their next is the first
	asked  map[string]int
}

func newBalancer(t *testing.T) *balancer {
	t.Helper()
	b := &balancer{t: t, redis: engines.Redis(t), dir: t.TempDir(), asked: map[string]int{}}
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		b.mu.Lock()
		defer b.mu.Unlock()
		next := b.behind[0]
		b.behind = append(b.behind[1:], next)
		b.asked[next.Host]++
		r.SetURL(next)
		r.Out.Host = r.In.Host
	}}
	web := httptest.NewServer(proxy)
	t.Cleanup(web.Close)
	b.base = web.URL
	return b
}

// world is all nodes together.
func (b *balancer) world() *world { return &world{t: b.t, base: b.base} }

// send sends everything to these nodes from now on, in turns.
func (b *balancer) send(nodes ...*world) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.behind = nil
	for _, n := range nodes {
		u, err := url.Parse(n.base)
		if err != nil {
			b.t.Fatal(err)
		}
		b.behind = append(b.behind, u)
	}
}

// node starts one more node, in a process of its own.
func (b *balancer) node(auth string) *world {
	b.t.Helper()
	dir, err := os.MkdirTemp(b.dir, "node-")
	if err != nil {
		b.t.Fatal(err)
	}
	address := program.Address(b.t)
	common := fmt.Sprintf("\nlisten: %s\nstate: {key_file: ../key}\nredis: {url: \"${env:REDIS_URL}\"}\n", address)
	for name, text := range map[string]string{"schema.sql": notesSchema, "newel.yaml": common + auth + notesConfig} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			b.t.Fatal(err)
		}
	}
	w := &world{t: b.t, base: "http://" + address}
	cmd := exec.Command(program.Built(b.t, program.Newel), "serve")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "REDIS_URL="+b.redis.URL, "NO_COLOR=1")
	w.process = program.Serve(b.t, cmd, program.Ready(w.base+"/ready"))
	return w
}

// A proof is good for one time, at whichever node it is shown; a nonce is good at all. While Redis is
// away no proof is, and tokens that need none go on.
func TestBoundTokensAtAllNodes(t *testing.T) {
	is := newBoundIssuer(t)
	b := newBalancer(t)
	auth := fmt.Sprintf("\nauth:\n  mode: tokens\n  public_url: %s\n  issuers: [{url: %q, jwks: %q}]\n", b.base, is.url, is.url+"/jwks")
	first, second := b.node(auth), b.node(auth)
	b.send(first, second)
	w := b.world()
	h := is.hold(w)
	ask := func(headers []string) response {
		t.Helper()
		message := `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"read_note","arguments":{"id":1},` + meta + `}}`
		return w.send("", message, append([]string{"Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "tools/call", "Mcp-Name", "read_note"}, headers...)...)
	}
	r := ask(h.headers("POST"))
	if r.status != http.StatusUnauthorized || r.nonce == "" || !strings.Contains(r.challenge, `error="use_dpop_nonce"`) {
		t.Fatalf("without a nonce: %+v", r)
	}
	h.nonce = r.nonce
	for i := range 4 {
		proof := h.headers("POST")
		if r := ask(proof); !r.reads() {
			t.Fatalf("%d: %+v", i, r)
		}
		for range 2 { // both nodes
			if r := ask(proof); r.status != http.StatusUnauthorized || !strings.Contains(r.challenge, `error="invalid_token"`) {
				t.Errorf("%d, again: %+v", i, r)
			}
		}
	}
	free := is.token("bob", b.base+"/mcp")
	b.redis.Stop()
	for range 2 {
		if r := ask(h.headers("POST")); r.status != http.StatusServiceUnavailable || r.retry == "" || !r.later() {
			t.Errorf("without Redis: %+v", r)
		}
		if r := w.read(free); !r.reads() {
			t.Errorf("without Redis, with a token that needs no proof: %+v", r)
		}
	}
	old := h.headers("POST")
	b.redis.Restart(t)
	for range 2 {
		r = ask(old)
		if r.status != http.StatusUnauthorized || !strings.Contains(r.challenge, `error="use_dpop_nonce"`) {
			t.Fatalf("Redis has forgotten: %+v", r)
		}
	}
	h.nonce = r.nonce
	for range 2 {
		if r := ask(h.headers("POST")); !r.reads() {
			t.Errorf("with Redis again: %+v", r)
		}
	}
	if b.asked[strings.TrimPrefix(first.base, "http://")] < 5 || b.asked[strings.TrimPrefix(second.base, "http://")] < 5 {
		t.Errorf("asked were %v", b.asked)
	}
}

// A login that begins at one node goes on and ends at others: each request goes to another one. What was
// used at one is used up at all, and what was copied ends the login at all. Nothing of that is lost when
// a node is killed in the middle.
func TestLoginAtAllNodes(t *testing.T) {
	t.Parallel()
	p := startIDP(t)
	b := newBalancer(t)
	auth := p.brokered(b.base, "../keys", "5m")
	first, second := b.node(auth), b.node(auth)
	b.send(first, second)
	w := b.world()
	id, status := w.register(`{"client_name":"Far","redirect_uris":["https://far.example/callback"]}`)
	if status != http.StatusCreated {
		t.Fatalf("registered with status %d", status)
	}
	const verifier = "a-verifier-that-is-long-enough-for-pkce-1234567890"
	challenge := sha256.Sum256([]byte(verifier))
	ask := b.base + "/oauth/authorize?" + url.Values{
		"response_type": {"code"}, "client_id": {id}, "redirect_uri": {"https://far.example/callback"}, "state": {"xyz"},
		"code_challenge": {base64.RawURLEncoding.EncodeToString(challenge[:])}, "code_challenge_method": {"S256"},
	}.Encode()
	atCallback := func(u *url.URL) bool { return u.Path == "/oauth/callback" }
	atClient := func(u *url.URL) bool { return u.Host == "far.example" }
	token := func(form url.Values) tokens { return w.tokens(form, id) }
	redeem := func(to *url.URL) tokens {
		t.Helper()
		if to.Query().Get("code") == "" || to.Query().Get("iss") != b.base || to.Query().Get("state") != "xyz" {
			t.Fatalf("sent to %s", to)
		}
		return token(url.Values{"grant_type": {"authorization_code"}, "code": {to.Query().Get("code")}, "code_verifier": {verifier}})
	}
	refresh := func(secret string) tokens {
		return token(url.Values{"grant_type": {"refresh_token"}, "refresh_token": {secret}})
	}
	good := func(what string, got tokens) tokens {
		t.Helper()
		if got.status != http.StatusOK || got.Access == "" || got.Refresh == "" {
			t.Fatalf("%s: %+v", what, got)
		}
		for range 2 {
			if r := w.read(got.Access); !r.reads() {
				t.Fatalf("%s: its token: %+v", what, r)
			}
		}
		return got
	}
	refused := func(what string, got tokens) {
		t.Helper()
		if got.status != http.StatusBadRequest || got.Error != "invalid_grant" || got.Access != "" {
			t.Errorf("%s: %+v", what, got)
		}
	}

	to := browse(t, newBrowser(t), ask, atClient)
	one := good("a login", redeem(to))
	two := good("renewed", refresh(one.Refresh))
	three := good("renewed again", refresh(two.Refresh))
	refused("the first refresh token again", refresh(one.Refresh))
	for range 2 {
		refused("the last one, after that", refresh(three.Refresh))
	}

	// What the person allowed is known at all nodes, so nobody is asked; an answer counts once.
	victim := newBrowser(t)
	answer := browse(t, victim, ask, atCallback).String()
	to = browse(t, victim, answer, func(u *url.URL) bool {
		if u.Path == "/oauth/consent" {
			t.Error("asked again what was allowed")
		}
		return atClient(u)
	})
	for range 2 {
		resp, err := victim.Get(answer)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("the same answer again: %s", resp.Status)
		}
	}
	four := good("another login", redeem(to))
	refused("its code again", redeem(to))
	for range 2 {
		refused("after that", refresh(four.Refresh))
	}

	// Of one code that comes to both nodes at once at most one login comes, and none that stays.
	for range 5 {
		victim = newBrowser(t)
		to = browse(t, victim, ask, atClient)
		var got [4]tokens
		var all sync.WaitGroup
		for i := range got {
			all.Go(func() {
				got[i] = token(url.Values{"grant_type": {"authorization_code"}, "code": {to.Query().Get("code")}, "code_verifier": {verifier}})
			})
		}
		all.Wait()
		n := 0
		for _, one := range got {
			if one.Access != "" {
				n++
				refused("of a code that was copied", refresh(one.Refresh))
			}
		}
		if n > 1 {
			t.Fatalf("%d logins of one code", n)
		}
	}

	// So with a refresh token.
	for range 5 {
		old := good("a login", redeem(browse(t, newBrowser(t), ask, atClient)))
		var got [4]tokens
		var all sync.WaitGroup
		for i := range got {
			all.Go(func() { got[i] = refresh(old.Refresh) })
		}
		all.Wait()
		n := 0
		for _, one := range got {
			if one.Access != "" {
				n++
				refused("of a refresh token that was copied", refresh(one.Refresh))
			}
		}
		if n > 1 {
			t.Fatalf("renewed %d times with one token", n)
		}
	}

	// Node 1 has begun a login and dies.
	b.send(first, second)
	five := good("a login before", redeem(browse(t, newBrowser(t), ask, atClient)))
	b.send(first)
	victim = newBrowser(t)
	answer = browse(t, victim, ask, atCallback).String()
	first.process.Kill()
	b.send(second)
	six := good("a login that a dead node began", redeem(browse(t, victim, answer, atClient)))
	five = good("a login of before", refresh(five.Refresh))
	third := b.node(auth)
	b.send(third, second)
	six, five = good("at a new node", refresh(six.Refresh)), good("at the others", refresh(five.Refresh))

	// Without Redis nobody logs in and nothing is renewed; who has a token goes on.
	b.redis.Stop()
	for range 2 {
		if got := refresh(six.Refresh); got.status != http.StatusServiceUnavailable || got.Error != "temporarily_unavailable" || got.retry == "" {
			t.Errorf("renewed without Redis: %+v", got)
		}
		resp, err := newBrowser(t).Get(ask)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
			t.Errorf("a login without Redis: %s", resp.Status)
		}
		if r := w.read(six.Access); !r.reads() {
			t.Errorf("a call without Redis: %+v", r)
		}
	}
	known := strings.Replace(strings.Replace(ask, id, "desk", 1), url.QueryEscape("https://far.example/callback"), url.QueryEscape("http://127.0.0.1:9/callback"), 1)
	if to := browse(t, newBrowser(t), known, func(u *url.URL) bool { return u.Path == "/callback" }); to.Query().Get("error") != "temporarily_unavailable" || to.Query().Has("code") {
		t.Errorf("a known client without Redis: sent to %s", to)
	}
	b.redis.Restart(t)
	refused("Redis has forgotten", refresh(six.Refresh))
	good("a login after that", w.tokens(url.Values{
		"grant_type": {"authorization_code"}, "code_verifier": {verifier},
		"code": {browse(t, newBrowser(t), known, func(u *url.URL) bool { return u.Path == "/callback" }).Query().Get("code")},
	}, "desk"))
}

// tokens is an answer of the token endpoint.
type tokens struct {
	status  int
	retry   string
	Access  string `json:"access_token"`
	Refresh string `json:"refresh_token"`
	Error   string `json:"error"`
}

// tokens asks for some, as a public client.
func (w *world) tokens(form url.Values, client string) tokens {
	w.t.Helper()
	form.Set("client_id", client)
	resp, err := http.PostForm(w.base+"/oauth/token", form)
	if err != nil {
		w.t.Error(err)
		return tokens{}
	}
	defer resp.Body.Close()
	out := tokens{status: resp.StatusCode, retry: resp.Header.Get("Retry-After")}
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		w.t.Error(err)
	}
	return out
}

// The official client, which has a key of its own, notices nothing of it that each of its requests goes
// to another node than the last.
func TestClientAtAllNodes(t *testing.T) {
	t.Parallel()
	p := startIDP(t)
	b := newBalancer(t)
	auth := p.brokered(b.base, "../keys", "3s")
	b.send(b.node(auth), b.node(auth))
	p.officialClient(b.world(), "2026-07-28", "2026-07-28", "dpop")
}
