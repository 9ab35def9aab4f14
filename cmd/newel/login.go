package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"newel.dev/newel/internal/identity/login"
)

func loginCommand(env *environment) *cobra.Command {
	var server, as, clientID string
	var scopes []string
	c := &cobra.Command{
		Use:   "login",
		Short: "Log in to a server in the browser; the other verbs use the token",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), 5*time.Minute)
			defer cancel()
			t, err := env.login(ctx, server, as, clientID, scopes)
			if err != nil {
				return exit(exitFailed, err)
			}
			if err := env.remember(server, t); err != nil {
				return exit(exitFailed, err)
			}
			fmt.Fprintf(env.err, "%s %s\n", env.style(green, "Logged in to "+server), env.style(dim, "with "+t.Scope))
			return nil
		},
	}
	c.Flags().StringVarP(&server, "server", "s", defaultURL, "URL of the server")
	c.Flags().StringSliceVar(&scopes, "scope", nil, "scopes to ask for; default: what the server asks for")
	c.Flags().StringVar(&clientID, "client-id", "", "id of a client that is registered; default: one is registered now")
	c.Flags().StringVar(&as, "as", "", "user of newel's authorization server for development, instead of the browser")
	return c
}

func tokenCommand(env *environment) *cobra.Command {
	var server, output string
	c := &cobra.Command{
		Use:   "token",
		Short: "Print the access token of a login, renewed if need be",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := env.token(cmd.Context(), server)
			if err != nil {
				return exit(exitFailed, err)
			}
			if t == nil {
				return exit(exitFailed, fmt.Errorf("there is no login to %s; newel login makes one", server))
			}
			if output == "json" {
				return env.print(map[string]any{"access_token": t.Access, "expires": t.Expires, "scope": t.Scope})
			}
			_, err = fmt.Fprintln(env.out, t.Access)
			return err
		},
	}
	c.Flags().StringVarP(&server, "server", "s", defaultURL, "URL of the server")
	c.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return c
}

// login goes the whole way: the browser comes back to a port of ours.
func (e *environment) login(ctx context.Context, server, as, clientID string, scopes []string) (*login.Token, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer l.Close()
	back := make(chan url.Values, 1)
	srv := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/callback" {
			http.NotFound(w, r)
			return
		}
		fmt.Fprintln(w, "You can close this page and go back to the terminal.")
		select {
		case back <- r.URL.Query():
		default: // one answer is enough
		}
	})}
	go func() { _ = srv.Serve(l) }() // ends with Close
	defer srv.Close()

	f, err := login.Begin(ctx, login.Options{Server: server, Redirect: "http://" + l.Addr().String() + "/callback", Scopes: scopes, ClientID: clientID})
	if err != nil {
		return nil, err
	}
	if as != "" {
		err = chooseUser(ctx, f.URL, as)
	} else {
		fmt.Fprintf(e.err, "Open this address in a browser to log in:\n  %s\n", f.URL)
		openBrowser(ctx, f.URL)
	}
	if err != nil {
		return nil, err
	}
	select {
	case q := <-back:
		return f.Finish(ctx, q)
	case <-ctx.Done():
		return nil, errors.New("nobody logged in in time")
	}
}

// chooseUser presses a user's button on the page of the authorization server for development.
func chooseUser(ctx context.Context, page, user string) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, page, strings.NewReader(url.Values{"user": {user}}.Encode()))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("nobody can log in as %q there: status %d; --as is for newel's own authorization server for development", user, resp.StatusCode)
	}
	return nil
}

// openBrowser tries; the address was printed in any case.
func openBrowser(ctx context.Context, address string) {
	name := map[string]string{"linux": "xdg-open", "darwin": "open"}[runtime.GOOS]
	if name == "" {
		return
	}
	if path, err := exec.LookPath(name); err == nil {
		_ = exec.CommandContext(ctx, path, address).Start() //nolint:gosec // the address is of a checked scheme
	}
}

// tokens is the file of logins: for its owner alone.
func (e *environment) tokens() (string, error) {
	if dir, ok := e.getenv("NEWEL_CONFIG_DIR"); ok && dir != "" {
		return filepath.Join(dir, "tokens.json"), nil
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "newel", "tokens.json"), nil
}

func (e *environment) logins() (map[string]*login.Token, error) {
	path, err := e.tokens()
	if err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return map[string]*login.Token{}, nil
	}
	if err != nil {
		return nil, err
	}
	all := map[string]*login.Token{}
	if err := json.Unmarshal(raw, &all); err != nil {
		return nil, fmt.Errorf("%s is damaged (%w); remove it and log in again", path, err)
	}
	return all, nil
}

// remember writes a login whole, or not at all.
func (e *environment) remember(server string, t *login.Token) error {
	all, err := e.logins()
	if err != nil {
		return err
	}
	all[server] = t
	path, err := e.tokens()
	if err != nil {
		return err
	}
	raw, err := json.Marshal(all)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	part, err := os.CreateTemp(filepath.Dir(path), ".tokens-") // made for its owner alone
	if err != nil {
		return err
	}
	_, err = part.Write(raw)
	if err = errors.Join(err, part.Sync(), part.Close()); err == nil {
		err = os.Rename(part.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(part.Name()))
	}
	return nil
}

// token returns the token of a login, renewed if it has expired; nil: there is none.
func (e *environment) token(ctx context.Context, server string) (*login.Token, error) {
	all, err := e.logins()
	if err != nil {
		return nil, err
	}
	t := all[server]
	if t == nil || t.Fresh(time.Now()) {
		return t, nil
	}
	next, err := login.Renew(ctx, t)
	if err != nil {
		return nil, fmt.Errorf("the login to %s has expired: %w; newel login makes a new one", server, err)
	}
	return next, e.remember(server, next)
}

// bearer adds the token of a login to requests to its server.
type bearer struct {
	token string
	next  http.RoundTripper
}

// RoundTrip implements http.RoundTripper.
func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+b.token)
	return b.next.RoundTrip(r)
}
