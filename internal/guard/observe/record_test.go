package observe

import (
	"strings"
	"testing"

	"github.com/go-json-experiment/json/jsontext"
)

func TestSanitised(t *testing.T) {
	many := `{"a":1` + strings.Repeat(`,"b":2`, 20) + `}`
	for args, want := range map[string]string{
		`{}`:                             "",
		` { "a" : 1 , "b":"x y" } `:      "a:number/1 b:string/5",
		`{"o":{"x":[1,"}",2]},"n":null}`: "o:object/15 n:null/4",
		`{"a":[],"t":true,"f":-1.5e3}`:   "a:array/2 t:boolean/4 f:number/6",
		`{"quo\"te":"a\\","next":"\"}"}`: `quo\"te:string/5 next:string/5`,
		`{"a b:c/d":1,"ü":2}`:            "a_b_c_d:number/1 __:number/1",
		many:                             "a:number/1" + strings.Repeat(" b:number/1", 15) + " …",
		`[1]`:                            "not an object/3",
		`{"x":"` + strings.Repeat("y", 70_000) + `"}`: "object/70008",
	} {
		if got := sanitised([]byte(args)); got != want {
			t.Errorf("%.60s:\n got %q\nwant %q", args, got, want)
		}
	}
}

// FuzzSanitised holds the scan to its promise: on anything at all it ends, and on valid objects it
// names every member (up to its bound) and shows nothing of a string's value.
func FuzzSanitised(f *testing.F) {
	f.Add([]byte(`{"a":1,"b":"x","c":{"d":[1,2,{}]}}`))
	f.Add([]byte(`{"a`))
	f.Add([]byte(`{"a":}`))
	f.Fuzz(func(t *testing.T, args []byte) {
		got := sanitised(args)
		v := jsontext.Value(args)
		if !v.IsValid() || v.Kind() != '{' || len(args) > maxArgBytes {
			return
		}
		d := jsontext.NewDecoder(strings.NewReader(string(args)))
		if _, err := d.ReadToken(); err != nil {
			t.Fatal(err)
		}
		members := 0
		for ; d.PeekKind() == '"'; members++ {
			if err := d.SkipValue(); err != nil {
				t.Fatal(err)
			}
			if err := d.SkipValue(); err != nil {
				t.Fatal(err)
			}
		}
		if n := len(strings.Fields(got)); n != min(members, maxArgs+1) {
			t.Errorf("%d of %d members in %q of %q", n, members, got, args)
		}
	})
}

func BenchmarkSanitised(b *testing.B) {
	args := []byte(`{"order_id":"A-100234","limit":10,"filter":{"status":"open"}}`)
	b.ReportAllocs()
	for b.Loop() {
		_ = sanitised(args)
	}
}
