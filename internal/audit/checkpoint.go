package audit

import (
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// A Signer signs heads of one log with Ed25519, as signed notes (C2SP tlog-checkpoint).
type Signer struct {
	origin   string
	signer   note.Signer
	verifier string
}

// NewSigner returns a signer. origin names the log: no spaces, no plus signs. seed is 32 secret
// bytes; the same seed and origin give the same key.
func NewSigner(origin string, seed []byte) (*Signer, error) {
	if len(seed) != ed25519.SeedSize {
		return nil, fmt.Errorf("audit: the seed of the key has %d bytes, not %d", len(seed), ed25519.SeedSize)
	}
	public, ok := ed25519.NewKeyFromSeed(seed).Public().(ed25519.PublicKey)
	if !ok {
		return nil, errors.New("audit: no public key")
	}
	verifier, err := note.NewEd25519VerifierKey(origin, public)
	if err != nil {
		return nil, fmt.Errorf("audit: the key cannot be named %q: %w", origin, err)
	}
	parts := strings.SplitN(verifier, "+", 3) // name, hash of name and key, key
	const algorithm = 1                       // Ed25519
	private := base64.StdEncoding.EncodeToString(append([]byte{algorithm}, seed...))
	s, err := note.NewSigner("PRIVATE+KEY+" + parts[0] + "+" + parts[1] + "+" + private)
	if err != nil {
		return nil, fmt.Errorf("audit: the key cannot be named %q: %w", origin, err)
	}
	return &Signer{origin, s, verifier}, nil
}

// VerifierKey is the public key in the form of signed notes: whoever checks the log keeps it.
func (s *Signer) VerifierKey() string { return s.verifier }

// Sign returns the checkpoint of a tree.
func (s *Signer) Sign(tree tlog.Tree) ([]byte, error) {
	text := s.origin + "\n" + strconv.FormatInt(tree.N, 10) + "\n" + base64.StdEncoding.EncodeToString(tree.Hash[:]) + "\n"
	b, err := note.Sign(&note.Note{Text: text}, s.signer)
	if err != nil {
		return nil, fmt.Errorf("audit: the checkpoint cannot be signed: %w", err)
	}
	return b, nil
}

// MaxCheckpoint bounds the bytes of a checkpoint.
const MaxCheckpoint = 4 << 10

// OpenCheckpoint checks the signature of a checkpoint with a public key and returns its tree.
func OpenCheckpoint(checkpoint []byte, verifierKey string) (tlog.Tree, error) {
	if len(checkpoint) > MaxCheckpoint {
		return tlog.Tree{}, errors.New("audit: the checkpoint is too long")
	}
	v, err := note.NewVerifier(verifierKey)
	if err != nil {
		return tlog.Tree{}, fmt.Errorf("audit: the key to check with is not valid: %w", err)
	}
	n, err := note.Open(checkpoint, note.VerifierList(v))
	if err != nil {
		return tlog.Tree{}, fmt.Errorf("%w: the checkpoint is not signed by %s: %w", ErrTampered, v.Name(), err)
	}
	lines := strings.Split(strings.TrimSuffix(n.Text, "\n"), "\n")
	if len(lines) < 3 || lines[0] != v.Name() {
		return tlog.Tree{}, fmt.Errorf("audit: the checkpoint is not one of the log %s", v.Name())
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil || size < 0 || strconv.FormatInt(size, 10) != lines[1] {
		return tlog.Tree{}, errors.New("audit: the size in the checkpoint is not a number")
	}
	root, err := base64.StdEncoding.DecodeString(lines[2])
	if err != nil || len(root) != tlog.HashSize {
		return tlog.Tree{}, errors.New("audit: the root in the checkpoint is not a hash")
	}
	return tlog.Tree{N: size, Hash: tlog.Hash(root)}, nil
}
