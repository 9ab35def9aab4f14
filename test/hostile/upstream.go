package main

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// serveUpstream is the hostile server: the path says what it does wrong.
func serveUpstream(addr string) error {
	srv := &http.Server{Addr: addr, ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(misbehave)}
	return srv.ListenAndServe()
}

// tool is what it does in a call.
type tool func(w http.ResponseWriter, r *http.Request, m *request)

const good = `{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete","content":[{"type":"text","text":%q}]}}`

const late = "late"

// garbageTools answer wrongly, and at once.
var garbageTools = map[string]tool{
	"random": func(w http.ResponseWriter, _ *http.Request, _ *request) {
		_, _ = io.WriteString(w, "\x00\xff\x17\x80{]\x01") // newel may be gone; so for all that follow
	},
	"wrong-type": func(w http.ResponseWriter, _ *http.Request, m *request) {
		w.Header().Set("Content-Type", "image/png")
		fmt.Fprintf(w, good, m.ID, m.Params.Args.Nonce)
	},
	"bad-utf8": func(w http.ResponseWriter, _ *http.Request, m *request) {
		fmt.Fprintf(w, "{\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{\"content\":[{\"type\":\"text\",\"text\":\"\xff\xfe\"}]}}", m.ID)
	},
	"wrong-id": func(w http.ResponseWriter, _ *http.Request, m *request) {
		fmt.Fprintf(w, good, "1"+string(m.ID), "of another")
	},
	"two-answers": func(w http.ResponseWriter, _ *http.Request, m *request) {
		fmt.Fprintf(w, good+good, m.ID, m.Params.Args.Nonce, m.ID, "of another")
	},
	"html": func(w http.ResponseWriter, _ *http.Request, _ *request) {
		w.Header().Set("Content-Type", "text/html")
		_, _ = io.WriteString(w, "<html>Please log in</html>")
	},
	"cut-chunk": func(w http.ResponseWriter, _ *http.Request, m *request) {
		raw(w, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n{\"jsonrpc\":\"2.0\",\"id\":"+string(m.ID))
	},
	"bad-chunk": func(w http.ResponseWriter, _ *http.Request, _ *request) {
		raw(w, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n")
	},
	"no-http": func(w http.ResponseWriter, _ *http.Request, _ *request) { raw(w, "SSH-2.0-OpenSSH_9.9\r\n") },
	"unended-event": func(w http.ResponseWriter, _ *http.Request, m *request) {
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprintf(w, "event: message\ndata: "+good, m.ID, m.Params.Args.Nonce) // no empty line: not an event
	},
	"of-another-event": func(w http.ResponseWriter, _ *http.Request, m *request) {
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprintf(w, "data: "+good+"\n\n", "77"+string(m.ID), "of another")
	},
	"gzipped": func(w http.ResponseWriter, _ *http.Request, _ *request) {
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		zeros := make([]byte, 1<<20)
		for range 100 {
			_, _ = z.Write(zeros)
		}
		_ = z.Close()
	},
	late: func(w http.ResponseWriter, _ *http.Request, m *request) { // when the call has been given up
		<-time.After(2500 * time.Millisecond)
		fmt.Fprintf(w, good, m.ID, m.Params.Args.Nonce)
	},
	"gone": func(http.ResponseWriter, *http.Request, *request) { panic(http.ErrAbortHandler) },
}

// endlessTools do not come to an end.
var endlessTools = map[string]tool{
	"endless-body": func(w http.ResponseWriter, r *http.Request, _ *request) { pour(w, r, `{"jsonrpc":"2.0","x":"`, flood) },
	"endless-line": func(w http.ResponseWriter, r *http.Request, _ *request) {
		w.Header().Set("Content-Type", "text/event-stream")
		pour(w, r, "data: ", flood)
	},
	"endless-event": func(w http.ResponseWriter, r *http.Request, _ *request) {
		w.Header().Set("Content-Type", "text/event-stream")
		pour(w, r, "", "data: "+flood+"\n")
	},
	"endless-empty": func(w http.ResponseWriter, r *http.Request, _ *request) {
		w.Header().Set("Content-Type", "text/event-stream")
		pour(w, r, "", strings.Repeat(":\n", 1<<15))
	},
	"progress": func(w http.ResponseWriter, r *http.Request, _ *request) {
		w.Header().Set("Content-Type", "text/event-stream")
		pour(w, r, "", strings.Repeat(`data: {"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":1,"progress":1}}`+"\n\n", 500))
	},
	"bodies": func(w http.ResponseWriter, _ *http.Request, m *request) { // as large as may be
		fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"content":[{"type":"text","text":"`, m.ID)
		for range 15 << 4 {
			_, _ = io.WriteString(w, flood)
		}
		_, _ = io.WriteString(w, `"}]}}`)
	},
	"drip": func(w http.ResponseWriter, r *http.Request, _ *request) {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for r.Context().Err() == nil {
			_, _ = io.WriteString(w, " ")
			_ = http.NewResponseController(w).Flush()
			select {
			case <-tick.C:
			case <-r.Context().Done():
			}
		}
	},
	"drip-events": func(w http.ResponseWriter, r *http.Request, _ *request) {
		w.Header().Set("Content-Type", "text/event-stream")
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for r.Context().Err() == nil {
			_, _ = io.WriteString(w, ":\n")
			_ = http.NewResponseController(w).Flush()
			select {
			case <-tick.C:
			case <-r.Context().Done():
			}
		}
	},
	"silent": func(_ http.ResponseWriter, r *http.Request, _ *request) { <-r.Context().Done() },
}

var flood = strings.Repeat("x", 1<<16)

func pour(w http.ResponseWriter, r *http.Request, first, rest string) {
	if _, err := io.WriteString(w, first); err != nil {
		return
	}
	for r.Context().Err() == nil {
		if _, err := io.WriteString(w, rest); err != nil {
			return
		}
	}
}

// raw answers without the help of net/http.
func raw(w http.ResponseWriter, answer string) {
	c, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	_, _ = io.WriteString(c, answer)
	_ = c.Close()
}

// definitions are tools that are listed and that nobody should have to take.
var definitions = map[string]func(w io.Writer, cursor string) error{
	"many-tools": func(w io.Writer, _ string) error {
		for i := range 100_000 {
			if err := define(w, i, fmt.Sprintf("tool%d", i), `{"type":"object"}`); err != nil {
				return err
			}
		}
		return nil
	},
	"large-tools": func(w io.Writer, _ string) error { // each within its bounds
		enum := `{"type":"object","properties":{"a":{"enum":["` + strings.Repeat("x", 120_000) + `"]}}}`
		for i := range 120 {
			if err := define(w, i, fmt.Sprintf("large%d", i), enum); err != nil {
				return err
			}
		}
		return nil
	},
	"long-name": func(w io.Writer, _ string) error {
		return define(w, 0, strings.Repeat("n", 1_000_000), `{"type":"object"}`)
	},
	"fdfa": func(w io.Writer, _ string) error {
		return define(w, 0, strings.Repeat("\ufdfa", 40), `{"type":"object","description":"`+strings.Repeat("\ufdfa", 30_000)+`"}`)
	},
	"subschemas": func(w io.Writer, _ string) error {
		return define(w, 0, "subschemas", `{"type":"object","allOf":[`+strings.Repeat("{},", 100_000)+`{}]}`)
	},
	"repeats": func(w io.Writer, _ string) error {
		return define(w, 0, "repeats", `{"type":"object","properties":{"a":{"type":"string","pattern":"((a{100}){100}){100}"},"b":{"type":"string","pattern":"(a{1000}){1000}"}}}`)
	},
	"patterns": func(w io.Writer, _ string) error { // each one can just be compiled
		for i := range 50 {
			if err := define(w, i, fmt.Sprintf("pattern%d", i), `{"type":"object","properties":{"a":{"type":"string","pattern":"`+strings.Repeat(`[\\pL\\pN]{1000}`, 200)+`"}}}`); err != nil {
				return err
			}
		}
		return nil
	},
	"loop": func(w io.Writer, _ string) error {
		return define(w, 0, "loop", `{"type":"object","$ref":"#/$defs/a","$defs":{"a":{"$ref":"#/$defs/b"},"b":{"$ref":"#/$defs/a"}}}`)
	},
	"remote": func(w io.Writer, _ string) error {
		return define(w, 0, "remote", `{"type":"object","properties":{"a":{"$ref":"http://127.0.0.1:1/secret"}}}`)
	},
	"doubling": func(w io.Writer, _ string) error { // one look at an argument is 2^40
		var defs strings.Builder
		for i := range 40 {
			fmt.Fprintf(&defs, `"d%d":{"anyOf":[{"$ref":"#/$defs/d%d"},{"$ref":"#/$defs/d%d"}]},`, i, i+1, i+1)
		}
		return define(w, 0, "doubling", `{"type":"object","properties":{"nonce":{"$ref":"#/$defs/d0"}},"$defs":{`+defs.String()+`"d40":{"type":"integer"}}}`)
	},
	"doubling-down": func(w io.Writer, _ string) error { // and this one 2^60, by the depth of the arguments
		return define(w, 0, "doubling-down", `{"type":"object","properties":{"nonce":{"$ref":"#/$defs/n"}},"$defs":{"n":{"anyOf":[{"properties":{"c":{"$ref":"#/$defs/n"}},"required":["x"]},{"properties":{"c":{"$ref":"#/$defs/n"}},"required":["y"]}]}}}`)
	},
}

func define(w io.Writer, i int, name, schema string) error {
	comma := ","
	if i == 0 {
		comma = ""
	}
	_, err := fmt.Fprintf(w, `%s{"name":%q,"description":"d","inputSchema":%s}`, comma, name, schema)
	return err
}

// misbehave is one request to the hostile server.
func misbehave(w http.ResponseWriter, r *http.Request) {
	mode := strings.TrimPrefix(r.URL.Path, "/")
	if mode == "" {
		return // is it there?
	}
	m, ok := begin(w, r)
	if !ok {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	if mode == "turning" { // its list is another one every second
		protocol(w, m, fmt.Sprintf(`{"name":"turning","description":"at %d","inputSchema":{"type":"object"}}`, time.Now().Unix()))
		return
	}
	switch do, list := toolOf(mode), definitions[mode]; {
	case m.Method == "tools/call" && do != nil:
		do(w, r, &m)
	case m.Method == "tools/list" && mode == "cursor":
		fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete","tools":[],"nextCursor":"%s+"}}`, m.ID, m.Params.Cursor)
	case m.Method == "tools/list" && mode == "endless-list":
		pour(w, r, fmt.Sprintf(`{"jsonrpc":"2.0","id":%s,"result":{"tools":[`, m.ID), `{"name":"x","inputSchema":{}},`)
	case m.Method == "tools/list" && list != nil:
		_, err := fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete","tools":[`, m.ID)
		err = errors.Join(err, list(w, m.Params.Cursor))
		if err == nil {
			_, _ = io.WriteString(w, `]}}`)
		}
	default:
		protocol(w, m, `{"name":"`+mode+`","description":"d","inputSchema":{"type":"object"}}`)
	}
}

func toolOf(mode string) tool {
	if t := garbageTools[mode]; t != nil {
		return t
	}
	return endlessTools[mode]
}
