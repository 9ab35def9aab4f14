package mcpsession

import (
	"bufio"
	"io"
	"strings"
	"testing"
)

// TestLift is the one member that the SDK would lose: it moves, everything else stays byte for byte.
func TestLift(t *testing.T) {
	for in, want := range map[string]string{
		`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"a","task":{"ttl":1},"arguments":{"n":9007199254740993, "task":2}}}`: `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"a","arguments":{"n":9007199254740993, "task":2},"_meta":{"dev.newel/task":{"ttl":1}}}}`,
		`{"method":"tools/call","params":{"_meta":{"x":1,"dev.newel/task":{"ttl":9}},"task":{}}}`:                                            `{"method":"tools/call","params":{"_meta":{"x":1,"dev.newel/task":{}}}}`,
		`{"method":"tools/call","params":{"_meta":7,"task":{}}}`:                                                                             ``, // refused by the SDK
		`{"method":"tools/call","params":["task"]}`:                                                                                          ``,
		`{"method":"tools/call","params":{"arguments":{"task":1}}}`:                                                                          ``,
		`{"method":"prompts/get","params":{"task":{}}}`:                                                                                      ``,
		`["task"]`: ``,
		`"task`:    ``,
	} {
		if want == "" {
			want = in
		}
		if got := string(lift([]byte(in))); got != want {
			t.Errorf("%s\nbecomes %s\nwant    %s", in, got, want)
		}
	}
	in := `{"method":"ping"}` + "\n" + `{"method":"tools/call","params":{"task":{}}}` + "\r\n" + `{"method":"tools/call","params":{"name":"task"}}`
	got, err := io.ReadAll(&lifter{in: bufio.NewReader(strings.NewReader(in))})
	want := `{"method":"ping"}` + "\n" + `{"method":"tools/call","params":{"_meta":{"dev.newel/task":{}}}}` + "\n" + `{"method":"tools/call","params":{"name":"task"}}` + "\n"
	if err != nil || string(got) != want {
		t.Errorf("lines become %q, %v", got, err)
	}
}
