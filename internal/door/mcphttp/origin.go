package mcphttp

import (
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/mcpwire"
)

// checkHost stops DNS rebinding: a page that had its own name resolve to this machine still
// sends its own name as Host. On a loopback listener only loopback names and allowed ones pass;
// elsewhere the allowed ones, if any are configured.
func (d *Door) checkHost(r *http.Request) *mcpwire.Failure {
	host := hostname(r.Host)
	if d.allowedHost(host) || isLoopback(host) {
		return nil
	}
	if len(d.opts.AllowedHosts) == 0 && !onLoopback(r) {
		return nil
	}
	return &mcpwire.Failure{Status: http.StatusForbidden, Code: -32600, Cause: call.Denied,
		Message: "this Host is not served here; an operator can add it to allowed_hosts"}
}

func (d *Door) allowedHost(host string) bool {
	return slices.ContainsFunc(d.opts.AllowedHosts, func(a string) bool { return a == "*" || strings.EqualFold(a, host) })
}

// checkOrigin refuses browsers on foreign pages (MCP: an Origin that is present and not valid is
// answered with 403), and tells those on allowed pages that they may read the answer.
func (d *Door) checkOrigin(w http.ResponseWriter, r *http.Request) *mcpwire.Failure {
	values := r.Header["Origin"]
	if len(values) == 0 {
		return nil // not a browser
	}
	if len(values) != 1 || !d.allowedOrigin(r, values[0]) {
		return &mcpwire.Failure{Status: http.StatusForbidden, Code: -32600, Cause: call.Denied,
			Message: "this Origin may not call this server; an operator can add it to allowed_origins"}
	}
	h := w.Header()
	h.Set("Access-Control-Allow-Origin", values[0])
	h.Add("Vary", "Origin")
	h.Set("Access-Control-Expose-Headers", "Mcp-Session-Id, WWW-Authenticate, DPoP-Nonce, X-Correlation-Id, Retry-After")
	return nil
}

// allowedOrigin: configured ones; the server's own; and on a loopback listener pages of this
// machine, such as the MCP Inspector.
func (d *Door) allowedOrigin(r *http.Request, origin string) bool {
	if slices.ContainsFunc(d.opts.AllowedOrigins, func(a string) bool { return strings.EqualFold(a, origin) }) {
		return true
	}
	u, err := url.Parse(origin)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return false
	}
	return strings.EqualFold(u.Host, r.Host) || isLoopback(u.Hostname()) && isLoopback(hostname(r.Host)) && onLoopback(r)
}

// preflight answers what a browser asks before it sends a request (Fetch standard, CORS). Besides
// the headers known by name it allows the Mcp-Param-* ones that are asked for: their names come
// from the schemas of tools.
func (d *Door) preflight(w http.ResponseWriter, r *http.Request) {
	allowed := allowedHeaders
	for asked := range strings.SplitSeq(r.Header.Get("Access-Control-Request-Headers"), ",") {
		asked = http.CanonicalHeaderKey(strings.TrimSpace(asked))
		if rest, ok := strings.CutPrefix(asked, "Mcp-Param-"); ok && isToken(rest) && len(allowed) < maxAllowedHeaders {
			allowed += ", " + asked
		}
	}
	h := w.Header()
	h.Set("Access-Control-Allow-Methods", "GET, POST, DELETE")
	h.Set("Access-Control-Allow-Headers", allowed)
	h.Add("Vary", "Access-Control-Request-Headers")
	h.Set("Access-Control-Max-Age", "600")
	w.WriteHeader(http.StatusNoContent)
}

const (
	allowedHeaders = "Content-Type, Accept, Authorization, DPoP, Last-Event-ID, Mcp-Protocol-Version, Mcp-Method, Mcp-Name, Mcp-Session-Id, X-Correlation-Id, Idempotency-Key, Traceparent, Tracestate, Baggage"
	// maxAllowedHeaders bounds how many bytes of what was asked are echoed.
	maxAllowedHeaders = 4 << 10
)

// isToken reports whether s is a token of RFC 9110, section 5.6.2.
func isToken(s string) bool {
	for _, c := range []byte(s) {
		if c <= ' ' || c >= 0x7f || strings.IndexByte(`"(),/:;<=>?@[\]{}`, c) >= 0 {
			return false
		}
	}
	return s != ""
}

// hostname returns the name in a Host header, without port and brackets.
func hostname(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		return h
	}
	return strings.Trim(host, "[]")
}

func isLoopback(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.IsLoopback()
}

// onLoopback reports whether the request came in over a loopback listener. Without a local
// address (in-memory connections) it says yes, which is the stricter answer.
func onLoopback(r *http.Request) bool {
	switch a := r.Context().Value(http.LocalAddrContextKey).(type) {
	case *net.TCPAddr:
		return a.IP.IsLoopback()
	case net.Addr:
		return a.Network() == "unix"
	}
	return true
}
