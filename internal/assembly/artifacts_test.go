package assembly

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/backend/artifact"
)

// A large tool returns more than fits into an answer.
type large struct{ text string }

// Name implements call.Backend.
func (large) Name() string { return "large" }

// Capabilities implements call.Backend.
func (b large) Capabilities(context.Context) ([]*call.Capability, error) {
	return []*call.Capability{{
		Kind: call.Tool, Name: "export", Description: "D.", Effect: call.Read, Input: jsontext.Value(`{"type":"object"}`), Origin: "large",
		Run: func(context.Context, *call.Call) (*call.Result, error) { return call.Text(b.text), nil },
	}}, nil
}

// A large result has an address in its link, which a browser can open; without a key for it, and
// unless it is asked for, there is no such route.
func TestDownload(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	base := "http://" + l.Addr().String()
	text := strings.Repeat("0123456789abcdef", 64<<10) // a megabyte
	h, err := Build(t.Context(), &Options{
		Backends:  []call.Backend{large{text}},
		Artifacts: artifact.Options{Dir: dir, Key: make([]byte, 32), Links: artifact.Links{Base: base, Life: time.Minute}},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	body := `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"export","arguments":{},"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}}}`
	_, answer := fetch(t, http.MethodPost, base+"/mcp", body, "Content-Type", "application/json", "Accept", "application/json, text/event-stream", "Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "tools/call", "Mcp-Name", "export")
	var reply struct {
		Result struct {
			Content []struct {
				Meta map[string]string `json:"_meta"`
			} `json:"content"`
		} `json:"result"`
	}
	if err := json.Unmarshal([]byte(answer), &reply); err != nil || len(reply.Result.Content) < 2 {
		t.Fatalf("%v in %s", err, answer)
	}
	link := reply.Result.Content[1].Meta["dev.newel/download"]
	if !strings.HasPrefix(link, base+"/artifacts/") {
		t.Fatalf("the address is %q in %s", link, answer)
	}
	if resp, got := fetch(t, http.MethodGet, link, ""); resp.StatusCode != http.StatusOK || got != text || resp.Header.Get("Content-Type") != "text/plain; charset=utf-8" {
		t.Errorf("%s, %d bytes, %v", resp.Status, len(got), resp.Header)
	}
	if resp, got := fetch(t, http.MethodGet, link, "", "Range", "bytes=65530-65550"); resp.StatusCode != http.StatusPartialContent || got != text[65530:65551] {
		t.Errorf("a range: %s, %q", resp.Status, got)
	}
	// Whoever has it already is told so, and gets it again only if it is another one (RFC 9110, section 13).
	first, _ := fetch(t, http.MethodGet, link, "", "Range", "bytes=0-0")
	tag := first.Header.Get("ETag")
	for given, want := range map[string]int{tag: http.StatusNotModified, `"other", ` + tag: http.StatusNotModified, "*": http.StatusNotModified, `"other"`: http.StatusOK} {
		if resp, got := fetch(t, http.MethodGet, link, "", "If-None-Match", given); resp.StatusCode != want || resp.Header.Get("ETag") != tag || want == http.StatusNotModified && got != "" {
			t.Errorf("If-None-Match %s: %s, %d bytes, ETag %s", given, resp.Status, len(got), resp.Header.Get("ETag"))
		}
	}
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete} {
		if resp, _ := fetch(t, method, link, ""); resp.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("%s: %s", method, resp.Status)
		}
	}
	for i := len(base) + 1; i < len(link); i++ {
		changed := link[:i] + string(link[i]^1) + link[i+1:]
		if resp, got := fetch(t, http.MethodGet, changed, ""); resp.StatusCode != http.StatusNotFound || strings.Contains(got, "0123456789") {
			t.Errorf("byte %d changed: %s for %s", i, resp.Status, changed)
		}
	}
	// What cannot be sent whole does not look whole: the connection is cut.
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	blob, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	blob[len(blob)-1] ^= 1
	if err := os.WriteFile(files[0], blob, 0o600); err != nil {
		t.Fatal(err)
	}
	resp, err := http.Get(link)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err == nil || len(got) >= len(text) {
		t.Errorf("of a damaged file %d bytes, %v", len(got), err)
	}

	without, err := Build(t.Context(), &Options{Backends: []call.Backend{large{text}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range without.routes().patterns {
		if strings.Contains(p, "artifacts") {
			t.Errorf("%s is a route although nobody asked for addresses", p)
		}
	}
	if _, err := Build(t.Context(), &Options{Artifacts: artifact.Options{Links: artifact.Links{Base: base, Life: time.Minute}}}); err == nil || !strings.Contains(err.Error(), "key") {
		t.Errorf("addresses without a key: %v", err)
	}
}

func fetch(t *testing.T, method, address, body string, headers ...string) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, address, strings.NewReader(body))
	if err != nil {
		return &http.Response{StatusCode: http.StatusNotFound, Status: fmt.Sprint("not sent: ", err)}, ""
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(got)
}
