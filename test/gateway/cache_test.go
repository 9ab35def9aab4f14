package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/backend/mcpupstream"
	"newel.dev/newel/internal/guard/cache"
	"newel.dev/newel/internal/module"
)

// cacheable is a server of revision 2026-07-28, or of one with sessions, whose resources say by their
// name how they may be kept. Its list of tools grows by one with each reading.
func cacheable(t *testing.T, stateless bool, asked *atomic.Int64) *httptest.Server {
	t.Helper()
	hints := map[string]string{
		"x://public": `,"ttlMs":60000,"cacheScope":"public"`, "x://private": `,"ttlMs":60000,"cacheScope":"private"`, "x://silent": ``,
		"x://now": `,"ttlMs":0,"cacheScope":"public"`, "x://below": `,"ttlMs":-5,"cacheScope":"public"`, "x://odd": `,"ttlMs":"x","cacheScope":"everybody"`,
	}
	var lists atomic.Int64
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var m struct {
			ID     json.RawMessage
			Method string
			Params struct{ URI string }
		}
		if r.Method != http.MethodPost || json.NewDecoder(r.Body).Decode(&m) != nil {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		result := ""
		switch m.Method {
		case "server/discover":
			if !stateless {
				w.WriteHeader(http.StatusBadRequest)
				return
			}
			result = `{"resultType":"complete","supportedVersions":["2026-07-28"],"capabilities":{"tools":{},"resources":{}},"ttlMs":0,"cacheScope":"private"}`
		case "initialize":
			result = `{"protocolVersion":"2025-11-25","capabilities":{"tools":{},"resources":{}},"serverInfo":{"name":"x","version":"1"}}`
		case "tools/list":
			result = fmt.Sprintf(`{"tools":[{"name":"t%d","inputSchema":{"type":"object"}}],"ttlMs":1,"cacheScope":"private"}`, lists.Add(1))
		case "resources/list":
			list := ""
			for uri := range hints {
				list += fmt.Sprintf(`,{"uri":%q,"name":%q}`, uri, uri)
			}
			result = `{"resources":[` + list[1:] + `],"ttlMs":3600000,"cacheScope":"public"}`
		case "resources/read":
			result = fmt.Sprintf(`{"contents":[{"uri":%q,"text":"%d"}]%s}`, m.Params.URI, asked.Add(1), hints[m.Params.URI])
		case "notifications/initialized":
			w.WriteHeader(http.StatusAccepted)
			return
		default:
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":{"code":-32601,"message":"no"}}`, m.ID)
			return
		}
		fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":%s}`, m.ID, result)
	}))
	t.Cleanup(s.Close)
	return s
}

func opened(t *testing.T, c mcpupstream.Config) (*mcpupstream.Upstream, map[string]*call.Capability) {
	t.Helper()
	u, err := mcpupstream.New("up", c, module.Env{Logger: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := u.Close(); err != nil {
			t.Error(err)
		}
	})
	caps, err := u.Capabilities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]*call.Capability{}
	for _, c := range caps {
		all[c.Name+c.URI] = c
	}
	return u, all
}

// What a server says of how its resources may be kept counts, and is never widened.
func TestHintsOfServersCount(t *testing.T) {
	for name, tt := range map[string]struct {
		stateless, perUser bool
		want               map[string][2]bool // whether another caller, and the same one, is given it again
	}{
		"stateless": {true, false, map[string][2]bool{
			"x://public": {true, true}, "x://private": {false, true}, "x://silent": {false, true}, "x://now": {false, false}, "x://below": {false, false}, "x://odd": {false, true},
		}},
		"stateless, per caller": {true, true, map[string][2]bool{"x://public": {false, true}, "x://private": {false, true}, "x://now": {false, false}}},
		"with sessions":         {false, false, map[string][2]bool{"x://silent": {true, true}, "x://now": {false, false}}}, // the rule counts
		"sessions, per caller":  {false, true, map[string][2]bool{"x://silent": {false, true}}},
	} {
		t.Run(name, func(t *testing.T) {
			var asked atomic.Int64
			revision := "2025-11-25"
			if tt.stateless {
				revision = "2026-07-28"
			}
			_, all := opened(t, mcpupstream.Config{URL: cacheable(t, tt.stateless, &asked).URL, Revision: revision, PerUser: tt.perUser})
			results, err := cache.New(cache.Options{Rules: []cache.Rule{{Names: []string{"x://*"}, TTL: time.Minute, For: cache.Everybody}}})
			if err != nil {
				t.Fatal(err)
			}
			h := results.Guard("/mcp")(func(ctx context.Context, c *call.Call) (*call.Result, error) { return c.Target.Run(ctx, c) })
			again := func(uri, who string) bool {
				t.Helper()
				before := asked.Load()
				target := all[uri+uri]
				if target == nil {
					t.Fatalf("%s is not there", uri)
				}
				if _, err := h(t.Context(), &call.Call{Kind: call.Resource, Name: uri, Target: target, Principal: &call.Principal{ID: who}, Sink: call.Discard, Asker: call.NoAsker}); err != nil {
					t.Fatal(err)
				}
				return asked.Load() == before
			}
			for uri, want := range tt.want {
				if again(uri, "ada") {
					t.Errorf("%s was there before anybody asked", uri)
				}
				if got := [2]bool{again(uri, "bob"), again(uri, "ada")}; got != want {
					t.Errorf("%s: given again to another and to the same caller: %v, want %v", uri, got, want)
				}
			}
		})
	}
}

// A server that does not tell of changes, and says how long its lists are good, is asked again when they
// are not any more, but not more than once a second.
func TestListsAreReadWhenTheirTimeIsUp(t *testing.T) {
	var asked atomic.Int64
	u, _ := opened(t, mcpupstream.Config{URL: cacheable(t, true, &asked).URL, Revision: "2026-07-28"})
	ctx, stop := context.WithCancel(t.Context())
	heard, done := make(chan time.Time, 100), make(chan error, 1)
	start := time.Now()
	go func() {
		done <- u.Run(ctx, func(...call.Kind) { heard <- time.Now() }, func(string) {})
	}()
	first, second := <-heard, <-heard
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if first.Sub(start) < 900*time.Millisecond || second.Sub(first) < 900*time.Millisecond {
		t.Errorf("read after %v, and again after %v", first.Sub(start), second.Sub(first))
	}
}
