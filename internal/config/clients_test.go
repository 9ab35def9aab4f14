package config

import (
	"strings"
	"testing"
)

func TestImport(t *testing.T) {
	for name, tt := range map[string]struct{ src, want, notes string }{
		"Claude": {`{"mcpServers": {"files": {"command": "npx", "args": ["-y", "server", "/tmp"], "env": {"API_TOKEN": "s3cret", "MODE": "fast"}}}}`,
			"mcpServers:\n  files:\n    command: npx\n    args:\n    - -y\n    - server\n    - /tmp\n    env:\n      API_TOKEN: ${env:API_TOKEN}\n      MODE: fast\n", ""},
		"VS Code": {"{\n// servers of this workspace\n\"servers\": {\"gh\": {\"type\": \"http\", \"url\": \"https://x.example/mcp\", \"headers\": {\"Authorization\": \"Bearer ${input:github-token}\"},},},\n\"inputs\": [{\"id\": \"github-token\"}] /* asked */}",
			"mcpServers:\n  gh:\n    url: https://x.example/mcp\n    headers:\n      Authorization: Bearer ${env:GITHUB_TOKEN}\n", ""},
		"Cursor": {`{"mcpServers": {"a": {"url": "http://127.0.0.1:1/mcp", "headers": {"Authorization": "Bearer abc"}, "autoApprove": ["x"]}, "b": {"command": "x", "disabled": true}, "c": {"type": "sse", "url": "http://x/sse"}}}`,
			"mcpServers:\n  a:\n    url: http://127.0.0.1:1/mcp\n    headers:\n      Authorization: Bearer ${env:A_AUTHORIZATION}\n  c:\n    type: sse\n    url: http://x/sse\n", "autoApprove|disabled"},
	} {
		im, err := Import([]byte(tt.src))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if string(im.YAML) != tt.want {
			t.Errorf("%s: got\n%s\nwant\n%s", name, im.YAML, tt.want)
		}
		all := strings.Join(im.Notes, "\n")
		for want := range strings.SplitSeq(tt.notes, "|") {
			if !strings.Contains(all, want) {
				t.Errorf("%s: notes %q, want %q in them", name, all, want)
			}
		}
		if strings.Contains(string(im.YAML), "s3cret") || strings.Contains(string(im.YAML), "abc") {
			t.Errorf("%s: a secret is in the configuration:\n%s", name, im.YAML)
		}
	}
	for src, want := range map[string]string{
		`{"x": 1}`: "names no servers", `[1`: "not JSON", `{"mcpServers": {"a": {}}}`: "no server of the file",
		`{"mcpServers": {"a": {"command": 7}}}`: `server "a"`, `{"mcpServers": 7}`: "not a JSON object",
	} {
		if _, err := Import([]byte(src)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", src, err, want)
		}
	}
}

func FuzzImport(f *testing.F) {
	f.Add(`{"mcpServers": {"a": {"command": "x", /* c */ "args": ["//",], "env": {"T": "${input:x}"}}}}`)
	f.Add(`{"servers": {"a": {"url": "http://x", "headers": {"Authorization": "Bearer x"}}}} // end`)
	f.Fuzz(func(t *testing.T, src string) {
		im, err := Import([]byte(src))
		if err == nil && len(im.YAML) == 0 {
			t.Error("neither an error nor a configuration")
		}
	})
}
