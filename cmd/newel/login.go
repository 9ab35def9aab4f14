package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/identity/exchange"
)

func loginCommand(env *environment) *cobra.Command {
	var server, upstream, path, as, clientID string
	var scopes []string
	c := &cobra.Command{
		Use:   "login",
		Short: "Log in to a server in the browser; the other verbs use the token, the gateway that of its servers",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), 5*time.Minute)
			defer cancel()
			where, begin := server, env.beginServer
			if upstream != "" {
				if cmd.Flags().Changed("server") || clientID != "" {
					return errors.New("--upstream takes the server and the client from the configuration; leave --server and --client-id out")
				}
				where, begin = upstream, env.beginUpstream
			}
			client, err := begin(ctx, &asked{where: where, config: path, clientID: clientID, scopes: scopes})
			if err != nil {
				return exit(exitFailed, err)
			}
			t, err := env.login(ctx, client, as)
			if err != nil {
				return exit(exitFailed, err)
			}
			fmt.Fprintf(env.err, "%s %s\n", env.style(green, "Logged in to "+where), env.style(dim, "with "+t.Scope))
			return nil
		},
	}
	c.Flags().StringVarP(&server, "server", "s", defaultURL, "URL of the server")
	c.Flags().StringVar(&upstream, "upstream", "", "name of a server behind the gateway, from the configuration, instead")
	c.Flags().StringVarP(&path, "config", "c", defaultConfig, "configuration file of --upstream")
	c.Flags().StringSliceVar(&scopes, "scope", nil, "scopes to ask for; default: what the server asks for")
	c.Flags().StringVar(&clientID, "client-id", "", "id of a client that is registered; default: one is registered now")
	c.Flags().StringVar(&as, "as", "", "user of newel's authorization server for development, instead of the browser")
	return c
}

// asked is what the command line says about a login.
type asked struct {
	where, config, clientID string
	scopes                  []string
}

func tokenCommand(env *environment) *cobra.Command {
	var server, output string
	c := &cobra.Command{
		Use:   "token",
		Short: "Print the access token of a login, renewed if need be",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, t, err := env.token(cmd.Context(), server)
			if err != nil {
				return exit(exitFailed, err)
			}
			if t == nil {
				return exit(exitFailed, fmt.Errorf("there is no login to %s; newel login makes one", server))
			}
			if output == "json" {
				return env.print(map[string]any{"access_token": t.Access.Reveal(), "expires": t.Expires, "scope": t.Scope})
			}
			_, err = fmt.Fprintln(env.out, t.Access.Reveal())
			return err
		},
	}
	c.Flags().StringVarP(&server, "server", "s", defaultURL, "URL of the server")
	c.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return c
}

// token returns the token of a login to a server, renewed if it has expired; nil: there is none.
func (e *environment) token(ctx context.Context, server string) (*exchange.Client, *exchange.Token, error) {
	if !exchange.Secure(server) {
		return nil, nil, nil // nobody can be logged in there
	}
	c, err := e.client(&asked{where: server})
	if err != nil {
		return nil, nil, err
	}
	t, err := c.Token(ctx)
	if said, ok := errors.AsType[*call.Error](err); ok {
		err = fmt.Errorf("the login to %s has expired: %w; newel login makes a new one", server, said)
	}
	return c, t, err
}

// homes are the private ranges where a person's own servers are. A person chose the server; the
// addresses that it names in turn are held against this.
var homes = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("192.168.0.0/16"), netip.MustParsePrefix("fc00::/7"),
}

// client returns what has access to a server that a person talks to.
func (e *environment) client(a *asked) (*exchange.Client, error) {
	file, err := e.file("logins", a.where)
	if err != nil {
		return nil, err
	}
	return exchange.New(exchange.Options{
		Name: a.where, Server: a.where, ClientID: a.clientID, Scopes: a.scopes, File: file, Login: "newel login --server " + a.where,
		HTTP: egress.Client(egress.Options{Timeout: 15 * time.Second, Allow: homes, Loopback: exchange.OnLoopback(a.where)}),
	})
}

// beginServer asks a server without a token what it wants.
func (e *environment) beginServer(ctx context.Context, a *asked) (*exchange.Client, error) {
	c, err := e.client(a)
	if err != nil {
		return nil, err
	}
	c.Forget()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, a.where, nil)
	if err != nil {
		return nil, err
	}
	r.Header.Set("Accept", "text/event-stream")
	resp, err := c.Transport(&http.Transport{Proxy: http.ProxyFromEnvironment}).RoundTrip(r)
	if _, refused := errors.AsType[*call.Error](err); err != nil && !refused {
		return nil, err
	}
	if resp != nil {
		resp.Body.Close()
	}
	return c, nil
}

// login goes the whole way: the browser comes back to a port of ours, that of the last time if it
// is free.
func (e *environment) login(ctx context.Context, c *exchange.Client, as string) (*exchange.Token, error) {
	var lc net.ListenConfig
	var l net.Listener
	err := errors.New("there was no login yet")
	if before, parsed := url.Parse(c.Redirect()); parsed == nil && before.Host != "" {
		l, err = lc.Listen(ctx, "tcp", before.Host)
	}
	if err != nil {
		if l, err = lc.Listen(ctx, "tcp", "127.0.0.1:0"); err != nil {
			return nil, err
		}
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

	f, err := c.Begin(ctx, "http://"+l.Addr().String()+"/callback")
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

// file is where a login is kept: for its owner alone.
func (e *environment) file(kind, key string) (string, error) {
	dir, ok := e.getenv("NEWEL_CONFIG_DIR")
	if !ok || dir == "" {
		base, err := os.UserConfigDir()
		if err != nil {
			return "", fmt.Errorf("there is no folder to keep logins in (%w); set NEWEL_CONFIG_DIR", err)
		}
		dir = filepath.Join(base, "newel")
	}
	sum := sha256.Sum256([]byte(key))
	return filepath.Join(dir, kind, hex.EncodeToString(sum[:16])+".json"), nil
}
