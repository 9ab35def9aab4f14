package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Ids have a fixed width, so that every answer to one request has the same length.
const (
	firstID = 1_000_000_000
	idWidth = 10
)

// A request is a valid message of revision 2026-07-28 and how to know its answer is right.
type request struct {
	method, key string // key is the tool's name or the cursor
	params      string // without _meta
	bearer      string // access token, or ""
	check       func(result json.RawMessage) error

	before, after []byte // the right answer around its id; set once one was checked
}

const meta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28",` +
	`"io.modelcontextprotocol/clientCapabilities":{},` +
	`"io.modelcontextprotocol/clientInfo":{"name":"newel-bench","version":"1.0.0"}}`

const echoText = "The quick brown fox jumps over the lazy dog."

func echoRequest() request { return echoOf(echoText) }

// echoOf is echo of a text that is spelled the same in JSON.
func echoOf(said string) request {
	return request{method: "tools/call", key: "echo",
		params: `"name":"echo","arguments":{"text":"` + said + `"}`,
		check: func(result json.RawMessage) error {
			text, err := onlyText(result)
			if err == nil && text != said {
				err = fmt.Errorf("echo said %.100q", text)
			}
			return err
		}}
}

func largeRequest(size int) request {
	return request{method: "tools/call", key: "large", params: `"name":"large","arguments":{}`,
		check: func(result json.RawMessage) error {
			text, err := onlyText(result)
			if err == nil && len(text) != size {
				err = fmt.Errorf("the text has %d bytes, want %d", len(text), size)
			}
			return err
		}}
}

// onlyText returns the text of a result with one text block.
func onlyText(result json.RawMessage) (string, error) {
	var r struct {
		IsError bool
		Content []struct{ Type, Text string }
	}
	if err := json.Unmarshal(result, &r); err != nil {
		return "", err
	}
	if r.IsError || len(r.Content) != 1 || r.Content[0].Type != "text" {
		return "", fmt.Errorf("not a result of one text: %.300s", result)
	}
	return r.Content[0].Text, nil
}

func listRequest(cursor string) request {
	r := request{method: "tools/list", key: cursor, check: func(result json.RawMessage) error {
		var r struct{ Tools []json.RawMessage }
		if err := json.Unmarshal(result, &r); err != nil {
			return err
		}
		if len(r.Tools) == 0 {
			return fmt.Errorf("a page without tools: %.300s", result)
		}
		return nil
	}}
	if cursor != "" {
		quoted, _ := json.Marshal(cursor) // strings always can
		r.params = `"cursor":` + string(quoted)
	}
	return r
}

// listPages walks tools/list once and returns a request for every page.
func listPages(ctx context.Context, s *server) (pages []request, tools int, err error) {
	for cursor := ""; ; {
		r := listRequest(cursor)
		raw, err := s.answer(ctx, &r)
		if err != nil {
			return nil, 0, err
		}
		var msg struct {
			Result struct {
				Tools      []json.RawMessage
				NextCursor string
			}
		}
		if err := json.Unmarshal(raw, &msg); err != nil {
			return nil, 0, err
		}
		pages = append(pages, r)
		tools += len(msg.Result.Tools)
		if cursor = msg.Result.NextCursor; cursor == "" {
			return pages, tools, nil
		}
	}
}

// message returns the HTTP request to s and where its id is. session is "" without one.
func (r *request) message(s *server, session string) (raw []byte, id int) {
	d := &s.speaks
	var body strings.Builder
	fmt.Fprintf(&body, `{"jsonrpc":"2.0","id":%d,"method":%q,"params":{%s`, firstID, r.method, r.params)
	if d.older == "" {
		if r.params != "" {
			body.WriteByte(',')
		}
		body.WriteString(meta)
	}
	body.WriteString("}}")
	var h bytes.Buffer
	fmt.Fprintf(&h, "POST %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: newel-bench\r\nContent-Type: application/json\r\n"+
		"Accept: application/json, text/event-stream\r\nMCP-Protocol-Version: %s\r\n", d.where(), s.addr, d.revision())
	if d.older == "" {
		fmt.Fprintf(&h, "Mcp-Method: %s\r\n", r.method)
		if r.method == "tools/call" {
			fmt.Fprintf(&h, "Mcp-Name: %s\r\n", r.key)
		}
	}
	if session != "" {
		fmt.Fprintf(&h, "Mcp-Session-Id: %s\r\n", session)
	}
	if r.bearer != "" {
		fmt.Fprintf(&h, "Authorization: Bearer %s\r\n", r.bearer)
	}
	fmt.Fprintf(&h, "Content-Length: %d\r\n\r\n%s", body.Len(), body.String())
	return h.Bytes(), bytes.Index(h.Bytes(), []byte(strconv.Itoa(firstID)))
}

// learn checks an answer with JSON and remembers its bytes around the id.
func (r *request) learn(raw []byte, id int) error {
	var msg struct {
		JSONRPC string          `json:"jsonrpc"`
		ID      json.RawMessage `json:"id"`
		Result  json.RawMessage `json:"result"`
		Error   json.RawMessage `json:"error"`
	}
	if err := json.Unmarshal(raw, &msg); err != nil {
		return fmt.Errorf("%w in %.300q", err, raw)
	}
	digits := strconv.Itoa(id)
	if msg.JSONRPC != "2.0" || string(msg.ID) != digits || msg.Result == nil {
		return fmt.Errorf("not the answer to %s %s: %.500s", r.method, digits, raw)
	}
	if err := r.check(msg.Result); err != nil {
		return err
	}
	before, after, found := bytes.Cut(raw, []byte(digits))
	if !found {
		return fmt.Errorf("the id is spelled differently: %.300s", raw)
	}
	r.before, r.after = bytes.Clone(before), bytes.Clone(after)
	return nil
}

// right reports whether raw is the learned answer with this id.
func (r *request) right(raw, id []byte) bool {
	return len(raw) == len(r.before)+len(id)+len(r.after) &&
		bytes.HasPrefix(raw, r.before) && bytes.HasSuffix(raw, r.after) &&
		bytes.Equal(raw[len(r.before):len(r.before)+len(id)], id)
}

// writeReplay writes what the floor needs to answer with the same bytes.
func writeReplay(path string, requests []request) error {
	type answer struct{ Before, After string }
	file := map[string]answer{}
	for _, r := range requests {
		file[r.method+" "+r.key] = answer{string(r.before), string(r.after)}
	}
	raw, err := json.Marshal(file)
	if err != nil {
		return err
	}
	return os.WriteFile(path, raw, 0o600)
}
