package observe

import (
	"context"
	"crypto/rand"
	"strconv"
	"sync/atomic"
	"time"
)

// MaxCorrelation bounds a correlation id that is taken over from a caller, in bytes.
const MaxCorrelation = 128

type correlationKey struct{}

// Correlation returns the correlation id of the call that ctx belongs to, for backends to pass
// on, or "" outside of a call.
func Correlation(ctx context.Context) string {
	if id, ok := ctx.Value(correlationKey{}).(*string); ok {
		return *id
	}
	return ""
}

// withCorrelation is the one place where a value other than a span enters a context: a backend
// that calls out has the context of the call at hand, and often not the call. id is not copied and
// must not change.
func withCorrelation(ctx context.Context, id *string) context.Context {
	return context.WithValue(ctx, correlationKey{}, id)
}

// ids makes correlation ids: unique, not secret.
type ids struct {
	prefix string
	next   *atomic.Uint64
}

func newIDs() ids {
	return ids{prefix: rand.Text()[:16] + strconv.FormatInt(time.Now().Unix(), 36) + "-", next: new(atomic.Uint64)}
}

// correlation takes the caller's id over if it is visible ASCII of sane length, otherwise it
// makes one.
func (s ids) correlation(given string) string {
	if sane(given) {
		return given
	}
	var buf [64]byte
	b := append(buf[:0], s.prefix...)
	return string(strconv.AppendUint(b, s.next.Add(1), 36))
}

func sane(id string) bool {
	if id == "" || len(id) > MaxCorrelation {
		return false
	}
	for i := range len(id) {
		if id[i] <= ' ' || id[i] >= 0x7f {
			return false
		}
	}
	return true
}
