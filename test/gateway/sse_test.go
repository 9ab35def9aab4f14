package gateway

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"newel.dev/newel/internal/backend/mcpupstream"
	"newel.dev/newel/test/program"
)

// A server of revision 2024-11-05, which speaks HTTP+SSE only, serves clients of both eras.
func TestHTTPWithSSE(t *testing.T) {
	bin := installServers(t)
	_, port, err := net.SplitHostPort(program.Address(t))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(bin, "node"), filepath.Join(bin, "mcp-server-everything"), "sse")
	cmd.Env = append(os.Environ(), "PORT="+port)
	p := program.Serve(t, cmd, func() bool {
		c, err := net.Dial("tcp", "localhost:"+port)
		return err == nil && c.Close() == nil
	})
	t.Cleanup(p.Kill)
	url := serve(t, map[string]mcpupstream.Config{"old": {URL: "http://localhost:" + port + "/sse", Transport: "sse", ListTimeout: 20 * time.Second}})
	for _, revision := range []string{"2026-07-28", "2025-11-25"} {
		t.Run(revision, func(t *testing.T) {
			progress := make(chan float64, 100)
			s := client(t, url, revision, progress)
			for tool, tt := range map[string]struct {
				args map[string]any
				want string
			}{
				"echo":                           {map[string]any{"message": "grüß"}, "grüß"},
				"trigger-long-running-operation": {map[string]any{"duration": 1, "steps": 2}, ""},
			} {
				p := &mcp.CallToolParams{Name: tool, Arguments: tt.args}
				p.SetProgressToken("p")
				if r, err := s.CallTool(t.Context(), p); err != nil || r.IsError || !strings.Contains(text(r), tt.want) {
					t.Errorf("%s: %v, %v", tool, err, r)
				}
			}
			select {
			case <-progress:
			case <-time.After(5 * time.Second):
				t.Error("no progress")
			}
			if r, err := s.ListResources(t.Context(), nil); err != nil || len(r.Resources) == 0 {
				t.Errorf("resources: %v", err)
			}
		})
	}
}

// What a hostile server of that kind does ends its own calls, with words that help.
func TestHostileSSE(t *testing.T) {
	for name, tt := range map[string]struct {
		first string // what the stream begins with
		call  func(w io.Writer, id json.RawMessage)
		want  string
	}{
		"another origin": {"event: endpoint\ndata: http://169.254.169.254/latest\n\n", nil, "unknown tool"},
		"no endpoint":    {"event: message\ndata: {}\n\n", nil, "unknown tool"},
		"the stream ends": {"", func(io.Writer, json.RawMessage) {
			panic(http.ErrAbortHandler)
		}, "whether it did what was asked is not known"},
		"an endless event": {"", func(w io.Writer, _ json.RawMessage) {
			for line := "data: " + strings.Repeat("x", 1<<14) + "\n"; ; {
				if _, err := io.WriteString(w, line); err != nil {
					return
				}
			}
		}, "larger than the gateway takes"},
	} {
		t.Run(name, func(t *testing.T) {
			posted := make(chan []byte, 10)
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodPost {
					b, _ := io.ReadAll(r.Body)
					posted <- b
					w.WriteHeader(http.StatusAccepted)
					return
				}
				w.Header().Set("Content-Type", "text/event-stream")
				first := tt.first
				if first == "" {
					first = "event: endpoint\ndata: /post?session=1\n\n"
				}
				io.WriteString(w, first)
				for {
					w.(http.Flusher).Flush()
					select {
					case <-r.Context().Done():
						return
					case b := <-posted:
						var m struct {
							ID     json.RawMessage `json:"id"`
							Method string          `json:"method"`
						}
						_ = json.Unmarshal(b, &m)
						switch m.Method {
						case "initialize":
							fmt.Fprintf(w, "event: message\ndata: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{\"protocolVersion\":\"2024-11-05\",\"capabilities\":{\"tools\":{}},\"serverInfo\":{\"name\":\"s\",\"version\":\"1\"}}}\n\n", m.ID)
						case "tools/list":
							fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{\"tools\":[{\"name\":\"ok\",\"inputSchema\":{\"type\":\"object\"}}]}}\n\n", m.ID)
						case "tools/call":
							tt.call(w, m.ID)
							return
						}
					}
				}
			}))
			t.Cleanup(s.Close)
			url := serve(t, map[string]mcpupstream.Config{"old": {URL: s.URL, Transport: "sse", MaxMessageBytes: 1 << 20}})
			if got := callOK(t, url, "ok"); !strings.Contains(got, tt.want) {
				t.Errorf("got %s", got)
			}
		})
	}
}
