// Package approvals is the door for people who decide about calls, and for operators.
//
// Start reading at [Door.Routes]. Who decides has an access token for this server, or the proof of
// the key file (see [Proof]): so newel approvals works while the server runs, whatever the engine,
// which one process may have to itself. Other systems sign with the secret of the webhook.
//
// Refuses: whoever it does not know (401), and what nobody may see as if it were not there (404);
// decisions that were taken before (409). It bounds what it reads to 64 KiB.
package approvals

import (
	"context"
	"encoding/base64"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/audit"
	"newel.dev/newel/internal/guard/approve"
)

// Options configure the door.
type Options struct {
	Approvals *approve.Approvals
	Webhook   *approve.Webhook // nil: the callback is not there
	// Who tells whose access token a request carries; nil: none is taken.
	Who func(r *http.Request) (*call.Principal, error)
	// Nonce makes one for the next proof of a client whose token is bound to a key (RFC 9449); nil: such
	// tokens are not taken.
	Nonce func() string
	// Operators is the key of the proofs of operators; nil: none is taken.
	Operators []byte
	// Undo has an operation undone by an operator; nil: nothing is.
	Undo func(ctx context.Context, operation, by string) (*call.Result, error)
	// Log is the audit log, for operators: they erase values, and say that they read some; nil: nobody does.
	Log audit.Eraser
	// Refused is told of requests that are not answered.
	Refused func(ctx context.Context, status int, peer, reason string)
}

// A Door serves approvals.
type Door struct{ o Options }

// New returns the door.
func New(o Options) *Door { return &Door{o} }

// Routes are what is served, by pattern.
func (d *Door) Routes() map[string]http.HandlerFunc {
	out := map[string]http.HandlerFunc{
		"GET /approvals":       d.known(d.list),
		"GET /approvals/{id}":  d.known(d.show),
		"POST /approvals/{id}": d.known(d.decide),
	}
	if d.o.Webhook != nil {
		out["POST /approvals/{id}/callback"] = d.callback
	}
	if d.o.Undo != nil {
		out["POST /operations/{id}/undo"] = d.known(d.undo)
	}
	if d.o.Log != nil {
		out["POST /audit/erase"] = d.known(d.erase)
		out["POST /audit/reads"] = d.known(d.reads)
	}
	return out
}

const (
	maxBody  = 64 << 10
	maxList  = 500
	operator = "Newel-Operator"
)

// Proof is the Authorization header of an operator who has the key: a signature of now, of the
// request and of who says to send it. A server takes it for five minutes.
func Proof(key []byte, name, method, uri string, body []byte, now time.Time) string {
	return operator + " " + base64.RawURLEncoding.EncodeToString([]byte(name)) + " " + approve.Sign(key, now, signed(name, method, uri, body))
}

func signed(name, method, uri string, body []byte) []byte {
	var b []byte
	for _, part := range []string{"newel operator 1", name, method, uri} {
		b = append(append(strconv.AppendInt(b, int64(len(part)), 10), ':'), part...)
	}
	return append(b, body...)
}

var errStranger = errors.New("it is not known who is asking")

// who is who sends a request.
func (d *Door) who(r *http.Request, body []byte) (approve.Person, error) {
	scheme, rest, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if scheme == operator && d.o.Operators != nil {
		name, signature, _ := strings.Cut(rest, " ")
		raw, err := base64.RawURLEncoding.Strict().DecodeString(name)
		if err != nil || len(raw) == 0 || len(raw) > 256 || !utf8.Valid(raw) {
			return approve.Person{}, errStranger
		}
		if err := approve.CheckSignature(d.o.Operators, signature, signed(string(raw), r.Method, r.URL.RequestURI(), body), time.Now()); err != nil {
			return approve.Person{}, err
		}
		return approve.Person{Name: string(raw), How: approve.ByOperator, Operator: true}, nil
	}
	if d.o.Who == nil {
		return approve.Person{}, errStranger
	}
	p, err := d.o.Who(r)
	if err != nil {
		return approve.Person{}, err
	}
	if p == nil || p.ID == "" {
		return approve.Person{}, errStranger
	}
	return approve.Person{Name: p.ID, Tenant: p.Tenant, Roles: p.Roles, How: approve.ByToken}, nil
}

type handler func(r *http.Request, who approve.Person, body []byte) (any, error)

// known serves those who are known.
func (d *Door) known(h handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, ok := d.read(w, r)
		if !ok {
			return
		}
		who, err := d.who(r, body)
		if e := (*call.Error)(nil); errors.As(err, &e) && e.Code == call.Unavailable {
			w.Header().Set("Retry-After", "1")
			d.fail(w, r, http.StatusServiceUnavailable, "unavailable", e.Message, err)
			return
		}
		if err != nil {
			w.Header().Set("WWW-Authenticate", "Bearer")
			if e := (*call.Error)(nil); errors.As(err, &e) && e.OAuth == "use_dpop_nonce" && d.o.Nonce != nil {
				w.Header().Set("WWW-Authenticate", `DPoP error="use_dpop_nonce"`)
				w.Header().Set("DPoP-Nonce", d.o.Nonce())
			}
			d.fail(w, r, http.StatusUnauthorized, "unauthenticated", "authentication is required: an access token for this server, or newel approvals with the key file of its configuration", err)
			return
		}
		out, err := h(r, who, body)
		d.answer(w, r, out, err)
	}
}

func (d *Door) read(w http.ResponseWriter, r *http.Request) ([]byte, bool) {
	if r.Header.Get("Origin") != "" { // no page of a browser has business here
		d.fail(w, r, http.StatusForbidden, "denied", "this is not for web pages", errors.New("it has an Origin"))
		return nil, false
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		d.fail(w, r, http.StatusRequestEntityTooLarge, "too_large", "the message is too large", err)
		return nil, false
	}
	return body, true
}

// answer is the one place where errors become statuses.
func (d *Door) answer(w http.ResponseWriter, r *http.Request, out any, err error) {
	var said *call.Error
	switch {
	case err == nil:
		b, err := json.Marshal(out)
		if err != nil {
			d.fail(w, r, http.StatusInternalServerError, "internal", "internal error", err)
			return
		}
		write(w, http.StatusOK, b)
	case errors.Is(err, approve.ErrNone):
		d.fail(w, r, http.StatusNotFound, "not_found", approve.ErrNone.Error(), err)
	case errors.Is(err, approve.ErrOwn), errors.Is(err, approve.ErrNoVoter):
		d.fail(w, r, http.StatusForbidden, "denied", err.Error(), err)
	case errors.Is(err, approve.ErrEnded), errors.Is(err, approve.ErrTwice):
		d.fail(w, r, http.StatusConflict, "conflict", err.Error(), err)
	case errors.Is(err, approve.ErrSignature):
		w.Header().Set("WWW-Authenticate", approve.SignatureHeader)
		d.fail(w, r, http.StatusUnauthorized, "unauthenticated", err.Error(), err)
	case errors.Is(err, approve.ErrAnswer):
		d.fail(w, r, http.StatusBadRequest, "malformed", err.Error(), err)
	case errors.As(err, &said):
		d.fail(w, r, statusOf(said.Code), said.Code.String(), said.Message, err)
	default:
		w.Header().Set("Retry-After", "1")
		d.fail(w, r, http.StatusServiceUnavailable, "unavailable", "approvals cannot be looked up right now; try again in a moment", err)
	}
}

// statusOf is the status of an error of a call.
func statusOf(c call.Code) int {
	switch c {
	case call.Malformed, call.Invalid:
		return http.StatusBadRequest
	case call.NotFound:
		return http.StatusNotFound
	case call.Denied:
		return http.StatusForbidden
	case call.Unavailable, call.Exhausted, call.Timeout:
		return http.StatusServiceUnavailable
	case call.Internal:
		return http.StatusInternalServerError
	}
	return http.StatusConflict
}

func (d *Door) fail(w http.ResponseWriter, r *http.Request, status int, code, text string, err error) {
	if d.o.Refused != nil {
		d.o.Refused(r.Context(), status, r.RemoteAddr, err.Error())
	}
	b := call.AppendString(jsontext.Value(`{"error":{"code":`), code)
	b = call.AppendString(append(b, `,"message":`...), text)
	write(w, status, append(b, "}}"...))
}

func write(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n')) // the client is gone if this fails
}

var states = map[string]approve.State{"": 0, "pending": approve.Pending, "approved": approve.Approved, "used": approve.Used, "denied": approve.Denied, "expired": approve.Expired}

func (d *Door) list(r *http.Request, who approve.Person, _ []byte) (any, error) {
	state, ok := states[r.URL.Query().Get("state")]
	if !ok {
		return nil, call.Errorf(call.Malformed, "state is pending, approved, used, denied or expired")
	}
	list, err := d.o.Approvals.List(r.Context(), who, state, maxList)
	return map[string]any{"approvals": list}, err
}

func (d *Door) show(r *http.Request, who approve.Person, _ []byte) (any, error) {
	return d.o.Approvals.Show(r.Context(), r.PathValue("id"), who)
}

func (d *Door) decide(r *http.Request, who approve.Person, body []byte) (any, error) {
	var said struct {
		Decision string `json:"decision"`
		Reason   string `json:"reason"`
	}
	if err := json.Unmarshal(body, &said, json.RejectUnknownMembers(true)); err != nil || said.Decision != "approve" && said.Decision != "deny" {
		return nil, call.Errorf(call.Malformed, `send {"decision": "approve" or "deny", "reason": text}`)
	}
	a, err := d.o.Approvals.Decide(r.Context(), r.PathValue("id"), who, said.Decision == "approve", said.Reason)
	if err != nil {
		return nil, err
	}
	return d.o.Approvals.View(&a)
}

// undo is for operators alone.
func (d *Door) undo(r *http.Request, who approve.Person, _ []byte) (any, error) {
	if !who.Operator {
		return nil, call.Errorf(call.Denied, "only operators undo: newel undo, with the key file of the configuration")
	}
	result, err := d.o.Undo(r.Context(), r.PathValue("id"), who.Name)
	if err != nil {
		return nil, err
	}
	return struct {
		Operation  string         `json:"operation"` // that was undone
		Content    jsontext.Value `json:"content,omitzero"`
		Structured jsontext.Value `json:"structuredContent,omitzero"`
		IsError    bool           `json:"isError"`
		Meta       jsontext.Value `json:"more,omitzero"`
	}{r.PathValue("id"), result.Content, result.Structured, result.IsError, result.Extra}, nil
}

// erase takes one step of erasing values of the audit log.
func (d *Door) erase(r *http.Request, who approve.Person, body []byte) (any, error) {
	if !who.Operator {
		return nil, call.Errorf(call.Denied, "only operators erase: newel audit erase, with the key file of the configuration")
	}
	var e audit.Erasure
	if err := json.Unmarshal(body, &e, json.RejectUnknownMembers(true)); err != nil {
		return nil, call.Errorf(call.Malformed, "this is not what to erase").Because(err)
	}
	if err := e.Check(); err != nil {
		return nil, call.Errorf(call.Malformed, "%s", err)
	}
	if e.From < 0 || e.Reason == "" {
		return nil, call.Errorf(call.Malformed, "say where to begin, and why")
	}
	e.By = who.Name
	done, err := audit.Erase(r.Context(), d.o.Log, &e)
	if err != nil {
		return nil, call.Errorf(call.Unavailable, "not everything could be erased; erase it again").Because(err)
	}
	return done, nil
}

// A Looking says which values somebody is about to read.
type Looking struct {
	First int64 `json:"first"`
	Last  int64 `json:"last"`
	Count int64 `json:"count"` // of records with values
}

// reads writes down that an operator reads values.
func (d *Door) reads(r *http.Request, who approve.Person, body []byte) (any, error) {
	if !who.Operator {
		return nil, call.Errorf(call.Denied, "only operators read values")
	}
	var l Looking
	if err := json.Unmarshal(body, &l, json.RejectUnknownMembers(true)); err != nil || l.First < 0 || l.Last < l.First || l.Count < 0 {
		return nil, call.Errorf(call.Malformed, "this is not what is read")
	}
	if err := audit.NoteRead(r.Context(), d.o.Log, who.Name, l.First, l.Last, l.Count); err != nil {
		return nil, call.Errorf(call.Unavailable, "that values are read cannot be written down, so they are not shown").Because(err)
	}
	return map[string]bool{"noted": true}, nil
}

// callback takes the decision of the webhook's side.
func (d *Door) callback(w http.ResponseWriter, r *http.Request) {
	body, ok := d.read(w, r)
	if !ok {
		return
	}
	a, err := d.o.Webhook.Take(r.Context(), d.o.Approvals, r.PathValue("id"), r.Header.Get(approve.SignatureHeader), body)
	d.answer(w, r, map[string]string{"approval": r.PathValue("id"), "state": a.State.String()}, err)
}
