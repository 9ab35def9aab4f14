package sqldb

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	_ "github.com/jackc/pgx/v5/stdlib"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/module"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/test/engines"
)

const script = `
CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, price NUMERIC(20,2), big BIGINT, born TIMESTAMP, data TEXT, active BOOLEAN);
INSERT INTO item VALUES (1,'one',1.50,9007199254740993,'2026-01-02 03:04:05','{"a": [1,2]}',TRUE),(2,'two',NULL,NULL,NULL,'plain',FALSE);
`

// world is one kind of database, filled by script and with items up to 60.
type world struct {
	name   string
	config Config
	env    module.Env
}

func env(dir string) module.Env {
	return module.Env{Dir: dir, Logger: slog.New(slog.DiscardHandler), Position: func(p string) string { return "newel.yaml:" + p }, Progress: func(string, int, int) {}}
}

func defaults(c Config) Config {
	c.MaxRows, c.MaxBytes, c.Timeout, c.MaxConnections = 50, 1<<16, 5*time.Second, 4
	return c
}

func worlds(t *testing.T) []world {
	t.Helper()
	dir := t.TempDir()
	var more strings.Builder
	for i := 3; i <= 60; i++ {
		fmt.Fprintf(&more, "INSERT INTO item (id, name) VALUES (%d, 'n%03d');", i, i)
	}
	if err := os.WriteFile(filepath.Join(dir, "init.sql"), []byte(script+more.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	dsn := engines.Postgres(t)
	db, err := sql.Open("pgx", dsn)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.ExecContext(t.Context(), script+more.String()); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	return []world{
		{"sqlite", defaults(Config{Driver: "sqlite", File: "x.db", Init: "init.sql"}), env(dir)},
		{"postgres", defaults(Config{Driver: "postgres", DSN: secret.New(dsn)}), env(dir)},
	}
}

// tools are declared on both engines; $T is a cast for parameters that may be NULL.
func tools(postgres bool) []Tool {
	cast := func(s, typ string) string {
		if postgres {
			return s + "::" + typ
		}
		return s
	}
	ten := 10.0
	return []Tool{
		{Name: "get", Result: "row", None: "no such item", JSON: []string{"data"}, SQL: "SELECT id, name, price, big, born, data, active FROM item WHERE id = :id", Params: []Param{{Name: "id", Type: "integer", Required: true}}},
		{Name: "find", SQL: "SELECT id, name FROM item WHERE name = :name OR " + cast(":name", "text") + " IS NULL ORDER BY id", Params: []Param{{Name: "name"}}},
		{Name: "page", SQL: "SELECT id, name FROM item WHERE (" + cast(":after_id", "bigint") + " IS NULL OR id > :after_id) AND id >= :min ORDER BY id LIMIT :limit",
			Params: []Param{{Name: "min", Type: "integer", Default: 0, Maximum: &ten}}, Page: Page{Key: []string{"id"}, Size: 7, Max: 50}},
		{Name: "rename", Effect: "write", Result: "row", None: "no such item", SQL: "UPDATE item SET name = :name WHERE id = :id RETURNING id, name", Params: []Param{{Name: "id", Type: "integer", Required: true}, {Name: "name", Required: true}}},
		{Name: "remove", Effect: "destructive", Result: "affected", SQL: "DELETE FROM item WHERE id = :id", Params: []Param{{Name: "id", Type: "integer", Required: true}}},
		{Name: "all", SQL: "SELECT a.id, b.id AS b FROM item a, item b"},
		{Name: "slow", SQL: "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000000) SELECT count(*) AS c FROM n"},
	}
}

// open opens a world with its tools and returns how to call one through the catalog's checks.
func open(t *testing.T, w world) func(ctx context.Context, tool, args string) (*call.Result, error) {
	t.Helper()
	w.config.Tools = tools(w.name == "postgres")
	b, err := Open(t.Context(), "db", w.config, w.env)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	caps, err := b.Capabilities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s, err := catalog.Build([]catalog.Source{{Backend: "db", Capabilities: caps}})
	if err != nil {
		t.Fatal(err)
	}
	return func(ctx context.Context, tool, args string) (*call.Result, error) {
		c := s.Tool(tool)
		if err := c.Check(jsontext.Value(args)); err != nil {
			return nil, err
		}
		return c.Run(ctx, &call.Call{Kind: call.Tool, Name: tool, Args: jsontext.Value(args)})
	}
}

func TestEngines(t *testing.T) {
	for _, w := range worlds(t) {
		t.Run(w.name, func(t *testing.T) {
			do := open(t, w)
			ctx := t.Context()
			want := func(tool, args, want string) {
				t.Helper()
				r, err := do(ctx, tool, args)
				if err != nil {
					t.Errorf("%s %s: %v", tool, args, err)
				} else if string(r.Structured) != want {
					t.Errorf("%s %s: got %s\nwant %s", tool, args, r.Structured, want)
				}
			}
			refuse := func(tool, args string, code call.Code, text string) {
				t.Helper()
				r, err := do(ctx, tool, args)
				if err == nil {
					t.Errorf("%s %s: went through: %s", tool, args, r.Structured)
				} else if e := call.AsError(err); e.Code != code || !strings.Contains(e.Message, text) {
					t.Errorf("%s %s: %v %q, want %v %q", tool, args, e.Code, e.Message, code, text)
				}
			}
			price := `1.50`
			born := `"2026-01-02T03:04:05Z"`
			active := `true`
			if w.name == "sqlite" {
				price = `1.5`
				active = `true`
			}
			want("get", `{"id":1}`, `{"row":{"id":1,"name":"one","price":`+price+`,"big":9007199254740993,"born":`+born+`,"data":{"a": [1,2]},"active":`+active+`}}`)
			want("find", `{"name":"x' OR '1'='1"}`, `{"rows":[],"row_count":0}`)
			want("find", `{"name":"two"}`, `{"rows":[{"id":2,"name":"two"}],"row_count":1}`)
			refuse("find", `{}`, call.TooLarge, "more than 50 rows")
			refuse("get", `{"id":99}`, call.Failed, "no such item")
			refuse("get", `{"id":"1"}`, call.Invalid, "type integer")
			refuse("get", `{"id":99999999999999999999}`, call.Invalid, "64 bits")
			refuse("find", `{"name":"a\u0000b"}`, call.Invalid, "NUL")
			refuse("page", `{"min":11}`, call.Invalid, "min")
			refuse("page", `{"cursor":"nonsense"}`, call.Invalid, "cursor")
			refuse("all", `{}`, call.TooLarge, "more than 50 rows")
			refuse("rename", `{"id":2,"name":"one"}`, call.Failed, "refused the change")
			refuse("rename", `{"id":99,"name":"x"}`, call.Failed, "no such item")
			want("rename", `{"id":2,"name":"zwei"}`, `{"row":{"id":2,"name":"zwei"}}`)
			want("find", `{"name":"zwei"}`, `{"rows":[{"id":2,"name":"zwei"}],"row_count":1}`)
			want("remove", `{"id":60}`, `{"affected":1}`)
			refuse("remove", `{"id":60}`, call.Failed, "nothing was changed")

			// All pages, each row once.
			seen, cursor := 0, ""
			for {
				args := `{"limit":9}`
				if cursor != "" {
					args = `{"limit":9,"cursor":"` + cursor + `"}`
				}
				r, err := do(ctx, "page", args)
				if err != nil {
					t.Fatal(err)
				}
				var page struct {
					Rows []struct{ ID int }
					Next string `json:"next_cursor"`
				}
				if err := json.Unmarshal(r.Structured, &page, json.MatchCaseInsensitiveNames(true)); err != nil {
					t.Fatal(err)
				}
				for _, row := range page.Rows {
					if seen++; row.ID != seen {
						t.Fatalf("row %d has id %d", seen, row.ID)
					}
				}
				if cursor = page.Next; cursor == "" {
					break
				}
				refuse("page", `{"min":1,"cursor":"`+cursor+`"}`, call.Invalid, "does not belong")
			}
			if seen != 59 {
				t.Errorf("%d rows on all pages", seen)
			}

			// A cancelled call ends at once.
			short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
			defer cancel()
			start := time.Now()
			_, err := do(short, "slow", `{}`)
			if e := call.AsError(err); e == nil || e.Code != call.Timeout || time.Since(start) > 4*time.Second {
				t.Errorf("got %v after %v", err, time.Since(start))
			}
		})
	}
}

func TestDeclarationsAreChecked(t *testing.T) {
	id := []Param{{Name: "id", Type: "integer"}}
	tests := []struct {
		tool        Tool
		where, want string
		engines     string
	}{
		{Tool{SQL: "SELEC 1"}, "tools[0].sql", "SELEC cannot be a tool", "both"},
		{Tool{SQL: "SELECT id FROM item WHERE"}, "tools[0].sql", "incomplete", "sqlite"},
		{Tool{SQL: "SELECT id FROM item WHERE"}, "tools[0].sql", "syntax", "postgres"},
		{Tool{SQL: "SELECT nope FROM item"}, "tools[0].sql", "nope", "both"},
		{Tool{SQL: "SELECT 1 AS a; SELECT 2"}, "tools[0].sql", "more than one statement", "both"},
		{Tool{SQL: "SELECT id FROM item WHERE id = :id"}, "tools[0].sql", ":id is not declared", "both"},
		{Tool{SQL: "SELECT 1 AS a", Params: id}, "tools[0].params[0]", "not used", "both"},
		{Tool{SQL: "SELECT 'a"}, "tools[0].sql", "no end", "both"},
		{Tool{SQL: "SELECT id FROM item WHERE id = $1"}, "tools[0].sql", "named parameters", "postgres"},
		{Tool{SQL: "SELECT id FROM item WHERE id = ?"}, "tools[0].sql", "named parameters", "sqlite"},
		{Tool{SQL: "DELETE FROM item"}, "tools[0].effect", "the statement writes", "both"},
		{Tool{SQL: "SELECT 1 AS a, 2 AS a"}, "tools[0].sql", "two columns", "both"},
		{Tool{SQL: "SELECT id FROM item WHERE name = :id", Params: id}, "tools[0].params", "uses it as", "postgres"},
		{Tool{SQL: "SELECT id FROM item", Page: Page{Key: []string{"id"}, Size: 1, Max: 1}}, "tools[0].page.key", "start anew", "both"},
		{Tool{SQL: "SELECT id FROM item", Result: "affected"}, "tools[0].result", "rows or row", "both"},
		{Tool{SQL: "SELECT id FROM item", JSON: []string{"x"}}, "tools[0].sql", `no column "x"`, "both"},
		{Tool{SQL: "SELECT id FROM item WHERE id = :id", Params: []Param{{Name: "id", Type: "integer", Default: "x"}}}, "tools[0].params[0].default", "whole number", "both"},
	}
	for _, w := range worlds(t) {
		for _, tt := range tests {
			if tt.engines != "both" && tt.engines != w.name {
				continue
			}
			tt.tool.Name = "t"
			w.config.Tools = []Tool{tt.tool}
			_, err := Open(t.Context(), "db", w.config, w.env)
			if err == nil || !strings.Contains(err.Error(), "newel.yaml:"+tt.where+":") || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s: %s: got %v, want %s and %q", w.name, tt.tool.SQL, err, tt.where, tt.want)
			}
		}
	}
}

func TestDatabaseCannotBeOpened(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "garbage.db"), []byte(strings.Repeat("not a database", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]Config{
		"cannot be opened":      {Driver: "sqlite", File: "garbage.db"},
		"cannot be reached":     {Driver: "postgres", DSN: secret.New("postgres://u:hunter2@127.0.0.1:1/x")},
		"not one of PostgreSQL": {Driver: "postgres", DSN: secret.New("postgres://u:hunter2@[bad")},
		"needs file":            {Driver: "sqlite"},
		"needs dsn":             {Driver: "postgres"},
	} {
		_, err := Open(t.Context(), "db", defaults(c), env(dir))
		if err == nil || !strings.Contains(err.Error(), name) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("got %v, want %q", err, name)
		}
	}
}

// A script that fails leaves nothing behind, so that the next start tries again.
func TestInitIsAllOrNothing(t *testing.T) {
	dir := t.TempDir()
	write := func(s string) {
		if err := os.WriteFile(filepath.Join(dir, "init.sql"), []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := defaults(Config{Driver: "sqlite", File: "x.db", Init: "init.sql"})
	c.Tools = []Tool{{Name: "t", SQL: "SELECT a FROM t"}}
	write("CREATE TABLE t (a); INSERT INTO nope VALUES (1)")
	if _, err := Open(t.Context(), "db", c, env(dir)); err == nil || !strings.Contains(err.Error(), "newel.yaml:init") {
		t.Fatalf("got %v", err)
	}
	write("CREATE TABLE t (a); INSERT INTO t VALUES (1)")
	for range 2 { // the second start does not run it again
		b, err := Open(t.Context(), "db", c, env(dir))
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOrdersExample(t *testing.T) {
	c := defaults(Config{Driver: "sqlite", File: filepath.Join(t.TempDir(), "orders.db"), Init: "../../../examples/orders/schema.sql"})
	c.Tools = []Tool{{Name: "count", Result: "row", SQL: "SELECT (SELECT count(*) FROM orders) AS orders, (SELECT count(*) FROM order_items) AS items, (SELECT count(*) FROM customers) AS customers"}}
	b, err := Open(t.Context(), "orders", c, env("."))
	if err != nil {
		t.Fatal(err)
	}
	r, err := b.caps[0].Run(t.Context(), &call.Call{})
	if err = errors.Join(err, b.Close()); err != nil {
		t.Fatal(err)
	}
	if got := string(r.Structured); got != `{"row":{"orders":3000,"items":7500,"customers":240}}` {
		t.Error(got)
	}
}

// FuzzRewrite: what comes out of the rewriter has no named parameters left outside of quotes, and
// rewriting what holds none changes nothing but white space.
func FuzzRewrite(f *testing.F) {
	for _, s := range []string{"SELECT :a, ':b', \":c\", a::text -- :d\n, /* :e /* :f */ */ :a", "SELECT $$ :a $$, $x$ :b $x$, E'\\':a', :b", "SELECT [a:b], `c:d`, :e;", "'", "/*", "$$", ":", "::", "a$1"} {
		f.Add(s, true)
		f.Add(s, false)
	}
	f.Fuzz(func(t *testing.T, s string, postgres bool) {
		text, names, err := rewrite(s, postgres)
		if err != nil {
			return
		}
		if len(names) > 0 {
			return
		}
		if !strings.HasPrefix(strings.TrimSpace(s), text) {
			t.Errorf("%q became %q", s, text)
		}
	})
}
