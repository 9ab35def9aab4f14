package newel_test

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"
)

const modulePath = "newel.dev/newel"

// floors are the house from the ground up: a package imports only from floors below its own, never
// from its own. A package that stands on none fails: a new idea gets a place here first.
var floors = []string{
	"internal/faultpoint",
	"call internal/lane internal/strictjson internal/secret internal/nearest internal/pattern internal/egress internal/certs internal/identity/claim internal/identity/jws",
	"internal/module internal/catalog internal/process internal/policy internal/audit internal/redact internal/answer internal/identity/dpop",
	"internal/identity/issuer internal/redact/*",
	"internal/config internal/guard/* internal/task internal/backend/* internal/identity/* internal/toolsearch internal/policy/*",
	"internal/guard internal/mcpwire internal/cluster internal/stream internal/durable internal/slo",
	"internal/door/* internal/store/*",
	"internal/assembly",
	".",
	"modules/* neweltest",
	"cmd/* test/*",
}

// floorOf returns the floor of a package, or -1.
func floorOf(pkg string) int {
	for i, f := range floors {
		for _, pattern := range strings.Fields(f) {
			if pattern == pkg {
				return i
			}
			if prefix, ok := strings.CutSuffix(pattern, "/*"); ok && strings.HasPrefix(pkg, prefix+"/") {
				return i
			}
		}
	}
	return -1
}

// sources calls f for every Go file of the module.
func sources(t *testing.T, f func(pkg, file string, syntax *ast.File)) {
	t.Helper()
	err := filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			name := d.Name()
			if p != "." && (strings.HasPrefix(name, ".") || name == "testdata" || name == "node_modules" || name == "data" || p == "test/bench" || p == "test/opa" || p == "test/acme" || p == "test/alerts" || p == "test/s3") {
				return fs.SkipDir // modules of their own
			}
			return nil
		}
		if !strings.HasSuffix(p, ".go") {
			return nil
		}
		syntax, err := parser.ParseFile(token.NewFileSet(), p, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		f(path.Dir(filepath.ToSlash(p)), p, syntax)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestFloors reads the files itself: Go's test cache does not see what a child process read.
func TestFloors(t *testing.T) {
	sources(t, func(pkg, file string, syntax *ast.File) {
		if strings.HasSuffix(file, "_test.go") {
			return
		}
		mine := floorOf(pkg)
		if mine < 0 {
			t.Errorf("%s: the package %s stands on no floor; which existing noun does it belong to?", file, pkg)
			return
		}
		for _, imp := range syntax.Imports {
			full := strings.Trim(imp.Path.Value, `"`)
			if full != modulePath && !strings.HasPrefix(full, modulePath+"/") {
				continue
			}
			other := strings.TrimPrefix(strings.TrimPrefix(full, modulePath), "/")
			if other == "" {
				other = "."
			}
			if other == "internal/guard" && strings.HasPrefix(pkg, "internal/guard/") || floorOf(other) >= mine && !sameFamily(pkg, other) {
				t.Errorf("%s: %s (floor %d) must not import %s (floor %d)", file, pkg, mine, other, floorOf(other))
			}
		}
	})
}

// sameFamily allows the tests above the house to use each other.
func sameFamily(a, b string) bool {
	return strings.HasPrefix(a, "test/") && strings.HasPrefix(b, "test/")
}

func TestHabits(t *testing.T) {
	documented := map[string]bool{}
	seen := map[string]string{}
	sources(t, func(pkg, file string, syntax *ast.File) {
		if strings.HasSuffix(file, "_test.go") {
			sleeps, virtual := false, false
			for _, imp := range syntax.Imports {
				virtual = virtual || imp.Path.Value == `"testing/synctest"`
			}
			ast.Inspect(syntax, func(n ast.Node) bool {
				if s, ok := n.(*ast.SelectorExpr); ok && s.Sel.Name == "Sleep" {
					if x, ok := s.X.(*ast.Ident); ok && x.Name == "time" {
						sleeps = true
					}
				}
				return true
			})
			if sleeps && !virtual {
				t.Errorf("%s: sleeps without testing/synctest", file)
			}
			return
		}
		seen[pkg] = file
		documented[pkg] = documented[pkg] || syntax.Doc != nil
		for _, d := range syntax.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil && f.Name.Name == "init" {
				t.Errorf("%s: func init: values are handed in, nothing registers itself", file)
			}
		}
	})
	for pkg, file := range seen {
		if !documented[pkg] {
			t.Errorf("%s: the package %s has no comment", file, pkg)
		}
	}
}

// forbidden is what the library must not carry into its users' programs, and why.
var forbidden = map[string]string{
	"github.com/jackc/pgx":                "a database driver belongs to those who use that database",
	"modernc.org/sqlite":                  "a database driver belongs to those who use that database",
	"github.com/redis/go-redis":           "an engine belongs to those who use it",
	"github.com/minio/minio-go":           "a bucket belongs to those who use one",
	"google.golang.org/grpc":              "it doubles the size of a small server",
	"go.opentelemetry.io/otel/exporters":  "the program chooses where telemetry goes",
	"go.opentelemetry.io/otel/sdk":        "the program chooses where telemetry goes",
	"github.com/prometheus/client_golang": "the program chooses where metrics go",
	"github.com/spf13/cobra":              "the command line is the daemon's",
	"github.com/goccy/go-yaml":            "the configuration is the daemon's",
	"github.com/zricethezav/gitleaks":     "the rules for secrets bring a parser and a configuration of their own; the daemon hands them in",
	"github.com/spf13/viper":              "it comes with the rules for secrets",
	"testing":                             "tests stay out of programs",
}

func TestLibraryStaysSmall(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for dep := range bytes.Lines(out) {
		d := strings.TrimSpace(string(dep))
		for f, why := range forbidden {
			if d == f || strings.HasPrefix(d, f+"/") {
				t.Errorf("the library depends on %s: %s", d, why)
			}
		}
	}
}
