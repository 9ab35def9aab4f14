package pattern

import (
	"regexp"
	"testing"
)

// What the expression fits is what the pattern fits.
func TestRE2(t *testing.T) {
	names := []string{"", "get", "get_order", "get.order", "getXorder", "a/b", "list-3", "a*b", "a]b", "\\", "ä", "x\ny"}
	for _, p := range []string{"*", "get", "get*", "get.order", "get?order", "*_order", "a/*", "list-[0-9]", `a\*b`, `a\]b`, `[a\]]*`, "?", `x*y`} {
		if err := Check(p); err != nil {
			t.Fatal(err)
		}
		re, err := regexp.Compile("^(?s:" + RE2(p) + ")$") // as Prometheus does it
		if err != nil {
			t.Errorf("%s: %v", p, err)
			continue
		}
		for _, name := range names {
			if got, want := re.MatchString(name), Any([]string{p}, name); got != want {
				t.Errorf("%q and %q: %v, want %v (%s)", p, name, got, want, re)
			}
		}
	}
}
