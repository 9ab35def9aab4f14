package strictjson

import (
	"errors"
	"strings"
	"testing"

	"github.com/go-json-experiment/json/jsontext"
)

func TestCheck(t *testing.T) {
	tests := []struct {
		name, in, want string
		limit          bool
	}{
		{"object", `{"a":[1,2,{"b":null}]}`, "", false},
		{"duplicate name", `{"a":1,"a":2}`, "duplicate", false},
		{"nested duplicate name", `{"x":[{"a":1,"a":2}]}`, "duplicate", false},
		{"escaped duplicate name", `{"a":1,"\u0061":2}`, "duplicate", false},
		{"case variants are different names", `{"method":1,"Method":2}`, "", false},
		{"invalid UTF-8", "{\"a\":\"\xff\"}", "UTF-8", false},
		{"lone surrogate", `{"a":"\ud800"}`, "surrogate", false},
		{"trailing bytes", `{} {}`, "after top-level", false},
		{"truncated", `{"a":`, "EOF", false},
		{"empty", ``, "EOF", false},
		{"depth 10^6", strings.Repeat("[", 1e6), "deeper than 64", true},
		{"depth 64", strings.Repeat("[", 64) + strings.Repeat("]", 64), "", false},
		{"depth 65", strings.Repeat("[", 65) + strings.Repeat("]", 65), "deeper than 64", true},
		{"depth 65 of both", strings.Repeat(`{"a":[`, 32) + "[", "deeper than 64", true},
		{"wide, not deep", "[" + strings.Repeat("[],", 1000) + "[]]", "", false},
		{"10^5 elements", "[" + strings.Repeat("1,", 1e5) + "1]", "", false},
		{"10^5 and one", "[" + strings.Repeat("1,", 1e5+1) + "1]", "more than 100000 elements", true},
		{"10^6 keys", "[" + strings.Repeat("1,", 1e6) + "1]", "more than 100000 elements", true},
		{"over size", `"` + strings.Repeat("x", 5<<20) + `"`, "over the limit", true},
		{"brackets in strings do not count", `"` + strings.Repeat("[", 1000) + `"`, "", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := Check([]byte(tt.in), Limits{})
			if tt.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			var e *Error
			if !errors.As(err, &e) || !strings.Contains(e.Problem, tt.want) || e.Limit != tt.limit {
				t.Errorf("got %v, want %q (limit %v)", err, tt.want, tt.limit)
			}
		})
	}
}

func FuzzCheck(f *testing.F) {
	f.Add([]byte(`{"a":1,"a":2}`))
	f.Add([]byte(`{"jsonrpc":"2.0","id":1,"method":"x","params":{"_meta":{}}}`))
	f.Add([]byte("\"\xff\""))
	f.Fuzz(func(t *testing.T, b []byte) {
		if Check(b, Limits{}) != nil {
			return
		}
		// What passes must survive canonicalization: no two parsers read it differently.
		v := jsontext.Value(b).Clone()
		if err := v.Canonicalize(); err != nil {
			t.Fatalf("accepted, but not canonical: %v", err)
		}
	})
}
