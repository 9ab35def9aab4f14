package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func results(t *testing.T, scenarios map[string]string) Report {
	t.Helper()
	dir := t.TempDir()
	for name, checks := range scenarios {
		d := filepath.Join(dir, "server-"+name+"-2026-11-21T00-51-46-690Z")
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(d, "checks.json"), []byte(checks), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	r := Report{}
	if err := r.Read("2026-07-28", dir); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestOnlySuccessPasses(t *testing.T) {
	const expected = "2026-07-28 ping 1\n"
	for _, tt := range []struct {
		name           string
		scenarios      map[string]string
		passed, failed int
	}{
		{"success", map[string]string{"ping": `[{"id":"a","status":"SUCCESS"}]`}, 1, 0},
		{"failure", map[string]string{"ping": `[{"id":"a","status":"FAILURE"}]`}, 0, 1},
		{"warning", map[string]string{"ping": `[{"id":"a","status":"SUCCESS"},{"id":"b","status":"WARNING"}]`}, 1, 1},
		{"skipped", map[string]string{"ping": `[{"id":"a","status":"SKIPPED"}]`}, 0, 1},
		{"remark", map[string]string{"ping": `[{"id":"a","status":"SUCCESS"},{"id":"b","status":"INFO"}]`}, 1, 0},
		{"nothing checked", map[string]string{"ping": `[]`}, 0, 1},
		{"scenario missing", nil, 0, 1},
		{"extension left out", map[string]string{"ping": `[{"id":"a","status":"SUCCESS"}]`, "sep-2640-x": `[{"id":"a","status":"FAILURE"}]`}, 1, 0},
		{"new scenario fails", map[string]string{"ping": `[{"id":"a","status":"SUCCESS"}]`, "new": `[{"id":"a","status":"FAILURE"}]`}, 1, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			passed, failed, err := results(t, tt.scenarios).Print(&out, []byte(expected))
			if err != nil || passed != tt.passed || failed != tt.failed {
				t.Errorf("got %d passed, %d failed, %v; want %d, %d\n%s", passed, failed, err, tt.passed, tt.failed, out.Bytes())
			}
			if strings.Contains(out.String(), "FAIL") != (tt.failed > 0) {
				t.Errorf("the table does not say what the counts say:\n%s", out.Bytes())
			}
		})
	}
}

func TestEmptyExpectationIsAnError(t *testing.T) {
	if _, _, err := (Report{}).Print(&bytes.Buffer{}, []byte("# nothing\n")); err == nil {
		t.Error("an empty scenarios.txt let everything pass")
	}
}
