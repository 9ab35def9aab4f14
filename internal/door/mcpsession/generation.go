package mcpsession

import (
	"context"
	"crypto/rand"
	"errors"
	"net/http"
	"slices"
	"strconv"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/mcpwire"
)

// A Generation is what sessions are served with for a while: a path, bounds, and what new sessions
// are told. Requests that came to one are served by it to their end. It is an http.Handler.
type Generation struct {
	door   *Door
	o      Options
	number string
	server *server
}

// Next prepares another generation; nothing uses it before [Generation.Begin] or its own
// ServeHTTP. Of the options, Hub, Tasks, Identified, Cluster, Events, Scope, Streams, IdleTimeout, KeepAlive,
// RetainBytes and Logger stay those of the door.
func (d *Door) Next(o Options) (*Generation, error) {
	if o.Path == nil {
		return nil, errors.New("mcpsession: Path and Hub are required")
	}
	setDefaults(&o)
	d.mu.Lock()
	defer d.mu.Unlock()
	s, err := d.serverFor(about{o.Name, o.Title, o.Version, o.Instructions, o.Has})
	if err != nil {
		return nil, err
	}
	d.count++
	g := &Generation{door: d, o: o, number: strconv.Itoa(d.count), server: s}
	d.generations[g.number] = g
	return g, nil
}

// First returns the generation that the door was made with, while it is the current one.
func (d *Door) First() *Generation { return d.current.Load() }

// Begin makes it the current one: that of clients over stdio, and of requests whose own has ended.
func (g *Generation) Begin() { g.door.current.Store(g) }

// End forgets a generation that is not the current one any more, or was never.
func (g *Generation) End() {
	d := g.door
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.generations, g.number)
	d.servers = slices.DeleteFunc(d.servers, func(s *server) bool {
		for range s.Sessions() {
			return false
		}
		for _, other := range d.generations {
			if other.server == s {
				return false
			}
		}
		return true
	})
}

// ServeHTTP serves one request of a session revision. Host and Origin are checked by the caller.
func (g *Generation) ServeHTTP(w http.ResponseWriter, r *http.Request) { g.door.serve(g, w, r) }

// serverFor returns the server that tells sessions this; d.mu is held.
func (d *Door) serverFor(a about) (*server, error) {
	for _, s := range d.servers {
		if s.about == a {
			return s, nil
		}
	}
	s := &server{about: a}
	s.Server = mcp.NewServer(&mcp.Implementation{Name: a.name, Title: a.title, Version: a.version}, &mcp.ServerOptions{
		Instructions:              a.instructions,
		Capabilities:              capabilities(a.has),
		SupportedProtocolVersions: Revisions(),
		GetSessionID:              rand.Text,
		SubscribeHandler: func(ctx context.Context, r *mcp.SubscribeRequest) error {
			if readable := d.of(r.GetExtra()).o.Readable; readable != nil {
				if err := readable(ctx, r.Params.URI); err != nil {
					return wireError(mcpwire.SessionError(call.Resource, err))
				}
			}
			d.o.Hub.Follow(r.Params.URI)
			d.remember(ctx, r.Session.ID(), func(k *kept) {
				if len(k.state.URIs) < maxFollowed && !slices.Contains(k.state.URIs, r.Params.URI) {
					k.state.URIs = append(k.state.URIs, r.Params.URI)
				}
			})
			return nil
		},
		UnsubscribeHandler: func(ctx context.Context, r *mcp.UnsubscribeRequest) error {
			d.remember(ctx, r.Session.ID(), func(k *kept) {
				k.state.URIs = slices.DeleteFunc(k.state.URIs, func(uri string) bool { return uri == r.Params.URI })
			})
			return nil
		},
	})
	if err := d.addTasks(s); err != nil {
		return nil, err
	}
	s.AddReceivingMiddleware(d.takeOver)
	s.AddSendingMiddleware(d.onlyNews)
	d.servers = append(d.servers, s)
	return s, nil
}

// About returns the names that sessions were told, and still have.
func (d *Door) About() []string {
	var names []string
	for _, s := range d.all() {
		names = append(names, s.about.name)
	}
	return names
}

// all are the servers that have, or may have, sessions.
func (d *Door) all() []*server {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.servers)
}

// generation is the one that a request came to, or the current one if that has ended.
func (d *Door) generation(h http.Header) *Generation {
	d.mu.Lock()
	defer d.mu.Unlock()
	if g := d.generations[h.Get(headerGeneration)]; g != nil {
		return g
	}
	return d.current.Load()
}

// of is the generation of a message. It may have waited in its session until what it came to has
// ended; then it goes the way of the current one.
func (d *Door) of(extra *mcp.RequestExtra) *Generation {
	if extra == nil || extra.Header == nil {
		return d.current.Load()
	}
	return d.generation(extra.Header)
}
