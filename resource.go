package newel

import (
	"context"
	"encoding/base64"
	"errors"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/yosida95/uritemplate/v3"

	"newel.dev/newel/call"
)

// A Resource is something to read, at a URI.
type Resource struct {
	URI         string
	Name        string
	Title       string
	Description string
	MIME        string
	Size        int64 // bytes; 0: unknown
	Annotations jsontext.Value
	Icons       jsontext.Value
	Meta        jsontext.Value
	Scopes      []string
	TTL         time.Duration // how long clients may cache it; 0: not at all
}

// A Template is a family of resources: an RFC 6570 URI template and the variables in it.
type Template struct {
	Template    string
	Name        string
	Title       string
	Description string
	MIME        string
	Annotations jsontext.Value
	Icons       jsontext.Value
	Meta        jsontext.Value
	Scopes      []string
	TTL         time.Duration
	// Suggest completes a variable; nil: no suggestions.
	Suggest func(ctx context.Context, variable, typed string) ([]string, error)
}

// Contents is what a resource holds: Text, or Blob if that is not nil.
type Contents struct {
	Text string
	Blob []byte
	MIME string // "": that of the resource
}

// AddResource adds a resource; f reads it.
func AddResource(s *Server, r Resource, f func(ctx context.Context, req *Request) (Contents, error)) {
	s.add(&call.Capability{
		Kind: call.Resource, URI: r.URI, Name: r.Name, Title: r.Title, Description: r.Description, MIME: r.MIME, Size: r.Size,
		Annotations: r.Annotations, Icons: r.Icons, Meta: r.Meta, Scopes: r.Scopes, Effect: call.Read, Origin: place(),
		Run: func(ctx context.Context, c *call.Call) (*call.Result, error) {
			got, err := f(ctx, &Request{c})
			return got.result(c.Name, r.MIME, r.TTL), err
		},
	}, nil)
}

// AddTemplate adds a resource template; f reads the resource whose variables it is given. It
// returns a NotFound error for what does not exist.
func AddTemplate(s *Server, t Template, f func(ctx context.Context, req *Request, vars map[string]string) (Contents, error)) {
	m, err := uritemplate.New(t.Template)
	c := &call.Capability{
		Kind: call.Resource, Template: t.Template, Name: t.Name, Title: t.Title, Description: t.Description, MIME: t.MIME,
		Annotations: t.Annotations, Icons: t.Icons, Meta: t.Meta, Scopes: t.Scopes, Effect: call.Read, Origin: place(),
		Run: func(ctx context.Context, c *call.Call) (*call.Result, error) {
			vars := map[string]string{}
			for name, v := range m.Match(c.Name) {
				vars[name] = v.String()
			}
			got, err := f(ctx, &Request{c}, vars)
			return got.result(c.Name, t.MIME, t.TTL), err
		},
	}
	if t.Suggest != nil {
		c.Suggest = func(ctx context.Context, q *call.Completion) ([]string, int, error) {
			values, err := t.Suggest(ctx, q.Argument, q.Value)
			return values, len(values), err
		}
	}
	if t.Template == "" {
		err = errors.New("needs a URI template")
	}
	s.add(c, err)
}

func (c Contents) result(uri, mime string, ttl time.Duration) *call.Result {
	return &call.Result{Content: append(append(jsontext.Value{'['}, c.object(uri, mime)...), ']'), TTL: ttl}
}

// object is the contents as MCP spells them.
func (c Contents) object(uri, mime string) jsontext.Value {
	if c.MIME != "" {
		mime = c.MIME
	}
	b := append(jsontext.Value(nil), `{"uri":`...)
	b = call.AppendString(b, uri)
	if mime != "" {
		b = call.AppendString(append(b, `,"mimeType":`...), mime)
	}
	if c.Blob != nil {
		b = call.AppendString(append(b, `,"blob":`...), base64.StdEncoding.EncodeToString(c.Blob))
		b = call.AppendETag(b, c.Blob)
	} else {
		b = call.AppendString(append(b, `,"text":`...), c.Text)
		b = call.AppendETag(b, []byte(c.Text))
	}
	return append(b, '}')
}
