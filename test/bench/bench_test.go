package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestSpread(t *testing.T) {
	for _, tt := range []struct {
		in                []float64
		median, low, high float64
	}{
		{[]float64{3, 1, 2}, 2, 1, 3},
		{[]float64{4, 1, 2, 3}, 2.5, 1, 4},
		{[]float64{7}, 7, 7, 7},
	} {
		if m, l, h := spread(tt.in); m != tt.median || l != tt.low || h != tt.high {
			t.Errorf("spread(%v) = %v, %v, %v", tt.in, m, l, h)
		}
	}
}

func TestRatioIsTakenWithinARound(t *testing.T) {
	tb := &table{rows: []*row{
		{name: "a", rounds: []measurement{{cpu: 2}, {cpu: 20}, {cpu: 300}}},
		{name: "b", rounds: []measurement{{cpu: 1}, {cpu: 10}, {cpu: 100}}},
	}}
	if m, l, h := tb.ratio("a", "b"); m != 2 || l != 2 || h != 3 {
		t.Errorf("ratio = %v (%v to %v), want 2 (2 to 3)", m, l, h)
	}
}

func TestWrongAnswersAreSeen(t *testing.T) {
	r := echoRequest()
	answer := func(id, text string) []byte {
		return []byte(`{"jsonrpc":"2.0","id":` + id + `,"result":{"content":[{"type":"text","text":"` + text + `"}]}}`)
	}
	for _, bad := range [][]byte{
		answer("1000000000", "something else"),
		answer("1000000001", echoText),
		[]byte(`{"jsonrpc":"2.0","id":1000000000,"error":{"code":-32603,"message":"x"}}`),
		[]byte(`{"jsonrpc":"2.0","id":1000000000,"result":{"isError":true,"content":[{"type":"text","text":"` + echoText + `"}]}}`),
		[]byte("ok"),
	} {
		if err := r.learn(bad, firstID); err == nil {
			t.Errorf("learned a wrong answer: %s", bad)
		}
	}
	if err := r.learn(answer("1000000000", echoText), firstID); err != nil {
		t.Fatal(err)
	}
	if id := []byte("1000000007"); !r.right(answer("1000000007", echoText), id) {
		t.Error("a right answer was called wrong")
	} else if r.right(answer("1000000008", echoText), id) || r.right(answer("1000000007", "The quick brown fox jumps over the lazy cat."), id) {
		t.Error("a wrong answer was called right")
	}
}

func TestMessagesAreValid(t *testing.T) {
	for _, r := range []request{echoRequest(), largeRequest(largeBytes), listRequest(""), listRequest(`a"b`)} {
		raw, id := r.message(&server{addr: "127.0.0.1:1"}, "")
		if string(raw[id:id+idWidth]) != "1000000000" {
			t.Errorf("%s: the id is not where message says", r.method)
		}
		_, body, _ := bytes.Cut(raw, []byte("\r\n\r\n"))
		if !json.Valid(body) {
			t.Errorf("%s: not JSON: %s", r.method, body)
		}
	}
}

// TestAPauseIsCharged: the calls that were due while a server stopped count from when they were due.
func TestAPauseIsCharged(t *testing.T) {
	const pause = 200 * time.Millisecond
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var answered atomic.Int64
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		raw, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		if answered.Add(1) == 50 {
			<-time.After(pause)
		}
		_, id, _ := bytes.Cut(raw, []byte(`"id":`))
		body := fmt.Appendf(nil, `{"jsonrpc":"2.0","id":%s,"result":{"content":[{"type":"text","text":%q}]}}`, id[:idWidth], echoText)
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		_, _ = w.Write(body)
	})}
	go func() { _ = srv.Serve(l) }()
	defer srv.Close()
	r, err := newRunner(t.Context(), &server{name: "pausing", addr: l.Addr().String()}, 1, []request{echoRequest()})
	if err != nil {
		t.Fatal(err)
	}
	took, err := r.atRate(t.Context(), 500, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	late := 0
	for _, d := range took {
		if d > pause/2 {
			late++
		}
	}
	// 100 calls were due in the pause; half of those waited for more than half of it.
	if len(took) != 500 || late < 40 {
		t.Errorf("of %d calls %d waited for more than half of the pause; want about 50", len(took), late)
	}
}

// TestPeersArePinned: a peer is the same program tomorrow.
func TestPeersArePinned(t *testing.T) {
	lists, err := filepath.Glob(filepath.Join(sources, "*", "requirements.txt"))
	if err != nil || len(lists) == 0 {
		t.Fatalf("no requirements: %v", err)
	}
	for _, list := range lists {
		raw, err := os.ReadFile(list)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(raw)) {
			if line = strings.TrimSpace(line); !strings.HasPrefix(line, "#") && strings.Count(line, "==") != 1 {
				t.Errorf("%s: %q names no version", list, line)
			}
		}
	}
	raw, err := os.ReadFile(filepath.Join(sources, "typescript", "package.json"))
	if err != nil {
		t.Fatal(err)
	}
	var p struct{ Dependencies map[string]string }
	if err := json.Unmarshal(raw, &p); err != nil || len(p.Dependencies) == 0 {
		t.Fatalf("package.json: %v", err)
	}
	for name, version := range p.Dependencies {
		if strings.Trim(version, "0123456789.") != "" {
			t.Errorf("%s is wanted in %q, which is no one version", name, version)
		}
	}
}

// TestTheLastEventIsTheAnswer: servers of older revisions may answer with a stream, whose events have
// ids that differ from call to call.
func TestTheLastEventIsTheAnswer(t *testing.T) {
	const answer = `{"jsonrpc":"2.0","id":1}`
	body := "event: prime\nid: X_0\ndata: \n\nevent: message\nid: X_1\ndata: " + answer + "\n\n"
	raw := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(body), body)
	c := &conn{in: bufio.NewReaderSize(strings.NewReader(raw), 64<<10)}
	if err := c.read(); err != nil || string(c.body) != answer {
		t.Errorf("read %q, %v", c.body, err)
	}
}
