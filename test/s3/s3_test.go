// Package s3 holds tests against a real server that speaks S3, which is built from its source. It is
// a module of its own, so that the server's dependencies are not Newel's.
package s3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/backend/artifact"
	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/s3"
	"newel.dev/newel/internal/store/shelftest"
	"newel.dev/newel/test/program"
)

const (
	bucket    = "artifacts"
	accessKey = "newel"
	secretKey = "not-a-secret-anywhere-else"
)

// binary is the server, built once.
var binary string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "newel-s3-*")
	if err != nil {
		log.Print(err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "versitygw")
	if out, err := exec.Command("go", "build", "-o", binary, "github.com/versity/versitygw/cmd/versitygw").CombinedOutput(); err != nil {
		log.Printf("building the server: %v\n%s", err, out)
		return 1
	}
	return program.Run(m)
}

// A server keeps buckets as folders and objects as files.
type server struct {
	address string
	dir     string // of the bucket
	process *program.Process
}

func start(t *testing.T) server {
	t.Helper()
	root := t.TempDir()
	s := server{dir: filepath.Join(root, "buckets", bucket)}
	side := filepath.Join(root, "side")
	for _, dir := range []string{s.dir, side} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	addr := program.Address(t)
	s.address = "http://" + addr
	cmd := exec.Command(binary, "--port", addr, "--access", accessKey, "--secret", secretKey, "--quiet", "posix", "--sidecar", side, filepath.Dir(s.dir))
	s.process = program.Serve(t, cmd, func() bool {
		c, err := net.Dial("tcp", addr)
		return err == nil && c.Close() == nil
	})
	t.Cleanup(s.process.Kill)
	return s
}

func (s server) bucket(t *testing.T, change func(*s3.Options)) *s3.Bucket {
	t.Helper()
	o := s3.Options{
		Endpoint: s.address, Bucket: bucket, Prefix: "newel/", AccessKey: secret.New(accessKey), SecretKey: secret.New(secretKey),
		Transport: egress.Transport(egress.Options{Loopback: true}),
	}
	if change != nil {
		change(&o)
	}
	b, err := s3.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestShelf(t *testing.T) {
	s := start(t)
	stranger := filepath.Join(s.dir, "stranger")
	if err := os.WriteFile(stranger, []byte("not ours"), 0o600); err != nil {
		t.Fatal(err)
	}
	shelftest.Run(t, shelftest.Place{
		Open: func(t *testing.T) artifact.Shelf { return s.bucket(t, nil) },
		Change: func(t *testing.T, name string, to func([]byte) []byte) {
			file := filepath.Join(s.dir, "newel", name)
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, to(b), 0o600); err != nil {
				t.Fatal(err)
			}
		},
	})
	if _, err := os.Stat(stranger); err != nil {
		t.Errorf("outside of the prefix: %v", err)
	}
}

func open(t *testing.T, shelf artifact.Shelf) (*artifact.Store, error) {
	return artifact.New(t.Context(), artifact.Options{Shelf: shelf, Key: make([]byte, 32), Links: artifact.Links{Base: "https://mcp.example.com", Life: time.Minute}})
}

// failing tries everything that needs the bucket; all of it has to fail with advice to the caller, and
// none may say what is not true.
func failing(t *testing.T, st *artifact.Store, known call.Artifact) {
	t.Helper()
	_, err := st.Put(t.Context(), nil, "report", "text/plain", []byte("new"))
	if e := call.AsError(err); err == nil || e.Code != call.Unavailable || strings.Contains(e.Message, bucket) || e.Unwrap() == nil {
		t.Errorf("put: %v", err)
	}
	caps, err := st.Capabilities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, err = caps[0].Run(t.Context(), &call.Call{Kind: call.Resource, Name: known.URI})
	if e := call.AsError(err); err == nil || e.Code != call.Unavailable {
		t.Errorf("read: %v", err)
	}
}

func TestBucketGone(t *testing.T) {
	s := start(t)
	st, err := open(t, s.bucket(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	known, err := st.Put(t.Context(), nil, "report", "text/plain", []byte("known"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(s.dir, s.dir+"-away"); err != nil {
		t.Fatal(err)
	}
	failing(t, st, known)
	if _, err := open(t, s.bucket(t, nil)); err == nil || !strings.Contains(err.Error(), "there is no bucket") || !strings.Contains(err.Error(), bucket) {
		t.Errorf("opened without its bucket: %v", err)
	}
	if err := os.Rename(s.dir+"-away", s.dir); err != nil {
		t.Fatal(err)
	}
	caps, err := st.Capabilities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if r, err := caps[0].Run(t.Context(), &call.Call{Kind: call.Resource, Name: known.URI}); err != nil || !bytes.Contains(r.Content, []byte(`"known"`)) {
		t.Errorf("once the bucket is back: %v", err)
	}
}

// pause stops all threads of the server where they are, and waits until they have.
func (s server) pause(t *testing.T) {
	t.Helper()
	if err := s.process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for begun := time.Now(); ; {
		running := 0
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", s.process.PID()))
		switch {
		case runtime.GOOS != "linux":
			t.Skip("needs Linux's /proc")
		case err != nil || len(tasks) == 0:
			t.Fatalf("the server is gone: %v", err)
		}
		for _, task := range tasks {
			if b, err := os.ReadFile(task); err == nil && !bytes.Contains(b, []byte(") T ")) {
				running++
			}
		}
		if running == 0 {
			return
		}
		if time.Since(begun) > 10*time.Second {
			t.Fatalf("%d threads do not stop", running)
		}
	}
}

// A server that does not go on holds nobody up for longer than the timeout allows.
func TestSlowServer(t *testing.T) {
	s := start(t)
	const timeout = 300 * time.Millisecond
	b := s.bucket(t, func(o *s3.Options) { o.Timeout = timeout })
	st, err := open(t, b)
	if err != nil {
		t.Fatal(err)
	}
	known, err := st.Put(t.Context(), nil, "report", "text/plain", bytes.Repeat([]byte("x"), 100<<10))
	if err != nil {
		t.Fatal(err)
	}
	s.pause(t)
	within := func(what string, f func() error) {
		t.Helper()
		begun := time.Now()
		err := f()
		if took := time.Since(begun); err == nil || took < timeout/2 || took > 10*timeout {
			t.Errorf("%s: %v after %v", what, err, took)
		}
	}
	ctx := t.Context()
	within("list", func() error {
		for _, err := range b.List(ctx) {
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("list: %v", err)
			}
			return err
		}
		return nil
	})
	within("get", func() error { _, err := b.Get(ctx, strings.TrimPrefix(known.URI, "artifact://"), 0, 10); return err })
	within("delete", func() error { return b.Delete(ctx, "A") })
	within("put", func() error { return b.Put(ctx, "A", []byte("x")) })
	within("open", func() error { _, err := open(t, b); return err })
	failing(t, st, known)
	if err := s.process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	for begun := time.Now(); ; { // what was sent to it meanwhile comes first
		got, err := b.Get(ctx, strings.TrimPrefix(known.URI, "artifact://"), 0, 1)
		if err == nil && len(got) == 1 {
			break
		}
		if time.Since(begun) > 30*time.Second {
			t.Fatalf("it does not come back: %v", err)
		}
	}
}

func TestServerGone(t *testing.T) {
	s := start(t)
	b := s.bucket(t, func(o *s3.Options) { o.Timeout = time.Second })
	st, err := open(t, b)
	if err != nil {
		t.Fatal(err)
	}
	known, err := st.Put(t.Context(), nil, "report", "text/plain", []byte("known"))
	if err != nil {
		t.Fatal(err)
	}
	s.process.Kill()
	failing(t, st, known)
}

func TestCredentials(t *testing.T) {
	s := start(t)
	b := s.bucket(t, func(o *s3.Options) { o.SecretKey = secret.New("wrong-and-not-to-be-printed") })
	_, err := open(t, b)
	if err == nil || strings.Contains(err.Error(), "wrong-and-not") {
		t.Errorf("with the wrong key: %v", err)
	}
	if printed := fmt.Sprintf("%v %+v", s3.Options{SecretKey: secret.New(secretKey)}, s3.Options{SecretKey: secret.New(secretKey)}); strings.Contains(printed, secretKey) {
		t.Error("the options print the secret key")
	}
	if _, err := b.Get(t.Context(), "A", 0, 1); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("refused looks like not there: %v", err)
	}
}

// An address that the operator did not allow is not reached.
func TestEgress(t *testing.T) {
	s := start(t)
	b := s.bucket(t, func(o *s3.Options) { o.Transport = egress.Transport(egress.Options{}) })
	var refused *egress.Refused
	if _, err := open(t, b); !errors.As(err, &refused) {
		t.Errorf("got %v", err)
	}
}

// Encryption is asked for with every object.
func TestEncryption(t *testing.T) {
	s := start(t)
	for kind, want := range map[string]string{"": "", "s3": "AES256", "kms": "aws:kms"} {
		seen := &headers{next: egress.Transport(egress.Options{Loopback: true})}
		b := s.bucket(t, func(o *s3.Options) {
			o.Transport, o.Encryption = seen, kind
			if kind == "kms" {
				o.KMSKey = "a-key"
			}
		})
		_ = b.Put(t.Context(), "A", []byte("x")) // this server knows no encryption
		if got := seen.put.Get("X-Amz-Server-Side-Encryption"); got != want {
			t.Errorf("%q: %q", kind, got)
		}
		if got := seen.put.Get("X-Amz-Server-Side-Encryption-Aws-Kms-Key-Id"); (got == "a-key") != (kind == "kms") {
			t.Errorf("%q: key %q", kind, got)
		}
	}
}

// headers remembers those of the last PUT on its way to the server.
type headers struct {
	next http.RoundTripper
	put  http.Header
}

func (h *headers) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method == http.MethodPut {
		h.put = r.Header.Clone()
	}
	return h.next.RoundTrip(r)
}

func TestOpenRefuses(t *testing.T) {
	good := s3.Options{Endpoint: "https://s3.example.com", Bucket: bucket, AccessKey: secret.New("a"), SecretKey: secret.New("b"), Transport: http.DefaultTransport}
	if _, err := s3.Open(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*s3.Options){
		"no scheme":      func(o *s3.Options) { o.Endpoint = "s3.example.com" },
		"path":           func(o *s3.Options) { o.Endpoint = "https://s3.example.com/bucket" },
		"user":           func(o *s3.Options) { o.Endpoint = "https://a:b@s3.example.com" },
		"no bucket":      func(o *s3.Options) { o.Bucket = "" },
		"no key":         func(o *s3.Options) { o.SecretKey = secret.String{} },
		"no transport":   func(o *s3.Options) { o.Transport = nil },
		"timeout":        func(o *s3.Options) { o.Timeout = -1 },
		"encryption":     func(o *s3.Options) { o.Encryption = "rot13" },
		"kms without":    func(o *s3.Options) { o.Encryption = "kms" },
		"key without":    func(o *s3.Options) { o.KMSKey = "k" },
		"bad bucket":     func(o *s3.Options) { o.Bucket = "../x" },
		"prefix with ..": func(o *s3.Options) { o.Prefix = "../x/" },
	} {
		o := good
		change(&o)
		if _, err := s3.Open(o); err == nil {
			t.Errorf("%s: opened", name)
		}
	}
}
