package pattern

import "testing"

func TestAny(t *testing.T) {
	for _, tt := range []struct {
		pattern, name string
		want          bool
	}{
		{"*", "", true}, {"*", "a/b", true}, {"a", "a", true}, {"a", "ab", false}, {"a*", "a", true}, {"a*", "a/b/c", true}, {"a*", "b", false},
		{"kb://*/x", "kb://a/b/x", true}, {"kb://*/x", "kb://a/b/y", false}, {"?b", "ab", true}, {"[ab]c", "bc", true}, {"[ab]c", "cc", false},
		{`a\*`, "a*", true}, {`a\*`, "ab", false}, {"", "", true}, {"", "a", false}, {"*_x", "a_x", true}, {"*_x", "a_y", false},
	} {
		if err := Check(tt.pattern); err != nil {
			t.Errorf("%q: %v", tt.pattern, err)
		}
		if got := Any([]string{"never", tt.pattern}, tt.name); got != tt.want {
			t.Errorf("%q %q: %v", tt.pattern, tt.name, got)
		}
	}
	if Any(nil, "") {
		t.Error("no pattern fits")
	}
	for _, bad := range []string{"[", "[a", `a\`} {
		if Check("fine", bad) == nil {
			t.Errorf("%q is taken for a pattern", bad)
		}
	}
}
