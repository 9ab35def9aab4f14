package main

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// perStream is what one open stream may take: heap and stacks that are in use. What the process has from
// the system is more, by what Go's collector leaves free to be used again; perResident bounds that.
const (
	perStream   = 50 << 10
	perResident = 80 << 10
)

// streams is E11: many open streams of both kinds, calls beside them, some that go away without a word,
// and a server that is told to stop.
func streams(ctx context.Context, s *stage) error {
	n := s.o.streams
	if err := room(n); err != nil {
		return err
	}
	limits := fmt.Sprintf(", max_streams: %[1]d, max_streams_per_peer: %[1]d, max_sessions: %[1]d, max_sessions_per_peer: %[1]d, max_connections: %[2]d, max_connections_per_peer: %[2]d, session_idle_timeout: 20m", n, 2*n+500)
	if err := s.open(ctx, setting{memory: budget + n*perResident, limits: limits, backends: []string{"turning"}, of: ", refresh_interval: 1s"}); err != nil {
		return err
	}
	neighbour := s.neighbours(ctx, 2*neighbours)
	defer neighbour.cancel()
	err := neighbour.held(ctx, func() (before, during time.Duration, err error) { return s.besideStreams(ctx, neighbour, n) })
	if err != nil {
		return err
	}
	return s.drain(ctx, max(100, n/4))
}

// besideStreams opens the streams, measures what they take and the neighbour beside them, and waits until
// nothing is left of them.
func (s *stage) besideStreams(ctx context.Context, neighbour *neighbour, n int) (before, during time.Duration, err error) {
	low := s.lowest(ctx)
	before = neighbour.windows(ctx, 3)
	base := low()
	first, err := s.takes()
	if err != nil {
		return 0, 0, err
	}
	wait, err := s.attack(fmt.Sprintf("streams:%d", n), streamsTime(n))
	if err != nil {
		return 0, 0, err
	}
	if err := s.streamsOpen(n); err != nil {
		return 0, 0, err
	}
	if err := s.idle(neighbour, n, first); err != nil {
		return 0, 0, err
	}
	at, calls := time.Now(), neighbour.count()
	low = s.lowest(ctx)
	during = neighbour.windows(ctx, 5)
	s.figure("memory in use of one", (low()-base)/float64(n)/1024, perStream>>10, "KiB")
	s.figure("calls a second beside them", float64(neighbour.count()-calls)/time.Since(at).Seconds(), 0, "")
	report, err := wait()
	if err != nil {
		return 0, 0, err
	}
	s.judgeStreams(report, n)
	return before, during, s.allGone(first, n)
}

func streamsTime(n int) time.Duration { return 20*time.Second + time.Duration(n)*2*time.Millisecond }

// room says what to do when there are not enough descriptors.
func room(n int) error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	if need := uint64(n + 1000); limit.Max < need {
		return fmt.Errorf("%d streams need %d descriptors, and there are %d: see ulimit -n, or set -streams", n, need, limit.Max)
	}
	return nil
}

// usage is what newel has taken.
type usage struct{ rss, used, goroutines, fds, connections float64 }

func (s *stage) takes() (usage, error) {
	m, err := s.metrics()
	return usage{m["process_resident_memory_bytes"], m["go_memstats_heap_inuse_bytes"] + m["go_memstats_stack_inuse_bytes"], m["go_goroutines"], m["process_open_fds"], m["newel_connections"]}, err
}

// lowest returns the least memory that is in use at any moment until it is asked: after a collection.
func (s *stage) lowest(ctx context.Context) (end func() float64) {
	ctx, cancel := context.WithCancel(ctx)
	least := make(chan float64, 1)
	go func() {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		used := math.Inf(1)
		for ctx.Err() == nil {
			if now, err := s.takes(); err != nil {
				s.wrong("metrics: %v", err)
			} else {
				used = min(used, now.used)
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
		least <- used
	}()
	return func() float64 { cancel(); return <-least }
}

func (s *stage) streamsOpen(n int) error {
	return await(2*time.Minute, "the streams", func() bool {
		now, err := s.takes()
		return err != nil || now.connections >= float64(n)
	})
}

// idle measures what streams take that nobody uses: no calls meanwhile.
func (s *stage) idle(n *neighbour, streams int, first usage) error {
	n.rest.Store(true)
	defer n.rest.Store(false)
	<-time.After(2 * time.Second)
	now, err := s.takes()
	if err != nil {
		return err
	}
	of := float64(streams)
	s.figure("streams open", of, 0, "")
	s.figure("resident memory of one", (now.rss-first.rss)/of/1024, perResident>>10, "KiB")
	s.figure("goroutines of one", (now.goroutines-first.goroutines)/of, 0, "")
	s.figure("descriptors of one", (now.fds-first.fds)/of, 1.1, "")
	return nil
}

func (s *stage) judgeStreams(r map[string]float64, n int) {
	if r["opened"] < float64(n) || r["failed"] > 0 {
		s.wrong("%v of %d streams were opened, %v failed", r["opened"], n, r["failed"])
	}
	if r["of another"] > 0 {
		s.wrong("I10: %v messages were of another's subscription", r["of another"])
	}
	if r["told"] == 0 {
		s.wrong("no stream was told of a change")
	}
	if r["ended"] > 0 {
		s.wrong("%v streams ended that nobody closed", r["ended"])
	}
	s.figure("notifications on streams", r["told"], 0, "")
	s.figure("closed without a word", r["reset"], 0, "")
}

// allGone waits until nothing is left of the streams. Memory is given back by and by, and not all.
func (s *stage) allGone(first usage, n int) error {
	var now usage
	err := await(40*time.Second, "nothing is left", func() (gone bool) {
		var err error
		now, err = s.takes()
		return err == nil && now.goroutines <= first.goroutines+50+leftSessions(n) && now.fds <= first.fds+20 && now.connections <= first.connections+10
	})
	s.figure("goroutines left", now.goroutines-first.goroutines, 50+leftSessions(n), "")
	s.figure("descriptors left", now.fds-first.fds, 20, "")
	s.figure("connections left", now.connections-first.connections, 10, "")
	s.figure("resident memory after, above that before", (now.rss-first.rss)/(1<<20), 0, "MiB")
	if err != nil {
		s.wrong("%v", err)
	}
	return nil
}

// leftSessions are goroutines of sessions whose clients went away without a word: they go on for
// session_idle_timeout.
func leftSessions(n int) float64 { return 6 * float64(n) / 2 / 20 }

// drain has newel stop while streams are open.
func (s *stage) drain(ctx context.Context, n int) error {
	wait, err := s.attack(fmt.Sprintf("streams:%d", n), 2*time.Minute)
	if err != nil {
		return err
	}
	if err := s.streamsOpen(n); err != nil {
		return err
	}
	at := time.Now()
	if err := s.newel.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	if !s.newel.Ended(25 * time.Second) {
		s.wrong("it does not stop within 25 s with %d streams", n)
		return nil
	}
	s.stopped = true
	s.figure("stopping with streams open", time.Since(at).Seconds(), 16, "s")
	if s.newel.Err() != nil {
		s.wrong("it stops with %v", s.newel.Err())
	}
	r, err := wait()
	if err != nil {
		return err
	}
	s.figure("streams at the end", r["opened"], 0, "")
	if cut := r["ended"] - r["ended in order"]; cut > 0 || r["ended"] < r["opened"] || r["opened"] < 0.9*float64(n) {
		s.wrong("of %v streams %v ended, %v of them without a word", r["opened"], r["ended"], cut)
	}
	return ctx.Err()
}

// holdStreams opens n streams, half of each kind, has one in twenty go away without a word in the
// middle, and closes the others in order at the end.
func holdStreams(ctx context.Context, addr string, n int, r *report) {
	var all sync.WaitGroup
	gate := make(chan struct{}, 32) // so many at a time are opened
	life, cut := context.WithTimeout(ctx, max(0, time.Until(deadlineOf(ctx))-3*time.Second))
	defer cut()
	var over atomic.Int64
	for i := range n {
		all.Go(func() {
			gate <- struct{}{}
			st, err := openStream(ctx, addr, i)
			<-gate
			if err != nil {
				r.add("failed", 1)
				return
			}
			r.add("opened", 1)
			stop := context.AfterFunc(life, func() { st.leave(addr) })
			if i%20 == 0 {
				early := time.AfterFunc(time.Until(deadlineOf(ctx))/2, func() { over.Add(1); st.reset() })
				defer early.Stop()
			}
			st.read(r)
			stop()
		})
	}
	all.Wait()
	r.add("reset", float64(over.Load()))
}

func deadlineOf(ctx context.Context) time.Time {
	d, _ := ctx.Deadline() // every attack has one
	return d
}

// A held stream is one connection with an event stream on it.
type heldStream struct {
	conn    *net.TCPConn
	in      *bufio.Reader
	id      string // of the request, where messages carry it
	session string
	left    atomic.Bool
}

// leave closes it in order; a session is ended first.
func (h *heldStream) leave(addr string) {
	h.left.Store(true)
	if h.session != "" {
		if r, err := http.NewRequest(http.MethodDelete, "http://"+addr+"/mcp", nil); err == nil {
			r.Header.Set("Mcp-Session-Id", h.session)
			r.Header.Set("Mcp-Protocol-Version", "2025-11-25")
			if resp, err := plain.Do(r); err == nil {
				_ = resp.Body.Close()
			}
		}
	}
	_ = h.conn.Close()
}

// reset closes it as if its machine were gone.
func (h *heldStream) reset() {
	h.left.Store(true)
	_ = h.conn.SetLinger(0)
	_ = h.conn.Close()
}

// read reads until it ends.
func (h *heldStream) read(r *report) {
	lines := bufio.NewReaderSize(httputil.NewChunkedReader(h.in), 512)
	own := `"io.modelcontextprotocol/subscriptionId":` + h.id + `}`
	result := false
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			if !h.left.Load() {
				r.add("ended", 1)
				if errors.Is(err, io.EOF) && (result || h.session != "") {
					r.add("ended in order", 1)
				}
			}
			return
		}
		data, ok := strings.CutPrefix(line, "data: ")
		if !ok {
			continue
		}
		switch {
		case h.id != "" && !strings.Contains(data, own) && !strings.Contains(data, strings.TrimSuffix(own, "}")+","):
			r.add("of another", 1)
		case strings.Contains(data, "list_changed"):
			r.add("told", 1)
		case h.id != "" && strings.Contains(data, `"result":`):
			result = true
		}
	}
}

// openStream opens the i-th stream: one of two is a subscription, the other that of a session.
func openStream(ctx context.Context, addr string, i int) (*heldStream, error) {
	raw, err := dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	h := &heldStream{conn: raw.(*net.TCPConn), in: bufio.NewReaderSize(raw, 512)}
	if i%2 == 0 {
		h.id = fmt.Sprint(1_000_000 + i)
		body := `{"jsonrpc":"2.0","id":` + h.id + `,"method":"subscriptions/listen","params":{"notifications":{"toolsListChanged":true},` + meta + `}}`
		err = h.ask(fmt.Sprintf("%sMcp-Method: subscriptions/listen\r\nContent-Length: %d\r\n\r\n%s", requestHead, len(body), body))
	} else {
		err = h.begin()
	}
	if err != nil {
		_ = raw.Close()
		return nil, err
	}
	return h, nil
}

const sessionHead = "Host: localhost\r\nContent-Type: application/json\r\nAccept: application/json, text/event-stream\r\nMcp-Protocol-Version: 2025-11-25\r\n"

// begin begins a session and opens its stream.
func (h *heldStream) begin() error {
	for _, body := range []string{
		`{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"x","version":"1"}}}`,
		`{"jsonrpc":"2.0","method":"notifications/initialized"}`,
	} {
		resp, err := h.exchange("POST /mcp HTTP/1.1\r\n" + sessionHead + h.sessionLine() + fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body), body))
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode/100 != 2 {
			return fmt.Errorf("status %d, %w", resp.StatusCode, err)
		}
		if h.session == "" {
			h.session = resp.Header.Get("Mcp-Session-Id")
		}
	}
	return h.ask("GET /mcp HTTP/1.1\r\n" + sessionHead + h.sessionLine() + "\r\n")
}

func (h *heldStream) sessionLine() string {
	if h.session == "" {
		return ""
	}
	return "Mcp-Session-Id: " + h.session + "\r\n"
}

func (h *heldStream) exchange(request string) (*http.Response, error) {
	if _, err := io.WriteString(h.conn, request); err != nil {
		return nil, err
	}
	return http.ReadResponse(h.in, nil)
}

// ask sends a request whose answer is an event stream. Its body is read by read, in chunks.
func (h *heldStream) ask(request string) error {
	if _, err := io.WriteString(h.conn, request); err != nil {
		return err
	}
	status, err := h.in.ReadString('\n')
	if err != nil || !strings.HasPrefix(status, "HTTP/1.1 200") {
		return fmt.Errorf("%q, %w", status, errors.Join(err, errRefused))
	}
	stream := false
	for {
		line, err := h.in.ReadString('\n')
		if err != nil {
			return err
		}
		stream = stream || strings.HasPrefix(line, "Content-Type: text/event-stream")
		if line == "\r\n" && !stream {
			return errRefused
		}
		if line == "\r\n" {
			return nil
		}
	}
}

var errRefused = errors.New("refused")

// floods: streams, sessions and keys of one client, and the neighbour.
func floods(ctx context.Context, s *stage) error {
	key := newIssuer()
	is, err := key.serve()
	if err != nil {
		return err
	}
	defer is.Close()
	top := fmt.Sprintf("auth:\n  mode: tokens\n  private_ranges: [127.0.0.0/8]\n  issuers: [{url: %q, jwks: %q, audiences: [newel]}]\n", key.url, key.url+"/jwks")
	if err := s.open(ctx, setting{top: top, limits: ", max_streams_per_peer: 200, max_sessions_per_peer: 200"}); err != nil {
		return err
	}
	n := s.neighbour(ctx, "Authorization", "Bearer "+key.token("neighbour", "known"))
	return n.during(ctx, func() error {
		fetched := key.fetched.Load()
		begun := time.Now()
		reports, err := s.attacks([]string{"listen:" + key.token("attacker", "known"), "sessions:" + key.token("attacker", "known"), "keys:" + key.token("attacker", "unknown")}, 8*time.Second)
		if err != nil {
			return err
		}
		for kind, r := range reports {
			kind, _, _ = strings.Cut(kind, ":")
			if kind != "keys" {
				s.figure("open "+kind+" of one caller", r["opened"], 204, "")
			}
			s.figure("refused "+kind, r["refused"], 0, "")
			if r["refused"] == 0 {
				s.wrong("%s: nothing was refused: %v", kind, r)
			}
		}
		s.figure("keys asked for in a minute", float64(key.fetched.Load()-fetched)/time.Since(begun).Minutes(), 60/10+8, "")
		return nil
	})
}

// openStreams opens subscriptions until the time is over, and keeps them.
func openStreams(ctx context.Context, addr, token string, r *report) {
	body := `{"jsonrpc":"2.0","id":1,"method":"subscriptions/listen","params":{"notifications":{"toolsListChanged":true},` + meta + `}}`
	for ctx.Err() == nil {
		every(ctx, 10*time.Millisecond)
		c, err := dial(ctx, addr)
		if err != nil {
			continue
		}
		_ = c.SetDeadline(deadlineOf(ctx)) // a connection that is open has them
		h := &heldStream{conn: c.(*net.TCPConn), in: bufio.NewReaderSize(c, 512)}
		if err := h.ask(fmt.Sprintf("%sAuthorization: Bearer %s\r\nMcp-Method: subscriptions/listen\r\nContent-Length: %d\r\n\r\n%s", requestHead, token, len(body), body)); err == nil {
			first, err := h.in.ReadString('\n')
			for err == nil && !strings.Contains(first, "{") {
				first, err = h.in.ReadString('\n')
			}
			if strings.Contains(first, "acknowledged") {
				r.add("opened", 1)
				defer c.Close()
				continue
			}
		}
		_ = c.Close()
		if ctx.Err() == nil {
			r.add("refused", 1)
		}
	}
}

// openSessions begins sessions until the time is over.
func openSessions(ctx context.Context, addr, token string, r *report) {
	c := client(attacker)
	for ctx.Err() == nil {
		every(ctx, 10*time.Millisecond)
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+addr+"/mcp", strings.NewReader(`{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"x","version":"1"}}}`))
		if err != nil {
			return
		}
		for k, v := range map[string]string{"Content-Type": "application/json", "Accept": "application/json, text/event-stream", "Authorization": "Bearer " + token} {
			req.Header.Set(k, v)
		}
		resp, err := c.Do(req)
		if err != nil {
			continue
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			r.add("opened", 1)
		} else {
			r.add("refused", 1)
		}
	}
}

// sendTokens sends tokens whose keys nobody knows, each with another.
func sendTokens(ctx context.Context, addr, token string, r *report) {
	c := client(attacker)
	_, rest, _ := strings.Cut(token, ".")
	for ctx.Err() == nil {
		every(ctx, 10*time.Millisecond)
		head := base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"alg":"EdDSA","typ":"at+jwt","kid":"%x"}`, rand.Uint64()))
		status, _, err := call(ctx, c, addr, "echo", `{}`, "Authorization", "Bearer "+head+"."+rest)
		switch {
		case err != nil:
		case status == http.StatusOK:
			r.add("taken", 1)
		default:
			r.add("refused", 1)
		}
	}
}

// issuer is an authorization server: one key, and how often it was asked for.
type issuer struct {
	url     string
	key     ed25519.PrivateKey
	fetched atomic.Int64
}

func newIssuer() *issuer {
	return &issuer{key: ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))} // of tests
}

func (i *issuer) serve() (io.Closer, error) {
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	i.url = "http://" + l.Addr().String()
	srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		i.fetched.Add(1)
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"known","alg":"EdDSA","use":"sig","x":%q}]}`, base64.RawURLEncoding.EncodeToString(i.key.Public().(ed25519.PublicKey)))
	})}
	go func() { _ = srv.Serve(l) }() // until it is closed
	return srv, nil
}

// token returns an access token (RFC 9068).
func (i *issuer) token(subject, kid string) string {
	head := fmt.Sprintf(`{"alg":"EdDSA","typ":"at+jwt","kid":%q}`, kid)
	body, err := json.Marshal(map[string]any{"iss": i.url, "sub": subject, "aud": "newel", "client_id": "hostile", "jti": subject + kid, "iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix()})
	if err != nil {
		panic(err) // text and numbers
	}
	signed := base64.RawURLEncoding.EncodeToString([]byte(head)) + "." + base64.RawURLEncoding.EncodeToString(body)
	return signed + "." + base64.RawURLEncoding.EncodeToString(ed25519.Sign(i.key, []byte(signed)))
}
