package sqldb

import (
	"database/sql"
	"fmt"
	"regexp"
	"strings"
	"testing"

	"modernc.org/sqlite"
)

// strange is what SQLite reads in ways of its own, and rewrite leaves to it or refuses.
var strange = regexp.MustCompile(`[^\x09\x0a\x0d\x20-\x7e]|[$@#?]|::|:[0-9]`)

// FuzzRewriteAgainstSQLite: SQLite knows :name itself. What it accepts as written, it accepts
// rewritten, with the same names for its columns once they have names.
func FuzzRewriteAgainstSQLite(f *testing.F) {
	for _, s := range []string{
		":a", ":a + :b || ':c'", `":x"`, "`:x`", "[:x]", "1 -- :a\n + :b", "1 /* :a /* */ + :b", "'it''s :a' || :a", "x':a'", "x'00'", "1;", "1; -- end", "1; 2",
		"(SELECT :a)", "id FROM t WHERE id=:id AND name=':id'", "'", "/*", "-", "1/:a", "1-:a", "1--:a", "e'\\':a'", ":a:b", ": a", "\":a\"\"\"", "[a]]:b]",
	} {
		f.Add(s)
	}
	db, err := sql.Open("sqlite", "file::memory:?_dqs=0")
	if err != nil {
		f.Fatal(err)
	}
	db.SetMaxOpenConns(1)
	f.Cleanup(func() { _ = db.Close() })
	c, err := db.Conn(f.Context())
	if err != nil {
		f.Fatal(err)
	}
	if _, err := c.ExecContext(f.Context(), "CREATE TABLE t (id INTEGER, name TEXT)"); err != nil {
		f.Fatal(err)
	}
	prepare := func(text string) (columns int, err error) {
		err = c.Raw(func(driver any) error {
			conn, ok := driver.(interface {
				ColumnInfo(query string) ([]sqlite.ColumnInfo, error)
			})
			if !ok {
				return fmt.Errorf("an unexpected driver %T", driver)
			}
			infos, err := conn.ColumnInfo(text)
			columns = len(infos)
			return err
		})
		return columns, err
	}
	f.Fuzz(func(t *testing.T, expr string) {
		if strange.MatchString(expr) {
			return
		}
		expr = "SELECT " + expr
		text, names, err := rewrite(expr, false)
		want, wantErr := prepare(expr)
		if err != nil {
			return // refused at start
		}
		got, gotErr := prepare(text)
		if (gotErr == nil) != (wantErr == nil) || got != want {
			t.Fatalf("%q gives %d columns, %v; rewritten %q %d, %v", expr, want, wantErr, text, got, gotErr)
		}
		if gotErr != nil {
			return
		}
		// As many parameters as names: one value more or fewer is an error.
		args := make([]any, len(names))
		rows, err := c.QueryContext(t.Context(), "EXPLAIN "+text, args...)
		if err != nil {
			t.Fatalf("%q with %d values: %v", text, len(args), err)
		}
		used := map[int64]bool{}
		for rows.Next() {
			var op string
			var p1 int64
			var skip any
			if err := rows.Scan(&skip, &op, &p1, &skip, &skip, &skip, &skip, &skip); err != nil {
				t.Fatal(err)
			}
			if op == "Variable" {
				used[p1] = true
			}
		}
		if err := rows.Close(); err != nil {
			t.Fatal(err)
		}
		for n := range used {
			if n > int64(len(names)) {
				t.Errorf("%q uses parameter %d of %s", text, n, strings.Join(names, ", "))
			}
		}
	})
}
