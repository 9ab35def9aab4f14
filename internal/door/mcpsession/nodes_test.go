package mcpsession

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/cluster"
	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/redis"
	"newel.dev/newel/test/engines"
)

// ownedBy is a store that says of every session that one node has it.
type ownedBy struct {
	cluster.Store
	node cluster.Node
}

// Find implements cluster.Store.
func (o ownedBy) Find(_ context.Context, id string) (cluster.Session, cluster.Node, bool, error) {
	return cluster.Session{ID: id, Owner: o.node.Name}, o.node, true, nil
}

// Clients of a session whose node takes requests and never answers are told, in the form that they know:
// of a call that it may have been done.
func TestNodeNeverAnswers(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // the kernel takes connections for it
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := gone.Close(); err != nil {
		t.Fatal(err)
	}
	const pings, says = `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"pay"}}`, `{"jsonrpc":"2.0","method":"notifications/initialized"}`
	for name, c := range map[string]struct {
		node         net.Listener
		method, body string
		status, code int
		id           int
		data         string
		retry        bool
	}{
		"a call":                  {l, http.MethodPost, pings, 504, -31520, 7, "outcome_unknown", false},
		"a notification":          {l, http.MethodPost, says, 504, -31504, 0, "", true},
		"a stream":                {l, http.MethodGet, "", 504, -31504, 0, "", true},
		"a call, nobody is there": {gone, http.MethodPost, pings, 503, -31503, 7, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			nodes, err := cluster.New(cluster.Options{
				Address: "http://127.0.0.1:1", Key: make([]byte, 32), Store: ownedBy{node: cluster.Node{Name: "other", Address: "http://" + c.node.Addr().String()}},
				Transport: egress.Transport(egress.Options{Loopback: true}),
			})
			if err != nil {
				t.Fatal(err)
			}
			w := newWorld(t, func(context.Context, *call.Call) (*call.Result, error) { return call.Text("x"), nil }, func(o *Options) {
				o.Cluster, o.ForwardTimeout = nodes, 100*time.Millisecond
			})
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			r, err := http.NewRequestWithContext(ctx, c.method, w.url, strings.NewReader(c.body))
			if err != nil {
				t.Fatal(err)
			}
			for k, v := range map[string]string{"Content-Type": "application/json", "Accept": "application/json, text/event-stream", "Mcp-Session-Id": "s", "Mcp-Protocol-Version": "2025-11-25"} {
				r.Header.Set(k, v)
			}
			resp, err := http.DefaultTransport.RoundTrip(r)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			raw, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			var m struct {
				ID    int `json:"id"`
				Error struct {
					Code    int    `json:"code"`
					Message string `json:"message"`
					Data    struct {
						Code string `json:"code"`
					} `json:"data"`
				} `json:"error"`
			}
			if err := json.Unmarshal(raw, &m); err != nil {
				t.Fatalf("%v: %s", err, raw)
			}
			if resp.StatusCode != c.status || m.Error.Code != c.code || m.ID != c.id || m.Error.Data.Code != c.data || m.Error.Message == "" || (resp.Header.Get("Retry-After") != "") != c.retry {
				t.Errorf("HTTP %d, Retry-After %q: %s", resp.StatusCode, resp.Header.Get("Retry-After"), raw)
			}
		})
	}
}

// shares is a door that shares sessions with others by way of a Redis; its path says its name.
func shares(t *testing.T, db *redis.DB, name string) (*world, *cluster.Cluster) {
	t.Helper()
	var w *world
	srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { w.ServeHTTP(rw, r) }))
	nodes, err := cluster.New(cluster.Options{Address: srv.URL, Key: make([]byte, 32), Store: db, Transport: egress.Transport(egress.Options{Loopback: true})})
	if err != nil {
		t.Fatal(err)
	}
	if err := nodes.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	w = newWorld(t, func(context.Context, *call.Call) (*call.Result, error) { return call.Text("by " + name), nil }, func(o *Options) {
		o.Cluster, o.Events, o.Scope = nodes, db.Events(time.Minute, slog.New(slog.DiscardHandler)), "x"
	})
	t.Cleanup(srv.Close)
	return w, nodes
}

// A node that was away for longer than it counts as alive has lost its session to the one that it was asked
// for at meanwhile, and knows it whatever happens there first: nothing is answered, said or forgotten there
// any more.
func TestLostSession(t *testing.T) {
	db, err := redis.Open(secret.New(engines.Redis(t).URL))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	const calls = `{"jsonrpc":"2.0","id":5,"method":"tools/call","params":{"name":"x"}}`
	// What the old node does first, once it is back.
	for name, first := range map[string]func(t *testing.T, old *world, s *raw){
		"is asked": func(t *testing.T, old *world, s *raw) {
			if got := s.post(t, calls); !strings.Contains(got, "by new") {
				t.Errorf("it answers %s", got)
			}
		},
		"tells of a change": func(_ *testing.T, old *world, _ *raw) {
			old.hub.ListChanged(call.ListTools, false)
		},
		"ends what is idle": func(t *testing.T, old *world, s *raw) {
			for _, server := range old.all() {
				for all := range server.Sessions() {
					if all.ID() == s.id {
						if err := all.Close(); err != nil {
							t.Error(err)
						}
					}
				}
			}
		},
		"tidies up": func(t *testing.T, old *world, _ *raw) { old.sweep(t.Context()) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			old, back := shares(t, db, "old")
			taker, alive := shares(t, db, "new")
			ctx, stop := context.WithCancel(t.Context())
			running := make(chan error, 2)
			go func() { running <- alive.Run(ctx) }()
			defer func() {
				stop()
				for range 2 {
					if err := <-running; err != nil {
						t.Error(err)
					}
				}
			}()
			s := old.raw(t, "2025-11-25", `{}`)
			if got := s.post(t, calls); !strings.Contains(got, "by old") {
				t.Fatalf("before: %s", got)
			}
			listens, _ := s.dial(t)
			there := &raw{taker.url, s.id, s.version}
			if got := there.post(t, calls); !strings.Contains(got, "by old") {
				t.Errorf("by way of another node: %s", got)
			}
			until(t, "its node counts as gone", func() bool {
				_, node, ok, err := db.Find(t.Context(), old.clusterID(s.id))
				return err == nil && ok && node.Name == ""
			})
			if got := there.post(t, calls); !strings.Contains(got, "by new") {
				t.Errorf("when its node is gone: %s", got)
			}
			taker.hub.ListChanged(call.ListPrompts, false)
			told := func() (n int) {
				for _, err := range db.Events(time.Minute, slog.New(slog.DiscardHandler)).After(t.Context(), s.id, "", -1) {
					if err != nil {
						t.Fatal(err)
					}
					n++
				}
				return n
			}
			until(t, "the session is told of a change", func() bool { return told() == 1 })

			go func() { running <- back.Run(ctx) }()
			first(t, old, s)
			if said, err := io.ReadAll(listens); err != nil || strings.Contains(string(said), "list_changed") {
				t.Errorf("the stream that was open says %q, %v", said, err)
			}
			if got := s.post(t, calls); !strings.Contains(got, "by new") {
				t.Errorf("asked where it was: %s", got)
			}
			if old.here(s.id) || !taker.here(s.id) || told() != 1 {
				t.Errorf("the old node has it: %v, the new one: %v, and it was told of %d changes", old.here(s.id), taker.here(s.id), told())
			}
			for _, server := range old.all() { // what it still has of the session ends some time
				for all := range server.Sessions() {
					if err := all.Close(); err != nil {
						t.Error(err)
					}
				}
			}
			old.sweep(t.Context())
			if told() != 1 || old.lostHere(s.id) {
				t.Errorf("%d events are left; the old node knows that it lost it: %v", told(), old.lostHere(s.id))
			}
			if found, ok, err := back.Find(t.Context(), old.clusterID(s.id)); err != nil || !ok || found.Node.Name == "" {
				t.Errorf("whose is it? %v, %v, %v", found, ok, err)
			}
			// Its end by way of the old node is the end.
			resp := s.send(t, http.MethodDelete, "")
			resp.Body.Close()
			taker.sweep(t.Context())
			if _, ok, err := back.Find(t.Context(), old.clusterID(s.id)); resp.StatusCode != http.StatusNoContent || ok || err != nil {
				t.Errorf("DELETE: HTTP %d; it is still there: %v, %v", resp.StatusCode, ok, err)
			}
		})
	}
}
