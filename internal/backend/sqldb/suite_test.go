package sqldb

import (
	"testing"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/backend/backendtest"
)

// Both engines pass the suite of all backends.
func TestBackend(t *testing.T) {
	for _, w := range worlds(t) {
		t.Run(w.name, func(t *testing.T) {
			w.config.Tools = tools(w.name == "postgres")
			backendtest.Run(t, func(t *testing.T) call.Backend {
				b, err := Open(t.Context(), "db", w.config, w.env)
				if err != nil {
					t.Fatal(err)
				}
				return b
			}, []backendtest.Sample{
				{Name: "get", Args: `{"id":1}`},
				{Name: "get", Args: `{"id":-1}`, Want: call.Failed, Secret: "SELECT"},
				{Name: "get", Args: `{"id":9223372036854775808}`, Want: call.Invalid, Secret: "item"},
				{Name: "get", Args: `{"id":1.5}`, Want: call.Invalid},
				{Name: "get", Args: `{"id":null}`, Want: call.Invalid},
				{Name: "get", Args: `{}`, Want: call.Invalid},
				{Name: "find", Args: `{"name":"'; DROP TABLE item; --"}`},
				{Name: "find", Args: `{"name":"\\'; DROP TABLE item; --"}`},
				{Name: "find", Args: `{"name":"\u0000"}`, Want: call.Invalid},
				{Name: "find", Args: `{}`, Want: call.TooLarge, Secret: "FROM"},
				{Name: "page", Args: `{}`},
				{Name: "page", Args: `{"limit":50}`},
				{Name: "page", Args: `{"limit":51}`, Want: call.Invalid},
				{Name: "page", Args: `{"cursor":"e30"}`, Want: call.Invalid},
				{Name: "rename", Args: `{"id":2,"name":"two"}`},
				{Name: "rename", Args: `{"id":2,"name":"one"}`, Want: call.Failed, Secret: "item"},
				{Name: "remove", Args: `{"id":60}`},
				{Name: "remove", Args: `{"id":60}`, Want: call.Failed},
				{Name: "slow", Slow: true},
			})
		})
	}
}
