// Package pattern holds names against patterns that an operator writes: * stands for any text, slashes
// too, and [a-z] and ? as in path.Match.
package pattern

import (
	"fmt"
	"path"
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
