package config

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/goccy/go-yaml"

	"newel.dev/newel/call"
)

// An Imported file is the servers of a client's configuration as one of ours.
type Imported struct {
	YAML    []byte            // the configuration; secrets are references in it
	Secrets map[string]string // what stood in the file in their place, by name of the variable
	Needed  []string          // variables that the configuration refers to, sorted
	Notes   []string          // what could not be taken over, and why
}

// clientServer is one entry of a client's file, in any dialect.
type clientServer struct {
	Command  string            `json:"command"`
	Args     []string          `json:"args"`
	Env      map[string]string `json:"env"`
	Cwd      string            `json:"cwd"`
	URL      string            `json:"url"`
	Server   string            `json:"serverUrl"` // Windsurf
	Headers  map[string]string `json:"headers"`
	Type     string            `json:"type"`
	Disabled bool              `json:"disabled"`
	Unknown  jsontext.Value    `json:",embed"`
}

// Import reads the file of a client: Claude Desktop and Code, Cursor (mcpServers), or VS Code
// (servers, alone or under mcp). Comments and trailing commas are taken, as those clients do.
func Import(src []byte) (*Imported, error) {
	if len(src) > MaxBytes {
		return nil, fmt.Errorf("the file has %d bytes, over the limit of %d", len(src), MaxBytes)
	}
	type servers struct {
		MCPServers jsontext.Value `json:"mcpServers"`
		Servers    jsontext.Value `json:"servers"`
	}
	var file struct {
		servers
		MCP servers `json:"mcp"`
	}
	if err := json.Unmarshal(plainJSON(src), &file); err != nil {
		return nil, fmt.Errorf("the file is not JSON: %w", err)
	}
	var list jsontext.Value
	for _, l := range []jsontext.Value{file.MCPServers, file.Servers, file.MCP.Servers, file.MCP.MCPServers} {
		if l != nil && list == nil {
			list = l
		}
	}
	if list == nil {
		return nil, errors.New(`the file names no servers: neither "mcpServers" (Claude, Cursor) nor "servers" (VS Code) is in it`)
	}
	out := &Imported{Secrets: map[string]string{}}
	var entries yaml.MapSlice
	var problems []error
	err := call.EachMember(list, func(name string, v jsontext.Value) {
		var s clientServer
		if err := json.Unmarshal(v, &s); err != nil {
			problems = append(problems, fmt.Errorf("server %q: %w", name, err))
			return
		}
		if e := out.server(name, &s); e != nil {
			entries = append(entries, yaml.MapItem{Key: name, Value: e})
		}
	})
	if err := errors.Join(append(problems, err)...); err != nil {
		return nil, err
	}
	if len(entries) == 0 {
		return nil, errors.New("no server of the file can be served: " + strings.Join(out.Notes, "; "))
	}
	out.YAML, err = yaml.Marshal(yaml.MapSlice{{Key: serversKey, Value: entries}})
	slices.Sort(out.Needed)
	out.Needed = slices.Compact(out.Needed)
	return out, err
}

// server returns the entry of one server, or nil if it is left out.
func (im *Imported) server(name string, s *clientServer) yaml.MapSlice {
	note := func(format string, args ...any) {
		im.Notes = append(im.Notes, fmt.Sprintf("server %q: ", name)+fmt.Sprintf(format, args...))
	}
	if s.URL == "" {
		s.URL = s.Server
	}
	switch {
	case s.Disabled:
		note("left out: it is disabled")
		return nil
	case (s.Command == "") == (s.URL == ""):
		note("left out: it needs either a command or a url")
		return nil
	}
	var e yaml.MapSlice
	add := func(key string, v any) { e = append(e, yaml.MapItem{Key: key, Value: v}) }
	if s.Command != "" {
		add("command", im.local(s.Command))
		if len(s.Args) > 0 {
			args := make([]string, len(s.Args))
			for i, a := range s.Args {
				args[i] = im.local(a)
				if strings.Contains(args[i], "${") {
					note("the argument %q refers to a value of the client; write it out", a)
				}
			}
			add("args", args)
		}
		if len(s.Env) > 0 {
			add("env", im.table(s.Env, func(key string) string { return variable(key) }))
		}
		if s.Cwd != "" {
			add("cwd", im.local(s.Cwd))
		}
	} else {
		if s.Type == "sse" {
			add(transportAlias, s.Type)
		}
		add("url", im.local(s.URL))
		if len(s.Headers) > 0 {
			add("headers", im.table(s.Headers, func(key string) string { return variable(name + "_" + key) }))
		}
	}
	if s.Unknown != nil {
		var names []string
		_ = call.EachMember(s.Unknown, func(n string, _ jsontext.Value) { names = append(names, n) }) // an object: it was decoded
		slices.Sort(names)
		note("not taken over: %s", strings.Join(names, ", "))
	}
	return e
}

// input is a reference to what VS Code asks its user for.
var input = regexp.MustCompile(`\$\{input:([^}]+)\}`)

// table makes text of a client references where it is a secret.
func (im *Imported) table(m map[string]string, variableOf func(string) string) yaml.MapSlice {
	var out yaml.MapSlice
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		v := input.ReplaceAllStringFunc(im.local(m[k]), func(ref string) string {
			return "${env:" + variable(input.FindStringSubmatch(ref)[1]) + "}"
		})
		if isSecretName(k) && !strings.Contains(v, "${") && v != "" {
			name := variableOf(k)
			scheme, token, found := strings.Cut(v, " ")
			if found && strings.EqualFold(scheme, "Bearer") {
				im.Secrets[name], v = token, scheme+" ${env:"+name+"}"
			} else {
				im.Secrets[name], v = v, "${env:"+name+"}"
			}
		}
		for _, ref := range reference.FindAllStringSubmatch(v, -1) {
			im.Needed = append(im.Needed, ref[1])
		}
		out = append(out, yaml.MapItem{Key: k, Value: v})
	}
	return out
}

var reference = regexp.MustCompile(`\$\{env:([^}]+)\}`)

// local replaces what stands for the folder of the file.
func (im *Imported) local(s string) string {
	return strings.NewReplacer("${workspaceFolder}", ".", "${workspaceRoot}", ".").Replace(s)
}

// variable makes the name of an environment variable.
func variable(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, strings.ToUpper(s))
}

func isSecretName(name string) bool {
	name = strings.ToUpper(name)
	return slices.ContainsFunc(secretNames, func(s string) bool { return strings.Contains(name, s) })
}

// plainJSON takes comments and trailing commas out, by putting spaces in their place.
func plainJSON(src []byte) []byte {
	b := slices.Clone(src)
	comma := -1 // the last one, if only space and comments follow it
	for i := 0; i < len(b); i++ {
		switch {
		case b[i] == '"':
			comma = -1
			for i++; i < len(b) && b[i] != '"'; i++ {
				if b[i] == '\\' {
					i++
				}
			}
		case b[i] == '/' && i+1 < len(b) && b[i+1] == '/':
			for ; i < len(b) && b[i] != '\n'; i++ {
				b[i] = ' '
			}
		case b[i] == '/' && i+1 < len(b) && b[i+1] == '*':
			end := strings.Index(string(b[i+2:]), "*/")
			stop := len(b)
			if end >= 0 {
				stop = i + 2 + end + 2
			}
			for ; i < stop; i++ {
				b[i] = ' '
			}
			i--
		case b[i] == ',':
			comma = i
		case b[i] == ']' || b[i] == '}':
			if comma >= 0 {
				b[comma] = ' '
			}
			comma = -1
		case b[i] != ' ' && b[i] != '\n' && b[i] != '\r' && b[i] != '\t':
			comma = -1
		}
	}
	return b
}
