package config

import (
	"fmt"
	"slices"

	"github.com/goccy/go-yaml/ast"
)

// effects checks what the settings of a tool say together.
func (d *decoder) effects(root ast.Node) {
	e := &d.file.Config.Effects
	list, _ := child(child(root, "effects"), "tools").(*ast.SequenceNode)
	for i := range e.Tools {
		t, n := &e.Tools[i], list.Values[i]
		problem := func(key, message, suggestion string) {
			at := n
			if given := child(n, key); given != nil {
				at = given
			}
			d.problem(where(at), fmt.Sprintf("effects.tools[%d].%s", i, key), message, suggestion)
		}
		other := slices.Contains([]string{"none", "safe", "resend_same_key"}, t.Recovery) // what is none is a problem already
		switch {
		case t.Recovery == "lookup" && t.Lookup == "":
			problem("lookup", "is missing: nobody tells whether a call ran", "name a tool that reads")
		case other && t.Lookup != "":
			problem("lookup", "is for the recovery lookup alone", "write recovery: lookup, or leave it out")
		}
		switch {
		case other && t.Settle > 0:
			problem("settle", "is for the recovery lookup alone", "write recovery: lookup and the tool to look with, or leave it out")
		case t.Settle > e.Retention && e.Retention > 0:
			problem("settle", fmt.Sprintf("must be at most effects.retention, %s", e.Retention), "it is how long the tool may hold what was sent to it")
		}
	}
}
