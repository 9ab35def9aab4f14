package config_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"golang.org/x/tools/txtar"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/config"
	"newel.dev/newel/internal/module"
	"newel.dev/newel/internal/secret"
)

var update = flag.Bool("update", false, "rewrite the expected problems of testdata/bad/*.txtar")

type shop struct {
	DSN     secret.String `yaml:"dsn" required:"true" doc:"How to connect."`
	Timeout time.Duration `yaml:"timeout" default:"15s" doc:"Longest run."`
	Mode    string        `yaml:"mode" enum:"fast,safe" default:"safe" doc:"How."`
	Tools   []struct {
		Name  string   `yaml:"name" required:"true" doc:"Name."`
		Limit *float64 `yaml:"limit" doc:"Most."`
		Any   any      `yaml:"any" doc:"Anything."`
	} `yaml:"tools" doc:"Tools."`
}

func modules() []module.Module {
	return []module.Module{module.Backend("shop", "A shop.", func(context.Context, string, shop, module.Env) (call.Backend, error) { return nil, nil })}
}

func secrets(kind, name string) (string, error) {
	if name == "missing" {
		return "", fmt.Errorf("the %s %s is not set", kind, name)
	}
	return kind + " of " + name, nil
}

// TestBad loads every configuration of testdata/bad and compares what is said of it.
func TestBad(t *testing.T) {
	files, err := filepath.Glob("testdata/bad/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatal("no files", err)
	}
	for _, file := range files {
		a, err := txtar.ParseFile(file)
		if err != nil {
			t.Fatal(err)
		}
		out := txtar.Archive{Comment: a.Comment}
		for i, f := range a.Files {
			if strings.HasSuffix(f.Name, " problems") {
				continue
			}
			_, err := config.Load("c.yaml", f.Data, modules(), secrets)
			var problems config.Problems
			if !errors.As(err, &problems) {
				t.Errorf("%s: %s: got %v", file, f.Name, err)
				continue
			}
			got := problems.Error() + "\n"
			want := ""
			if i+1 < len(a.Files) && a.Files[i+1].Name == f.Name+" problems" {
				want = string(a.Files[i+1].Data)
			}
			if !*update && got != want {
				t.Errorf("%s: %s: got\n%s\nwant\n%s", file, f.Name, got, want)
			}
			out.Files = append(out.Files, f, txtar.File{Name: f.Name + " problems", Data: []byte(got)})
		}
		if *update {
			if err := os.WriteFile(file, txtar.Format(&out), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}

const good = `
server:
  name: x
  instructions: |
    Two
    lines.
listen: 127.0.0.1:1
limits: {max_message_bytes: 64KiB, call_timeout: 1m30s, max_depth: 10}
backends:
  - type: shop
    name: one
    dsn: ${env:DSN}
    mode: fast
    tools:
      - {name: a, limit: 1.5, any: 7}
      - name: "b"
        any: text
`

func TestGood(t *testing.T) {
	f, err := config.Load("dir/c.yaml", []byte(good), modules(), secrets)
	if err != nil {
		t.Fatal(err)
	}
	c := f.Config
	s, ok := c.Backends[0].Settings.(shop)
	if !ok {
		t.Fatalf("settings are %T", c.Backends[0].Settings)
	}
	if c.Server.Instructions != "Two\nlines.\n" || c.Limits.MaxMessageBytes != 64<<10 || c.Limits.CallTimeout != 90*time.Second || c.Limits.MaxDepth != 10 ||
		c.Limits.MaxStreams != 10_000 || !c.Telemetry.Prometheus || c.Telemetry.LogLevel != "info" {
		t.Errorf("got %+v", c)
	}
	if s.DSN.Reveal() != "env of DSN" || s.Timeout != 15*time.Second || s.Mode != "fast" || *s.Tools[0].Limit != 1.5 || s.Tools[0].Any != int64(7) || s.Tools[1].Any != "text" {
		t.Errorf("got %+v", s)
	}
	for path, want := range map[string]string{"": "dir/c.yaml:10:5", "tools[1]": "dir/c.yaml:16:9", "tools[0].limit": "dir/c.yaml:15:26", "tools[1].nope.deeper": "dir/c.yaml:16:9"} {
		if got := f.BackendPosition(&c.Backends[0], path); got != want {
			t.Errorf("%q stands at %s, want %s", path, got, want)
		}
	}
	if f.Dir != "dir" {
		t.Errorf("dir is %q", f.Dir)
	}
}

// The schema accepts what Load accepts, and refuses unknown settings and inline secrets.
func TestSchema(t *testing.T) {
	raw, err := config.Schema(modules())
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(string(raw)))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("urn:x", doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("urn:x")
	if err != nil {
		t.Fatal(err)
	}
	for in, ok := range map[string]bool{
		`{"backends":[{"type":"shop","name":"a","dsn":"${env:X}","tools":[{"name":"t"}]}]}`: true,
		`{"backends":[{"type":"shop","name":"a","dsn":"postgres://inline"}]}`:               false,
		`{"backends":[{"type":"nope","name":"a"}]}`:                                         false,
		`{"backends":[],"lisen":"x"}`:                                                       false,
		`{"backends":[],"limits":{"call_timeout":"5 parsecs"}}`:                             false,
	} {
		v, err := jsonschema.UnmarshalJSON(strings.NewReader(in))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Validate(v); (err == nil) != ok {
			t.Errorf("%s: %v", in, err)
		}
	}
}

func TestSecretsAreLookedUp(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "pw"), []byte("hunter2\n"), 0o600), os.WriteFile(filepath.Join(dir, "empty"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	look := config.Secrets(func(n string) (string, bool) { return "value", n == "SET" }, dir)
	for _, tt := range [][3]string{{"env", "SET", "value"}, {"env", "UNSET", "UNSET is not set"}, {"file", "pw", "hunter2"}, {"file", "empty", "is empty"}, {"file", "nope", "cannot be read"}} {
		v, err := look(tt[0], tt[1])
		if got := fmt.Sprint(v, err); !strings.Contains(got, tt[2]) {
			t.Errorf("%s:%s: %s", tt[0], tt[1], got)
		}
	}
}

// FuzzLoad: any bytes give a configuration or problems with positions in the file, and no panic.
func FuzzLoad(f *testing.F) {
	f.Add([]byte(good))
	f.Add([]byte("a: &x [*x]\n<<: *x\n--- \n"))
	f.Add([]byte("backends: [{type: shop, name: {a: b}}]"))
	f.Fuzz(func(t *testing.T, src []byte) {
		_, err := config.Load("c.yaml", src, modules(), secrets)
		var problems config.Problems
		if err != nil && (!errors.As(err, &problems) || len(problems) == 0) {
			t.Fatalf("not problems: %v", err)
		}
		lines := strings.Count(string(src), "\n") + 2
		for _, p := range problems {
			if p.Line < 1 || p.Line > lines {
				t.Errorf("%v stands outside of the file", p)
			}
		}
	})
}
