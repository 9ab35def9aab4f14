// Package audit is the record of what was done, in a form that shows whether it was changed: a
// Merkle tree (RFC 6962) whose head is signed.
//
// Start reading at [Record], which is one line of the log, and [Edge], which appends to the tree.
// checkpoint.go signs heads, verify.go proves and checks without the server, export.go writes
// records for other systems.
//
// It promises: a record's bytes are canonical, so that its leaf can be computed again anywhere;
// values (arguments, answers) are no part of the tree, only their salted digests are, so that a
// value can be erased and the tree stays provable. Everything here is a pure function; an engine
// appends in its own transaction.
package audit

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"golang.org/x/mod/sumdb/tlog"
)

// Version is that of the form of records.
const Version = 1

// MaxRecord bounds the bytes of one encoded record.
const MaxRecord = 16 << 10

// Acts of a record.
const (
	Intent  = "intent"  // a call with an effect is about to go out
	Outcome = "outcome" // how it ended, or that this is not known
	Reads   = "reads"   // calls without an effect, counted together
	Started = "started" // a server began to write here

	Denied     = "denied"     // calls that the policy refused, counted together
	Approval   = "approval"   // an approval was asked for, decided, or ran out; Outcome says which
	Configured = "configured" // a server took over a configuration; Pin is the SHA-256 of its file
	Undo       = "undo"       // somebody has an operation undone
	TaskMade   = "task_made"  // a call goes on as a task; Operation is its id
	TaskEnded  = "task_ended" // how the task ended

	Erased    = "erased"     // the values of Records were erased, by whom and why
	AuditRead = "audit_read" // somebody looked at the values of Records
)

// A Record says what was done, by whom, when and why it was allowed. Fields stand in the order of
// their names, which is that of the canonical form (RFC 8785): so encoding is one pass.
type Record struct {
	Act         string   `json:"act"`
	Approval    string   `json:"approval,omitzero"`   // id of the approval that it is about, or that was used up
	By          string   `json:"by,omitzero"`         // who decided or did it, if that is not the caller
	Capability  string   `json:"capability,omitzero"` // name of a tool or prompt, URI of a resource
	Client      string   `json:"client,omitzero"`     // OAuth client
	Code        string   `json:"code,omitzero"`       // why it failed
	Correlation string   `json:"correlation,omitzero"`
	Count       int64    `json:"count,omitzero"` // of calls that a Reads record stands for
	Digests     []Digest `json:"digests,omitempty"`
	Door        string   `json:"door,omitzero"`
	Effect      string   `json:"effect,omitzero"`
	Fence       int64    `json:"fence,omitzero"` // which attempt of the operation
	From        string   `json:"from,omitzero"`  // Reads: time of the first call
	Kind        string   `json:"kind,omitzero"`
	Operation   string   `json:"operation,omitzero"` // ties outcome to intent
	Outcome     string   `json:"outcome,omitzero"`   // state the operation ended in
	Pin         string   `json:"pin,omitzero"`       // SHA-256 of the definition that was called
	Principal   string   `json:"principal,omitzero"`
	Reason      string   `json:"reason,omitzero"`  // Erased: why
	Records     string   `json:"records,omitzero"` // Erased, AuditRead: which, as 3,7-9
	Rule        string   `json:"rule,omitzero"`    // of the policy, that allowed it
	Server      string   `json:"server,omitzero"`
	Tenant      string   `json:"tenant,omitzero"`
	Time        string   `json:"time"` // UTC, RFC 3339 with microseconds, by the clock of the server
	Version     int      `json:"v"`
}

// A Digest stands for a value: SHA-256 over a random salt and the value, in hexadecimal. Without
// the salt nobody can try values against it.
type Digest struct {
	Name   string `json:"name"`
	SHA256 string `json:"sha256"`
}

// A Value is what a digest stands for. It is kept apart from the record, encrypted, and may be
// erased.
type Value struct {
	Name string `json:"name"`
	Salt []byte `json:"salt"`           // 16 bytes
	Data []byte `json:"data,omitempty"` // nil: only the salt is kept
}

// An Entry is one record as an engine appends it.
type Entry struct {
	Record  []byte // canonical
	Private []byte // sealed values, or nil; no part of the tree
}

// Time is how records write a time.
func Time(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000000Z") }

// NewValue returns a value with a fresh salt.
func NewValue(name string, data []byte) Value {
	salt := make([]byte, 16)
	_, _ = rand.Read(salt) // never fails
	return Value{Name: name, Salt: salt, Data: data}
}

// Digest returns the digest of the value.
func (v *Value) Digest() Digest { return Digest{v.Name, digest(v.Salt, v.Data)} }

// Matches reports whether d stands for the value.
func (v *Value) Matches(d Digest) bool { return v.Name == d.Name && digest(v.Salt, v.Data) == d.SHA256 }

func digest(salt, data []byte) string {
	h := sha256.New()
	h.Write(salt) // fixed length: no other split gives the same bytes
	h.Write(data)
	var sum [sha256.Size]byte
	var text [2 * sha256.Size]byte
	hex.Encode(text[:], h.Sum(sum[:0]))
	return string(text[:])
}

// Encode returns the canonical form (RFC 8785). Text that is not UTF-8 is refused, and so is a
// record that is too long.
func (r *Record) Encode() ([]byte, error) {
	if r.Version == 0 {
		r.Version = Version
	}
	b, err := r.append(make([]byte, 0, usual))
	if err != nil {
		return nil, fmt.Errorf("audit: a record cannot be encoded: %w", err)
	}
	if len(b) > MaxRecord {
		return nil, fmt.Errorf("audit: a record of %d bytes is longer than %d", len(b), MaxRecord)
	}
	return b, nil
}

// usual is what most records have room in.
const usual = 640

// append is what json.Marshal does, for the one form of which each call with an effect writes two.
func (r *Record) append(b []byte) ([]byte, error) {
	o := object{b: append(b, '{')}
	o.must("act", r.Act)
	o.text("approval", r.Approval)
	o.text("by", r.By)
	o.text("capability", r.Capability)
	o.text("client", r.Client)
	o.text("code", r.Code)
	o.text("correlation", r.Correlation)
	o.number("count", r.Count)
	o.digests(r.Digests)
	o.text("door", r.Door)
	o.text("effect", r.Effect)
	o.number("fence", r.Fence)
	o.text("from", r.From)
	o.text("kind", r.Kind)
	o.text("operation", r.Operation)
	o.text("outcome", r.Outcome)
	o.text("pin", r.Pin)
	o.text("principal", r.Principal)
	o.text("reason", r.Reason)
	o.text("records", r.Records)
	o.text("rule", r.Rule)
	o.text("server", r.Server)
	o.text("tenant", r.Tenant)
	o.must("time", r.Time)
	o.name("v")
	return append(strconv.AppendInt(o.b, int64(r.Version), 10), '}'), o.err
}

// An object is JSON that is being written. Empty members are left out; the first error sticks.
type object struct {
	b   []byte
	err error
}

func (o *object) name(name string) {
	if o.b[len(o.b)-1] != '{' {
		o.b = append(o.b, ',')
	}
	o.b = append(append(append(o.b, '"'), name...), '"', ':')
}

func (o *object) must(name, v string) {
	o.name(name)
	b, err := jsontext.AppendQuote(o.b, v)
	if o.b = b; err != nil && o.err == nil {
		o.err = err
	}
}

func (o *object) text(name, v string) {
	if v != "" {
		o.must(name, v)
	}
}

func (o *object) number(name string, v int64) {
	if v != 0 {
		o.name(name)
		o.b = strconv.AppendInt(o.b, v, 10)
	}
}

func (o *object) digests(list []Digest) {
	if len(list) == 0 {
		return
	}
	o.name("digests")
	for i, d := range list {
		o.b = append(o.b, "[,"[min(i, 1)], '{')
		o.must("name", d.Name)
		o.must("sha256", d.SHA256)
		o.b = append(o.b, '}')
	}
	o.b = append(o.b, ']')
}

// EncodeValues returns values as they are sealed: their JSON.
func EncodeValues(values []Value) ([]byte, error) {
	n := 2
	for i := range values {
		n += 64 + len(values[i].Name) + base64.StdEncoding.EncodedLen(len(values[i].Data))
	}
	o := object{b: append(make([]byte, 0, n), '[')}
	for i := range values {
		if i > 0 {
			o.b = append(o.b, ',')
		}
		o.b = append(o.b, '{')
		o.must("name", values[i].Name)
		o.bytes("salt", values[i].Salt)
		if len(values[i].Data) > 0 {
			o.bytes("data", values[i].Data)
		}
		o.b = append(o.b, '}')
	}
	return append(o.b, ']'), o.err
}

func (o *object) bytes(name string, v []byte) {
	o.name(name)
	o.b = append(base64.StdEncoding.AppendEncode(append(o.b, '"'), v), '"')
}

// Decode reads a record and refuses what is not in canonical form or from the future.
func Decode(b []byte) (*Record, error) {
	if len(b) > MaxRecord {
		return nil, errors.New("audit: the record is too long")
	}
	canonical := jsontext.Value(b).Clone()
	if err := canonical.Canonicalize(); err != nil {
		return nil, fmt.Errorf("audit: the record is not JSON: %w", err)
	}
	if string(canonical) != string(b) {
		return nil, errors.New("audit: the record is not in canonical form")
	}
	var r Record
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("audit: the record is not of the right form: %w", err)
	}
	if r.Version != Version {
		return nil, fmt.Errorf("audit: the record has form %d, this program knows %d", r.Version, Version)
	}
	return &r, nil
}

// Leaf is the hash of a record in the tree.
func Leaf(record []byte) tlog.Hash { return tlog.RecordHash(record) }
