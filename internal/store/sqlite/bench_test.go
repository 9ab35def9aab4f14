package sqlite

import (
	"context"
	"path/filepath"
	"testing"

	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/storetest"
)

func benchDB(b *testing.B) *DB {
	b.Helper()
	db, err := Open(b.Context(), filepath.Join(b.TempDir(), "state.db"), secret.RandomKey(), 0)
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
// many writers, in grouped commits. They have a file each.
func BenchmarkWrites(b *testing.B) {
	plain := benchDB(b)
	if _, err := plain.conn.ExecContext(b.Context(), "CREATE TABLE plain (key BLOB NOT NULL UNIQUE, data BLOB NOT NULL) STRICT"); err != nil {
		b.Fatal(err)
	}
	storetest.Compare(b, benchDB(b), func(ctx context.Context, rows [][]byte) error {
		args := make([]any, 0, 2*len(rows))
		for _, r := range rows {
			args = append(args, r[:32], r[32:])
		}
		return plain.within(ctx, func() error {
			return plain.insert(ctx, "INSERT OR ROLLBACK INTO plain (key, data) VALUES ", "(?,?)", 2, args)
		})
	}, nil)
}
