package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"newel.dev/newel/internal/backend/mcpupstream"
	"newel.dev/newel/internal/config"
	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/identity/exchange"
	"newel.dev/newel/internal/module"
	"newel.dev/newel/internal/secret"
)

// maxAssertion bounds a file with a token, in bytes.
const maxAssertion = 64 << 10

// giveAccess gives a server behind the gateway the transport that its auth asks for, and returns
// what has the access; nil if there is no auth.
func (e *environment) giveAccess(f *config.File, b *config.Backend) (*exchange.Client, error) {
	c, ok := b.Settings.(mcpupstream.Config)
	if !ok || c.Auth == nil || c.URL == "" {
		return nil, nil // what is wrong with it, the backend says
	}
	client, err := e.upstream(f, b, &c)
	if err != nil {
		return nil, err
	}
	c.Access = client.Transport
	b.Settings = c
	return client, nil
}

// upstream returns what has access to one server behind the gateway.
func (e *environment) upstream(f *config.File, b *config.Backend, c *mcpupstream.Config) (*exchange.Client, error) {
	a := c.Auth
	wrong := func(setting string, err error) error {
		return fmt.Errorf("%s: %w", f.BackendPosition(b, strings.TrimSuffix("auth."+setting, ".")), err)
	}
	o := exchange.Options{
		Name: fmt.Sprintf("the server %q behind this", b.Name), Server: c.URL, Grant: a.Grant, Issuer: a.Issuer, ClientID: a.ClientID, ClientSecret: a.ClientSecret,
		Document: a.MetadataURL, Scopes: a.Scopes, Legacy: a.Legacy, Login: "its operator runs newel login --upstream " + b.Name,
		Provider: exchange.Provider{Issuer: a.Provider.Issuer, ClientID: a.Provider.ClientID, ClientSecret: a.Provider.ClientSecret},
	}
	path := func(name string) string {
		if filepath.IsAbs(name) {
			return name
		}
		return filepath.Join(f.Dir, name)
	}
	if a.PrivateKeyFile != "" {
		text, err := os.ReadFile(path(a.PrivateKeyFile))
		if err != nil {
			return nil, wrong("private_key_file", err)
		}
		if o.Key, err = exchange.ParseKey(text); err != nil {
			return nil, wrong("private_key_file", err)
		}
	}
	if a.AssertionFile != "" {
		o.Assertion = func() (secret.String, error) { return assertion(path(a.AssertionFile)) }
	}
	var private []netip.Prefix
	for i, p := range a.Private {
		prefix, err := netip.ParsePrefix(p)
		if err != nil {
			return nil, wrong(fmt.Sprintf("private_ranges[%d]", i), fmt.Errorf("%q is not a range of addresses, such as 10.0.0.0/8", p))
		}
		private = append(private, prefix)
	}
	if a.Grant == exchange.AuthorizationCode {
		var err error
		if o.File, err = e.file("upstreams", b.Name+"\x00"+c.URL); err != nil {
			return nil, wrong("", err)
		}
	}
	o.HTTP = egress.Client(egress.Options{Timeout: 15 * time.Second, Allow: private, Loopback: exchange.OnLoopback(c.URL)})
	client, err := exchange.New(o)
	if err != nil {
		return nil, wrong("", err)
	}
	return client, nil
}

// assertion reads a token that something else keeps up to date.
func assertion(name string) (secret.String, error) {
	file, err := os.Open(name)
	if err != nil {
		return secret.String{}, err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxAssertion+1))
	token := strings.TrimSpace(string(text))
	switch {
	case err != nil:
		return secret.String{}, err
	case token == "" || len(text) > maxAssertion:
		return secret.String{}, fmt.Errorf("%s holds no token of at most %d bytes", name, maxAssertion)
	}
	return secret.New(token), nil
}

// beginUpstream asks a server of the configuration what it wants of who has no token, by speaking
// to it as the gateway does.
func (e *environment) beginUpstream(ctx context.Context, a *asked) (*exchange.Client, error) {
	f, err := e.load(a.config, e.secrets(a.config))
	if err != nil {
		return nil, err
	}
	at := slices.IndexFunc(f.Config.Backends, func(b config.Backend) bool { return b.Name == a.where })
	if at < 0 {
		return nil, fmt.Errorf("%s has no server %q", a.config, a.where)
	}
	b := &f.Config.Backends[at]
	c, ok := b.Settings.(mcpupstream.Config)
	if !ok || c.Auth == nil {
		return nil, fmt.Errorf("%s: %q has no auth: nobody logs in to it", f.BackendPosition(b, ""), a.where)
	}
	if len(a.scopes) > 0 {
		c.Auth.Scopes = a.scopes
	}
	client, err := e.giveAccess(f, b)
	if err != nil {
		return nil, err
	}
	if client == nil {
		return nil, fmt.Errorf("%s: only a server with a url asks for access tokens", f.BackendPosition(b, "auth"))
	}
	client.Forget()
	backend, err := b.Module.Open(ctx, b.Name, b.Settings, module.Env{
		Dir: f.Dir, Logger: slog.New(slog.DiscardHandler), Progress: func(string, int, int) {},
		Position: func(path string) string { return f.BackendPosition(b, path) },
	})
	if err != nil {
		return nil, err
	}
	_, err = backend.Capabilities(ctx) // what it says is remembered by the client
	if closer, ok := backend.(io.Closer); ok {
		err = errors.Join(err, closer.Close())
	}
	return client, err
}
