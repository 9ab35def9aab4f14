package main

import (
	"strings"
	"testing"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/internal/config"
	"newel.dev/newel/modules/standard"
)

func TestRedactor(t *testing.T) {
	token := "ghp_" + "x7Kq2LmN9pRt4VwY6zAb8CdE1fGh3JkM5nPq" // of nobody
	value := `{"pin":1234,"note":"E-77 has ` + token + `"}`
	for _, c := range []struct{ text, want, err string }{
		{"audit: {}", `{"pin":1234,"note":"E-77 has [redacted:github-pat]"}`, ""},
		{"audit: {redact: {secrets: false}}", value, ""},
		{"audit:\n  redact:\n    secrets: false\n    members: [pin]\n    patterns: [{name: employee, pattern: 'E-\\d+'}]", `{"pin":"[redacted:pin]","note":"[redacted:employee] has ` + token + `"}`, ""},
		{"audit: {redact: {patterns: [{name: a, pattern: '('}]}}", "", "c.yaml:1:17: redact: the pattern \"a\""},
		{"audit: {redact: {members: ['*']}}", "", "every member"},
	} {
		f, err := config.Load("c.yaml", []byte(c.text+"\nmcpServers: {a: {command: a}}\n"), standard.Modules(), nil)
		if err != nil {
			t.Fatal(err)
		}
		r, err := redactor(f)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: %v", c.text, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if got := string(r.JSON(jsontext.Value(value), nil)); got != c.want {
			t.Errorf("%s\n got %s\nwant %s", c.text, got, c.want)
		}
	}
}
