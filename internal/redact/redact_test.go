package redact_test

import (
	"strings"
	"testing"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/internal/redact"
	"newel.dev/newel/internal/redact/leaks"
)

// Secrets that are none: they are put together here so that nobody's scanner stumbles over this file.
var (
	github = "ghp_" + "x7Kq2LmN9pRt4VwY6zAb8CdE1fGh3JkM5nPq"
	aws    = "AKIA" + "Q3EGRUZ7MJ2NFKLT"
	cardNo = "4111" + "111111111111"
	ibanNo = "DE89" + "370400440532013000"
)

func all(t testing.TB, o redact.Options) *redact.Redactor {
	t.Helper()
	o.Secrets = leaks.New()
	r, err := redact.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestJSON(t *testing.T) {
	r := all(t, redact.Options{
		Members:  []string{"pin", "*.birth_date", "customer.na*", "x-*-id"},
		Patterns: []redact.Pattern{{Name: "employee", Expr: `\bE-(\d{4})\b`}, {Name: "case", Expr: `(?i)case \d+`}},
	})
	for _, c := range [][2]string{
		{`{"amount":12,"to":"bob"}`, ``}, {`[]`, ``}, {`null`, ``}, {`"text"`, ``}, {`{ "a" : 1.50 }`, ``}, {`{"pinned":"x","birth_date":"y","name":"z"}`, ``},
		{`{"password":"hunter2"}`, `{"password":"[redacted:password]"}`},
		{`{"a":[{"Api-Key":{"x":["y"]}}]}`, `{"a":[{"Api-Key":"[redacted:apikey]"}]}`},
		{`{"pass\u0077ord":7}`, `{"password":"[redacted:password]"}`},
		{`{"PIN":1234}`, `{"PIN":"[redacted:pin]"}`},
		{`{"who":{"birthDate":"1980"},"customer":[{"name":"A","age":3}]}`, `{"who":{"birthDate":"[redacted:*.birthdate]"},"customer":[{"name":"[redacted:customer.na*]","age":3}]}`},
		{`{"X-Trace-Id":"a","x/id":"b"}`, `{"X-Trace-Id":"[redacted:x*id]","x/id":"[redacted:x*id]"}`},
		{`"of E-1234, E-99"`, `"of E-[redacted:employee], E-99"`},
		{`"CASE 17 and case 18"`, `"[redacted:case] and [redacted:case]"`},
		{`{"note":"use ` + github + ` please"}`, `{"note":"use [redacted:github-pat] please"}`},
		{`["` + aws + `"]`, `["[redacted:aws-access-token]"]`},
		{`["\u0067hp_` + github[4:] + `"]`, `["[redacted:github-pat]"]`},
		{`{"` + github + `":1,"` + github[:30] + `zzzzzzzzzz":2}`, `{"[redacted:github-pat]#1":1,"[redacted:github-pat]#2":2}`},
		{`"card ` + cardNo + `, thanks"`, `"card [redacted:payment-card], thanks"`},
		{`"4111 1111 1111 1111 12"`, `"[redacted:payment-card] 12"`},
		{`"4111-1111-1111-1112"`, ``}, {`"x4111111111111111"`, ``}, {`"41111111111111119999"`, ``},
		{`{"n":` + cardNo + `}`, `{"n":"[redacted:payment-card]"}`}, {`{"n":-` + cardNo + `,"m":1763720000000}`, ``},
		{`"to ` + ibanNo + `."`, `"to [redacted:iban]."`},
		{`"de89 3704 0044 0532 0130 00 soon"`, `"[redacted:iban] soon"`}, {`"DE88370400440532013000"`, ``}, {`"XX89370400440532013000"`, ``},
		{`{"a":1`, `"[redacted:not JSON, 6 bytes]"`}, {`1 2`, `"[redacted:not JSON, 3 bytes]"`}, {"\"\xff\"", `"[redacted:not JSON, 3 bytes]"`}, {`"\ud800"`, `"[redacted:not JSON, 8 bytes]"`},
		{`{"a":"` + strings.Repeat("x", redact.MaxText+1) + `"}`, `{"a":"[redacted:65537 bytes, not looked at]"}`},
	} {
		want := c[1]
		if want == "" {
			want = c[0]
		}
		if got := string(r.JSON(jsontext.Value(c[0]), nil)); got != want {
			t.Errorf("%.120s\n got %.200s\nwant %.200s", c[0], got, want)
		}
	}
	if got := r.JSON(nil, nil); got != nil {
		t.Errorf("nothing became %s", got)
	}
}

// A secret that only its name gives away is seen as it stands in a program.
func TestNamed(t *testing.T) {
	secret := "q8Zt" + "4mKx7Wv2Lp9Rb3Nc6Yd1Hf5Js0"
	got := string(all(t, redact.Options{}).JSON(jsontext.Value(`{"stripe_api_key_backup":"`+secret+`","title":"`+secret+`"}`), nil))
	if want := `{"stripe_api_key_backup":"[redacted:generic-api-key]","title":"` + secret + `"}`; got != want {
		t.Errorf("got %s", got)
	}
}

func TestSchema(t *testing.T) {
	r, err := redact.New(redact.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for schema, want := range map[string]string{
		`{"properties":{"a":{"writeOnly":true}}}`:                                                                `{"a":"[redacted:schema]","b":{"c":2}}`,
		`{"properties":{"b":{"properties":{"c":{"format":"password"}}}}}`:                                        `{"a":1,"b":{"c":"[redacted:schema]"}}`,
		`{"$defs":{"s":{"writeOnly":true}},"properties":{"b":{"anyOf":[{"type":"null"},{"$ref":"#/$defs/s"}]}}}`: `{"a":1,"b":"[redacted:schema]"}`,
		`{"properties":{"b":{"additionalProperties":{"writeOnly":true}}}}`:                                       `{"a":1,"b":"[redacted:schema]"}`,
		`{"properties":{"b":{"items":{"format":"password"}}}}`:                                                   `{"a":1,"b":"[redacted:schema]"}`,
		`{"writeOnly":true}`: `"[redacted:schema]"`,
		`{"properties":{"a":{"writeOnly":false,"format":"email"}}}`:                                                                             `{"a":1,"b":{"c":2}}`,
		`{"$ref":"#","properties":{"a":{"$ref":"#/properties/a"}}}`:                                                                             `{"a":1,"b":{"c":2}}`,
		`{"properties":{"a":{"$ref":"https://example.com/other"}}}`:                                                                             `{"a":1,"b":{"c":2}}`,
		`{"properties":{"a":{"allOf":[{"$ref":"#"},{"$ref":"#"},{"$ref":"#"},{"$ref":"#"}]}},"allOf":[{"$ref":"#"},{"$ref":"#"},{"$ref":"#"}]}`: `"[redacted:schema]"`, // too much to look at
		`nonsense`: `{"a":1,"b":{"c":2}}`,
		``:         `{"a":1,"b":{"c":2}}`,
	} {
		if got := string(r.JSON(jsontext.Value(`{"a":1,"b":{"c":2}}`), redact.Of(jsontext.Value(schema)))); got != want {
			t.Errorf("%s\n got %s\nwant %s", schema, got, want)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for name, o := range map[string]redact.Options{
		"no name":       {Members: []string{""}},
		"an empty part": {Members: []string{"a..b"}},
		"every member":  {Members: []string{"*"}},
		"bad pattern":   {Members: []string{"[a"}},
		"a path":        {Members: []string{"a/b"}},
		"bad RE2":       {Patterns: []redact.Pattern{{Name: "x", Expr: `(`}}},
		"backtracking":  {Patterns: []redact.Pattern{{Name: "x", Expr: `(a)\1`}}},
		"empty":         {Patterns: []redact.Pattern{{Name: "x", Expr: `a*`}}},
		"nameless":      {Patterns: []redact.Pattern{{Expr: `a`}}},
		"a mark":        {Patterns: []redact.Pattern{{Name: "a]", Expr: `a`}}},
	} {
		if _, err := redact.New(o); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

// Work is bounded: a value made of all the words that rules look for is not matched for ever, and what
// was not looked at is not kept.
func TestBounded(t *testing.T) {
	r := all(t, redact.Options{})
	bait := "aws github gitlab stripe slack key token secret auth sk_live xoxb eyJ AIza ghp_ glpat- npm_ heroku twilio sendgrid " + strings.Repeat("a", 4000)
	v := jsontext.Value(`["` + strings.TrimSuffix(strings.Repeat(strings.Repeat(bait, 10)+`","`, 50), `,"`) + `]`)
	got := string(r.JSON(v, nil))
	if !strings.Contains(got, "bytes, not looked at]") || !jsontext.Value(got).IsValid() {
		t.Errorf("%d bytes are looked at without bound: %.200s", len(v), got)
	}
	deep := jsontext.Value(strings.Repeat(`[`, 9000) + `"` + cardNo + `"` + strings.Repeat(`]`, 9000))
	if got := string(r.JSON(deep, nil)); strings.Contains(got, cardNo) {
		t.Error("what lies deep is kept")
	}
	deep = jsontext.Value(strings.Repeat(`[`, 1_000_000))
	if got := string(r.JSON(deep, nil)); got != `"[redacted:not JSON, 1000000 bytes]"` {
		t.Errorf("got %.100s", got)
	}
}

func FuzzJSON(f *testing.F) {
	r := all(f, redact.Options{Members: []string{"*.pin"}, Patterns: []redact.Pattern{{Name: "x", Expr: `x+(y)?`}}})
	for _, s := range []string{`{"password":{"a":[1]},"b":"` + cardNo + `"}`, `["` + github + `"]`, `{"a":"\u0034111 1111 1111 1111"}`, `"` + ibanNo + `"`, `{"":{"":""}}`, `-0e1`, `{"a":1,"a":2}`} {
		f.Add([]byte(s), []byte(`{"properties":{"a":{"format":"password"}}}`))
	}
	f.Fuzz(func(t *testing.T, v, schema []byte) {
		got := r.JSON(jsontext.Value(v), redact.Of(jsontext.Value(schema)))
		if len(v) > 0 && !got.IsValid() {
			t.Fatalf("%q became %q, which is not JSON", v, got)
		}
		planted, _ := jsontext.AppendQuote(nil, strings.ToValidUTF8(string(v), "?"))
		got = r.JSON(append(append([]byte(`{"a":`), planted...), `,"b":{"password":"hunter2","c":"`+cardNo+`"}}`...), nil)
		if s := string(got); strings.Contains(s, `"hunter2"`) || strings.Contains(s, `"`+cardNo+`"`) && !strings.Contains(string(v), cardNo) || !got.IsValid() {
			t.Fatalf("%q: %s", v, got)
		}
	})
}

func BenchmarkJSON(b *testing.B) {
	r := all(b, redact.Options{})
	for name, v := range map[string]string{
		"small": `{"order":"4711","status":"shipped","note":"left at the door"}`,
		"4KiB":  `{"title":"minutes","body":"` + strings.Repeat("the quick brown fox jumps over it ", 120) + `"}`,
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(v)))
			b.ReportAllocs()
			for b.Loop() {
				r.JSON(jsontext.Value(v), nil)
			}
		})
	}
}
