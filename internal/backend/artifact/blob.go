package artifact

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"mime"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/call"
)

// What the shelf keeps of an artifact is one blob: a line with a sum over the record and the id,
// then the record, then the data. The record holds sums of the chunks of the data, so that a part can
// be checked without reading the whole.
const (
	keySize   = 32
	idLength  = 52
	maxHead   = 32 << 10 // bytes of sum and record
	minChunk  = 64 << 10 // bytes that have a sum of their own
	maxChunks = 256      // larger artifacts have larger chunks
	otherType = "application/octet-stream"
	maxType   = 255 // bytes of a media type
	maxTool   = 512 // bytes of the name of a tool
)

// An item is one artifact. It does not change, but for known.
type item struct {
	id      string
	tenant  string
	owner   string
	tool    string
	class   int
	mime    string
	size    int64
	sha256  string
	text    bool // valid UTF-8: parts are text
	created time.Time
	expires time.Time

	begin int64 // of the data in the blob
	chunk int64
	sums  []byte
	known time.Time // since when this process knows it
}

// A record is what stands before the data.
type record struct {
	Tenant  string    `json:"tenant"`
	Owner   string    `json:"owner"`
	Tool    string    `json:"tool"`
	MIME    string    `json:"mime"`
	Size    int64     `json:"size"`
	SHA256  string    `json:"sha256"`
	Text    bool      `json:"text"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
	Chunk   int64     `json:"chunk"`
	Sums    []byte    `json:"sums"`
}

// isID reports whether a name is that of an artifact: Put makes no others.
func isID(name string) bool {
	for _, c := range []byte(name) {
		if (c < 'A' || c > 'Z') && (c < '2' || c > '7') {
			return false
		}
	}
	return len(name) == idLength
}

// mac is a sum that only those with the key can make; without a key it is but a sum.
func (s *Store) mac(purpose string, parts ...[]byte) []byte {
	h := hmac.New(sha256.New, s.o.Key)
	fmt.Fprintf(h, "%s\n", purpose)
	for _, p := range parts {
		fmt.Fprintf(h, "%d\n", len(p))
		h.Write(p)
	}
	return h.Sum(nil)
}

// ownerOf identifies a principal and its tenant, without naming them; nil is the local caller of a
// server without identity.
func (s *Store) ownerOf(p *call.Principal) (tenant, owner string) {
	if p == nil {
		return "local", "local"
	}
	sum := func(purpose string, parts ...[]byte) string {
		return base64.RawURLEncoding.EncodeToString(s.mac(purpose, parts...))
	}
	return sum("tenant", []byte(p.Tenant)), sum("owner", []byte(p.Tenant), []byte(p.ID))
}

// cleanType returns a media type as tools may claim it, or that of any bytes: what a tool says gets
// into headers and records.
func cleanType(claimed string) string {
	if len(claimed) > maxType {
		return otherType
	}
	t, params, err := mime.ParseMediaType(claimed)
	if err != nil {
		return otherType
	}
	if t = mime.FormatMediaType(t, params); t == "" || len(t) > maxType {
		return otherType
	}
	return t
}

// pack fills in what follows from the data and returns the blob, which has a copy of it.
func (s *Store) pack(it *item, data []byte) ([]byte, error) {
	it.size, it.text = int64(len(data)), utf8.Valid(data)
	whole := sha256.Sum256(data)
	it.sha256 = hex.EncodeToString(whole[:])
	for it.chunk = minChunk; it.chunk*maxChunks < it.size; it.chunk *= 2 {
	}
	for rest := data; len(rest) > 0; {
		n := min(it.chunk, int64(len(rest)))
		sum := sha256.Sum256(rest[:n])
		it.sums, rest = append(it.sums, sum[:]...), rest[n:]
	}
	if len(it.tool) > maxTool || !utf8.ValidString(it.tool) {
		return nil, errors.New("the name of the tool is too long")
	}
	raw, err := json.Marshal(record{it.tenant, it.owner, it.tool, it.mime, it.size, it.sha256, it.text, it.created.UTC(), it.expires.UTC(), it.chunk, it.sums})
	if err != nil {
		return nil, err
	}
	blob := hex.AppendEncode(make([]byte, 0, 2*sha256.Size+len(raw)+2+len(data)), s.mac("record", []byte(it.id), raw))
	blob = append(append(append(blob, '\n'), raw...), '\n')
	if len(blob) > maxHead {
		return nil, fmt.Errorf("the record of an artifact has %d bytes", len(blob))
	}
	it.begin = int64(len(blob))
	return append(blob, data...), nil
}

// unpack reads the head of a blob; nil stands for what is not ours, was changed or is not whole. What
// the operator says now of how long results are kept holds for those that are there too.
func (s *Store) unpack(id string, head []byte) *item {
	sum, rest, ok := bytes.Cut(head, []byte{'\n'})
	if !ok {
		return nil
	}
	raw, _, ok := bytes.Cut(rest, []byte{'\n'})
	if !ok || !hmac.Equal(sum, hex.AppendEncode(nil, s.mac("record", []byte(id), raw))) {
		return nil
	}
	var r record
	if json.Unmarshal(raw, &r, json.RejectUnknownMembers(true)) != nil || r.Size < 0 || r.Chunk < minChunk {
		return nil
	}
	if chunks := (r.Size + r.Chunk - 1) / r.Chunk; chunks > maxChunks || int64(len(r.Sums)) != chunks*sha256.Size {
		return nil
	}
	class, retention, _ := s.classOf(r.Tool)
	if now := r.Created.Add(retention); now.Before(r.Expires) {
		r.Expires = now
	}
	return &item{
		id: id, tenant: r.Tenant, owner: r.Owner, tool: r.Tool, class: class, mime: cleanType(r.MIME), size: r.Size, sha256: r.SHA256, text: r.Text,
		created: r.Created, expires: r.Expires, begin: int64(len(sum) + len(raw) + 2), chunk: r.Chunk, sums: r.Sums,
	}
}

var errDamaged = errors.New("a stored result is not what was stored")

// read returns the chunk of an artifact that holds a byte, and where it begins. It fails if it is not
// what was kept.
func (s *Store) read(ctx context.Context, it *item, offset int64) (chunk []byte, from int64, err error) {
	n := offset / it.chunk
	from = n * it.chunk
	length := min(it.chunk, it.size-from)
	chunk, err = s.shelf.Get(ctx, it.id, it.begin+from, length)
	if err != nil {
		return nil, 0, err
	}
	sum := sha256.Sum256(chunk)
	if int64(len(chunk)) != length || !bytes.Equal(sum[:], it.sums[n*sha256.Size:(n+1)*sha256.Size]) {
		return nil, 0, errDamaged
	}
	return chunk, from, nil
}

// fill reads part of an artifact.
func (s *Store) fill(ctx context.Context, it *item, part []byte, offset int64) error {
	for len(part) > 0 {
		chunk, from, err := s.read(ctx, it, offset)
		if err != nil {
			return err
		}
		n := copy(part, chunk[offset-from:])
		part, offset = part[n:], offset+int64(n)
	}
	return nil
}
