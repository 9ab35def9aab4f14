// Package standard is what the official binary carries: one list. A program of your own hands
// the same list, with more in it, to the same code.
package standard

import (
	"newel.dev/newel/internal/backend/knowledge"
	"newel.dev/newel/internal/backend/mcpupstream"
	"newel.dev/newel/internal/backend/sqldb"
	"newel.dev/newel/internal/module"
)

// Modules returns the kinds of backends of the official binary.
func Modules() []module.Module {
	return []module.Module{
		sqldb.Module(),
		knowledge.Module(),
		mcpupstream.Module(),
	}
}
