package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"newel.dev/newel/test/program"
)

// part starts another process of this program.
func part(name, addr, file string) (*program.Process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, name, addr, file)
	cmd.Stderr = os.Stderr
	return program.Start(cmd)
}

// startTime is how long a process may take over what it does at a start.
const startTime = 30 * time.Second

// A node is one place for a newel process: its folder, address and what is armed in it.
type node struct {
	dir, addr, binary string
	dsn               string   // of its state, or ""
	env               []string // variables that the scenario adds
	log               *os.File
	*program.Process
}

// newNode writes the configuration of a node. state is the section of that name.
func newNode(binary, dir, ledger, state, extra, settles string) (*node, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	addr, err := program.FreeAddress()
	if err != nil {
		return nil, err
	}
	config := fmt.Sprintf(`server: {name: faults}
listen: %s
state: %s
effects:
  wait: 100ms
%s  tools:
    - {tool: resend, recovery: resend_same_key}
    - {tool: lookup, recovery: lookup, lookup: find%s}
limits: {call_timeout: 20s, max_result_bytes: 4194304, max_result_tokens: 4194304}
backends:
  - type: mcp
    name: ledger
    url: http://%s/
    revision: "2026-07-28"
    tools:
      - {name: find, effect: read}
      - {name: "*", effect: write}
`, addr, state, extra, settles, ledger)
	n := &node{dir: dir, addr: addr, binary: binary}
	if err := os.WriteFile(filepath.Join(dir, "newel.yaml"), []byte(config), 0o600); err != nil {
		return nil, err
	}
	n.log, err = os.OpenFile(filepath.Join(dir, "newel.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	return n, err
}

// launch starts the process, without waiting for it.
func (n *node) launch() error {
	cmd := exec.Command(n.binary, "serve", "-c", filepath.Join(n.dir, "newel.yaml"))
	cmd.Env = append(os.Environ(), "NEWEL_FAULTPOINT="+n.armed(), "NEWEL_FAULTS_DSN="+n.dsn)
	cmd.Env = append(cmd.Env, n.env...)
	cmd.Stdout, cmd.Stderr = n.log, n.log
	p, err := program.Start(cmd)
	if err != nil {
		return err
	}
	n.Process = p
	return nil
}

// up starts the process and waits until it serves.
func (n *node) up() error {
	if err := n.launch(); err != nil {
		return err
	}
	return n.ready()
}

func (n *node) ready() error {
	err := n.Until(context.Background(), "newel in "+n.dir, program.Ready("http://"+n.addr+"/ready"))
	if err != nil {
		return fmt.Errorf("%w\n%s", err, n.said())
	}
	return nil
}

// said is the end of what it said.
func (n *node) said() []byte {
	b, err := os.ReadFile(filepath.Join(n.dir, "newel.log"))
	if err != nil {
		return []byte(err.Error())
	}
	return b[max(0, len(b)-2000):]
}

func (n *node) armed() string { return filepath.Join(n.dir, "armed") }

// arm has the process end, or suffer, at a point.
func (n *node) arm(point string) error {
	// Whole or not at all: the process reads it at any time.
	if err := os.WriteFile(n.armed()+".new", []byte(point), 0o600); err != nil {
		return err
	}
	return os.Rename(n.armed()+".new", n.armed())
}

// disarm reports whether the point had not been reached.
func (n *node) disarm() bool { return os.Remove(n.armed()) == nil }

// powerFails leaves of the files of SQLite what had been synced. The process is gone.
func (n *node) powerFails() error {
	for _, name := range []string{"state.db", "state.db-wal"} {
		file := filepath.Join(n.dir, name)
		if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err := os.Rename(file+".synced", file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return n.forget()
}

// forget removes what only belongs to a process that is gone: the index of the write-ahead log, and
// the shadow of files that the kernel still has whole.
func (n *node) forget() error {
	for _, name := range []string{"state.db-shm", "state.db.synced", "state.db-wal.synced"} {
		if err := os.Remove(filepath.Join(n.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// An operation is one call of the driver, with all that is needed to try it again.
type operation struct {
	ID, Key, Tool, Nonce string
	Args                 arguments
	State                string // requestState that it goes on with
	Token                string // access token, where one is needed
	Attempts             int
	Broken               time.Time // last
	Recoveries           int
	Ended                bool
}

// journal is the driver's log: a file that is only appended to.
type journal struct {
	mu     sync.Mutex
	file   *os.File
	events []Event
}

func (j *journal) add(e Event) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if e.Time == 0 {
		e.Time = time.Now().UnixNano()
	}
	j.events = append(j.events, e)
	b, err := json.Marshal(e)
	if err == nil {
		_, err = j.file.Write(append(b, '\n'))
	}
	if err != nil {
		panic(err) // without its log the run says nothing
	}
}

const revision = "2026-07-28"

// client has no connections that outlive a request: each attempt stands for itself.
var client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: time.Minute}

// message is the request of an operation, as it goes over the wire.
func (o *operation) message(addr, key string) []byte {
	params := map[string]any{
		"name": o.Tool, "arguments": o.Args,
		"_meta": map[string]any{
			"io.modelcontextprotocol/protocolVersion":    revision,
			"io.modelcontextprotocol/clientCapabilities": map[string]any{"elicitation": map[string]any{"form": map[string]any{}}},
		},
	}
	if o.State != "" {
		params["requestState"] = o.State
		params["inputResponses"] = map[string]any{"sure": map[string]any{"action": "accept", "content": map[string]any{"yes": true}}}
	}
	body, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": o.Attempts, "method": "tools/call", "params": params})
	if err != nil {
		panic(err) // strings and numbers
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "POST /mcp HTTP/1.1\r\nHost: %s\r\nConnection: close\r\nContent-Type: application/json\r\nAccept: application/json\r\nMcp-Protocol-Version: %s\r\nMcp-Method: tools/call\r\nMcp-Name: %s\r\n", addr, revision, o.Tool)
	if key != "" {
		fmt.Fprintf(&b, "Idempotency-Key: %s\r\n", strconv.Quote(key))
	}
	if o.Token != "" {
		fmt.Fprintf(&b, "Authorization: Bearer %s\r\n", o.Token)
	}
	fmt.Fprintf(&b, "Content-Length: %d\r\n\r\n", len(body))
	b.Write(body)
	return b.Bytes()
}
