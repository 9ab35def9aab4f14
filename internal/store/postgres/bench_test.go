package postgres

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/storetest"
	"newel.dev/newel/test/engines"
)

func benchDB(b *testing.B) *DB {
	b.Helper()
	db, err := Open(b.Context(), secret.New(engines.StartSynced(b).Database(b)), secret.RandomKey())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := db.Close(); err != nil {
			b.Error(err)
		}
	})
	return db
}

// BenchmarkWrites compares calls with the full guarantee with what the engine itself can do: rows of
// the size that one such call leaves behind, with a unique key as long as that of an operation, of as
// many writers, in grouped commits; and in commits of their own, of which the server syncs many at once.
func BenchmarkWrites(b *testing.B) {
	db := benchDB(b)
	if _, err := db.pool.Exec(b.Context(), "CREATE TABLE plain (key bytea PRIMARY KEY, data bytea NOT NULL)"); err != nil {
		b.Fatal(err)
	}
	each := db.pool.Config()
	each.MaxConns = storetest.Writers
	own, err := pgxpool.NewWithConfig(b.Context(), each)
	if err != nil {
		b.Fatal(err)
	}
	defer own.Close()
	storetest.Compare(b, db, func(ctx context.Context, rows [][]byte) error {
		keys, data := make([][]byte, len(rows)), make([][]byte, len(rows))
		for i, r := range rows {
			keys[i], data[i] = r[:32], r[32:]
		}
		q := &pgx.Batch{}
		q.Queue("INSERT INTO plain SELECT * FROM unnest($1::bytea[], $2::bytea[])", keys, data)
		return db.pool.SendBatch(ctx, q).Close()
	}, func(ctx context.Context, row []byte) error {
		_, err := own.Exec(ctx, "INSERT INTO plain VALUES ($1, $2)", row[:32], row[32:])
		return err
	})
}
