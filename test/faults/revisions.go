package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// previous is the commit of the program before this one: the last with the schema before. Raise it
// with the schema, or with a release.
const previous = "597898124d5e54783bef8482a7bb2b9d0a1c0b62"

// older builds the program before this one from the history, once.
func (o *options) older(ctx context.Context) (string, error) {
	o.building.Lock()
	defer o.building.Unlock()
	to := filepath.Join(o.dir, "newel-previous")
	if _, err := os.Stat(to); err == nil {
		return to, nil
	}
	if err := exec.CommandContext(ctx, "git", "cat-file", "-e", previous+"^{commit}").Run(); err != nil {
		return "", fmt.Errorf("E18 was NOT RUN: the program before this one is commit %.12s, which this clone does not have (%w); get the whole history (git fetch --unshallow), or name the scenarios that you want with -environment", previous, err)
	}
	src := filepath.Join(o.dir, "previous")
	if err := os.MkdirAll(src, 0o700); err != nil {
		return "", err
	}
	archive := exec.CommandContext(ctx, "git", "archive", previous)
	unpack := exec.CommandContext(ctx, "tar", "-x", "-C", src)
	var err error
	if unpack.Stdin, err = archive.StdoutPipe(); err != nil {
		return "", err
	}
	if err := errors.Join(unpack.Start(), archive.Run(), unpack.Wait()); err != nil {
		return "", err
	}
	build := exec.CommandContext(ctx, "go", "build", "-tags", "faults", "-o", to, "./cmd/newel")
	build.Dir, build.Env = src, append(os.Environ(), "CGO_ENABLED=0")
	if b, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("the program before this one cannot be built: %w\n%s", err, b)
	}
	return to, os.RemoveAll(src)
}

// revisions are those that clients speak. The first is not served: such a client is offered another.
var revisions = []string{"2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25", revision}

// A talker is a client of one revision at one node.
type talker struct {
	revision, addr string
	session        string
	agreed         string // revision that the server offered
	id             int
}

// post sends a message, and returns the answer to it. header and body are what the client says they
// are: they need not fit together.
func (t *talker) post(header map[string]string, body []byte) (status int, answer []byte, session string, err error) {
	r, err := http.NewRequestWithContext(context.Background(), http.MethodPost, "http://"+t.addr+"/mcp", bytes.NewReader(body))
	if err != nil {
		return 0, nil, "", err
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Accept", "application/json, text/event-stream")
	for k, v := range header {
		r.Header.Set(k, v)
	}
	resp, err := kept.Do(r)
	if err != nil {
		return 0, nil, "", err
	}
	defer resp.Body.Close()
	if strings.HasPrefix(resp.Header.Get("Content-Type"), "text/event-stream") {
		for lines := bufio.NewReader(resp.Body); ; {
			line, err := lines.ReadBytes('\n')
			if data, ok := bytes.CutPrefix(line, []byte("data:")); ok && bytes.Contains(data, []byte(`"id"`)) {
				return resp.StatusCode, bytes.TrimSpace(data), resp.Header.Get("Mcp-Session-Id"), nil
			}
			if err != nil {
				return 0, nil, "", fmt.Errorf("a stream without the answer: %w", err)
			}
		}
	}
	answer, err = io.ReadAll(resp.Body)
	return resp.StatusCode, answer, resp.Header.Get("Mcp-Session-Id"), err
}

// open begins a session, where the revision has them.
func (t *talker) open() error {
	if t.revision == revision || t.session != "" {
		t.agreed = t.revision
		return nil
	}
	status, answer, session, err := t.post(nil, fmt.Appendf(nil, `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":%q,"capabilities":{},"clientInfo":{"name":"driver","version":"1"}}}`, t.revision))
	if err != nil {
		return err
	}
	var m struct {
		Result struct {
			Revision string `json:"protocolVersion"`
		} `json:"result"`
	}
	if err := json.Unmarshal(answer, &m); err != nil || session == "" {
		return fmt.Errorf("HTTP %d, session %q, %w: %.200s", status, session, err, answer)
	}
	t.session, t.agreed, t.id = session, m.Result.Revision, 1
	_, _, _, err = t.post(t.header(""), []byte(`{"jsonrpc":"2.0","method":"notifications/initialized"}`))
	return err
}

func (t *talker) header(tool string) map[string]string {
	h := map[string]string{}
	if t.revision == revision {
		h["Mcp-Protocol-Version"], h["Mcp-Method"], h["Mcp-Name"] = revision, "tools/call", tool
		return h
	}
	h["Mcp-Session-Id"] = t.session
	if t.agreed > "2025-03-26" { // before, there was no such header
		h["Mcp-Protocol-Version"] = t.agreed
	}
	return h
}

// message is a call in the framing of the revision.
func (t *talker) message(tool string, args any, key string) []byte {
	t.id++
	meta := map[string]any{}
	if t.revision == revision {
		meta["io.modelcontextprotocol/protocolVersion"] = revision
		meta["io.modelcontextprotocol/clientCapabilities"] = map[string]any{}
	}
	if key != "" {
		meta["dev.newel/idempotencyKey"] = key
	}
	b, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": t.id, "method": "tools/call", "params": map[string]any{"name": tool, "arguments": args, "_meta": meta}})
	if err != nil {
		panic(err) // strings and numbers
	}
	return b
}

// tryAs makes one attempt of an operation as a client of a revision, and writes it down.
func (l *lane) tryAs(t *talker, o *operation) Event {
	o.Attempts++
	e := Event{Kind: invoked, Op: o.ID, Tool: o.Tool, Nonce: o.Nonce, Attempt: o.Attempts}
	l.journal.add(e)
	e.Kind = returned
	status, answer := 0, []byte(nil)
	err := t.open()
	if err == nil {
		status, answer, _, err = t.post(t.header(o.Tool), t.message(o.Tool, o.Args, o.Key))
	}
	switch {
	case err != nil:
		e.Outcome, e.Detail, t.session = lost, err.Error(), ""
	case t.session != "" && (status == http.StatusNotFound || status == http.StatusServiceUnavailable):
		e.Outcome, e.Detail, t.session = lost, fmt.Sprintf("HTTP %d", status), "" // the session is gone, or the server is about to be
	default:
		understand(&e, status, answer, o)
	}
	l.journal.add(e)
	return e
}

// programChanges has nodes go over to this program from the one before, and back, while clients of
// all revisions call; each operation may begin in one revision and go on in another. One tool is
// denied, whoever asks and however.
func programChanges(l *lane) error {
	old, err := l.options.older(l.host.Context())
	if err != nil {
		return err
	}
	l.settles, l.longest = "", "1s" // the program before does not know the setting: twice the longest call
	now := l.nodes[0].binary
	for _, n := range l.nodes {
		n.binary = old
		if err := l.rewrite(n, `policy:
  rules:
    - {name: most, then: allow, tools: [plain, lookup, find]}
    - {name: never, then: deny, tools: [resend]}
backends:
`+backend("ledger", l.ledgers, "")); err != nil {
			return err
		}
		if err := l.restart(n, false); err != nil {
			return err
		}
	}
	stop := make(chan struct{})
	var all sync.WaitGroup
	var mu sync.Mutex
	var calls [5]atomic.Int64
	for i := range revisions {
		for range 2 {
			all.Go(func() { l.speak(i, &mu, stop, &calls) })
		}
	}
	probes := 0
	change := func(n *node, to string, kill bool) error {
		if kill {
			n.Kill()
		} else if err := n.Signal(syscall.SIGTERM); err != nil {
			return err
		}
		if !n.Ended(deathTime) {
			return fmt.Errorf("it does not end:\n%s", n.said())
		}
		n.binary = to
		if err := l.restart(n, false); err != nil {
			return err
		}
		l.incident("E18")
		for _, n := range l.nodes {
			probes += l.bypass(n.addr)
		}
		<-time.After(500 * time.Millisecond)
		return nil
	}
	failed := func() error {
		for _, n := range l.nodes {
			probes += l.bypass(n.addr)
		}
		for _, to := range []string{now, old, now} {
			for i, n := range l.nodes {
				// On PostgreSQL a process that is killed holds its calls for 15 seconds more.
				if err := change(n, to, l.engine == "sqlite" || to == old && i == 0); err != nil {
					return err
				}
			}
		}
		return nil
	}()
	close(stop)
	all.Wait()
	for _, n := range l.nodes {
		n.binary = now
	}
	if failed != nil {
		return failed
	}
	b, err := os.ReadFile(l.ledgerFile())
	if err != nil {
		return err
	}
	denied := bytes.Count(b, []byte(`"tool":"resend"`))
	if denied > 0 {
		l.expect("E18", "I9: a tool that is denied was called %d times", denied)
	}
	var each []string
	for i, r := range revisions {
		n := calls[i].Load()
		each = append(each, fmt.Sprintf("%s %d", r, n))
		if n == 0 {
			l.expect("E18", "no client of revision %s had an answer", r)
		}
	}
	l.measure("E18", "%d upgrades and downgrades from and to %.7s; calls done: %s; %d probes of a denied tool, %d ran", 3*len(l.nodes), previous, strings.Join(each, ", "), probes, denied)
	return nil
}

// speak is a client of a revision until stop; what it begins it brings to its end, in that and in
// other revisions, at any node.
func (l *lane) speak(which int, mu *sync.Mutex, stop <-chan struct{}, calls *[5]atomic.Int64) {
	talkers := map[string]*talker{}
	at := func(rev, addr string) *talker {
		t := talkers[rev+addr]
		if t == nil {
			t = &talker{revision: rev, addr: addr}
			talkers[rev+addr] = t
		}
		return t
	}
	for {
		select {
		case <-stop:
			return
		case <-time.After(10 * time.Millisecond):
		}
		mu.Lock()
		o := l.operation([]string{"plain", "lookup"}[l.rand.IntN(2)])
		o.Args.Delay = l.rand.IntN(10)
		first := l.rand.IntN(len(l.nodes))
		mu.Unlock()
		l.journal.add(Event{Kind: faulted, Op: o.ID, Point: "E18", Tool: o.Tool})
		o.Broken = time.Now()
		ended := false
		for try := 0; !ended || try < 3; try++ {
			which, node := (which+try)%len(revisions), l.nodes[(first+try)%len(l.nodes)]
			e := l.tryAs(at(revisions[which], node.addr), o)
			switch {
			case e.Outcome == succeeded:
				calls[which].Add(1)
				ended = true
			case e.Outcome == unknown && !recovers(o.Tool), e.Outcome == refused:
				ended = true
			case time.Since(o.Broken) > l.patience():
				if !ended {
					l.journal.add(Event{Kind: gaveUp, Op: o.ID, Tool: o.Tool, Detail: e.Outcome + " " + e.Detail})
				}
				return
			default:
				<-time.After(20 * time.Millisecond)
			}
		}
	}
}

// bypass asks for a denied tool in every framing there is, and returns how often.
func (l *lane) bypass(addr string) int {
	probes := 0
	probe := func(t *talker, what string, header map[string]string, body []byte) {
		probes++
		status, answer, _, err := t.post(header, body)
		if err == nil && bytes.Contains(answer, []byte(`"structuredContent"`)) {
			l.expect("E18", "I9: %s, revision %s: HTTP %d %.300s", what, t.revision, status, answer)
		}
	}
	args := map[string]any{"op": "denied", "nonce": ""}
	for _, rev := range revisions {
		t := &talker{revision: rev, addr: addr}
		if err := t.open(); err != nil {
			l.expect("E18", "a client of revision %s: %v", rev, err)
			continue
		}
		if allowed := "2025-03-26 2025-06-18 2025-11-25 " + revision; rev == "2024-11-05" && !strings.Contains(allowed, t.agreed) || rev != "2024-11-05" && t.agreed != rev {
			l.expect("E18", "a client of revision %s was offered %q", rev, t.agreed)
		}
		probe(t, "as it is", t.header("resend"), t.message("resend", args, ""))
		probe(t, "with a key", t.header("resend"), t.message("resend", args, "key of a denied call"))
		for _, name := range []string{"Resend", "resend ", "resend\x00", "ledger/resend", "resend/../resend"} {
			probe(t, "another name", t.header(name[:6]), t.message(name, args, ""))
		}
		one := t.message("resend", args, "")
		probe(t, "in a batch", t.header("resend"), append(append([]byte("["), one...), ']'))
		probe(t, "a header of another tool", t.header("plain"), one)
		for _, other := range revisions {
			h := t.header("resend")
			h["Mcp-Protocol-Version"] = other
			probe(t, "with the header of "+other, h, t.message("resend", args, ""))
		}
		h := t.header("resend")
		delete(h, "Mcp-Protocol-Version")
		probe(t, "without a revision", h, t.message("resend", args, ""))
		delete(h, "Mcp-Session-Id")
		probe(t, "without a session", h, t.message("resend", args, ""))
		twice := bytes.Replace(t.message("plain", args, ""), []byte(`"name":"plain"`), []byte(`"name":"plain","name":"resend"`), 1)
		probe(t, "two names", t.header("plain"), twice)
	}
	return probes
}
