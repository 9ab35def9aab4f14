package mcpwire

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// StateTTL is how long a question may stay open before the call has to start again.
const StateTTL = 15 * time.Minute

// MaxRounds bounds how often one call may ask.
const MaxRounds = 16

// maxStateBytes bounds a requestState: answers of all rounds travel in it.
const maxStateBytes = 256 << 10

// state is what a call remembers between its rounds. It travels through the client, so it is
// sealed: encrypted and authenticated with AES-256-GCM, bound to principal and call, and it
// expires (MCP 2026-07-28, basic/patterns/mrtr: attacker-controlled input).
type state struct {
	Expires int64                     `json:"exp"`
	Round   int                       `json:"round"`
	Pending []string                  `json:"pending"`
	Answers map[string]jsontext.Value `json:"answers"`
	State   string                    `json:"state"` // of a handler that goes on from where it was
	// First names the first state of this call, the same in all later ones; "" in the first one itself.
	First string `json:"first,omitzero"`
}

// sealer seals and opens requestState.
type sealer struct {
	aead cipher.AEAD
	now  func() time.Time
}

func newSealer(key []byte) (*sealer, error) {
	if key == nil {
		key = make([]byte, 32)
		if _, err := rand.Read(key); err != nil {
			return nil, err
		}
	}
	if len(key) != 32 {
		return nil, fmt.Errorf("the state key has %d bytes; it must have 32", len(key))
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, err
	}
	return &sealer{aead: aead, now: time.Now}, nil
}

// binding is what a state belongs to: it opens for the same principal and the same call only.
func binding(c *call.Call) []byte {
	h := sha256.New()
	field := func(s string) { fmt.Fprintf(h, "%d:%s", len(s), s) }
	field("newel requestState v2")
	field(c.Key) // answers belong to one operation
	if c.Principal != nil {
		field(c.Principal.Tenant)
		field(c.Principal.ID)
	} else {
		field("")
		field("")
	}
	field(c.Kind.String())
	field(c.Name)
	// Member order and white space do not matter, digits do: no two numbers may look alike.
	args := c.Args.Clone()
	if err := args.Format(jsontext.ReorderRawObjects(true), jsontext.CanonicalizeRawInts(false), jsontext.CanonicalizeRawFloats(false), jsontext.SpaceAfterComma(false), jsontext.SpaceAfterColon(false)); err != nil {
		args = c.Args
	}
	field(string(args))
	return h.Sum(nil)
}

func (s *sealer) seal(c *call.Call, st *state) (string, error) {
	plain, err := json.Marshal(st)
	if err != nil {
		return "", err
	}
	if len(plain) > maxStateBytes {
		return "", call.Errorf(call.TooLarge, "the answers of this call are larger than %d bytes in all", maxStateBytes)
	}
	return base64.RawURLEncoding.EncodeToString(s.aead.Seal(nil, nil, plain, binding(c))), nil
}

var errState = errors.New("requestState was not opened")

func (s *sealer) open(c *call.Call, sealed string) (*state, error) {
	if len(sealed) > 2*maxStateBytes {
		return nil, errState
	}
	b, err := base64.RawURLEncoding.DecodeString(sealed)
	if err != nil {
		return nil, errState
	}
	plain, err := s.aead.Open(nil, nil, b, binding(c))
	if err != nil {
		return nil, errState
	}
	var st state
	if err := json.Unmarshal(plain, &st); err != nil {
		return nil, errState
	}
	if s.now().Unix() > st.Expires {
		return nil, errState
	}
	if st.First == "" {
		h := sha256.Sum256(b) // of the bytes: their text has more than one form
		st.First = hex.EncodeToString(h[:])
	}
	return &st, nil
}

// asker answers the questions of a stateless call from what the client sent, or says what to ask.
type asker struct {
	client  *call.Client
	answers map[string]jsontext.Value
}

// Ask implements call.Asker.
func (a *asker) Ask(_ context.Context, questions ...call.Question) (map[string]jsontext.Value, error) {
	out := make(map[string]jsontext.Value, len(questions))
	var open []call.Question
	for _, q := range questions {
		if q.Key == "" || slices.ContainsFunc(open, func(o call.Question) bool { return o.Key == q.Key }) {
			return nil, call.Errorf(call.Internal, "internal error").Because(fmt.Errorf("question key %q is empty or used twice", q.Key))
		}
		if err := a.client.Supports(q); err != nil {
			return nil, err
		}
		answer, ok := a.answers[q.Key]
		if !ok {
			open = append(open, q)
			continue
		}
		if err := q.CheckAnswer(answer); err != nil {
			return nil, err
		}
		out[q.Key] = answer
	}
	if len(open) > 0 {
		return nil, &call.InputRequired{Questions: open}
	}
	return out, nil
}
