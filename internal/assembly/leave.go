package assembly

import (
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// leaveTimeout bounds how long connections with nothing to do are kept for their next request after
// the socket was handed over: a client whose connection is closed just when it sends cannot know
// whether its call ran.
const leaveTimeout = time.Second

// leaving is a listener that can be given up while its connections are still served.
type leaving struct {
	net.Listener
	left  atomic.Bool
	done  chan struct{} // closed by release
	once  sync.Once
	mu    sync.Mutex // guards what is below
	open  map[net.Conn]struct{}
	empty chan struct{} // not nil while linger waits; closed when nothing is open
}

// handler serves with the house that is the current one when a request comes.
func (l *leaving) handler(kept *kept) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if l.left.Load() {
			w.Header().Set("Connection", "close") // the next request finds the other process
		}
		kept.current.Load().handler.ServeHTTP(w, r)
	})
}

// count keeps track of connections: it is the server's ConnState.
func (l *leaving) count(c net.Conn, s http.ConnState) {
	if s == http.StateActive || s == http.StateIdle { // twice for every call
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch s {
	case http.StateNew:
		if l.open == nil {
			l.open = map[net.Conn]struct{}{}
		}
		l.open[c] = struct{}{}
	case http.StateClosed, http.StateHijacked:
		delete(l.open, c)
		if len(l.open) == 0 && l.empty != nil {
			close(l.empty)
			l.empty = nil
		}
	}
}

// leave accepts no more connections, and tells those that are open to go.
func (l *leaving) leave() {
	l.left.Store(true)
	_ = l.Listener.Close() // the socket stays open in the other process
}

// linger waits until they have gone.
func (l *leaving) linger() {
	l.mu.Lock()
	empty := make(chan struct{})
	if len(l.open) == 0 {
		close(empty)
	} else {
		l.empty = empty
	}
	l.mu.Unlock()
	limit := time.NewTimer(leaveTimeout)
	defer limit.Stop()
	select {
	case <-empty:
	case <-limit.C:
	}
}

// release lets Accept return.
func (l *leaving) release() { l.once.Do(func() { close(l.done) }) }

// Accept implements net.Listener. After leave it blocks until release: to the server nothing failed.
func (l *leaving) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil && l.left.Load() {
		<-l.done
		return nil, net.ErrClosed
	}
	return c, err
}

// Close implements net.Listener.
func (l *leaving) Close() error {
	l.release()
	if l.left.Load() {
		return nil // it is closed
	}
	return l.Listener.Close()
}
