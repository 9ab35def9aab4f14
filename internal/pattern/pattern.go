// Package pattern holds names against patterns that an operator writes: * stands for any text, slashes
// too, and [a-z] and ? as in path.Match.
package pattern

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
)

// Check reports what is wrong with patterns.
func Check(patterns ...string) error {
	for _, p := range patterns {
		if _, err := path.Match(p, ""); err != nil {
			return fmt.Errorf("%q is not a pattern", p)
		}
	}
	return nil
}

// Any reports whether a name fits one of some patterns, which have been checked.
func Any(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return fits(p, name) })
}

func fits(pattern, name string) bool {
	i := strings.IndexAny(pattern, `*?[\`)
	switch {
	case i < 0:
		return pattern == name
	case !strings.HasPrefix(name, pattern[:i]):
		return false
	case pattern[i:] == "*":
		return true
	}
	// A slash has no meaning in these names.
	ok, _ := path.Match(strings.ReplaceAll(pattern, "/", "\x00"), strings.ReplaceAll(name, "/", "\x00"))
	return ok
}

// RE2 returns the regular expression, in the syntax of RE2 and without anchors, of the names that a
// pattern fits. The pattern has been checked.
func RE2(pattern string) string {
	var b strings.Builder
	for i := 0; i < len(pattern); i++ {
		switch c := pattern[i]; c {
		case '*':
			b.WriteString(".*")
		case '?':
			b.WriteString(".")
		case '\\':
			if i++; i < len(pattern) {
				b.WriteString(regexp.QuoteMeta(pattern[i : i+1]))
			}
		case '[':
			end := i + 1
			for end < len(pattern) && pattern[end] != ']' {
				if pattern[end] == '\\' {
					end++
				}
				end++
			}
			b.WriteString(pattern[i:min(end+1, len(pattern))])
			i = end
		default:
			b.WriteString(regexp.QuoteMeta(pattern[i : i+1]))
		}
	}
	return b.String()
}
