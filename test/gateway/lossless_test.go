package gateway

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"newel.dev/newel/internal/backend/mcpupstream"
)

// scripted is a server that answers each method with the bytes it was given, and keeps what it got.
type scripted struct {
	answers map[string]string // method to result object
	session bool

	mu  sync.Mutex
	got map[string]string // method to params, as received
	hdr map[string]http.Header
}

func (s *scripted) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	body, _ := io.ReadAll(r.Body)
	var m struct {
		ID     json.RawMessage
		Method string
		Params json.RawMessage
	}
	if json.Unmarshal(body, &m) != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	s.got[m.Method], s.hdr[m.Method] = string(m.Params), r.Header.Clone()
	s.mu.Unlock()
	if m.ID == nil {
		w.WriteHeader(http.StatusAccepted)
		return
	}
	answer := s.answers[m.Method]
	w.Header().Set("Content-Type", "application/json")
	switch {
	case m.Method == "server/discover" && s.session:
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":{"code":-32000,"message":"Bad Request: Server not initialized"}}`, m.ID)
		return
	case m.Method == "server/discover":
		answer = `{"resultType":"complete","supportedVersions":["2026-07-28"],"capabilities":{"tools":{},"resources":{},"prompts":{},"completions":{}},"ttlMs":0,"cacheScope":"private"}`
	case m.Method == "initialize":
		w.Header().Set("Mcp-Session-Id", "s1")
		answer = `{"protocolVersion":"2025-11-25","capabilities":{"tools":{},"resources":{},"prompts":{},"completions":{}},"serverInfo":{"name":"x","version":"1"}}`
	}
	if strings.HasPrefix(answer, "error:") {
		fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":%s}`, m.ID, answer[6:])
		return
	}
	if answer == "" {
		fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":{"code":-32601,"message":"no"}}`, m.ID)
		return
	}
	fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":%s}`, m.ID, answer)
}

func (s *scripted) params(method string) (string, http.Header) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.got[method], s.hdr[method]
}

// What nobody here knows, in all the places where it may stand.
const (
	oddTool = `{"vendorX":{"z":1,"a":[1.50,9007199254740993]},"name":"odd","inputSchema":{"zeta":true,"type":"object","properties":{"region":{"type":"string","x-mcp-header":"Region"},"n":{"type":"number","maximum":90071992547409930000}},"additionalProperties":true},"annotations":{"vendorHint":"y","readOnlyHint":true},"description":"Odd.","_meta":{"ui":{"resourceUri":"ui://x"},"n":9007199254740993},"execution":{"taskSupport":"optional","vendor":1.0}}`
	// A content type of tomorrow, numbers beyond 2^53, fractions as written, key order, escapes.
	oddContent    = `[{"type":"hologram","zz":1,"data":{"b":9007199254740993,"a":1.50}},{"type":"text","text":"\u00fcml","annotations":{"priority":0.10,"x":null},"_meta":{"k":[{}]}},{"type":"resource_link","uri":"a://b","name":"n","size":12345678901234567890}]`
	oddStructured = `{"big":9007199254740993,"z":1,"a":1.50,"e":1E+2,"nested":{"y":[],"x":{}}}`
	oddArgs       = `{"z":9007199254740993,"region":"Zürich","a":1.50,"n":1e2,"deep":{"y":1,"x":[null,true]}}`
)

// oddHere is oddTool with the support for tasks that counts here: the server announces no tasks.
var oddHere = strings.Replace(oddTool, `"taskSupport":"optional",`, "", 1)

// exchange sends one message of the stateless revision and returns the raw answer.
func exchange(t *testing.T, url, method, name, params string, header ...string) string {
	t.Helper()
	body := fmt.Sprintf(`{"jsonrpc":"2.0","id":7,"method":%q,"params":%s}`, method, params)
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Accept", "application/json, text/event-stream")
	r.Header.Set("Mcp-Protocol-Version", "2026-07-28")
	r.Header.Set("Mcp-Method", method)
	if name != "" {
		r.Header.Set("Mcp-Name", name)
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

const clientMeta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{},"com.example/trace":{"n":9007199254740993,"b":1.50}}`

// member returns the raw bytes of a member somewhere in an object, by path.
func member(t *testing.T, raw string, path ...string) string {
	t.Helper()
	for _, p := range path {
		var obj map[string]json.RawMessage
		if err := json.Unmarshal([]byte(raw), &obj); err != nil {
			t.Fatalf("%v in %.300s", err, raw)
		}
		raw = string(obj[p])
	}
	return raw
}

// Everything travels as it is, from a caller of the stateless revision to servers of both eras and back.
func TestLossless(t *testing.T) {
	for _, sessions := range []bool{false, true} {
		t.Run(fmt.Sprintf("sessions=%v", sessions), func(t *testing.T) {
			up := &scripted{session: sessions, got: map[string]string{}, hdr: map[string]http.Header{}, answers: map[string]string{
				"tools/list":               `{"tools":[` + oddTool + `]}`,
				"resources/list":           `{"resources":[{"uri":"x://odd","name":"odd","size":12345678901234567890,"vendor":{"b":1,"a":1.0}}]}`,
				"resources/templates/list": `{"resourceTemplates":[{"uriTemplate":"x://t/{id}","name":"t","vendor":1.0}]}`,
				"prompts/list":             `{"prompts":[{"name":"p","arguments":[{"name":"q","vendor":9007199254740993}],"vendor":{"z":1.0}}]}`,
				"tools/call":               `{"vendorTop":{"z":1.0,"a":2},"content":` + oddContent + `,"structuredContent":` + oddStructured + `,"_meta":{"com.example/x":9007199254740993}}`,
				"resources/read":           `{"contents":[{"uri":"x://odd","text":"t","vendor":1.50}],"vendorTop":1.0,"ttlMs":5000,"cacheScope":"public"}`,
				"prompts/get":              `{"messages":[{"role":"user","content":{"type":"hologram","n":1.50}}],"description":"d","vendorTop":[1.0]}`,
				"completion/complete":      `{"completion":{"values":["a","b"],"total":2}}`,
			}}
			if !sessions {
				for k, v := range up.answers {
					up.answers[k] = `{"resultType":"complete",` + v[1:]
				}
			}
			server := httptest.NewServer(up)
			t.Cleanup(server.Close)
			url := serve(t, map[string]mcpupstream.Config{"up": {URL: server.URL}})

			for method, wants := range map[string][]string{
				"tools/list":               {oddHere},
				"resources/list":           {`"size":12345678901234567890,"vendor":{"b":1,"a":1.0}`},
				"resources/templates/list": {`{"uriTemplate":"x://t/{id}","name":"t","vendor":1.0}`},
				"prompts/list":             {`{"name":"q","vendor":9007199254740993}],"vendor":{"z":1.0}`},
			} {
				got := exchange(t, url, method, "", `{`+clientMeta+`}`)
				for _, want := range wants {
					if !strings.Contains(got, want) {
						t.Errorf("%s: got\n%s\nwant in it\n%s", method, got, want)
					}
				}
			}

			got := exchange(t, url, "tools/call", "odd", `{"name":"odd","arguments":`+oddArgs+`,"vendorParam":{"n":1.50},`+clientMeta+`}`, "Mcp-Param-Region", "=?base64?WsO8cmljaA==?=")
			for path, want := range map[string]string{"content": oddContent, "structuredContent": oddStructured, "vendorTop": `{"z":1.0,"a":2}`} {
				if have := member(t, got, "result", path); have != want {
					t.Errorf("%s: got\n%s\nwant\n%s", path, have, want)
				}
			}
			if have := member(t, got, "result", "_meta", "com.example/x"); have != "9007199254740993" {
				t.Errorf("_meta of the result: %s", got)
			}
			params, header := up.params("tools/call")
			if have := member(t, params, "arguments"); have != oddArgs {
				t.Errorf("arguments: got\n%s\nwant\n%s", have, oddArgs)
			}
			if have := member(t, params, "vendorParam"); have != `{"n":1.50}` {
				t.Errorf("an unknown param: %s", params)
			}
			if have := member(t, params, "_meta", "com.example/trace"); have != `{"n":9007199254740993,"b":1.50}` {
				t.Errorf("an unknown member of _meta: %s", params)
			}
			if !sessions && header.Get("Mcp-Param-Region") != "=?base64?WsO8cmljaA==?=" {
				t.Errorf("Mcp-Param-Region is %q", header.Get("Mcp-Param-Region"))
			}
			if sessions && header.Get("Mcp-Session-Id") != "s1" {
				t.Errorf("no session: %v", header)
			}

			got = exchange(t, url, "resources/read", "x://odd", `{"uri":"x://odd",`+clientMeta+`}`)
			if member(t, got, "result", "contents") != `[{"uri":"x://odd","text":"t","vendor":1.50}]` || member(t, got, "result", "vendorTop") != "1.0" ||
				member(t, got, "result", "ttlMs") != "5000" || member(t, got, "result", "cacheScope") != `"public"` {
				t.Errorf("resource: %s", got)
			}
			got = exchange(t, url, "prompts/get", "p", `{"name":"p",`+clientMeta+`}`)
			if !strings.Contains(got, `{"type":"hologram","n":1.50}`) || !strings.Contains(got, `"vendorTop":[1.0]`) || !strings.Contains(got, `"description":"d"`) {
				t.Errorf("prompt: %s", got)
			}
			got = exchange(t, url, "completion/complete", "", `{"ref":{"type":"ref/prompt","name":"p"},"argument":{"name":"q","value":"x"},`+clientMeta+`}`)
			if !strings.Contains(got, `"values":["a","b"]`) {
				t.Errorf("completion: %s", got)
			}

			up.mu.Lock()
			up.answers["tools/call"] = `error:{"code":-32050,"message":"no such ox","data":{"z":1.50,"a":[9007199254740993]}}`
			up.mu.Unlock()
			got = exchange(t, url, "tools/call", "odd", `{"name":"odd",`+clientMeta+`}`)
			if want := `"error":{"code":-32050,"message":"no such ox","data":{"z":1.50,"a":[9007199254740993]}}`; !strings.Contains(got, want) {
				t.Errorf("error: got %s, want %s", got, want)
			}
		})
	}
}

// A caller of a session revision gets the same bytes.
func TestLosslessForSessions(t *testing.T) {
	up := &scripted{got: map[string]string{}, hdr: map[string]http.Header{}, answers: map[string]string{
		"tools/list":               `{"tools":[` + oddTool + `]}`,
		"resources/list":           `{"resources":[]}`,
		"resources/templates/list": `{"resourceTemplates":[]}`,
		"prompts/list":             `{"prompts":[]}`,
		"tools/call":               `{"resultType":"complete","vendorTop":{"z":1.0,"a":2},"content":` + oddContent + `,"structuredContent":` + oddStructured + `}`,
	}}
	server := httptest.NewServer(up)
	t.Cleanup(server.Close)
	url := serve(t, map[string]mcpupstream.Config{"up": {URL: server.URL}})
	session := ""
	send := func(body string) string {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/json")
		r.Header.Set("Accept", "application/json, text/event-stream")
		if session != "" {
			r.Header.Set("Mcp-Session-Id", session)
			r.Header.Set("Mcp-Protocol-Version", "2025-11-25")
		}
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if id := resp.Header.Get("Mcp-Session-Id"); id != "" {
			session = id
		}
		raw, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		for line := range bytes.Lines(raw) {
			if data, ok := bytes.CutPrefix(line, []byte("data: {")); ok {
				return "{" + string(bytes.TrimSpace(data))
			}
		}
		return string(raw)
	}
	send(`{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"t","version":"1"}}}`)
	send(`{"jsonrpc":"2.0","method":"notifications/initialized"}`)
	if got := send(`{"jsonrpc":"2.0","id":2,"method":"tools/list"}`); !strings.Contains(got, oddHere) {
		t.Errorf("tools: %s", got)
	}
	got := send(`{"jsonrpc":"2.0","id":3,"method":"tools/call","params":{"name":"odd","arguments":` + oddArgs + `,"_meta":{"com.example/trace":{"n":9007199254740993,"b":1.50}}}}`)
	for path, want := range map[string]string{"content": oddContent, "structuredContent": oddStructured, "vendorTop": `{"z":1.0,"a":2}`} {
		if have := member(t, got, "result", path); have != want {
			t.Errorf("%s: got\n%s\nwant\n%s", path, have, want)
		}
	}
	params, _ := up.params("tools/call")
	if have := member(t, params, "arguments"); have != oddArgs {
		t.Errorf("arguments: got\n%s\nwant\n%s", have, oddArgs)
	}
}
