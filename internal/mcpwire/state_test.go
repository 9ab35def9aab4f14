package mcpwire

import (
	"encoding/base64"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// A sealed state opens for its own principal, call and time only, and not after any change.
func TestStateOpensForItsCallOnly(t *testing.T) {
	s, err := newSealer(nil)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Unix(1_000_000, 0)
	s.now = func() time.Time { return now }
	mine := func() *call.Call {
		return &call.Call{Kind: call.Tool, Name: "pay", Key: "k", Args: jsontext.Value(`{"a":1,"b":[2]}`), Principal: &call.Principal{ID: "u", Tenant: "t"}}
	}
	sealed, err := s.seal(mine(), &state{Expires: now.Add(time.Minute).Unix(), Round: 1, Answers: map[string]jsontext.Value{"q": jsontext.Value(`{}`)}})
	if err != nil {
		t.Fatal(err)
	}
	same := mine()
	same.Args = jsontext.Value(`{ "b": [2], "a": 1 }`)
	for _, c := range []*call.Call{mine(), same} {
		if st, err := s.open(c, sealed); err != nil || st.Round != 1 || string(st.Answers["q"]) != `{}` {
			t.Errorf("does not open for its own call: %v", err)
		}
	}
	others := map[string]func(*call.Call){
		"another user":       func(c *call.Call) { c.Principal.ID = "v" },
		"another tenant":     func(c *call.Call) { c.Principal.Tenant = "x" },
		"no principal":       func(c *call.Call) { c.Principal = nil },
		"moved border":       func(c *call.Call) { c.Principal = &call.Principal{ID: "", Tenant: "tu"} },
		"another kind":       func(c *call.Call) { c.Kind = call.Prompt },
		"another key":        func(c *call.Call) { c.Key = "l" },
		"no key":             func(c *call.Call) { c.Key = "" },
		"another tool":       func(c *call.Call) { c.Name = "refund" },
		"another argument":   func(c *call.Call) { c.Args = jsontext.Value(`{"a":2,"b":[2]}`) },
		"like-looking digit": func(c *call.Call) { c.Args = jsontext.Value(`{"a":1.0,"b":[2]}`) },
		"no arguments":       func(c *call.Call) { c.Args = nil },
	}
	for name, change := range others {
		c := mine()
		change(c)
		if _, err := s.open(c, sealed); err == nil {
			t.Errorf("opens for %s", name)
		}
	}
	raw, err := base64.RawURLEncoding.DecodeString(sealed)
	if err != nil {
		t.Fatal(err)
	}
	for i := range raw {
		for _, bit := range []byte{1, 0x80} {
			bad := append([]byte(nil), raw...)
			bad[i] ^= bit
			if _, err := s.open(mine(), base64.RawURLEncoding.EncodeToString(bad)); err == nil {
				t.Fatalf("opens with byte %d changed", i)
			}
		}
		if _, err := s.open(mine(), base64.RawURLEncoding.EncodeToString(raw[:i])); err == nil {
			t.Fatalf("opens cut to %d bytes", i)
		}
	}
	now = now.Add(time.Minute + time.Second)
	if _, err := s.open(mine(), sealed); err == nil {
		t.Error("opens after it has expired")
	}
	other, err := newSealer(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.open(mine(), sealed); err == nil {
		t.Error("opens with another key")
	}
}

// Every state of a call has the name of its first one, whichever way its text is written.
func TestStateNamesItsFirst(t *testing.T) {
	s, err := newSealer(nil)
	if err != nil {
		t.Fatal(err)
	}
	c := &call.Call{Kind: call.Tool, Name: "pay"}
	sealed := func(st state) string {
		t.Helper()
		st.Expires = time.Now().Add(time.Minute).Unix()
		text, err := s.seal(c, &st)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	first := func(text string) string {
		t.Helper()
		st, err := s.open(c, text)
		if err != nil {
			t.Fatal(err)
		}
		return st.First
	}
	text := sealed(state{})
	name := first(text)
	if name == "" || name != first(text) || name == first(sealed(state{})) {
		t.Errorf("the first state is called %q", name)
	}
	if got := first(sealed(state{First: name})); got != name {
		t.Errorf("the second state is of %q, not of %q", got, name)
	}
	forms := 1
	for _, last := range "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_" {
		if other := text[:len(text)-1] + string(last); other != text {
			if st, err := s.open(c, other); err == nil {
				if forms++; st.First != name {
					t.Error("the same state has two names")
				}
			}
		}
	}
	if len(text)%4 != 0 && forms == 1 {
		t.Error("there is no other form of the text: the test shows nothing")
	}
}
