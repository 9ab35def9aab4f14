package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/guard/effect"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/postgres"
	"newel.dev/newel/modules/standard"
	"newel.dev/newel/test/engines"
)

// On PostgreSQL the command writes beside the nodes that run: no server of this configuration is here.
func TestAuditOfDatabase(t *testing.T) {
	dsn, dir := engines.Postgres(t), t.TempDir()
	key, err := secret.OpenKey(filepath.Join(dir, "key"))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "newel.yaml")
	if err := os.WriteFile(file, []byte("state: {engine: postgres, dsn: \"${env:DSN}\", key_file: key}\nmcpServers: {a: {command: a}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	db, err := postgres.Open(t.Context(), secret.New(dsn), key)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close() //nolint:errcheck // the server ends with the test
	box, err := key.Box("newel stored values")
	if err != nil {
		t.Fatal(err)
	}
	v := audit.NewValue("arguments", []byte(`{"to":"bob"}`))
	private, err := effect.SealValues(box, "op", []audit.Value{v})
	if err != nil {
		t.Fatal(err)
	}
	b, err := (&audit.Record{Act: audit.Intent, Capability: "pay", Operation: "op", Digests: []audit.Digest{v.Digest()}, Time: audit.Time(time.Now())}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.Append(t.Context(), []audit.Entry{{Record: b, Private: private}}); err != nil {
		t.Fatal(err)
	}
	newel := func(want int, args ...string) (stdout, stderr string) {
		t.Helper()
		var out, errs bytes.Buffer
		code := run(t.Context(), append(args, "--config", file), environment{in: strings.NewReader(""), out: &out, err: &errs, modules: standard.Modules(), getenv: func(name string) (string, bool) {
			return dsn, name == "DSN"
		}})
		if code != want {
			t.Fatalf("%q ended with %d, want %d: %s", args, code, want, &errs)
		}
		return out.String(), errs.String()
	}
	exec := func(statement string) {
		t.Helper()
		conn, err := pgx.Connect(t.Context(), dsn)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.WithoutCancel(t.Context())) //nolint:errcheck // it was used
		if _, err := conn.Exec(t.Context(), statement); err != nil {
			t.Fatal(err)
		}
	}
	// A log that takes no more records shows no values.
	exec("ALTER TABLE newel_audit ADD CONSTRAINT full_up CHECK (idx < 1)")
	if out, errs := newel(exitFailed, "audit", "show", "0"); out != "" || !strings.Contains(errs, "cannot be written down, so they are not shown") {
		t.Errorf("it shows %q, and says %q", out, errs)
	}
	if out, _ := newel(exitFailed, "audit", "export", "--values"); out != "" {
		t.Errorf("it exports %q", out)
	}
	exec("ALTER TABLE newel_audit DROP CONSTRAINT full_up")
	if out, _ := newel(exitOK, "audit", "show", "0"); !strings.Contains(out, `"to": "bob"`) {
		t.Errorf("it shows %s", out)
	}
	newel(exitOK, "audit", "erase", "--tool", "pay", "--reason", "asked for", "--yes")
	if out, _ := newel(exitOK, "audit", "show", "0"); strings.Contains(out, "bob") || !strings.Contains(out, `"reason": "asked for"`) || !strings.Contains(out, `"proof"`) {
		t.Errorf("it shows %s", out)
	}
	out, _ := newel(exitOK, "audit", "search")
	for i, want := range []string{"intent", "audit_read", "erased"} {
		if lines := strings.Split(strings.TrimSpace(out), "\n"); len(lines) != 3 || !strings.Contains(lines[i], want) {
			t.Errorf("the log has %s", out)
		}
	}
	if out, _ := newel(exitOK, "audit", "verify"); !strings.Contains(out, "The log is whole") {
		t.Errorf("verify says %s", out)
	}
	// Somebody restores the row from a backup.
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context())) //nolint:errcheck // it was used
	if _, err := conn.Exec(t.Context(), "UPDATE newel_audit SET private = $1 WHERE idx = 0", private); err != nil {
		t.Fatal(err)
	}
	if out, errs := newel(exitFailed, "audit", "verify"); !strings.Contains(out, "The log is whole") || !strings.Contains(errs, "those of record 0 were erased, and they are there") {
		t.Errorf("verify says %s %s", out, errs)
	}
}
