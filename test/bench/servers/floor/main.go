// Command floor is the least an honest server does: a net/http handler that reads the message,
// decodes the envelope with encoding/json, looks at what is asked and answers. No schema, no
// headers, no limits but one. What others cost is given as a multiple of this.
//
// With -replay it also answers lists and large results, byte for byte as another server did.
package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
)

type request struct {
	JSONRPC string          `json:"jsonrpc"`
	ID      json.RawMessage `json:"id"`
	Method  string          `json:"method"`
	Params  struct {
		Name      string `json:"name"`
		Cursor    string `json:"cursor"`
		Arguments struct {
			Text string `json:"text"`
		} `json:"arguments"`
		Meta struct {
			Version      string          `json:"io.modelcontextprotocol/protocolVersion"`
			Capabilities json.RawMessage `json:"io.modelcontextprotocol/clientCapabilities"`
			Client       json.RawMessage `json:"io.modelcontextprotocol/clientInfo"`
		} `json:"_meta"`
	} `json:"params"`
}

type block struct {
	Type string `json:"type"`
	Text string `json:"text"`
}

type response struct {
	JSONRPC string          `json:"jsonrpc"`
	ID      json.RawMessage `json:"id"`
	Result  result          `json:"result"`
}

type result struct {
	ResultType string  `json:"resultType"`
	Content    []block `json:"content"`
}

// recorded is an answer around its id.
type recorded struct{ before, after []byte }

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "address to serve on")
	replay := flag.String("replay", "", "JSON file of answers: {\"method key\": answer}, key being tool name or cursor")
	flag.Parse()
	if err := run(*addr, *replay); err != nil {
		fmt.Fprintln(os.Stderr, "floor:", err)
		os.Exit(1)
	}
}

func run(addr, replay string) error {
	answers := map[string]recorded{}
	if replay != "" {
		raw, err := os.ReadFile(replay)
		if err != nil {
			return err
		}
		var file map[string]struct{ Before, After string }
		if err := json.Unmarshal(raw, &file); err != nil {
			return err
		}
		for k, v := range file {
			answers[k] = recorded{[]byte(v.Before), []byte(v.After)}
		}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /mcp", func(w http.ResponseWriter, r *http.Request) { serve(w, r, answers) })
	return http.ListenAndServe(addr, mux)
}

func serve(w http.ResponseWriter, r *http.Request, answers map[string]recorded) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 4<<20))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	var req request
	if err := json.Unmarshal(body, &req); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	var out []byte
	switch p := &req.Params; {
	case req.Method == "tools/call" && p.Name == "echo":
		out, err = json.Marshal(response{"2.0", req.ID, result{"complete", []block{{"text", p.Arguments.Text}}}})
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
	default:
		a, ok := answers[req.Method+" "+p.Name+p.Cursor]
		if !ok {
			http.Error(w, "not recorded", http.StatusNotFound)
			return
		}
		out = bytes.Join([][]byte{a.before, a.after}, req.ID)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(out)))
	_, _ = w.Write(out) // the client is gone if this fails
}
