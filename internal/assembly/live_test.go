package assembly

import (
	"bufio"
	"context"
	"encoding/json" // as the SDK's types
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/policy"
)

// versioned is a backend of one configuration: its tool says which one, and which rule allowed it.
type versioned struct {
	version int
	more    []*call.Capability
	closed  atomic.Bool
	watched atomic.Int32
}

// Name implements call.Backend.
func (b *versioned) Name() string { return "versioned" }

// Capabilities implements call.Backend.
func (b *versioned) Capabilities(context.Context) ([]*call.Capability, error) {
	which := &call.Capability{
		Kind: call.Tool, Name: "which", Description: "Says the version.", Effect: call.Read, Input: jsontext.Value(`{"type":"object"}`), Origin: "test",
		Run: func(_ context.Context, c *call.Call) (*call.Result, error) {
			if b.closed.Load() {
				return nil, errors.New("the backend is closed")
			}
			return call.Text(fmt.Sprintf("backend v%d rule %s", b.version, c.Event.Rule)), nil
		},
	}
	return append([]*call.Capability{which}, b.more...), nil
}

// Run implements call.Watcher.
func (b *versioned) Run(ctx context.Context, _ func(...call.Kind), _ func(string)) error {
	b.watched.Add(1)
	defer b.watched.Add(-1)
	<-ctx.Done()
	return nil
}

// configuration is the n-th: backend and policy say so.
func configuration(t *testing.T, n int, more ...*call.Capability) (*Options, *versioned) {
	t.Helper()
	p, problems := policy.Compile(policy.Set{Rules: []policy.Rule{{Name: fmt.Sprintf("v%d", n), Then: "allow"}}})
	if problems != nil {
		t.Fatal(problems)
	}
	b := &versioned{version: n, more: more}
	return &Options{Backends: []call.Backend{b}, Policy: p}, b
}

// whole says which version an answer is of, or fails if it is of two.
func whole(t *testing.T, text string) int {
	t.Helper()
	var backend, rule int
	if _, err := fmt.Sscanf(text, "backend v%d rule v%d", &backend, &rule); err != nil || backend != rule {
		t.Errorf("an answer of two configurations: %q (%v)", text, err)
	}
	return backend
}

// serveLive serves until the test ends.
func serveLive(t *testing.T, l *Live) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Serve(ctx, listener) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "http://" + listener.Addr().String()
}

const liveMeta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}`

// stateless calls a tool at revision 2026-07-28.
func stateless(ctx context.Context, client *http.Client, url, tool string) (string, error) {
	body := fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":%q,"arguments":{},%s}}`, tool, liveMeta)
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	for name, v := range map[string]string{"Content-Type": "application/json", "Mcp-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/call", "Mcp-Name": tool} {
		r.Header.Set(name, v)
	}
	resp, err := client.Do(r)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	var answer struct {
		Result struct {
			Content []struct{ Text string }
			IsError bool
		}
		Error *struct{ Message string }
	}
	if err := json.Unmarshal(raw, &answer); err != nil || resp.StatusCode != http.StatusOK || answer.Error != nil || answer.Result.IsError || len(answer.Result.Content) != 1 {
		return "", fmt.Errorf("%s: %s", resp.Status, raw)
	}
	return answer.Result.Content[0].Text, nil
}

// session connects with the SDK.
func session(t *testing.T, url string, o *mcp.ClientOptions) *mcp.ClientSession {
	t.Helper()
	s, err := mcp.NewClient(&mcp.Implementation{Name: "t", Version: "1"}, o).Connect(t.Context(), &mcp.StreamableClientTransport{Endpoint: url}, &mcp.ClientSessionOptions{ProtocolVersion: "2025-11-25"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func inSession(ctx context.Context, s *mcp.ClientSession, tool string) (string, error) {
	r, err := s.CallTool(ctx, &mcp.CallToolParams{Name: tool})
	if err != nil {
		return "", err
	}
	text, ok := r.Content[0].(*mcp.TextContent)
	if !ok || r.IsError {
		return "", fmt.Errorf("%+v", r.Content[0])
	}
	return text.Text, nil
}

func newLive(t *testing.T, o *Options) *Live {
	t.Helper()
	h, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return NewLive(h)
}

// Fault E15: a new configuration every 50 ms under load. No call fails, none is answered by two
// configurations, and sessions outlive them all.
func TestReplaceUnderLoad(t *testing.T) {
	first, _ := configuration(t, 0)
	l := newLive(t, first)
	url := serveLive(t, l) + "/mcp"
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	var calls, newest atomic.Int64
	caller := func(do func(context.Context) (string, error)) {
		all.Go(func() {
			last := 0
			for ctx.Err() == nil {
				text, err := do(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				if v := whole(t, text); v < last {
					t.Errorf("after version %d an answer of %d", last, v)
				} else {
					last = v
				}
				calls.Add(1)
				newest.Store(int64(last))
			}
		})
	}
	for range 4 {
		caller(func(ctx context.Context) (string, error) { return stateless(ctx, http.DefaultClient, url, "which") })
		s := session(t, url, nil)
		caller(func(ctx context.Context) (string, error) { return inSession(ctx, s, "which") })
	}
	const versions = 40
	backends := make([]*versioned, versions+1)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for n := 1; n <= versions; n++ {
		<-tick.C
		var o *Options
		o, backends[n] = configuration(t, n)
		old := backends[n-1]
		if err := l.Replace(t.Context(), o, func() {
			if old != nil {
				old.closed.Store(true)
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
	until(t, "nobody sees the last one", func() bool { return newest.Load() == versions || t.Failed() })
	stop()
	all.Wait()
	t.Logf("%d calls over %d configurations", calls.Load(), versions+1)
	if backends[versions].watched.Load() != 1 {
		t.Error("the backend in use is not watched")
	}
	until(t, "old backends are watched or open", func() bool {
		for _, b := range backends[1:versions] {
			if b.watched.Load() != 0 || !b.closed.Load() {
				return false
			}
		}
		return true
	})
}

// until waits for a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	limit := time.After(20 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-limit:
			t.Fatal(what)
		case <-tick.C:
		}
	}
}

// A call of a tool that is gone in the next configuration ends as it began, and only then its
// backend is let go.
func TestRemovedWhileCalled(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	o, _ := configuration(t, 1, &call.Capability{
		Kind: call.Tool, Name: "slow", Description: "D.", Effect: call.Read, Input: jsontext.Value(`{"type":"object"}`), Origin: "test",
		Run: func(context.Context, *call.Call) (*call.Result, error) {
			entered <- struct{}{}
			<-leave
			return call.Text("done"), nil
		},
	})
	l := newLive(t, o)
	url := serveLive(t, l) + "/mcp"
	s := session(t, url, nil)
	answers := make(chan error, 2)
	go func() { _, err := stateless(t.Context(), http.DefaultClient, url, "slow"); answers <- err }()
	go func() { _, err := inSession(t.Context(), s, "slow"); answers <- err }()
	<-entered
	<-entered
	let := make(chan struct{})
	next, _ := configuration(t, 2)
	if err := l.Replace(t.Context(), next, func() { close(let) }); err != nil {
		t.Fatal(err)
	}
	if _, err := stateless(t.Context(), http.DefaultClient, url, "slow"); err == nil {
		t.Error("what is gone can be called")
	}
	if text, err := inSession(t.Context(), s, "which"); err != nil || whole(t, text) != 2 {
		t.Error(text, err)
	}
	select {
	case <-let:
		t.Error("the old house was let go while a call was in it")
	default:
	}
	close(leave)
	for range 2 {
		if err := <-answers; err != nil {
			t.Error(err)
		}
	}
	<-let
}

// What is wrong changes nothing.
func TestReplaceRefused(t *testing.T) {
	first, _ := configuration(t, 1)
	l := newLive(t, first)
	url := serveLive(t, l) + "/mcp"
	s := session(t, url, nil)
	bad, b := configuration(t, 2)
	bad.Backends = append(bad.Backends, b)
	if err := l.Replace(t.Context(), bad, func() { t.Error("called done") }); err == nil || !strings.Contains(err.Error(), "two backends") {
		t.Error(err)
	}
	bad, _ = configuration(t, 2)
	bad.Servers = []Server{{Path: "/mcp/a"}, {Path: "/mcp/a"}}
	if err := l.Replace(t.Context(), bad, nil); err == nil {
		t.Error("two servers at one address")
	}
	text, err := inSession(t.Context(), s, "which")
	if err != nil || whole(t, text) != 1 {
		t.Error(text, err)
	}
}

// Subscribers hear of lists that are different, and of no others.
func TestListsChangedOnlyIfTheyDid(t *testing.T) {
	first, b := configuration(t, 1)
	l := newLive(t, first)
	url := serveLive(t, l) + "/mcp"
	heard := make(chan struct{}, 100)
	session(t, url, &mcp.ClientOptions{ToolListChangedHandler: func(context.Context, *mcp.ToolListChangedRequest) { heard <- struct{}{} }})
	until(t, "nobody listens", func() bool { return l.House().main().place.hub.Listeners() > 0 })
	same := *first // and the same backend and policy
	for range 3 {
		if err := l.Replace(t.Context(), &same, nil); err != nil {
			t.Fatal(err)
		}
	}
	if b.watched.Load() != 1 {
		t.Errorf("a backend that stayed is watched %d times", b.watched.Load())
	}
	more := *first
	extra := &versioned{version: 1}
	more.Backends = append(more.Backends, renamed{extra})
	if err := l.Replace(t.Context(), &more, nil); err != nil {
		t.Fatal(err)
	}
	<-heard
	// One more that changes nothing, then one that does: had the first been announced, there would be two.
	if err := l.Replace(t.Context(), &more, nil); err != nil {
		t.Fatal(err)
	}
	if err := l.Replace(t.Context(), &same, nil); err != nil {
		t.Fatal(err)
	}
	<-heard
	if n := len(heard); n != 0 {
		t.Errorf("%d announcements too many", n)
	}
}

// renamed publishes one other tool.
type renamed struct{ *versioned }

// Name implements call.Backend.
func (renamed) Name() string { return "renamed" }

// Capabilities implements call.Backend.
func (r renamed) Capabilities(ctx context.Context) ([]*call.Capability, error) {
	all, err := r.versioned.Capabilities(ctx)
	if err != nil {
		return nil, err
	}
	c := *all[0]
	c.Name = "another"
	return []*call.Capability{&c}, nil
}

// A session that was there before a server changed its name, and one that came after, are both
// served by the new one; each keeps what it was told.
func TestSessionsOfTwoNames(t *testing.T) {
	first, _ := configuration(t, 1)
	first.Name = "one"
	l := newLive(t, first)
	url := serveLive(t, l) + "/mcp"
	before := session(t, url, nil)
	next, _ := configuration(t, 2)
	next.Name = "two"
	if err := l.Replace(t.Context(), next, nil); err != nil {
		t.Fatal(err)
	}
	after := session(t, url, nil)
	for s, name := range map[*mcp.ClientSession]string{before: "one", after: "two"} {
		if got := s.InitializeResult().ServerInfo.Name; got != name {
			t.Errorf("%s instead of %s", got, name)
		}
		text, err := inSession(t.Context(), s, "which")
		if err != nil || whole(t, text) != 2 {
			t.Error(text, err)
		}
	}
}

// The time from the order to go over to the first answer of the new configuration. It is printed:
// machines differ.
func TestReplaceIsQuick(t *testing.T) {
	first, _ := configuration(t, 0)
	l := newLive(t, first)
	url := serveLive(t, l) + "/mcp"
	var worst time.Duration
	for n := 1; n <= 20; n++ {
		o, _ := configuration(t, n)
		start := time.Now()
		if err := l.Replace(t.Context(), o, nil); err != nil {
			t.Fatal(err)
		}
		text, err := stateless(t.Context(), http.DefaultClient, url, "which")
		if err != nil || whole(t, text) != n {
			t.Fatal(text, err)
		}
		worst = max(worst, time.Since(start))
	}
	t.Logf("the slowest of 20 was visible after %v", worst)
}

// Two hundred configurations leave nothing behind.
func TestReplaceLeaksNothing(t *testing.T) {
	first, _ := configuration(t, 0)
	l := newLive(t, first)
	url := serveLive(t, l) + "/mcp"
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	round := func(n int) {
		o, _ := configuration(t, n)
		o.Name = fmt.Sprintf("v%d", n%5) // servers of the SDK come and go too
		done := make(chan struct{})
		if err := l.Replace(t.Context(), o, func() { close(done) }); err != nil {
			t.Fatal(err)
		}
		if _, err := stateless(t.Context(), client, url, "which"); err != nil {
			t.Fatal(err)
		}
		<-done
	}
	for n := range 20 {
		round(n + 1)
	}
	goroutines, files := runtime.NumGoroutine(), descriptors(t)
	for n := range 200 {
		round(n + 21)
	}
	until(t, "goroutines or descriptors are left over", func() bool {
		return runtime.NumGoroutine() <= goroutines+2 && descriptors(t) <= files+2
	})
	if n := len(l.House().main().place.sessions.About()); n > 2 {
		t.Errorf("%d servers of the SDK are kept", n)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	switch {
	case err != nil && runtime.GOOS != "linux":
		t.Skip("this system does not list descriptors")
	case err != nil:
		t.Fatal(err)
	}
	return len(all)
}

// Connections of a socket that another process took over get an answer to what they sent, and are
// closed after it: a client never sees one closed on its request.
func TestHandOverUnderLoad(t *testing.T) {
	first, _ := configuration(t, 0)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tcp, ok := listener.(*net.TCPListener)
	if !ok {
		t.Fatal("no TCP")
	}
	file, err := tcp.File()
	if err != nil {
		t.Fatal(err)
	}
	url := "http://" + listener.Addr().String() + "/mcp"
	ctx, handOver := context.WithCancelCause(context.Background())
	done := make(chan error, 1)
	one := newLive(t, first)
	go func() { done <- one.Serve(ctx, listener) }()

	load, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	var calls, of2 atomic.Int64
	for range 8 {
		client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1}}
		all.Go(func() {
			defer client.CloseIdleConnections()
			for load.Err() == nil {
				text, err := stateless(t.Context(), client, url, "which")
				if err != nil {
					t.Error(err)
					return
				}
				if whole(t, text) == 2 {
					of2.Add(1)
				}
				calls.Add(1)
			}
		})
	}
	until(t, "no calls", func() bool { return calls.Load() > 200 })
	inherited, err := net.FileListener(file)
	if err != nil {
		t.Fatal(err)
	}
	file.Close()
	second, _ := configuration(t, 2)
	two := newLive(t, second)
	ctx2, cancel2 := context.WithCancel(context.Background())
	done2 := make(chan error, 1)
	go func() { done2 <- two.Serve(ctx2, inherited) }()
	handOver(ErrHandedOver)
	if err := <-done; err != nil {
		t.Error(err)
	}
	so := of2.Load()
	until(t, "the second does not answer", func() bool { return t.Failed() || of2.Load() > so+100 })
	stop()
	all.Wait()
	cancel2()
	if err := <-done2; err != nil {
		t.Error(err)
	}
	t.Logf("%d calls, %d of them answered by the second", calls.Load(), of2.Load())
}

// subscribed opens a subscription of revision 2026-07-28 and returns the methods it hears, and its end.
func subscribed(t *testing.T, url string) <-chan string {
	t.Helper()
	return subscribedBy(t, http.DefaultClient, url)
}

func subscribedBy(t *testing.T, client *http.Client, url string) <-chan string {
	t.Helper()
	body := `{"jsonrpc":"2.0","id":1,"method":"subscriptions/listen","params":{"notifications":{"toolsListChanged":true},` + liveMeta + `}}`
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]string{"Content-Type": "application/json", "Accept": "application/json, text/event-stream", "Mcp-Protocol-Version": "2026-07-28", "Mcp-Method": "subscriptions/listen"} {
		r.Header.Set(name, v)
	}
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	heard := make(chan string, 100)
	go func() {
		defer close(heard)
		defer resp.Body.Close()
		lines := bufio.NewScanner(resp.Body)
		for lines.Scan() {
			data, ok := strings.CutPrefix(lines.Text(), "data:")
			var m struct {
				Method string
				Result json.RawMessage
			}
			if !ok || json.Unmarshal([]byte(data), &m) != nil {
				continue
			}
			if m.Result != nil {
				m.Method = "result"
			}
			heard <- m.Method
		}
	}()
	return heard
}

// A subscription of the old house hears of the lists of the new one, and ends with its result when
// the old one is asked to end.
func TestSubscriptionsGoOver(t *testing.T) {
	first, _ := configuration(t, 1)
	l := newLive(t, first)
	url := serveLive(t, l) + "/mcp"
	heard := subscribed(t, url)
	if m := <-heard; m != call.Acknowledged {
		t.Fatal(m)
	}
	old := l.House()
	next, _ := configuration(t, 2)
	next.Backends = append(next.Backends, renamed{&versioned{version: 2}})
	let := make(chan struct{})
	if err := l.Replace(t.Context(), next, func() { close(let) }); err != nil {
		t.Fatal(err)
	}
	if m := <-heard; m != "notifications/tools/list_changed" {
		t.Fatal(m)
	}
	select {
	case <-let:
		t.Fatal("the old house was let go with a subscription in it")
	default:
	}
	old.drain.begin() // which happens after 15 seconds
	if m := <-heard; m != "result" {
		t.Fatal(m)
	}
	<-let
}

// somebody is who everybody is.
type somebody struct{}

// Verify implements authenticate.Verifier.
func (somebody) Verify(_ context.Context, c call.Credential) (*call.Principal, error) {
	if c.Known != nil {
		return c.Known, nil
	}
	return &call.Principal{ID: "somebody", Scopes: []string{"*"}}, nil
}

// A session that nobody was asked about is not there any more once people are.
func TestSessionsEndWhenIdentitiesBegin(t *testing.T) {
	first, _ := configuration(t, 1)
	l := newLive(t, first)
	url := serveLive(t, l) + "/mcp"
	before := session(t, url, nil)
	next, _ := configuration(t, 2)
	next.Identity = somebody{}
	if err := l.Replace(t.Context(), next, nil); err != nil {
		t.Fatal(err)
	}
	if text, err := inSession(t.Context(), before, "which"); err == nil {
		t.Errorf("a session of nobody answers %q", text)
	}
	if text, err := inSession(t.Context(), session(t, url, nil), "which"); err != nil || whole(t, text) != 2 {
		t.Error(text, err)
	}
	// The same people stay the same.
	again, _ := configuration(t, 3)
	again.Identity = somebody{}
	stays := session(t, url, nil)
	if err := l.Replace(t.Context(), again, nil); err != nil {
		t.Fatal(err)
	}
	if text, err := inSession(t.Context(), stays, "which"); err != nil || whole(t, text) != 3 {
		t.Error(text, err)
	}
}
