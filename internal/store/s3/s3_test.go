package s3

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/secret"
)

// hostile opens a bucket at a server that answers as no real one does; those are in test/s3.
func hostile(t *testing.T, answer http.HandlerFunc) *Bucket {
	t.Helper()
	s := httptest.NewServer(answer)
	t.Cleanup(s.Close)
	b, err := Open(Options{
		Endpoint: s.URL, Bucket: "results", AccessKey: secret.New("a"), SecretKey: secret.New("b"), Timeout: 5 * time.Second,
		Transport: egress.Transport(egress.Options{Loopback: true}),
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A server cannot make the memory full: not with a list that does not end, and not with metadata.
func TestEndlessAnswers(t *testing.T) {
	endless := func(w http.ResponseWriter, head, more string) {
		sent, _ := fmt.Fprint(w, head)
		for sent < 1<<30 {
			n, err := fmt.Fprint(w, strings.Repeat(more, 1000))
			if err != nil {
				return // as it has to be
			}
			sent += n
		}
		t.Error("a gigabyte was taken")
	}
	ctx := t.Context()
	const head = `<?xml version="1.0"?><ListBucketResult>`
	for what, more := range map[string]string{"objects": `<Contents><Key>A</Key><Size>1</Size></Contents>`, "a name": "x"} {
		b := hostile(t, func(w http.ResponseWriter, _ *http.Request) {
			if more == "x" {
				endless(w, head+"<Name>", more)
			} else {
				endless(w, head, more)
			}
		})
		var failed error
		for _, err := range b.List(ctx) {
			failed = err
		}
		var large *http.MaxBytesError
		if !errors.As(failed, &large) {
			t.Errorf("a list with endless %s: %v", what, failed)
		}
	}
	b := hostile(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			w.Header().Set("Content-Range", "bytes 0-9/10")
			w.Header().Set("Last-Modified", time.Now().UTC().Format(http.TimeFormat))
			w.WriteHeader(http.StatusPartialContent)
		}
		endless(w, "", "0123456789")
	})
	if got, err := b.Get(ctx, "A", 0, 10); err != nil || len(got) != 10 {
		t.Errorf("more than was asked for: %d bytes, %v", len(got), err)
	}
	b = hostile(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Amz-Meta-Large", strings.Repeat("x", 2<<20))
		w.WriteHeader(http.StatusPartialContent)
	})
	if _, err := b.Get(ctx, "A", 0, 10); err == nil {
		t.Error("two megabytes of metadata were read")
	}
}

// A server that stops in the middle of an answer holds nobody up for longer than the timeout.
func TestStalledAnswer(t *testing.T) {
	b := hostile(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Range", "bytes 0-99/100")
		w.Header().Set("Last-Modified", time.Now().UTC().Format(http.TimeFormat))
		w.WriteHeader(http.StatusPartialContent)
		_ = http.NewResponseController(w).Flush() // the client is still there
		<-r.Context().Done()
	})
	b.timeout = 200 * time.Millisecond
	begun := time.Now()
	if _, err := b.Get(t.Context(), "A", 0, 100); !errors.Is(err, context.DeadlineExceeded) || time.Since(begun) > 3*time.Second {
		t.Errorf("%v after %v", err, time.Since(begun))
	}
}
