package gateway

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/backend/mcpupstream"
)

// named is a server of the stateless revision with tools of these names, which say their own.
func named(t *testing.T, names ...string) mcpupstream.Config {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		var m struct {
			ID     json.RawMessage
			Method string
			Params struct {
				Name      string
				Arguments json.RawMessage
			}
		}
		_ = json.Unmarshal(body, &m)
		w.Header().Set("Content-Type", "application/json")
		switch m.Method {
		case "server/discover":
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"supportedVersions":["2026-07-28"],"capabilities":{"tools":{}}}}`, m.ID)
		case "tools/list":
			defs := make([]string, len(names))
			for i, n := range names {
				defs[i] = fmt.Sprintf(`{"name":%q,"description":"The tool %s.","inputSchema":{"type":"object","properties":{"text":{"type":"string"},"region":{"type":"string"}},"required":["region"]}}`, n, n)
			}
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"tools":[%s]}}`, m.ID, strings.Join(defs, ","))
		case "tools/call":
			answer(w, m.ID, m.Params.Name+" "+string(m.Params.Arguments))
		}
	}))
	t.Cleanup(s.Close)
	return mcpupstream.Config{URL: s.URL}
}

func toolNames(t *testing.T, url string) []string {
	t.Helper()
	var list struct {
		Result struct{ Tools []struct{ Name string } }
	}
	if err := json.Unmarshal([]byte(exchange(t, url, "tools/list", "", `{`+clientMeta+`}`)), &list); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, tool := range list.Result.Tools {
		names = append(names, tool.Name)
	}
	return names
}

// A virtual server shows its part, and what is not shown cannot be called there.
func TestVirtualServers(t *testing.T) {
	bank, shop := named(t, "pay", "balance"), named(t, "buy", "pay")
	bank.Prefix = "bank_"
	base := serveWith(t, assembly.Options{Servers: []assembly.Server{
		{Path: "/mcp/finance", Name: "finance", Backends: []string{"bank"}},
		{Path: "/mcp/pay", Tools: []string{"*pay"}},
	}}, upstream{"bank", bank}, upstream{"shop", shop})
	for path, want := range map[string][]string{
		"":         {"bank_balance", "bank_pay", "buy", "pay"},
		"/finance": {"bank_balance", "bank_pay"},
		"/pay":     {"bank_pay", "pay"},
	} {
		if got := toolNames(t, base+path); !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", path, got, want)
		}
	}
	args := `{"name":"%s","arguments":{"region":"eu"},` + clientMeta + `}`
	if got := exchange(t, base+"/finance", "tools/call", "bank_pay", fmt.Sprintf(args, "bank_pay")); !strings.Contains(got, `pay {\"region\":\"eu\"}`) {
		t.Errorf("got %s", got)
	}
	if got := exchange(t, base+"/finance", "tools/call", "buy", fmt.Sprintf(args, "buy")); !strings.Contains(got, "unknown tool") {
		t.Errorf("a tool of another server was called: %s", got)
	}
	if got := exchange(t, base+"/finance", "server/discover", "", `{`+clientMeta+`}`); !strings.Contains(got, `"name":"finance"`) {
		t.Errorf("discover: %s", got)
	}
}

// Renamed, fixed and hidden: what the operator says is what callers see and what the server gets.
func TestChosenTools(t *testing.T) {
	c := named(t, "pay", "balance", "secret")
	c.Tools = []mcpupstream.Tool{
		{Name: "pay", As: "pay_in_europe", Description: "Pays.", Fixed: map[string]any{"region": "eu"}},
		{Name: "b*", Hidden: []string{"text"}},
	}
	url := serve(t, map[string]mcpupstream.Config{"bank": c})
	if got := toolNames(t, url); !slices.Equal(got, []string{"balance", "pay_in_europe"}) {
		t.Errorf("got %v", got)
	}
	list := exchange(t, url, "tools/list", "", `{`+clientMeta+`}`)
	if !strings.Contains(list, `{"name":"pay_in_europe","description":"Pays.","inputSchema":{"type":"object","properties":{"text":{"type":"string"}},"required":[]}`) {
		t.Errorf("got %s", list)
	}
	if got := exchange(t, url, "tools/call", "pay_in_europe", `{"name":"pay_in_europe","arguments":{"text":"x"},`+clientMeta+`}`); !strings.Contains(got, `pay {\"text\":\"x\",\"region\":\"eu\"}`) {
		t.Errorf("got %s", got)
	}
}

// Search finds what the list shows, and call_tool calls it, on the same path.
func TestToolSearch(t *testing.T) {
	names := []string{"translate_text", "send_email"}
	for i := range 60 {
		names = append(names, fmt.Sprintf("filler_%d", i))
	}
	base := serveWith(t, assembly.Options{Search: "auto", Servers: []assembly.Server{{Path: "/mcp/small", Tools: []string{"*_text", "search_*"}, Search: "auto"}}}, upstream{"many", named(t, names...)})
	if got := toolNames(t, base); len(got) != len(names)+2 || !slices.Contains(got, "search_tools") || !slices.Contains(got, "call_tool") {
		t.Errorf("got %v", got)
	}
	if got := toolNames(t, base+"/small"); !slices.Equal(got, []string{"translate_text"}) {
		t.Errorf("a small server: %v", got)
	}
	got := exchange(t, base, "tools/call", "search_tools", `{"name":"search_tools","arguments":{"query":"write a mail","limit":1},`+clientMeta+`}`)
	if !strings.Contains(got, `"structuredContent":{"tools":[{"name":"send_email","description":"The tool send_email."`) {
		t.Errorf("search: %s", got)
	}
	got = exchange(t, base, "tools/call", "call_tool", `{"name":"call_tool","arguments":{"name":"send_email","arguments":{"region":"eu"}},`+clientMeta+`}`)
	if !strings.Contains(got, `send_email {\"region\":\"eu\"}`) {
		t.Errorf("call: %s", got)
	}
	got = exchange(t, base, "tools/call", "call_tool", `{"name":"call_tool","arguments":{"name":"send_email","arguments":{"text":"no region"}},`+clientMeta+`}`)
	if !strings.Contains(got, `"isError":true`) || !strings.Contains(got, "region") {
		t.Errorf("the tool's own schema was not asked: %s", got)
	}
}
