package approve

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/internal/secret"
)

// A Webhook is another system that hears of approvals that wait, and may decide about them: in its
// answer, or later with a signed request to the callback. It hears of each again until it is decided,
// and from every node, so it knows them by their ids.
type Webhook struct {
	URL      string
	Secret   secret.String // of both sides; at least 32 bytes
	Callback string        // address of this server, such as https://mcp.example.com; "": it can only answer
	HTTP     *http.Client
}

// SignatureHeader carries "t=<seconds since 1970>,v1=<hex>": HMAC-SHA256 of the secret over the
// decimal seconds, a dot and the body.
const SignatureHeader = "Newel-Signature"

const (
	maxSkew   = 5 * time.Minute // between the clocks of both sides
	tellEvery = 15 * time.Second
	maxAnswer = 64 << 10
	minSecret = 32
)

// Check returns what is wrong with the settings.
func (h *Webhook) Check() error {
	if len(h.Secret.Reveal()) < minSecret {
		return fmt.Errorf("the secret of the webhook must have at least %d bytes", minSecret)
	}
	return nil
}

// Sign returns the header for a body.
func Sign(key []byte, at time.Time, body []byte) string {
	t := strconv.FormatInt(at.Unix(), 10)
	return "t=" + t + ",v1=" + hex.EncodeToString(mac(key, t, body))
}

func mac(key []byte, t string, body []byte) []byte {
	m := hmac.New(sha256.New, key)
	m.Write([]byte(t + "."))
	m.Write(body)
	return m.Sum(nil)
}

// ErrSignature says that something is not signed, or not by whom it should be, or too long ago.
var ErrSignature = errors.New("the signature is missing, wrong or too old")

// CheckSignature checks the header of a body.
func CheckSignature(key []byte, header string, body []byte, now time.Time) error {
	t, sum, ok := strings.Cut(strings.TrimPrefix(header, "t="), ",v1=")
	at, err := strconv.ParseInt(t, 10, 64)
	if !ok || err != nil || !strings.HasPrefix(header, "t=") {
		return ErrSignature
	}
	given, err := hex.DecodeString(sum)
	if err != nil || !hmac.Equal(given, mac(key, t, body)) {
		return ErrSignature
	}
	if d := now.Sub(time.Unix(at, 0)); d > maxSkew || d < -maxSkew {
		return ErrSignature
	}
	return nil
}

// An Answer is what the other system says, in its answer or to the callback.
type Answer struct {
	Approval string `json:"approval"` // id
	Decision string `json:"decision"` // approve, deny, or "" for not yet
	By       string `json:"by"`       // who decided there; not the caller, unless the rule lets
	Reason   string `json:"reason"`
}

// tell tells the webhook of approvals that wait.
func (h *Webhook) tell(ctx context.Context, p *Approvals, wait []Approval) {
	next, away := map[string]time.Time{}, false
	for i := range wait {
		a := &wait[i]
		if at, known := p.told[a.ID]; known && time.Now().Before(at) {
			next[a.ID] = at
			continue
		}
		if away {
			continue // whoever does not answer about one is not asked about the others now
		}
		next[a.ID] = time.Now().Add(tellEvery)
		err := h.send(ctx, p, a)
		if err != nil && ctx.Err() == nil {
			p.log.LogAttrs(ctx, slog.LevelWarn, "the webhook was not told of an approval, or its answer decides nothing; it is told again", slog.String("approval", a.ID), slog.String("error", err.Error()))
		}
		var unreachable *url.Error
		away = errors.As(err, &unreachable)
	}
	p.told = next
}

// send announces one approval and takes the decision of the answer, if there is one.
func (h *Webhook) send(ctx context.Context, p *Approvals, a *Approval) error {
	v, err := p.View(a)
	if err != nil {
		return err
	}
	callback := ""
	if h.Callback != "" {
		callback = h.Callback + CallbackPath(a.ID)
	}
	body, err := json.Marshal(struct {
		Type     string `json:"type"`
		Approval *View  `json:"approval"`
		Callback string `json:"callback,omitzero"`
	}{"approval.pending", v, callback})
	if err != nil {
		return err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, h.URL, bytes.NewReader(body))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set(SignatureHeader, Sign([]byte(h.Secret.Reveal()), time.Now(), body))
	resp, err := h.HTTP.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close() //nolint:errcheck // it was read
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return err
	case resp.StatusCode/100 != 2:
		return fmt.Errorf("it answers %s", resp.Status)
	case len(answer) > maxAnswer:
		return fmt.Errorf("its answer is longer than %d bytes", maxAnswer)
	case resp.StatusCode != http.StatusOK || len(bytes.TrimSpace(answer)) == 0:
		return nil // heard, and not decided
	}
	_, err = h.Take(ctx, p, a.ID, resp.Header.Get(SignatureHeader), answer)
	if errors.Is(err, ErrEnded) {
		return nil
	}
	return err
}

// CallbackPath is where the decision of the other system about an approval goes.
func CallbackPath(id string) string { return "/approvals/" + id + "/callback" }

// ErrAnswer says that a signed answer makes no sense.
var ErrAnswer = errors.New(`the answer is not {"approval": id, "decision": "approve" or "deny", "by": who}`)

// Take takes a signed decision about one approval. One of "" decides nothing.
func (h *Webhook) Take(ctx context.Context, p *Approvals, id, signature string, body []byte) (Approval, error) {
	if err := CheckSignature([]byte(h.Secret.Reveal()), signature, body, time.Now()); err != nil {
		return Approval{}, err
	}
	var said Answer
	if err := json.Unmarshal(body, &said); err != nil || said.Approval != id {
		return Approval{}, ErrAnswer // signed for another one, perhaps
	}
	switch {
	case said.Decision == "":
		return Approval{}, nil
	case said.Decision != "approve" && said.Decision != "deny", said.By == "", len(said.By) > maxReason:
		return Approval{}, ErrAnswer
	}
	who := Person{Name: said.By, How: ByWebhook, Operator: true}
	return p.Decide(ctx, id, who, said.Decision == "approve", said.Reason)
}
