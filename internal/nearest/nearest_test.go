package nearest

import (
	"strings"
	"testing"
)

func TestName(t *testing.T) {
	known := []string{"listen", "limits", "backends", "environment"}
	for got, want := range map[string]string{
		"listne": "listen", "Limit": "limits", "backend": "backends", "enviroment": "environment", "enviromnet": "environment",
		"xyz": "", "": "", "LISTEN": "listen", strings.Repeat("l", 1000): "",
	} {
		if n := Name(got, known); n != want {
			t.Errorf("%q: got %q, want %q", got, n, want)
		}
	}
}
