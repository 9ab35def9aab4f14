package sqldb

import (
	"database/sql"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/test/engines"
)

const values = `
CREATE TABLE v (id BIGINT PRIMARY KEY, f DOUBLE PRECISION, t TEXT, born TIMESTAMP, n INTEGER);
INSERT INTO v VALUES (9007199254740993, 0.1, 'a', '2026-01-01 10:00:00', 1), (9007199254740994, 0.2, 'b', '2026-01-01 11:00:00', NULL),
 (9007199254740995, 0.3, 'c', '2026-01-02 00:00:00', NULL), (9007199254740996, 1e300, 'd', '2026-01-03 00:00:00.123', NULL), (9007199254740997, 1.0, 'e', '2026-01-04', 2);
`

// both opens the given tools on both engines, over the tables of script.
func both(t *testing.T, script string, list func(postgres bool) []Tool, test func(t *testing.T, postgres bool, w world)) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "init.sql"), []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Run("sqlite", func(t *testing.T) {
		c := defaults(Config{Driver: "sqlite", File: "x.db", Init: "init.sql"})
		c.Tools = list(false)
		test(t, false, world{"sqlite", c, env(dir)})
	})
	t.Run("postgres", func(t *testing.T) {
		dsn := engines.Postgres(t)
		db, err := sql.Open("pgx", dsn)
		if err != nil {
			t.Fatal(err)
		}
		_, err = db.ExecContext(t.Context(), script)
		if err := errors.Join(err, db.Close()); err != nil {
			t.Fatal(err)
		}
		c := defaults(Config{Driver: "postgres", DSN: secret.New(dsn)})
		c.Tools = list(true)
		test(t, true, world{"postgres", c, env(dir)})
	})
}

func openAs(t *testing.T, w world) *Backend {
	t.Helper()
	b, err := Open(t.Context(), "db", w.config, w.env)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

func (b *Backend) do(t *testing.T, tool, args string) (*call.Result, *call.Error) {
	t.Helper()
	for _, c := range b.caps {
		if c.Name == tool {
			r, err := c.Run(t.Context(), &call.Call{Kind: call.Tool, Name: tool, Args: []byte(args)})
			return r, call.AsError(err)
		}
	}
	t.Fatalf("no tool %s", tool)
	return nil, nil
}

// Keys of every type come back from the cursor as they were: each row once, in order.
func TestEveryKeyTypePages(t *testing.T) {
	columns := map[string]string{"id": "bigint", "f": "double precision", "t": "text", "born": "timestamp"}
	both(t, values, func(postgres bool) []Tool {
		var out []Tool
		for c, typ := range columns {
			null, key := ":after_"+c, c
			if postgres {
				null += "::" + typ
			} else if c == "born" {
				key = "CAST(born AS TEXT)" // SQLite has no type for times: the text is the key
			}
			out = append(out, Tool{
				Name: c, SQL: "SELECT " + key + " AS " + c + ", t AS letter FROM v WHERE " + null + " IS NULL OR " + c + " > " + null + " ORDER BY v." + c + " LIMIT :limit",
				Page: Page{Key: []string{c}, Size: 1, Max: 2},
			})
		}
		return out
	}, func(t *testing.T, _ bool, w world) {
		b := openAs(t, w)
		for c := range columns {
			want, got, args := "abcde", "", `{}`
			if c == "f" {
				want = "abced"
			}
			for range len(want) + 1 {
				r, e := b.do(t, c, args)
				if e != nil {
					t.Fatalf("%s: %v", c, e)
				}
				var page struct {
					Rows []struct{ Letter string }
					Next string `json:"next_cursor"`
				}
				if err := json.Unmarshal(r.Structured, &page, json.MatchCaseInsensitiveNames(true)); err != nil {
					t.Fatal(err)
				}
				for _, row := range page.Rows {
					got += row.Letter
				}
				if page.Next == "" {
					break
				}
				args = `{"cursor":"` + page.Next + `"}`
			}
			if got != want {
				t.Errorf("%s: rows %q, want %q", c, got, want)
			}
		}
	})
}

// A forged cursor gets no further than an error that says what to do.
func TestForgedCursors(t *testing.T) {
	both(t, values, func(postgres bool) []Tool {
		after := ":after_id"
		if postgres {
			after += "::bigint"
		}
		return []Tool{{
			Name: "p", SQL: "SELECT id FROM v WHERE " + after + " IS NULL OR id > " + after + " ORDER BY id LIMIT :limit",
			Page: Page{Key: []string{"id"}, Size: 1, Max: 2},
		}}
	}, func(t *testing.T, _ bool, w world) {
		b := openAs(t, w)
		r, e := b.do(t, "p", `{}`)
		if e != nil {
			t.Fatal(e)
		}
		var page struct {
			Next string `json:"next_cursor"`
		}
		if err := json.Unmarshal(r.Structured, &page); err != nil {
			t.Fatal(err)
		}
		raw, err := base64.RawURLEncoding.DecodeString(page.Next)
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range []string{`{"a":1}`, `[1]`, `null`, `true`, `"x"`, `"1 OR 1=1"`, `1e999`, `1.5`, `99999999999999999999`, `"\u0000"`} {
			forged := strings.Replace(string(raw), "[9007199254740993]", "["+key+"]", 1)
			if forged == string(raw) {
				t.Fatalf("the cursor is %s", raw)
			}
			r, e := b.do(t, "p", `{"cursor":"`+base64.RawURLEncoding.EncodeToString([]byte(forged))+`"}`)
			if e == nil && !strings.HasPrefix(string(r.Structured), `{"rows":[`) || e != nil && e.Code != call.Invalid {
				t.Errorf("%s: %v %v", key, r, e)
			}
		}
	})
}

// A page whose last key is NULL would start anew for ever.
func TestNullKeyIsNoCursor(t *testing.T) {
	both(t, values, func(postgres bool) []Tool {
		after := ":after_n"
		if postgres {
			after += "::int"
		}
		return []Tool{{
			Name: "p", SQL: "SELECT n, t FROM v WHERE " + after + " IS NULL OR n > " + after + " ORDER BY t LIMIT :limit",
			Page: Page{Key: []string{"n"}, Size: 2, Max: 2},
		}}
	}, func(t *testing.T, _ bool, w world) {
		if r, e := openAs(t, w).do(t, "p", `{}`); e == nil || e.Code != call.Internal {
			t.Errorf("got %v %v", r, e)
		}
	})
}

// Values that the schema lets through and the database does not take.
func TestValuesOutOfRange(t *testing.T) {
	both(t, values, func(bool) []Tool {
		param := func(name, typ string) []Param { return []Param{{Name: name, Type: typ, Required: true}} }
		return []Tool{
			{Name: "int", SQL: "SELECT t FROM v WHERE n = :n", Params: param("n", "integer")},
			{Name: "float", SQL: "SELECT t FROM v WHERE f = :f", Params: param("f", "number")},
			{Name: "date", SQL: "SELECT t FROM v WHERE born > :d", Params: param("d", "date")},
			{Name: "time", SQL: "SELECT t FROM v WHERE born > :d", Params: param("d", "timestamp")},
		}
	}, func(t *testing.T, postgres bool, w world) {
		b := openAs(t, w)
		for _, tt := range []struct {
			tool, args string
			code       call.Code
		}{
			{"int", `{"n":2147483647}`, call.OK},
			{"int", `{"n":2147483648}`, call.OK}, // over int4; no row has it
			{"int", `{"n":-9223372036854775809}`, call.Invalid},
			{"int", `{"n":1e3}`, call.OK},
			{"int", `{"n":1e400}`, call.Invalid},
			{"float", `{"f":1e308}`, call.OK},
			{"float", `{"f":1e400}`, call.Invalid},
			{"float", `{"f":"NaN"}`, call.Invalid},
			{"date", `{"d":"2026-02-30"}`, call.Invalid},
			{"date", `{"d":"0001-01-01"}`, call.OK},
			{"date", `{"d":"infinity"}`, call.Invalid},
			{"time", `{"d":"2026-01-01T00:00:00+25:00"}`, call.Invalid},
			{"time", `{"d":"9999-12-31T23:59:59.999999999Z"}`, call.OK},
			{"time", `{"d":"2026-01-01 00:00:00"}`, call.Invalid},
		} {
			_, e := b.do(t, tt.tool, tt.args)
			code := call.OK
			if e != nil {
				code = e.Code
			}
			if code != tt.code && !(postgres && tt.args == `{"n":2147483648}` && code == call.Invalid) {
				t.Errorf("%s %s: %v, want %s", tt.tool, tt.args, e, tt.code)
			}
		}
	})
}

// What is no plain query is refused at start, and so is a write that calls itself a read. One bad
// statement does not hide or harm the others.
func TestStatementsThatAreNoQueries(t *testing.T) {
	texts := []string{
		"CREATE TABLE x (a int)", "COMMIT", "ROLLBACK", "BEGIN", "VACUUM", "EXPLAIN ANALYZE DELETE FROM v", "/* a */ -- b\n COMMIT",
		"PRAGMA query_only = 0", "PRAGMA user_version", "ATTACH 'x.db' AS x", "VACUUM INTO 'x.db'",
		"COPY v TO '/x'", "COPY v TO PROGRAM 'id'", "SET transaction_read_only = off", "DO $$ BEGIN END $$", "CALL x()", "LISTEN x", "PREPARE p AS SELECT 1",
		"", "-- nothing", ";", "(((", "SELECT",
		"WITH gone AS (DELETE FROM v RETURNING id) SELECT id FROM gone", "INSERT INTO v (id) VALUES (1) RETURNING id", "SELECT id FROM v FOR UPDATE", "REPLACE INTO v (id) VALUES (1)",
		`SELECT "nope" FROM v`, // SQLite would read an unknown name in double quotes as a string
	}
	both(t, values, func(postgres bool) []Tool {
		var out []Tool
		for i, text := range texts {
			if postgres && text == "SELECT" {
				text = "SELECT FROM" // a SELECT of nothing is a query there
			}
			out = append(out, Tool{Name: fmt.Sprint("bad", i), SQL: text}, Tool{Name: fmt.Sprint("good", i), SQL: fmt.Sprint("SELECT id, ", i, " AS i FROM v")})
		}
		return out
	}, func(t *testing.T, _ bool, w world) {
		b, err := Open(t.Context(), "db", w.config, w.env)
		if err == nil {
			t.Fatal("all are taken", b.Close())
		}
		for i, text := range texts {
			if !strings.Contains(err.Error(), fmt.Sprintf("newel.yaml:tools[%d].", 2*i)) {
				t.Errorf("%q is taken", text)
			}
			if strings.Contains(err.Error(), fmt.Sprintf("newel.yaml:tools[%d].", 2*i+1)) {
				t.Errorf("after %q a good statement is refused: %v", text, err)
				break
			}
		}
	})
}

// Mistakes in declarations that no database finds.
func TestDeclarationMistakes(t *testing.T) {
	one, two := 1, 2
	low, high := 1.0, 2.0
	p := func(p Param) Tool {
		p.Name = "n"
		return Tool{Name: "t", SQL: "SELECT id FROM v WHERE n = :n", Params: []Param{p}}
	}
	c := defaults(Config{Driver: "sqlite", File: "x.db", Init: "init.sql"})
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "init.sql"), []byte(values), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		where string
		tools []Tool
	}{
		{"tools[0].params[0].type", []Tool{p(Param{Type: "strng"})}},
		{"tools[0].params[0].pattern", []Tool{p(Param{Pattern: "("})}},
		{"tools[0].params[0].minimum", []Tool{p(Param{Type: "integer", Minimum: &high, Maximum: &low})}},
		{"tools[0].params[0].min_length", []Tool{p(Param{MinLength: &two, MaxLength: &one})}},
		{"tools[0].params[0].minimum", []Tool{p(Param{Minimum: &low})}},
		{"tools[0].params[0].pattern", []Tool{p(Param{Type: "integer", Pattern: "a"})}},
		{"tools[0].params[0].default", []Tool{p(Param{Enum: []string{"a"}, Default: "b"})}},
		{"tools[0].params[1].name", []Tool{{Name: "t", SQL: "SELECT id FROM v WHERE n = :n", Params: []Param{{Name: "n"}, {Name: "n"}}}}},
		{"tools[0].result", []Tool{{Name: "t", SQL: "SELECT id FROM v", Result: "rowz"}}},
		{"tools[1].name", []Tool{{Name: "t", SQL: "SELECT id FROM v"}, {Name: "t", SQL: "SELECT id FROM v"}}},
		{"tools[0].name", []Tool{{SQL: "SELECT id FROM v"}}},
		{"tools[0].page", []Tool{{Name: "t", Effect: "write", SQL: "UPDATE v SET n = :after_id WHERE id < :limit RETURNING id", Page: Page{Key: []string{"id"}, Size: 1, Max: 1}}}},
		{"tools[0].page", []Tool{{Name: "t", Result: "row", SQL: "SELECT id FROM v WHERE id > :after_id LIMIT :limit", Page: Page{Key: []string{"id"}, Size: 1, Max: 1}}}},
		{"tools[0].page.key", []Tool{{Name: "t", SQL: "SELECT born FROM v WHERE born > :after_born LIMIT :limit", Page: Page{Key: []string{"born"}, Size: 1, Max: 1}}}},
	} {
		c.Tools = tt.tools
		b, err := Open(t.Context(), "db", c, env(dir))
		if err == nil {
			t.Errorf("%s: taken", tt.where)
			_ = b.Close()
		} else if !strings.Contains(err.Error(), "newel.yaml:"+tt.where+":") {
			t.Errorf("%s: %v", tt.where, err)
		}
	}
	c.Tools, c.Driver = nil, "mysql"
	if _, err := Open(t.Context(), "db", c, env(dir)); err == nil || !strings.Contains(err.Error(), "newel.yaml:driver:") {
		t.Errorf("mysql: %v", err)
	}
}

// A server that dies: calls fail as retryable while it is away, and work when it is back.
func TestServerDies(t *testing.T) {
	server := engines.Start(t)
	c := defaults(Config{Driver: "postgres", DSN: secret.New(server.Database(t))})
	c.Tools = []Tool{
		{Name: "one", Result: "row", SQL: "SELECT 1 AS one"},
		{Name: "sleep", Result: "row", SQL: "SELECT 1 AS one FROM pg_sleep(4)"},
	}
	b := openAs(t, world{"postgres", c, env(".")})
	if _, e := b.do(t, "one", `{}`); e != nil {
		t.Fatal(e)
	}
	sleeping := make(chan *call.Error)
	go func() {
		_, e := b.do(t, "sleep", `{}`)
		sleeping <- e
	}()
	waitFor(t, func() bool { return b.engine.read.Stats().InUse > 0 })
	server.Stop()
	if e := <-sleeping; e == nil || e.Code != call.Unavailable || !e.Retryable {
		t.Errorf("in the middle: %v", e)
	}
	for range 3 {
		if _, e := b.do(t, "one", `{}`); e == nil || e.Code != call.Unavailable || !e.Retryable {
			t.Errorf("away: %v", e)
		}
	}
	server.Restart(t)
	waitFor(t, func() bool { _, e := b.do(t, "one", `{}`); return e == nil })
}

// A table that changes under prepared statements: at most one call has to be repeated.
func TestSchemaChanges(t *testing.T) {
	dsn := engines.Postgres(t)
	db, err := sql.Open("pgx", dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	exec := func(text string) {
		if _, err := db.ExecContext(t.Context(), text); err != nil {
			t.Fatal(err)
		}
	}
	exec("CREATE TABLE x (a int); INSERT INTO x VALUES (1)")
	c := defaults(Config{Driver: "postgres", DSN: secret.New(dsn)})
	c.Tools = []Tool{{Name: "x", Result: "row", SQL: "SELECT * FROM x"}}
	b := openAs(t, world{"postgres", c, env(".")})
	if _, e := b.do(t, "x", `{}`); e != nil {
		t.Fatal(e)
	}
	exec("ALTER TABLE x ALTER COLUMN a TYPE bigint")
	if _, e := b.do(t, "x", `{}`); e != nil && (e.Code != call.Unavailable || !e.Retryable) {
		t.Errorf("got %v", e)
	}
	if _, e := b.do(t, "x", `{}`); e != nil {
		t.Errorf("again: %v", e)
	}
}

// Writers that wait for another one's lock wait no longer than the call.
func TestLockedDatabase(t *testing.T) {
	both(t, values, func(bool) []Tool {
		return []Tool{
			{Name: "w", Effect: "write", Result: "affected", SQL: "UPDATE v SET n = 7 WHERE t = 'a'"},
			{Name: "r", Result: "row", SQL: "SELECT n FROM v WHERE t = 'a'"},
		}
	}, func(t *testing.T, postgres bool, w world) {
		w.config.Timeout = 300 * time.Millisecond
		b := openAs(t, w)
		driver, dsn := "sqlite", "file:"+filepath.Join(w.env.Dir, "x.db")+"?_txlock=immediate"
		if postgres {
			driver, dsn = "pgx", w.config.DSN.Reveal()
		}
		db, err := sql.Open(driver, dsn)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = db.Close() }()
		tx, err := db.BeginTx(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.ExecContext(t.Context(), "UPDATE v SET n = 5"); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if _, e := b.do(t, "w", `{}`); e == nil || !e.Retryable || time.Since(start) > 3*time.Second {
			t.Errorf("locked: %v after %v", e, time.Since(start))
		}
		if r, e := b.do(t, "r", `{}`); e != nil || string(r.Structured) != `{"row":{"n":1}}` {
			t.Errorf("readers do not wait: %v %v", r, e)
		}
		if err := tx.Rollback(); err != nil {
			t.Fatal(err)
		}
		if _, e := b.do(t, "w", `{}`); e != nil {
			t.Errorf("free: %v", e)
		}
	})
}

// A write that is cancelled while it runs leaves nothing behind.
func TestCancelledWriteIsRolledBack(t *testing.T) {
	both(t, values, func(postgres bool) []Tool {
		slow := "UPDATE v SET n = (WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 1000000000) SELECT count(*) FROM c)"
		if postgres {
			slow = "WITH changed AS (UPDATE v SET n = 99 RETURNING id) SELECT count(*) AS changed FROM changed, pg_sleep(60)"
		}
		return []Tool{
			{Name: "slow", Effect: "write", Result: map[bool]string{true: "row", false: "affected"}[postgres], SQL: slow},
			{Name: "sum", Result: "row", SQL: "SELECT sum(n) AS n FROM v"},
		}
	}, func(t *testing.T, _ bool, w world) {
		w.config.Timeout = 100 * time.Millisecond
		b := openAs(t, w)
		if _, e := b.do(t, "slow", `{}`); e == nil || e.Code != call.Timeout {
			t.Errorf("slow: %v", e)
		}
		if r, e := b.do(t, "sum", `{}`); e != nil || string(r.Structured) != `{"row":{"n":3}}` {
			t.Errorf("sum: %v %v", r, e)
		}
	})
}

// What the driver gives for every type is JSON that keeps the value.
func TestPostgresTypes(t *testing.T) {
	c := defaults(Config{Driver: "postgres", DSN: secret.New(engines.Postgres(t))})
	tests := []struct{ expr, want string }{
		{"123456789012345678901234567890.123456789::numeric", `123456789012345678901234567890.123456789`},
		{"'NaN'::numeric", `"NaN"`},
		{"9223372036854775807::bigint", `9223372036854775807`},
		{"0.1::float8", `0.1`}, {"0.1::float4", `0.1`}, {"'Infinity'::float8", `"Infinity"`}, {"'NaN'::float8", `"NaN"`}, {"'-Infinity'::float4", `"-Infinity"`},
		{"'\\x00ff'::bytea", `"AP8="`},
		{"'2026-01-02'::date", `"2026-01-02"`}, {"'2026-01-02 03:04:05.5'::timestamp", `"2026-01-02T03:04:05.5Z"`}, {"'2026-01-02 03:04:05+02'::timestamptz", `"2026-01-02T01:04:05Z"`},
		{"'infinity'::timestamptz", `"infinity"`}, {"'infinity'::date", `"infinity"`},
		{"'6f9619ff-8b86-d011-b42d-00cf4fc964ff'::uuid", `"6f9619ff-8b86-d011-b42d-00cf4fc964ff"`},
		{`'{"b": 1, "a": 1e2}'::json`, `{"b": 1, "a": 1e2}`}, {`'{"b":1}'::jsonb`, `{"b": 1}`},
		{`'{"a":1,"a":2}'::json`, `"{\"a\":1,\"a\":2}"`}, // duplicate names: text, not JSON
		{"'null'::jsonb", `null`},
		{"true", `true`}, {"NULL", `null`}, {"'a'::char(3)", `"a  "`}, {"'12:30'::time", `"12:30:00"`}, {"'127.0.0.1'::inet", `"127.0.0.1"`},
		{"ARRAY[1,2]", `"{1,2}"`},
	}
	for i, tt := range tests {
		c.Tools = append(c.Tools, Tool{Name: fmt.Sprint("t", i), Result: "row", SQL: "SELECT " + tt.expr + " AS v"})
	}
	b := openAs(t, world{"postgres", c, env(".")})
	for i, tt := range tests {
		r, e := b.do(t, fmt.Sprint("t", i), `{}`)
		if e != nil {
			t.Errorf("%s: %v", tt.expr, e)
		} else if got := string(r.Structured); got != `{"row":{"v":`+tt.want+`}}` {
			t.Errorf("%s: got %s, want %s", tt.expr, got, tt.want)
		}
	}
}

func waitFor(t *testing.T, ready func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	late := time.After(10 * time.Second)
	for !ready() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatal("waited for too long")
		}
	}
}
