package mcpsession

import (
	"context"
	"net/http"
)

// stream serves a GET: what is said in a session beside the answers to its requests, or what was
// missed of one. It returns when w is not needed any more; the stream may go on.
func (d *Door) stream(w http.ResponseWriter, r *http.Request, out *writer, session string) {
	d.o.Streams.Serve(w, r, d.o.Logger, func(ctx context.Context, w http.ResponseWriter) {
		out.w = w
		ctx, end := d.attend(ctx, out, session)
		defer end()
		d.handler.ServeHTTP(out, r.WithContext(ctx))
		out.finish()
	})
}

// attend does what goes on beside a stream until end is called. It is a function of its own because what
// serves the stream keeps its stack for as long as that is open.
func (d *Door) attend(ctx context.Context, out *writer, session string) (_ context.Context, end func()) {
	ctx, cancel := context.WithCancel(ctx)
	stay := func() bool { return true }
	if d.o.Cluster != nil {
		out.had = d.had(session)
		stay = context.AfterFunc(out.had, cancel)
	}
	silence, deaf := out.keepAlive(d.o.KeepAlive), d.listen(session, out.event)
	return ctx, func() {
		deaf()
		silence()
		stay()
		d.done(session)
		cancel()
	}
}
