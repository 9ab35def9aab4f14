package catalog

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/yosida95/uritemplate/v3"

	"newel.dev/newel/call"
)

// PageSize is the number of definitions on one page of a list.
const PageSize = 1000

// MaxNameBytes bounds tool and prompt names (MCP 2026-07-28, server/tools: 128 characters).
const MaxNameBytes = 128

// A Source is what one backend publishes.
type Source struct {
	Backend      string
	Capabilities []*call.Capability
	// Tolerant sources are not ours to mend: what is wrong with one capability leaves that one out.
	Tolerant bool
}

// A Snapshot is what a server publishes at one moment. It is immutable and safe for
// concurrent use.
type Snapshot struct {
	tools     map[string]*entry
	prompts   map[string]*entry
	resources map[string]*entry
	templates []*template // in order of declaration
	lists     map[call.Kind]*list
	refused   []error

	mu    sync.Mutex // guards views
	views map[string]*Snapshot
}

type entry struct {
	capability *call.Capability
	backend    string
	headers    []ParamHeader
	definition []byte // as lists show it
}

type template struct {
	entry
	matcher *uritemplate.Template
}

// list is one list, sorted by key, each definition encoded once. starts holds the offset of
// each definition in joined, which is the whole JSON array without its brackets.
type list struct {
	keys   []string
	starts []int
	joined []byte
	pages  map[int]*call.Result // pages at multiples of PageSize
	digest func() string        // of joined, made when it is asked for
}

// Build checks the capabilities of all sources and returns their snapshot. The error joins all
// problems, each naming the capability and where it was declared.
func Build(sources []Source) (*Snapshot, error) {
	s := &Snapshot{
		tools:     map[string]*entry{},
		prompts:   map[string]*entry{},
		resources: map[string]*entry{},
		lists:     map[call.Kind]*list{},
	}
	items := map[call.Kind][]item{}
	var problems []error
	// What is ours comes first: a name that a tolerant source wants too is taken then.
	for _, src := range append(ours(sources, true), ours(sources, false)...) {
		spent := &spending{own: !src.Tolerant}
		for _, c := range src.Capabilities {
			kind, it, err := s.add(src.Backend, c, spent)
			if err != nil {
				err = fmt.Errorf("%s: %w", where(c, src.Backend), err)
				if src.Tolerant {
					s.refused = append(s.refused, err)
				} else {
					problems = append(problems, err)
				}
				continue
			}
			items[kind] = append(items[kind], it)
		}
	}
	if len(problems) > 0 {
		return nil, errors.Join(problems...)
	}
	for _, k := range []call.Kind{call.ListTools, call.ListResources, call.ListTemplates, call.ListPrompts} {
		s.lists[k] = newList(items[k])
	}
	return s, nil
}

// View returns the part of s that keep wants, and extra capabilities beside it, which win over
// others of their name. Nothing of s is compiled again.
func (s *Snapshot) View(keep func(backend string, c *call.Capability) bool, extra ...*call.Capability) (*Snapshot, error) {
	v, err := Build([]Source{{Backend: "built in", Capabilities: extra}})
	if err != nil {
		return nil, err
	}
	items := map[call.Kind][]item{}
	take := func(kind call.Kind, from, into map[string]*entry) {
		for key, e := range into { // the extra ones
			items[kind] = append(items[kind], item{key, e.definition})
		}
		for key, e := range from {
			if _, taken := into[key]; !taken && keep(e.backend, e.capability) {
				into[key] = e
				items[kind] = append(items[kind], item{key, e.definition})
			}
		}
	}
	take(call.ListTools, s.tools, v.tools)
	take(call.ListPrompts, s.prompts, v.prompts)
	take(call.ListResources, s.resources, v.resources)
	for _, t := range s.templates {
		if keep(t.backend, t.capability) {
			v.templates = append(v.templates, t)
			items[call.ListTemplates] = append(items[call.ListTemplates], item{t.capability.Template, t.definition})
		}
	}
	for _, k := range []call.Kind{call.ListTools, call.ListResources, call.ListTemplates, call.ListPrompts} {
		v.lists[k] = newList(items[k])
	}
	return v, nil
}

// Tools returns all tools, by name.
func (s *Snapshot) Tools() []*call.Capability {
	out := make([]*call.Capability, 0, len(s.tools))
	for _, name := range s.lists[call.ListTools].keys {
		out = append(out, s.tools[name].capability)
	}
	return out
}

// All returns all capabilities.
func (s *Snapshot) All() []*call.Capability {
	out := s.Tools()
	for _, e := range s.prompts {
		out = append(out, e.capability)
	}
	for _, e := range s.resources {
		out = append(out, e.capability)
	}
	for _, t := range s.templates {
		out = append(out, t.capability)
	}
	return out
}

// Definition returns what lists show of a tool, or nil.
func (s *Snapshot) Definition(tool string) jsontext.Value {
	if e := s.tools[tool]; e != nil {
		return e.definition
	}
	return nil
}

// ours returns the sources that are tolerant, or those that are not, in order.
func ours(sources []Source, own bool) []Source {
	return slices.DeleteFunc(slices.Clone(sources), func(s Source) bool { return s.Tolerant == own })
}

// Refused returns what was left out of tolerant sources, each naming the capability and why.
func (s *Snapshot) Refused() []error { return s.refused }

// Owner returns the backend that publishes the resource at uri, or "".
func (s *Snapshot) Owner(uri string) string {
	if e := s.resources[uri]; e != nil {
		return e.backend
	}
	for _, t := range s.templates {
		if t.matcher.Match(uri) != nil {
			return t.backend
		}
	}
	return ""
}

// where names a capability for an error: where it was declared, what it is, and its name.
func where(c *call.Capability, backend string) string {
	if c == nil {
		return fmt.Sprintf("backend %q", backend)
	}
	what := fmt.Sprintf("%s %q", c.Kind, cmp.Or(c.URI, c.Template, c.Name))
	if c.Origin != "" {
		return c.Origin + ": " + what
	}
	return fmt.Sprintf("backend %q: %s", backend, what)
}

type item struct {
	key string
	def []byte
}

// add registers one capability and returns the list it belongs to and its encoded definition.
func (s *Snapshot) add(backend string, given *call.Capability, spent *spending) (call.Kind, item, error) {
	if given == nil {
		return 0, item{}, errors.New("a nil capability")
	}
	c := *given // what the backend holds stays as it is
	c.Backend = backend
	if c.Run == nil {
		return 0, item{}, errors.New("has no handler")
	}
	e := &entry{capability: &c, backend: backend}
	var into map[string]*entry
	var key string
	var kind call.Kind
	switch c.Kind {
	case call.Tool:
		into, key, kind = s.tools, c.Name, call.ListTools
		if err := checkName(c.Name); err != nil {
			return 0, item{}, err
		}
		if err := e.compileTool(spent); err != nil {
			return 0, item{}, err
		}
	case call.Prompt:
		into, key, kind = s.prompts, c.Name, call.ListPrompts
		if err := checkName(c.Name); err != nil {
			return 0, item{}, err
		}
		e.compilePrompt(spent)
	case call.Resource:
		if (c.URI == "") == (c.Template == "") {
			return 0, item{}, errors.New("needs either a URI or a URI template")
		}
		if c.Template != "" {
			def, err := s.addTemplate(e)
			return call.ListTemplates, item{c.Template, def}, err
		}
		if !strings.Contains(c.URI, ":") {
			return 0, item{}, fmt.Errorf("the URI %q has no scheme", c.URI)
		}
		into, key, kind = s.resources, c.URI, call.ListResources
	default:
		return 0, item{}, fmt.Errorf("a capability cannot be of kind %q", c.Kind)
	}
	if other, taken := into[key]; taken {
		return 0, item{}, fmt.Errorf("the name is already taken by %s", where(other.capability, other.backend))
	}
	def, err := encode(&c)
	if err != nil {
		return 0, item{}, err
	}
	e.definition = def
	into[key] = e
	return kind, item{key, def}, nil
}

func (s *Snapshot) addTemplate(e *entry) ([]byte, error) {
	m, err := uritemplate.New(e.capability.Template)
	if err != nil {
		return nil, fmt.Errorf("the URI template is not valid (RFC 6570): %w", err)
	}
	for _, t := range s.templates {
		if t.capability.Template == e.capability.Template {
			return nil, fmt.Errorf("the template is already taken by %s", where(t.capability, t.backend))
		}
	}
	def, err := encode(e.capability)
	if err != nil {
		return nil, err
	}
	e.definition = def
	s.templates = append(s.templates, &template{entry: *e, matcher: m})
	return def, nil
}

func checkName(name string) error {
	if name == "" {
		return errors.New("has no name")
	}
	if len(name) > MaxNameBytes {
		return fmt.Errorf("the name has %d bytes, over the limit of %d", len(name), MaxNameBytes)
	}
	for i := range len(name) {
		switch b := name[i]; {
		case b >= 'a' && b <= 'z', b >= 'A' && b <= 'Z', b >= '0' && b <= '9', b == '_', b == '-', b == '.', b == '/':
		default:
			return fmt.Errorf("the name may only hold letters, digits and _ - . / (found %q)", b)
		}
	}
	return nil
}

// Tool returns the tool called name, or nil.
func (s *Snapshot) Tool(name string) *call.Capability { return s.tools[name].get() }

// Prompt returns the prompt called name, or nil.
func (s *Snapshot) Prompt(name string) *call.Capability { return s.prompts[name].get() }

// Resource returns the resource at uri: a listed one, otherwise the first template that
// matches, or nil.
func (s *Snapshot) Resource(uri string) *call.Capability {
	if e := s.resources[uri]; e != nil {
		return e.capability
	}
	for _, t := range s.templates {
		if t.matcher.Match(uri) != nil {
			return t.capability
		}
	}
	return nil
}

// Template returns the resource template declared as tmpl, or nil.
func (s *Snapshot) Template(tmpl string) *call.Capability {
	for _, t := range s.templates {
		if t.capability.Template == tmpl {
			return t.capability
		}
	}
	return nil
}

// ParamHeaders returns the arguments of a tool that callers over HTTP mirror in Mcp-Param
// headers (MCP 2026-07-28, SEP-2243). Most tools have none.
func (s *Snapshot) ParamHeaders(tool string) []ParamHeader {
	if e := s.tools[tool]; e != nil {
		return e.headers
	}
	return nil
}

// Names returns the sorted names (or URIs) in one list.
func (s *Snapshot) Names(kind call.Kind) []string {
	if l := s.lists[kind]; l != nil {
		return slices.Clone(l.keys)
	}
	return nil
}

// HasSuggestions reports whether any capability completes arguments.
func (s *Snapshot) HasSuggestions() bool {
	for _, e := range s.prompts {
		if e.capability.Suggest != nil {
			return true
		}
	}
	for _, t := range s.templates {
		if t.capability.Suggest != nil {
			return true
		}
	}
	return false
}

func (e *entry) get() *call.Capability {
	if e == nil {
		return nil
	}
	return e.capability
}

func newList(items []item) *list {
	slices.SortFunc(items, func(a, b item) int { return strings.Compare(a.key, b.key) })
	l := &list{pages: map[int]*call.Result{}}
	for _, it := range items {
		if len(l.joined) > 0 {
			l.joined = append(l.joined, ',')
		}
		l.keys = append(l.keys, it.key)
		l.starts = append(l.starts, len(l.joined))
		l.joined = append(l.joined, it.def...)
	}
	for i := 0; i == 0 || i < len(l.keys); i += PageSize {
		l.pages[i] = l.page(i)
	}
	l.digest = sync.OnceValue(func() string {
		sum := sha256.Sum256(l.joined)
		return string(sum[:])
	})
	return l
}

// page encodes the page that starts at index i.
func (l *list) page(i int) *call.Result {
	end := min(i+PageSize, len(l.keys))
	r := &call.Result{Content: jsontext.Value("[]")}
	if i < end {
		stop := len(l.joined)
		if end < len(l.keys) {
			stop = l.starts[end] - 1 // without the comma
			r.Next = encodeCursor(l.keys[end-1])
		}
		r.Content = slices.Concat([]byte{'['}, l.joined[l.starts[i]:stop], []byte{']'})
	}
	return r
}

// Page returns one page of a list: the one after the last name of the page before. So a cursor
// stays good when the snapshot is swapped between two pages. A cursor that is not ours is an
// Invalid error.
func (s *Snapshot) Page(kind call.Kind, cursor string) (*call.Result, error) {
	l := s.lists[kind]
	if l == nil {
		return nil, call.Errorf(call.Internal, "no such list").Because(fmt.Errorf("kind %v", kind))
	}
	if cursor == "" {
		return l.pages[0], nil
	}
	last, ok := decodeCursor(cursor)
	if !ok {
		return nil, call.Errorf(call.Malformed, "the cursor is not one that this server gave; start again without a cursor")
	}
	i, found := slices.BinarySearch(l.keys, last)
	if found {
		i++
	}
	if r := l.pages[i]; r != nil {
		return r, nil
	}
	return l.page(i), nil
}

// PageFor is Page of what a caller may see; nil: everything.
func (s *Snapshot) PageFor(kind call.Kind, cursor string, v *call.Visible) (*call.Result, error) {
	if v == nil {
		return s.Page(kind, cursor)
	}
	return s.seen(v).Page(kind, cursor)
}

// Digest returns a digest of what a caller is shown of one list; nil: everything. It is "" where that
// would have to be found out for this caller alone.
func (s *Snapshot) Digest(kind call.Kind, v *call.Visible) string {
	part := s
	if v != nil {
		s.mu.Lock()
		full := len(s.views) >= maxSeen
		s.mu.Unlock()
		if part = s.known(v.Key); part == nil && (v.Key == "" || full) {
			return ""
		}
		part = s.seen(v)
	}
	if l := part.lists[kind]; l != nil {
		return l.digest()
	}
	return ""
}

// known returns the part that all callers of a key are shown, if it was made before.
func (s *Snapshot) known(key string) *Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.views[key]
}

// maxSeen bounds how many views of one snapshot are remembered.
const maxSeen = 256

// seen returns the part of s that a caller may see. Parts that others see too are made once.
func (s *Snapshot) seen(v *call.Visible) *Snapshot {
	if known := s.known(v.Key); known != nil {
		return known
	}
	part, err := s.View(func(_ string, c *call.Capability) bool { return v.Shows(c) })
	if err != nil { // there is nothing in it that could be wrong; if there is, nothing is shown
		part = &Snapshot{lists: map[call.Kind]*list{}}
	}
	if v.Key != "" {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.views == nil || len(s.views) >= maxSeen {
			s.views = map[string]*Snapshot{}
		}
		s.views[v.Key] = part
	}
	return part
}

const cursorPrefix = "after:"

func encodeCursor(last string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(cursorPrefix + last))
}

func decodeCursor(c string) (string, bool) {
	b, err := base64.RawURLEncoding.DecodeString(c)
	if err != nil {
		return "", false
	}
	return strings.CutPrefix(string(b), cursorPrefix)
}

// A Catalog is the current snapshot. Its methods are safe for concurrent use; reads take no lock.
type Catalog struct {
	current atomic.Pointer[Snapshot]
}

// New returns a catalog that starts with s.
func New(s *Snapshot) *Catalog {
	c := &Catalog{}
	c.current.Store(s)
	return c
}

// Load returns the current snapshot.
func (c *Catalog) Load() *Snapshot { return c.current.Load() }

// Swap makes s the current snapshot and returns the list kinds whose content changed.
func (c *Catalog) Swap(s *Snapshot) []call.Kind { return s.Differs(c.current.Swap(s)) }

// Differs returns the list kinds whose content is not that of another snapshot.
func (s *Snapshot) Differs(other *Snapshot) []call.Kind {
	var changed []call.Kind
	for _, k := range []call.Kind{call.ListTools, call.ListResources, call.ListTemplates, call.ListPrompts} {
		if !bytes.Equal(other.lists[k].joined, s.lists[k].joined) {
			changed = append(changed, k)
		}
	}
	return changed
}
