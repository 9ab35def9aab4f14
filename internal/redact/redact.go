// Package redact takes secrets and personal data out of JSON before it is kept.
//
// Start reading at [Redactor.JSON]. people.go knows payment cards and bank accounts, schema.go what a
// schema says is secret. Rules for secrets of known services come from outside, as a [Finder].
//
// It promises: what comes out is JSON of the same shape, in which a mark such as
// "[redacted:password]" stands where something was; what cannot be looked at within the bounds is
// replaced by a mark, not kept. It looks at text as JSON means it, so escapes hide nothing. It does
// not put together what was spread over several values. Costs grow linearly with the input and are
// bounded by MaxText and MaxWork: patterns are RE2, which never backtracks.
package redact

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
)

// Bounds.
const (
	MaxText = 64 << 10 // bytes of one text; longer ones are replaced
	// MaxWork bounds the bytes that patterns are matched against, for one value, each pattern counted:
	// what comes after that is replaced. The slowest patterns do some 3 MB a second.
	MaxWork = 1 << 20
)

// members are names that are always redacted, at any depth, with whatever they hold.
var members = []string{
	"password", "passwd", "pwd", "passphrase", "secret", "client_secret", "token", "access_token", "refresh_token", "id_token", "session_token",
	"api_key", "private_key", "secret_key", "authorization", "card_number", "cvv", "cvc", "ssn",
}

// A Span is a part of a text that a rule found.
type Span struct {
	From, To int // bytes
	Rule     string
}

// A Finder finds secrets. It is safe for concurrent use.
type Finder interface {
	// Find returns what it finds in text, in any order, and how many bytes it matched patterns against.
	// It gives up once that would be more than most: then ok is false.
	Find(text string, most int) (found []Span, spent int, ok bool)
}

// A Pattern is what an operator calls secret.
type Pattern struct {
	Name string // shown in the mark
	Expr string // RE2; its first group, if it has one, is what is redacted
}

// Options say what is redacted, beside what always is. The zero value is good.
type Options struct {
	// Members are names of members: password. Names with dots are the end of a path, * stands for any
	// text: *.card_number, customer.pin. Case, - and _ do not matter. Elements of arrays do not count.
	Members  []string
	Patterns []Pattern
	Secrets  Finder // nil: none
}

// A Redactor redacts. It is safe for concurrent use.
type Redactor struct {
	names    map[string]bool // normal forms
	paths    [][]string
	patterns []pattern
	secrets  Finder
}

type pattern struct {
	name string
	re   *regexp.Regexp
}

// New returns a redactor, or an error that names the option that makes no sense.
func New(o Options) (*Redactor, error) {
	r := &Redactor{names: map[string]bool{}, secrets: o.Secrets}
	for _, m := range members {
		r.names[normal(m)] = true
	}
	for _, m := range o.Members {
		parts := strings.Split(m, ".")
		for i, p := range parts {
			parts[i] = normal(p)
			if _, err := path.Match(parts[i], ""); err != nil || parts[i] == "" || strings.Contains(p, "/") {
				return nil, fmt.Errorf("redact: %q is no name of a member: write password, *_key or customer.pin", m)
			}
		}
		if len(parts) == 1 && !strings.ContainsAny(parts[0], `*?[\`) {
			r.names[parts[0]] = true
			continue
		}
		if parts[len(parts)-1] == "*" && len(parts) == 1 {
			return nil, errors.New("redact: the member * is every member")
		}
		r.paths = append(r.paths, parts)
	}
	for _, p := range o.Patterns {
		if p.Name == "" || strings.ContainsAny(p.Name, "[]\"\\") || len(p.Name) > 64 {
			return nil, fmt.Errorf("redact: %q is no name of a pattern", p.Name)
		}
		re, err := regexp.Compile(p.Expr)
		if err != nil {
			return nil, fmt.Errorf("redact: the pattern %q: %w", p.Name, err)
		}
		if re.MatchString("") {
			return nil, fmt.Errorf("redact: the pattern %q fits an empty text, so it fits everywhere", p.Name)
		}
		r.patterns = append(r.patterns, pattern{p.Name, re})
	}
	return r, nil
}

// normal is the form in which names are compared.
func normal(name string) string { return strings.ToLower(joined.Replace(name)) }

// joined takes out what joins words. Making one costs much more than using it.
var joined = strings.NewReplacer("-", "", "_", "")

func mark(rule string) string { return "[redacted:" + rule + "]" }

// JSON returns v with marks, or v itself if nothing is to be redacted. Of what is not JSON only the
// length is kept. schema says more of members; nil: nothing.
func (r *Redactor) JSON(v jsontext.Value, schema *Secret) jsontext.Value {
	if len(v) == 0 {
		return v
	}
	if schema != nil && schema.all {
		return quoted(mark("schema"))
	}
	var out bytes.Buffer
	w := walk{Redactor: r, schema: schema, left: MaxWork,
		in:  jsontext.NewDecoder(bytes.NewReader(v)),
		out: jsontext.NewEncoder(&out, jsontext.AllowDuplicateNames(true))}
	err := w.value("")
	if err == nil {
		if _, err = w.in.ReadToken(); err == io.EOF {
			err = nil
		} else {
			err = errors.New("more than one value")
		}
	}
	switch {
	case err != nil:
		return quoted(mark("not JSON, " + strconv.Itoa(len(v)) + " bytes"))
	case !w.changed:
		return v
	}
	return bytes.TrimSuffix(out.Bytes(), []byte("\n"))
}

func quoted(s string) jsontext.Value {
	b, _ := jsontext.AppendQuote(nil, s) // it is UTF-8
	return b
}

// walk is one value on its way through.
type walk struct {
	*Redactor
	schema  *Secret
	in      *jsontext.Decoder
	out     *jsontext.Encoder
	path    []string // names of members, normal
	left    int      // bytes that patterns may still be matched against
	changed bool
}

// value goes over one value; name is that of its member, or "". Its depth is that which jsontext
// allows.
func (w *walk) value(name string) error {
	switch w.in.PeekKind() {
	case '{':
		return w.object()
	case '[':
		if err := w.copy(); err != nil {
			return err
		}
		for w.in.PeekKind() != ']' {
			if err := w.value(name); err != nil {
				return err
			}
		}
		return w.copy()
	case '"':
		t, err := w.in.ReadToken()
		if err != nil {
			return err
		}
		return w.out.WriteToken(jsontext.String(w.text(name, t.String())))
	case '0':
		raw, err := w.in.ReadValue()
		if err != nil {
			return err
		}
		if rule := numberRule(string(raw)); rule != "" {
			w.changed = true
			return w.out.WriteToken(jsontext.String(mark(rule)))
		}
		return w.out.WriteValue(raw)
	}
	return w.copy()
}

func (w *walk) copy() error {
	t, err := w.in.ReadToken()
	if err != nil {
		return err
	}
	return w.out.WriteToken(t)
}

func (w *walk) object() error {
	if err := w.copy(); err != nil {
		return err
	}
	marked := 0
	for w.in.PeekKind() != '}' {
		t, err := w.in.ReadToken()
		if err != nil {
			return err
		}
		name := t.String()
		shown := w.text("", name)
		if shown != name { // two of them would not be one object any more
			marked++
			shown += "#" + strconv.Itoa(marked)
		}
		if err := w.out.WriteToken(jsontext.String(shown)); err != nil {
			return err
		}
		w.path = append(w.path, normal(name[:min(len(name), 256)]))
		if rule := w.member(); rule != "" {
			w.changed = true
			if err = w.in.SkipValue(); err == nil {
				err = w.out.WriteToken(jsontext.String(mark(rule)))
			}
		} else {
			err = w.value(name)
		}
		w.path = w.path[:len(w.path)-1]
		if err != nil {
			return err
		}
	}
	return w.copy()
}

// member returns the rule by which the innermost member is redacted, or "".
func (w *walk) member() string {
	name := w.path[len(w.path)-1]
	switch {
	case w.names[name]:
		return name
	case w.schema != nil && w.schema.names[name]:
		return "schema"
	}
	for _, p := range w.paths {
		if len(p) > len(w.path) {
			continue
		}
		end := w.path[len(w.path)-len(p):]
		fits := true
		for i := range p {
			if ok, _ := path.Match(p[i], strings.ReplaceAll(end[i], "/", "|")); !ok { // checked by New
				fits = false
				break
			}
		}
		if fits {
			return strings.Join(p, ".")
		}
	}
	return ""
}

// text returns a text with marks. name is that of its member, which rules of secrets look at too.
func (w *walk) text(name, text string) string {
	if text == "" {
		return text
	}
	found, ok := w.find(name, text)
	if !ok {
		w.changed = true
		return mark(strconv.Itoa(len(text)) + " bytes, not looked at")
	}
	if len(found) == 0 {
		return text
	}
	w.changed = true
	slices.SortFunc(found, func(a, b Span) int {
		if a.From != b.From {
			return a.From - b.From
		}
		return b.To - a.To
	})
	var b strings.Builder
	at := 0
	for _, s := range found {
		if s.To <= at {
			continue
		}
		if s.From >= at { // what overlaps is one
			b.WriteString(text[at:s.From])
			b.WriteString(mark(s.Rule))
		}
		at = s.To
	}
	b.WriteString(text[at:])
	return b.String()
}

// find returns what is to be redacted in a text.
func (w *walk) find(name, text string) (found []Span, ok bool) {
	if len(text) > MaxText {
		return nil, false
	}
	for _, p := range w.patterns {
		if w.left -= len(text); w.left < 0 {
			return nil, false
		}
		for _, m := range p.re.FindAllStringSubmatchIndex(text, -1) {
			from, to := m[0], m[1]
			if len(m) > 2 && m[2] >= 0 {
				from, to = m[2], m[3]
			}
			if to > from {
				found = append(found, Span{from, to, p.name})
			}
		}
	}
	found = people(found, text)
	if w.secrets == nil {
		return found, true
	}
	// Some rules need the name that a secret is given: they see it as a program would write it.
	before := ""
	if name != "" && len(name) <= 256 {
		before = name + ` = "`
	}
	whole := text
	if before != "" {
		whole = before + text + `"`
	}
	secrets, spent, ok := w.secrets.Find(whole, w.left)
	if w.left -= spent; !ok {
		return nil, false
	}
	for _, s := range secrets {
		s.From, s.To = max(s.From-len(before), 0), min(s.To-len(before), len(text))
		if s.From < s.To {
			found = append(found, s)
		}
	}
	return found, true
}
