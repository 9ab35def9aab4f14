package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
)

// Bounds of what is said on the socket of a server.
const (
	maxOrder     = 1 << 10 // bytes
	maxOutcome   = 4 << 20 // bytes
	maxRequest   = 128 << 10
	maxOrders    = 16 // at once
	orderTimeout = 5 * time.Second
	reloadWait   = 10 * time.Minute // documents may have to be read
	maxSocket    = 100              // bytes of its path: the system takes little more
)

// socketOf is where the server of a configuration takes orders: beside its state, where only who
// runs it can write.
func socketOf(path string) string {
	return filepath.Join(filepath.Dir(path), ".newel", filepath.Base(path)+".sock")
}

// admin takes orders over a Unix socket: a line with the order, answered with a line of JSON. Who
// may open the socket (mode 0600) may give them. After the order http comes one request to the door
// for people who decide, which asks who is there like over the network.
type admin struct {
	serving  *serving
	listener net.Listener
	path     string
	info     os.FileInfo // of the socket, which another process may have replaced
}

// newAdmin puts the socket in its place. A process that hands over leaves its socket to its successor.
func newAdmin(path string, s *serving, successor bool) (*admin, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if len(path) > maxSocket {
		return nil, fmt.Errorf("the path %s is too long for a socket; send the signal SIGHUP instead", path)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil && !successor {
		return nil, errors.Join(fmt.Errorf("another server of this configuration listens on %s", path), c.Close())
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	// Made where nobody else gets to, so that there is no moment in which others could open it.
	private, err := os.MkdirTemp(dir, "s")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(private)
	made := filepath.Join(private, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: made, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	a := &admin{serving: s, listener: l, path: path}
	err = errors.Join(os.Chmod(made, 0o600), os.Rename(made, path))
	if err == nil {
		a.info, err = os.Lstat(path)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return a, nil
}

// run takes orders until ctx ends.
func (a *admin) run(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() {
		if now, err := os.Lstat(a.path); err == nil && os.SameFile(now, a.info) {
			_ = os.Remove(a.path) // the next server puts its own there in any case
		}
		_ = a.listener.Close()
	})
	defer stop()
	var all sync.WaitGroup
	defer all.Wait()
	room := make(chan struct{}, maxOrders)
	for {
		c, err := a.listener.Accept()
		if err != nil {
			return
		}
		select {
		case room <- struct{}{}:
		case <-ctx.Done():
			_ = c.Close()
			return
		}
		all.Go(func() {
			defer func() { <-room }()
			defer c.Close()
			a.order(ctx, c)
		})
	}
}

// order answers one connection.
func (a *admin) order(ctx context.Context, c net.Conn) {
	_ = c.SetDeadline(time.Now().Add(orderTimeout))
	limited := &io.LimitedReader{R: c, N: maxOrder}
	in := bufio.NewReader(limited)
	line, err := in.ReadString('\n')
	if err != nil {
		return
	}
	if strings.TrimSpace(line) == "http" {
		limited.N += maxRequest
		a.request(ctx, c, in)
		return
	}
	var answer any
	switch strings.TrimSpace(line) {
	case "reload":
		attempt := a.serving.ask()
		select {
		case <-attempt.done:
			answer = attempt.outcome
		case <-ctx.Done():
			answer = refused("the server is stopping")
		}
	case "status":
		answer = a.serving.condition()
	default:
		answer = refused("this server does not know the order")
	}
	text, err := json.Marshal(answer)
	if err != nil {
		return
	}
	_ = c.SetDeadline(time.Now().Add(orderTimeout))
	_, _ = c.Write(append(text, '\n')) // whoever asked may be gone
}

func refused(why string) *outcome {
	return &outcome{Outcome: "refused", Changed: []string{}, Error: why}
}

// request answers one request to the door for people who decide.
func (a *admin) request(ctx context.Context, c net.Conn, in *bufio.Reader) {
	r, err := http.ReadRequest(in)
	if err != nil {
		return
	}
	_ = c.SetDeadline(time.Now().Add(officeTimeout))
	ctx, cancel := context.WithTimeout(ctx, officeTimeout)
	defer cancel()
	r = r.WithContext(ctx)
	r.RemoteAddr = "socket" // never empty: that is who calls over stdio
	w := &reply{header: http.Header{}, status: http.StatusOK}
	a.serving.live.House().Deciding().ServeHTTP(w, r)
	resp := http.Response{ProtoMajor: 1, ProtoMinor: 1, StatusCode: w.status, Header: w.header, Body: io.NopCloser(&w.body), ContentLength: int64(w.body.Len()), Close: true}
	_ = resp.Write(c) // whoever asked may be gone
}

// reply is an answer that is sent when it is whole.
type reply struct {
	header http.Header
	status int
	body   bytes.Buffer
}

// Header implements http.ResponseWriter.
func (w *reply) Header() http.Header { return w.header }

// WriteHeader implements http.ResponseWriter.
func (w *reply) WriteHeader(status int) { w.status = status }

// Write implements http.ResponseWriter.
func (w *reply) Write(b []byte) (int, error) { return w.body.Write(b) }

// throughSocket sends requests to the server of a configuration that runs here.
func throughSocket(socket string) *http.Transport {
	return &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
		if err != nil {
			return nil, err
		}
		if _, err := io.WriteString(c, "http\n"); err != nil {
			return nil, errors.Join(err, c.Close())
		}
		return c, nil
	}}
}

func reloadCommand(env *environment) *cobra.Command {
	var path, output string
	c := &cobra.Command{
		Use:   "reload",
		Short: "Have the running server load its configuration anew",
		Long: `Tells the server that was started with this configuration to load it again, and says what is
different, or what is wrong with it. Calls that run are not disturbed; if something is wrong,
nothing changes and the exit code is 1.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return fmt.Errorf("--output must be text or json, not %q", output)
			}
			var out outcome
			raw, err := tell(cmd.Context(), socketOf(path), "reload", &out)
			if err != nil {
				return exit(exitConnection, err)
			}
			if output == "json" {
				_, err = fmt.Fprintf(env.out, "%s\n", raw)
			} else {
				_, err = fmt.Fprint(env.out, &out)
			}
			if err == nil && out.Outcome == "refused" {
				return exit(exitFailed, nil)
			}
			return err
		},
	}
	c.Flags().StringVarP(&path, "config", "c", defaultConfig, "configuration file that the server was started with")
	c.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return c
}

// tell gives an order to the server behind a socket, waits for its answer, and reads that into into.
func tell(ctx context.Context, socket, order string, into any) (raw []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, reloadWait)
	defer cancel()
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("no server of this configuration is running here, or it is somebody else's (%w); name its file with --config", err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Now()) })
	defer stop()
	if _, err := io.WriteString(c, order+"\n"); err != nil {
		return nil, err
	}
	if raw, err = io.ReadAll(io.LimitReader(c, maxOutcome)); err != nil {
		return nil, fmt.Errorf("the server did not answer: %w", err)
	}
	if err := json.Unmarshal(raw, into); err != nil {
		return nil, errors.New("the server ended before it answered")
	}
	return bytes.TrimSpace(raw), nil
}
