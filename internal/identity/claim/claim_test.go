package claim

import (
	"slices"
	"testing"
)

func TestTexts(t *testing.T) {
	const claims = `{"one":"a","many":["a","b"],"deep":{"er":{"still":["c"]}},"https://x.example/groups":["d"],"null":null,"number":1,"mixed":["a",1]}`
	for name, want := range map[string][]string{
		"one": {"a"}, "many": {"a", "b"}, "deep.er.still": {"c"}, "https://x.example/groups": {"d"}, "null": nil, "missing": nil, "one.more": nil, "deep.missing": nil,
	} {
		if got, err := Texts([]byte(claims), name); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for _, name := range []string{"number", "mixed", "deep"} {
		if got, err := Texts([]byte(claims), name); err == nil {
			t.Errorf("%s: %q", name, got)
		}
	}
	if got, err := Texts([]byte(`[]`), "x"); err != nil || got != nil {
		t.Errorf("%q, %v", got, err)
	}
}
