package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"syscall"
	"time"
)

// A way is how an attempt is made: cut short, if it is.
type way struct {
	send    int // bytes of the request that are sent before interrupt; 0: all
	receive int // bytes of the answer that are read before interrupt; 0: all
	// interrupt is what happens then; the connection is closed after it.
	interrupt func()
}

const (
	attemptTime = 40 * time.Second
	tinyBuffer  = 4 << 10
)

// try makes one attempt of an operation at an address, writes it down and returns how it went.
func (l *lane) try(o *operation, addr string, w way) Event {
	o.Attempts++
	e := Event{Kind: invoked, Op: o.ID, Tool: o.Tool, Nonce: o.Nonce, Attempt: o.Attempts}
	l.journal.add(e)
	e.Kind = returned
	status, body, err := l.exchange(addr, o.message(addr, o.Key), w)
	if err != nil {
		e.Outcome, e.Detail = lost, err.Error()
	} else {
		understand(&e, status, body, o)
	}
	l.journal.add(e)
	return e
}

// exchange sends a request and reads the answer.
func (l *lane) exchange(addr string, request []byte, w way) (status int, body []byte, err error) {
	d := net.Dialer{Timeout: attemptTime}
	if w.receive > 0 { // so that who answers is held up in the middle of it
		d.Control = func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) {
				_ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, tinyBuffer)
			})
		}
	}
	c, err := d.DialContext(context.Background(), "tcp", addr)
	if err != nil {
		return 0, nil, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(attemptTime)); err != nil {
		return 0, nil, err
	}
	part := request
	if w.send > 0 {
		part = request[:min(w.send, len(request))]
	}
	if _, err := c.Write(part); err != nil {
		return 0, nil, err
	}
	if w.send > 0 {
		w.interrupt()
		return 0, nil, errCut
	}
	if w.receive > 0 {
		_, err := io.ReadFull(c, make([]byte, w.receive))
		if err == nil {
			err = errCut
		}
		w.interrupt()
		return 0, nil, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return 0, nil, err
	}
	body, err = io.ReadAll(resp.Body)
	return resp.StatusCode, body, err
}

var errCut = fmt.Errorf("cut off by the driver")

// understand says what an answer means.
func understand(e *Event, status int, body []byte, o *operation) {
	type failure struct {
		Code  string  `json:"code"`
		After float64 `json:"retryAfterSeconds"`
	}
	var m struct {
		Result *struct {
			Type       string          `json:"resultType"`
			Content    json.RawMessage `json:"content"`
			Structured json.RawMessage `json:"structuredContent"`
			IsError    bool            `json:"isError"`
			State      string          `json:"requestState"`
			Meta       struct {
				Failure failure `json:"dev.newel/error"`
				Mark    struct {
					Replayed bool `json:"replayed"`
				} `json:"dev.newel/idempotency"`
			} `json:"_meta"`
		} `json:"result"`
		Error *struct {
			Message string  `json:"message"`
			Data    failure `json:"data"`
		} `json:"error"`
	}
	if err := json.Unmarshal(body, &m); err != nil {
		e.Outcome, e.Detail = refused, fmt.Sprintf("HTTP %d, %v: %.200s", status, err, body)
		return
	}
	r := m.Result
	code := ""
	switch {
	case m.Error != nil:
		code, e.After, e.Detail = m.Error.Data.Code, m.Error.Data.After, m.Error.Message
	case r == nil:
		e.Outcome, e.Detail = refused, fmt.Sprintf("neither result nor error: %.200s", body)
		return
	case r.IsError:
		code, e.After, e.Detail = r.Meta.Failure.Code, r.Meta.Failure.After, fmt.Sprintf("%.300s", r.Content)
	case r.Type == "input_required":
		e.Outcome, o.State = asked, r.State
		return
	default:
		var s struct {
			Nonce string `json:"nonce"`
		}
		if err := json.Unmarshal(r.Structured, &s); err != nil {
			e.Outcome, e.Detail = refused, err.Error()
			return
		}
		h := sha256.Sum256(bytes.Join([][]byte{r.Content, r.Structured}, []byte{0}))
		e.Outcome, e.Got, e.Answer, e.Replayed = succeeded, s.Nonce, fmt.Sprintf("%x", h[:6]), r.Meta.Mark.Replayed
		return
	}
	e.Outcome = refused
	switch code {
	case "outcome_unknown":
		e.Outcome = unknown
	case "conflict":
		e.Outcome = busy
	case "unavailable", "exhausted", "canceled", "not_found", "timeout": // of a call that was not sent
		e.Outcome = notExecuted
	}
	e.Detail = code + ": " + e.Detail
}
