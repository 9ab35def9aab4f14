package mcpupstream

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// maxFollowed bounds the resources that are followed at one server.
const maxFollowed = 1000

// Follow says that somebody wants to hear of changes of a resource. From now on the server is
// asked to tell; more than 1,000 are not followed.
func (u *Upstream) Follow(uri string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if _, known := u.followed[uri]; known || len(u.followed) >= maxFollowed {
		return
	}
	u.followed[uri] = struct{}{}
	close(u.refollow)
	u.refollow = make(chan struct{})
}

// following returns what is followed, and a channel that is closed when that changes.
func (u *Upstream) following() ([]string, <-chan struct{}) {
	u.mu.Lock()
	defer u.mu.Unlock()
	uris := make([]string, 0, len(u.followed))
	for uri := range u.followed {
		uris = append(uris, uri)
	}
	slices.Sort(uris)
	return uris, u.refollow
}

func (u *Upstream) onUpdated(f func(string)) { u.updated = f }

// updatedURI passes a change of a resource on.
func (u *Upstream) updatedURI(m *message) {
	var p struct {
		URI string `json:"uri"`
	}
	u.mu.Lock()
	f := u.updated
	u.mu.Unlock()
	if f != nil && json.Unmarshal(m.Params, &p) == nil && p.URI != "" {
		f(p.URI)
	}
}

// listen hears what the server says unasked, until ctx ends. A stream that breaks is opened again;
// whatever was missed meanwhile is made up for by a refresh.
func (u *Upstream) listen(ctx context.Context) {
	pause := time.Second
	for ctx.Err() == nil {
		u.mu.Lock()
		listed := u.listed
		u.mu.Unlock()
		if !listed {
			if wait(ctx, 200*time.Millisecond) != nil {
				return
			}
			continue
		}
		began := time.Now()
		err := u.listenOnce(ctx)
		if err != nil && ctx.Err() == nil {
			u.log.LogAttrs(ctx, slog.LevelDebug, "the stream of changes ended", slog.String("error", err.Error()))
		}
		if time.Since(began) > time.Minute {
			pause = time.Second
		}
		if wait(ctx, pause) != nil {
			return
		}
		pause = min(2*pause, time.Minute)
		u.announce(0)
	}
}

// listenOnce follows one stream to its end.
func (u *Upstream) listenOnce(ctx context.Context) error {
	s, release, err := u.lease(ctx, nil)
	if err != nil {
		return err
	}
	defer release()
	s.users.Add(1) // an open stream is use enough
	defer s.users.Add(-1)
	for ctx.Err() == nil {
		uris, more := u.following()
		if !tells(&s.server) {
			return wait(ctx, u.config.RefreshInterval) // nothing will come: the lists are asked for now and then
		}
		once, stop := context.WithCancel(ctx)
		again := make(chan struct{})
		go func() { // ends with once
			select {
			case <-more:
				close(again)
				stop()
			case <-once.Done():
			}
		}()
		err := u.stream(once, s, uris)
		stop()
		select {
		case <-again: // the same with more resources
		default:
			return err
		}
	}
	return ctx.Err()
}

func tells(f *features) bool {
	return f.Tools != nil && f.Tools.ListChanged || f.Prompts != nil && f.Prompts.ListChanged ||
		f.Resources != nil && (f.Resources.ListChanged || f.Resources.Subscribe)
}

// stream opens the stream of changes of one session.
func (u *Upstream) stream(ctx context.Context, s *session, uris []string) error {
	if s.stateless {
		f := newObject()
		f.raw("toolsListChanged", jsontext.Value("true"))
		f.raw("promptsListChanged", jsontext.Value("true"))
		f.raw("resourcesListChanged", jsontext.Value("true"))
		if len(uris) > 0 {
			list, err := json.Marshal(uris)
			if err != nil {
				return err
			}
			f.raw("resourceSubscriptions", list)
		}
		p := newObject()
		p.raw("notifications", f.end())
		p.raw("_meta", u.meta(nil, noCapabilities, 0))
		m, err := s.request(ctx, &request{id: s.ids.Add(1), method: "subscriptions/listen", params: p.end()}, u.heard)
		if err == nil && m.Error != nil {
			return m.Error
		}
		return err
	}
	for _, uri := range uris {
		p := newObject()
		p.str("uri", uri)
		limited, stop := context.WithTimeout(ctx, u.config.ListTimeout) // an answer, not a stream
		_, err := s.request(limited, &request{id: s.ids.Add(1), method: "resources/subscribe", params: p.end()}, u.heard)
		stop()
		if err != nil {
			return err
		}
	}
	h, overHTTP := s.link.(*sessionHTTP)
	if !overHTTP { // a process says it on the one pipe there is
		for ctx.Err() == nil && s.usable() {
			if err := wait(ctx, time.Second); err != nil {
				return err
			}
		}
		return errCut
	}
	_, _, err := h.get(ctx, h.head(), "", 0, func(m *message) {
		if m.ID != nil && m.Method != "" {
			reply := &rpcError{Code: -32601, Message: "nobody can be asked outside of a call"}
			if m.Method == "ping" {
				s.respond(ctx, m.ID, jsontext.Value("{}"), nil)
				return
			}
			s.respond(ctx, m.ID, nil, reply)
			return
		}
		u.heard(m)
	})
	return err
}

var _ call.Backend = (*Upstream)(nil)
