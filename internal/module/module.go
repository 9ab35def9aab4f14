// Package module is what can be plugged into the daemon, as values: there is no registration at
// a distance. A list of modules is handed to the program that runs them.
//
// Start reading at [Backend].
package module

import (
	"context"
	"fmt"
	"log/slog"
	"reflect"

	"newel.dev/newel/call"
)

// Env is what a module may use when it opens.
type Env struct {
	Dir    string       // folder of the configuration file: relative paths start here
	Logger *slog.Logger // never nil
	// Position returns where a setting stands ("newel.yaml:12:5"), given its path below the
	// module's own settings, such as "tools[2].sql".
	Position func(path string) string
	// Progress reports on long work; total 0 means unknown. Never nil.
	Progress func(label string, done, total int)
}

// A Module is one kind of backend.
type Module struct {
	Name   string       // as "type" in the configuration
	Doc    string       // one sentence for the reference
	Config reflect.Type // struct whose fields carry the tags yaml, doc, default, enum and required
	open   func(ctx context.Context, name string, config any, env Env) (call.Backend, error)
}

// Backend declares a kind of backend whose settings have type C. open is called once per backend
// of that kind; it checks everything and starts nothing.
func Backend[C any](name, doc string, open func(ctx context.Context, name string, config C, env Env) (call.Backend, error)) Module {
	return Module{Name: name, Doc: doc, Config: reflect.TypeFor[C](), open: func(ctx context.Context, name string, config any, env Env) (call.Backend, error) {
		c, ok := config.(C)
		if !ok {
			return nil, fmt.Errorf("settings are of type %T", config)
		}
		return open(ctx, name, c, env)
	}}
}

// Open opens a backend; config is a value of type Config.
func (m *Module) Open(ctx context.Context, name string, config any, env Env) (call.Backend, error) {
	return m.open(ctx, name, config, env)
}
