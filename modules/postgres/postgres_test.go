package postgres_test

import (
	"path/filepath"
	"strings"
	"testing"

	module "newel.dev/newel/modules/postgres"
)

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	whole := module.Options{DSN: "postgres://u:secret@127.0.0.1:1/d", KeyFile: filepath.Join(dir, "key"), Heads: filepath.Join(dir, "head")}
	for name, spoil := range map[string]func(o *module.Options){
		"no database": func(o *module.Options) { o.DSN = "" }, "no key": func(o *module.Options) { o.KeyFile = "" },
		"no file for heads": func(o *module.Options) { o.Heads = "" }, "nobody there": func(*module.Options) {},
	} {
		o := whole
		spoil(&o)
		if _, err := module.Open(t.Context(), o); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
