package mcpwire

import (
	"reflect"
	"testing"

	"newel.dev/newel/internal/strictjson"
)

// Doors use the room of a message for another one as soon as it is decoded.
func TestMessagesKeepNothingOfTheirBytes(t *testing.T) {
	const text = `{"jsonrpc":"2.0","id":"a","method":"tools/call","params":{"name":"n","arguments":{"a":"b"},"inputResponses":{"q":{"action":"accept"}},"ref":{"type":"t"},"vendor":{"x":1},` +
		`"notifications":{"resourceSubscriptions":["kb://a"]},"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{"roots":{}},"progressToken":"p","vendor":[1]}}}`
	want, f := Parse([]byte(text), strictjson.Limits{})
	if f != nil {
		t.Fatal(f.Message)
	}
	bytes := []byte(text)
	got, f := Parse(bytes, strictjson.Limits{})
	if f != nil {
		t.Fatal(f.Message)
	}
	clear(bytes)
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	for _, refused := range []string{`{"jsonrpc":"1.0","id":"a","method":"m"}`, `{"jsonrpc":"2.0","id":"a","method":1}`} {
		_, want := Parse([]byte(refused), strictjson.Limits{})
		bytes := []byte(refused)
		_, got := Parse(bytes, strictjson.Limits{})
		clear(bytes)
		if string(got.ID) != `"a"` || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v, want %+v", refused, got, want)
		}
	}
}
