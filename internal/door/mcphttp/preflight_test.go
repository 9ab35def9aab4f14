package mcphttp

import (
	"net/http/httptest"
	"strings"
	"testing"
)

// A browser may send the Mcp-Param headers of any tool, and nothing that is no header name.
func TestPreflightAllowsParamHeaders(t *testing.T) {
	w := newWorld(t)
	r := httptest.NewRequest("OPTIONS", "http://127.0.0.1/mcp", nil)
	r.Header.Set("Origin", "https://app.example.com")
	r.Header.Set("Access-Control-Request-Headers", "mcp-param-region, x-evil, mcp-param-, mcp-param-a b,"+strings.Repeat("mcp-param-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx,", 1000))
	rec := httptest.NewRecorder()
	w.Door.ServeHTTP(rec, r)
	got := rec.Header().Get("Access-Control-Allow-Headers")
	if rec.Code != 204 || !strings.Contains(got, ", Mcp-Param-Region") {
		t.Errorf("%d, allows %q", rec.Code, got)
	}
	if strings.Contains(strings.ToLower(got), "evil") || strings.Contains(got, "a b") || len(got) > 5<<10 {
		t.Errorf("allows too much, %d bytes: %.200q", len(got), got)
	}
}
