package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"
)

// A Row is one execution, as the ledger wrote it down: what really happened.
type Row struct {
	Time  int64  `json:"time"` // nanoseconds of the machine's clock
	Op    string `json:"op"`
	Key   string `json:"key"` // as it came from the gateway
	Nonce string `json:"nonce"`
	Tool  string `json:"tool"`
	Seq   int    `json:"seq"`

	Version string `json:"version,omitempty"` // as the caller wrote it
	Mark    string `json:"mark,omitempty"`    // as a gateway added it
}

// A plan is what the ledger does in the next call: at a step it signals a process.
type plan struct {
	Step   string         `json:"step"` // body: part of the request is read; request: all of it; done: it is written down; answer: half of the answer is sent
	PID    int            `json:"pid"`
	Signal syscall.Signal `json:"signal"`
	Run    bool           `json:"run"` // request: it is done all the same
}

// ledger is the upstream: an MCP server of the stateless revision whose tools write a row, synced
// before they answer. It runs in a process of its own.
type ledger struct {
	mu   sync.Mutex
	file *os.File
	rows []Row
	next plan
}

// serveLedger is the process: it serves on the address until its input ends.
func serveLedger(addr, file string) error {
	l := &ledger{}
	b, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if l.rows, err = parseLines[Row](b); err != nil {
		return err
	}
	if l.file, err = os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		return err
	}
	// Small buffers: whoever sends a large request to a ledger that does not read is held up in the
	// middle of it.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) {
			failed = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4<<10)
		})
		return errors.Join(err, failed)
	}}
	listener, err := lc.Listen(context.Background(), "tcp", addr)
	if err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0) // the driver is gone
	}()
	srv := &http.Server{Handler: l, ReadHeaderTimeout: time.Minute}
	return srv.Serve(listener)
}

// ServeHTTP implements http.Handler.
func (l *ledger) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/plan" {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.next = plan{}
		if err := json.NewDecoder(r.Body).Decode(&l.next); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
		}
		return
	}
	effect := r.Header.Get("Mcp-Method") == "tools/call" && r.Header.Get("Mcp-Name") != "find"
	first := make([]byte, 1)
	if _, err := io.ReadFull(r.Body, first); err != nil {
		return
	}
	if effect {
		if _, ok := l.at("body"); ok {
			l.drop(w)
			return
		}
	}
	body, err := io.ReadAll(io.MultiReader(bytes.NewReader(first), r.Body))
	if err != nil {
		return
	}
	var m struct {
		ID     json.RawMessage `json:"id"`
		Method string          `json:"method"`
		Params struct {
			Name  string          `json:"name"`
			Args  json.RawMessage `json:"arguments"`
			State string          `json:"requestState"`
			Meta  struct {
				Key string `json:"dev.newel/idempotencyKey"`
			} `json:"_meta"`
		} `json:"params"`
	}
	if err := json.Unmarshal(body, &m); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	var result any
	switch m.Method {
	case "server/discover":
		result = map[string]any{"resultType": "complete", "supportedVersions": []string{revision}, "capabilities": map[string]any{"tools": map[string]any{}}, "ttlMs": 0, "cacheScope": "private"}
	case "tools/list":
		result = map[string]any{"resultType": "complete", "tools": ledgerTools(), "ttlMs": 0, "cacheScope": "private"}
	case "tools/call":
		if p, ok := l.at("request"); ok && effect && !p.Run {
			l.drop(w)
			return
		}
		if result, err = l.call(m.Params.Name, m.Params.Args, m.Params.State, m.Params.Meta.Key); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		if effect {
			_, _ = l.at("done")
		}
	}
	if len(m.ID) == 0 {
		w.WriteHeader(http.StatusAccepted)
		return
	}
	out, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": m.ID, "result": result})
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", fmt.Sprint(len(out)))
	half := len(out) / 2
	_, err = w.Write(out[:half])
	if effect && l.is("answer") {
		if f, ok := w.(http.Flusher); ok {
			f.Flush()
		}
		<-time.After(5 * time.Millisecond) // for the other side to read it
		_, _ = l.at("answer")
	}
	if err == nil {
		_, _ = w.Write(out[half:])
	}
}

// drop ends the connection without an answer.
func (l *ledger) drop(w http.ResponseWriter) {
	if h, ok := w.(http.Hijacker); ok {
		if c, _, err := h.Hijack(); err == nil {
			_ = c.Close()
		}
	}
}

func (l *ledger) is(step string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.next.Step == step
}

// at does what is planned for the step: once.
func (l *ledger) at(step string) (plan, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.next.Step != step {
		return plan{}, false
	}
	p := l.next
	l.next = plan{}
	_ = syscall.Kill(p.PID, p.Signal)
	return p, true
}

// arguments are what the tools take.
type arguments struct {
	Op    string `json:"op"`
	Nonce string `json:"nonce"`
	Pad   string `json:"pad,omitempty"`
	Delay int    `json:"delay,omitempty"` // milliseconds before it is done
	Size  int    `json:"size,omitempty"`  // of the answer

	Version string `json:"version,omitempty"`
	Mark    string `json:"mark,omitempty"`
}

// call runs a tool. safe and plain do not know a call again, resend does; ask wants an answer
// first.
func (l *ledger) call(tool string, args json.RawMessage, state, key string) (any, error) {
	if tool == "find" {
		var in struct {
			Operation string `json:"operation"`
		}
		if err := json.Unmarshal(args, &in); err != nil {
			return nil, err
		}
		row := l.find(in.Operation)
		found := map[string]any{"found": row != nil}
		if row != nil {
			found["result"] = answerOf(row, 0)
		}
		return map[string]any{"resultType": "complete", "content": []any{}, "structuredContent": found}, nil
	}
	var in arguments
	if err := json.Unmarshal(args, &in); err != nil {
		return nil, err
	}
	if tool == "ask" && state == "" {
		return map[string]any{"resultType": "input_required", "requestState": "of " + in.Op, "inputRequests": map[string]any{
			"sure": map[string]any{"method": "elicitation/create", "params": map[string]any{"mode": "form", "message": "Sure?", "requestedSchema": map[string]any{"type": "object", "properties": map[string]any{"yes": map[string]any{"type": "boolean"}}}}},
		}}, nil
	}
	<-time.After(time.Duration(in.Delay) * time.Millisecond)
	row := (*Row)(nil)
	if tool == "resend" {
		row = l.find(key)
	}
	if row == nil {
		var err error
		if row, err = l.append(Row{Op: in.Op, Key: key, Nonce: in.Nonce, Tool: tool, Version: in.Version, Mark: in.Mark}); err != nil {
			return nil, err
		}
	}
	a := answerOf(row, in.Size)
	a["resultType"] = "complete"
	return a, nil
}

// answerOf is what a call of a row is answered, the first time and later.
func answerOf(r *Row, size int) map[string]any {
	return map[string]any{
		"content":           []any{map[string]any{"type": "text", "text": fmt.Sprintf("row %d%*s", r.Seq, size, "")}},
		"structuredContent": map[string]any{"op": r.Op, "nonce": r.Nonce, "seq": r.Seq},
	}
}

func (l *ledger) find(key string) *Row {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.rows {
		if l.rows[i].Key == key {
			return &l.rows[i]
		}
	}
	return nil
}

// append writes a row down, synced.
func (l *ledger) append(r Row) (*Row, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.Tool == "resend" { // two at once are one
		for i := range l.rows {
			if l.rows[i].Key == r.Key {
				return &l.rows[i], nil
			}
		}
	}
	r.Time, r.Seq = time.Now().UnixNano(), len(l.rows)+1
	b, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	_, err = l.file.Write(append(b, '\n'))
	if err = errors.Join(err, l.file.Sync()); err != nil {
		return nil, err
	}
	l.rows = append(l.rows, r)
	return &r, nil
}

// ledgerTools are the definitions.
func ledgerTools() []any {
	text := map[string]any{"type": "string"}
	number := map[string]any{"type": "integer"}
	input := map[string]any{"type": "object", "required": []string{"op", "nonce"}, "properties": map[string]any{"op": text, "nonce": text, "pad": text, "delay": number, "size": number, "version": text, "mark": text}}
	var out []any
	for _, name := range []string{"plain", "resend", "lookup", "ask"} {
		out = append(out, map[string]any{"name": name, "description": "Write a row.", "inputSchema": input})
	}
	return append(out, map[string]any{"name": "find", "description": "Find a row.", "annotations": map[string]any{"readOnlyHint": true},
		"inputSchema": map[string]any{"type": "object", "properties": map[string]any{"operation": text, "arguments": map[string]any{"type": "object"}}}})
}

// parseLines reads JSON lines. A last line without its end was being written: it does not count.
func parseLines[T any](b []byte) ([]T, error) {
	var out []T
	for line := range bytes.Lines(b) {
		if !bytes.HasSuffix(line, []byte("\n")) {
			break
		}
		var v T
		if err := json.Unmarshal(line, &v); err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}
