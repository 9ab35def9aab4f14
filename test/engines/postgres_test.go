package engines_test

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"newel.dev/newel/test/engines"
)

func TestPostgres(t *testing.T) {
	s := engines.Start(t)
	a, b := s.Database(t), s.Database(t)
	run(t, a, "CREATE TABLE things (id int)")
	run(t, b, "CREATE TABLE things (id int)") // another database: the name is free

	s.Stop()
	s.Stop() // once more does nothing
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if conn, err := pgx.Connect(ctx, a); err == nil {
		t.Errorf("a stopped server takes connections: %v", conn.Close(ctx))
	}

	s.Restart(t)
	run(t, a, "SELECT * FROM things")
}

func run(t *testing.T, dsn, text string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), text); err != nil {
		t.Error(err)
	}
	if err := conn.Close(t.Context()); err != nil {
		t.Error(err)
	}
}
