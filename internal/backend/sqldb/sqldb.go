// Package sqldb publishes declared SQL statements as tools, on SQLite and PostgreSQL.
//
// Start reading at [Open]: every statement is checked against the real database before a door
// opens. Then [statement.run]. Values only ever travel as parameters; a statement declared as
// read runs in a transaction that cannot write. Results are bounded by rows, bytes and time: past
// a bound there is a next page or an error that says how to ask for less, never a silent cut.
package sqldb

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/module"
	"newel.dev/newel/internal/secret"
)

// Config is one database and the statements on it.
type Config struct {
	Driver         string        `yaml:"driver" enum:"sqlite,postgres" required:"true" doc:"Which kind of database."`
	File           string        `yaml:"file" doc:"SQLite: the database file. It is made if it does not exist."`
	DSN            secret.String `yaml:"dsn" doc:"PostgreSQL: how to connect, as postgres://user:password@host:port/database. A secret: write a reference such as ${env:ORDERS_DSN}."`
	Init           string        `yaml:"init" doc:"SQLite: a script that is run once, in one transaction, when the database is empty."`
	MaxRows        int           `yaml:"max_rows" default:"1000" doc:"Most rows of one result."`
	MaxBytes       int           `yaml:"max_bytes" default:"131072" doc:"Most bytes of one result."`
	Timeout        time.Duration `yaml:"timeout" default:"15s" doc:"Longest run of one statement."`
	MaxConnections int           `yaml:"max_connections" default:"4" doc:"Most connections at once."`
	Tools          []Tool        `yaml:"tools" required:"true" doc:"One tool for each statement."`
}

// Tool is one statement.
type Tool struct {
	Name        string   `yaml:"name" required:"true" doc:"Name of the tool."`
	Title       string   `yaml:"title" doc:"Name for people."`
	Description string   `yaml:"description" required:"true" doc:"What it does and when to use it: models read this."`
	Effect      string   `yaml:"effect" enum:"read,write,destructive" default:"read" doc:"What it does to the data. A read cannot write, whatever the statement says."`
	SQL         string   `yaml:"sql" required:"true" doc:"One statement. Parameters are written :name; with a page also :limit and :after_KEY for each key."`
	Params      []Param  `yaml:"params" doc:"The parameters that callers give."`
	Result      string   `yaml:"result" enum:"rows,row,affected" default:"rows" doc:"All rows; exactly one row; or the number of changed rows."`
	Columns     []Column `yaml:"columns" doc:"What the columns of the result mean."`
	None        string   `yaml:"none" doc:"What to tell the caller when there is no row, or nothing changed."`
	JSON        []string `yaml:"json" doc:"Columns whose text is JSON."`
	Page        Page     `yaml:"page" doc:"Keyset pagination."`
	Scopes      []string `yaml:"scopes" doc:"Scopes a caller needs."`
	Owner       string   `yaml:"owner" doc:"Who answers for it."`
	Tags        []string `yaml:"tags" doc:"Labels."`
}

// Column says what a column of the result is.
type Column struct {
	Name        string `yaml:"name" required:"true" doc:"Name of the column."`
	Description string `yaml:"description" required:"true" doc:"What it is: models read this."`
}

// Param is one parameter of a statement.
type Param struct {
	Name        string   `yaml:"name" required:"true" doc:"Name, as in :name."`
	Type        string   `yaml:"type" enum:"string,integer,number,boolean,date,timestamp,uuid" default:"string" doc:"Type of the value. SQLite has no times: there a timestamp becomes text in UTC such as 2026-07-28T12:00:00Z."`
	Description string   `yaml:"description" doc:"What it is: models read this."`
	Required    bool     `yaml:"required" doc:"Whether callers must give it; otherwise it is NULL, or its default."`
	Default     any      `yaml:"default" doc:"Value when it is not given."`
	Enum        []string `yaml:"enum" doc:"Allowed values (strings)."`
	Minimum     *float64 `yaml:"minimum" doc:"Least number."`
	Maximum     *float64 `yaml:"maximum" doc:"Greatest number."`
	MinLength   *int     `yaml:"min_length" doc:"Least characters."`
	MaxLength   *int     `yaml:"max_length" doc:"Most characters [1000]."`
	Pattern     string   `yaml:"pattern" doc:"Regular expression (RE2) that a string must match."`
}

// Page is keyset pagination: the next page starts after the keys of the last row.
type Page struct {
	Key  []string `yaml:"key" doc:"Columns that order the rows, together unique; also the names in :after_KEY."`
	Size int      `yaml:"size" default:"20" doc:"Rows of a page unless the caller asks otherwise."`
	Max  int      `yaml:"max" default:"100" doc:"Most rows of a page."`
}

// A Backend is a database and its statements. It is safe for concurrent use.
type Backend struct {
	name   string
	engine *engine
	caps   []*call.Capability
}

// Module declares the kind of backend for the configuration.
func Module() module.Module {
	return module.Backend("sql", "A database: declared SQL statements as tools.", func(ctx context.Context, name string, c Config, env module.Env) (call.Backend, error) {
		return Open(ctx, name, c, env)
	})
}

// Open opens the database and checks every statement on it. The error joins all problems, each
// with the place in the configuration.
func Open(ctx context.Context, name string, c Config, env module.Env) (*Backend, error) {
	at := func(path string, err error) error { return fmt.Errorf("%s: %w", env.Position(path), err) }
	if c.MaxRows < 1 || c.MaxBytes < 1 || c.Timeout <= 0 || c.MaxConnections < 1 {
		return nil, at("", errors.New("max_rows, max_bytes, timeout and max_connections must be above zero"))
	}
	b := &Backend{name: name}
	var err error
	switch {
	case c.Driver != "sqlite" && c.Driver != "postgres":
		return nil, at("driver", fmt.Errorf("%q is not a driver; use sqlite or postgres", c.Driver))
	case c.Driver == "sqlite" && c.File == "":
		return nil, at("driver", errors.New("sqlite needs file"))
	case c.Driver == "sqlite":
		b.engine, err = openSQLite(ctx, resolve(env.Dir, c.File), c.MaxConnections)
		if err != nil {
			return nil, at("file", err)
		}
	case c.DSN.IsZero():
		return nil, at("driver", errors.New("postgres needs dsn"))
	default:
		b.engine, err = openPostgres(ctx, c.DSN.Reveal(), c.MaxConnections, c.Timeout)
		if err != nil {
			return nil, at("dsn", err)
		}
	}
	if c.Init != "" {
		if err := b.init(ctx, c, env); err != nil {
			return nil, errors.Join(at("init", err), b.Close())
		}
	}
	var problems []error
	taken := map[string]bool{}
	for i := range c.Tools {
		path := fmt.Sprintf("tools[%d]", i)
		if n := c.Tools[i].Name; n == "" || taken[n] {
			problems = append(problems, at(path+".name", fmt.Errorf("tool %q: each tool needs a name of its own", n)))
			continue
		}
		taken[c.Tools[i].Name] = true
		capability, where, err := b.declare(ctx, &c, &c.Tools[i])
		if err != nil {
			problems = append(problems, at(path+where, fmt.Errorf("tool %q: %w", c.Tools[i].Name, err)))
			continue
		}
		capability.Origin = env.Position(path)
		b.caps = append(b.caps, capability)
	}
	if err := errors.Join(problems...); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

func resolve(dir, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

// init runs the script if the database has no tables yet; a crash in between leaves it empty.
func (b *Backend) init(ctx context.Context, c Config, env module.Env) error {
	if b.engine.postgres {
		return errors.New("is for sqlite; a PostgreSQL database has its own migrations")
	}
	script, err := os.ReadFile(resolve(env.Dir, c.Init))
	if err != nil {
		return err
	}
	tx, err := b.engine.write.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	var tables int
	err = tx.QueryRowContext(ctx, "SELECT count(*) FROM sqlite_master").Scan(&tables)
	if err == nil && tables == 0 {
		env.Progress("filling "+b.name, 0, 1)
		if _, err = tx.ExecContext(ctx, string(script)); err == nil {
			if err = tx.Commit(); err == nil {
				env.Progress("filling "+b.name, 1, 1)
			}
			return err
		}
	}
	return errors.Join(err, tx.Rollback())
}

// Name implements call.Backend.
func (b *Backend) Name() string { return b.name }

// Capabilities implements call.Backend.
func (b *Backend) Capabilities(context.Context) ([]*call.Capability, error) { return b.caps, nil }

// Close closes the connections. Running statements end with an error.
func (b *Backend) Close() error { return b.engine.close() }

// declare checks one statement and makes its tool. where is the setting that an error is about.
func (b *Backend) declare(ctx context.Context, c *Config, t *Tool) (capability *call.Capability, where string, err error) {
	effect := map[string]call.Effect{"read": call.Read, "write": call.Write, "destructive": call.Destructive}[cmp.Or(t.Effect, "read")]
	if effect == call.Unknown {
		return nil, ".effect", fmt.Errorf("%q is not an effect; use read, write or destructive", t.Effect)
	}
	s := &statement{backend: b, tool: t, config: c, write: effect != call.Read}
	var names []string
	if s.text, names, err = rewrite(t.SQL, b.engine.postgres); err != nil {
		return nil, ".sql", err
	}
	verb, err := checkVerb(s.text, b.engine.postgres)
	if err != nil {
		return nil, ".sql", err
	}
	if where, err := s.settings(); err != nil {
		return nil, where, err
	}
	if where, err := s.bind(names); err != nil {
		return nil, where, err
	}
	checked, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	d, err := b.engine.describe(checked, s.text, len(names))
	if err != nil {
		return nil, ".sql", err
	}
	d.writes = d.writes || verb
	if where, err := s.fits(d); err != nil {
		return nil, where, err
	}
	capability = &call.Capability{
		Kind: call.Tool, Name: t.Name, Title: t.Title, Description: t.Description,
		Effect: effect, Depends: call.OnArguments, Scopes: t.Scopes, Owner: t.Owner, Tags: t.Tags,
		Input: s.inputSchema(), Output: s.outputSchema(d), Run: s.run,
	}
	return capability, "", nil
}
