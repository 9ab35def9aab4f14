package exchange

import (
	"net/http"
	"slices"
	"strings"
)

// challenge is what a refusal says about the access it wants (RFC 6750, RFC 9449, RFC 9728).
type challenge struct {
	dpop     bool     // it is of the scheme DPoP, and there is none of the scheme Bearer
	metadata string   // resource_metadata: where the resource describes itself, or ""
	scopes   []string // that the request needs, or none
	problem  string   // error, such as insufficient_scope, or ""
}

// Bounds of what a refusal may say: it is hostile input.
const (
	maxHeader = 8 << 10 // bytes of one header
	maxScopes = 64
	maxScope  = 256 // bytes
)

// challengeOf reads the WWW-Authenticate headers of a refusal. What it does not understand is left
// out.
func challengeOf(h http.Header) challenge {
	var c challenge
	bearer := false
	for _, line := range h.Values("WWW-Authenticate") {
		if len(line) > maxHeader {
			continue
		}
		scheme := ""
		for name, value := range parameters(line) {
			switch {
			case value == nil:
				scheme = strings.ToLower(name)
				bearer = bearer || scheme == "bearer"
				c.dpop = c.dpop || scheme == "dpop"
				continue
			case scheme != "bearer" && scheme != "dpop":
				continue
			}
			switch strings.ToLower(name) {
			case "resource_metadata":
				c.metadata = *value
			case "scope":
				c.scopes = union(c.scopes, scopesIn(*value))
			case "error":
				if c.problem == "" || *value == "use_dpop_nonce" {
					c.problem = *value
				}
			}
		}
	}
	c.dpop = c.dpop && !bearer
	return c
}

// parameters takes a header with challenges apart (RFC 9110, section 11.6.1): a scheme has no value.
func parameters(s string) func(yield func(name string, value *string) bool) {
	return func(yield func(string, *string) bool) {
		for {
			s = strings.TrimLeft(s, " \t,")
			n := strings.IndexAny(s, " \t,=\"")
			if n < 0 {
				n = len(s)
			}
			if n == 0 {
				return // the end, or nothing that can be a name
			}
			name := s[:n]
			s = strings.TrimLeft(s[n:], " \t")
			if !strings.HasPrefix(s, "=") {
				if !yield(name, nil) {
					return
				}
				continue
			}
			value, rest := valueOf(strings.TrimLeft(s[1:], " \t"))
			s = rest
			if !yield(name, &value) {
				return
			}
		}
	}
}

// valueOf reads a token or a quoted string.
func valueOf(s string) (value, rest string) {
	if !strings.HasPrefix(s, `"`) {
		if n := strings.IndexAny(s, " \t,"); n >= 0 {
			return s[:n], s[n:]
		}
		return s, ""
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == '"':
			return b.String(), s[i+1:]
		case s[i] == '\\' && i+1 < len(s):
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String(), ""
}

// scopesIn returns the scopes of a list, without those that cannot be any (RFC 6749, section 3.3).
func scopesIn(list string) []string {
	return valid(strings.Fields(list))
}

func valid(scopes []string) []string {
	var out []string
	for _, s := range scopes {
		odd := strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' }) >= 0
		if odd || s == "" || len(s) > maxScope || len(out) == maxScopes {
			continue
		}
		out = append(out, s)
	}
	return out
}

// union returns a and what is in b beside it, in order.
func union(a, b []string) []string {
	out := slices.Clone(a)
	for _, s := range b {
		if !slices.Contains(out, s) && len(out) < maxScopes {
			out = append(out, s)
		}
	}
	return out
}

// within reports whether all of a are in b.
func within(a, b []string) bool {
	return !slices.ContainsFunc(a, func(s string) bool { return !slices.Contains(b, s) })
}
