package mcpsession

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/cluster"
	"newel.dev/newel/internal/egress"
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
