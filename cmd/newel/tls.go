package main

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"path/filepath"
	"time"

	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/certs"
	"newel.dev/newel/internal/config"
	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/policy"
)

// exposure is what stands between the listener and whoever can reach it.
func exposure(c *config.Config) assembly.Exposure {
	return assembly.Exposure{
		Identities: c.Auth.Mode == "tokens" || c.Auth.Mode == "broker",
		Encrypted:  c.TLS.On() || c.TLS.Terminated,
		Production: c.Policy.Environment == policy.Production,
	}
}

// scheme is that of the server's address as clients write it.
func scheme(c *config.Config) string {
	if c.TLS.On() || c.TLS.Terminated {
		return "https"
	}
	return "http"
}

// checkTLS refuses settings that contradict each other. It opens no file.
func checkTLS(f *config.File) error {
	t := &f.Config.TLS
	bad := func(setting, text string) error { return fmt.Errorf("%s: %s", f.Position("tls."+setting), text) }
	acme := &t.ACME
	switch {
	case len(acme.Domains) == 0 && (acme.Email != "" || acme.Cache != "" || acme.Terms || acme.CA != "" || len(acme.Private) > 0):
		return bad("acme", "name the domains that certificates are asked for")
	case t.Terminated && t.On():
		return bad("terminated_by_proxy", "either a proxy in front speaks TLS, or this server does with certificates or acme; leave one out")
	case t.Terminated && len(t.Proxies) == 0:
		return bad("terminated_by_proxy", "name the proxy, such as trusted_proxies: [10.0.3.7/32]: from others plain HTTP is refused")
	case !t.Terminated && len(t.Proxies) > 0:
		return bad("trusted_proxies", "there is no proxy that speaks TLS for this server: write terminated_by_proxy: true, or leave trusted_proxies out")
	case !t.On() && (t.Clients != "none" || t.ClientCA != "" || t.MinVersion != "1.2"):
		return bad("", "there is no certificate: write certificates with files, or acme with domains")
	case t.On() && f.Config.Auth.Mode == "dev":
		return bad("", "the authorization server for development speaks plain HTTP on loopback: leave tls out, or write auth: {mode: tokens}")
	}
	if u, err := url.Parse(f.Config.Auth.PublicURL); f.Config.Policy.Environment == policy.Production && f.Config.Auth.PublicURL != "" && (err != nil || u.Scheme != "https") {
		return fmt.Errorf("%s: in production clients reach the server by https; write the address so", f.Position("auth.public_url"))
	}
	return nil
}

// certificates reads what the listener shows; nil means plain HTTP.
func certificates(f *config.File, log *slog.Logger) (assembly.Certificates, error) {
	t := &f.Config.TLS
	if !t.On() {
		return nil, nil
	}
	in := func(path string) string {
		if path == "" || filepath.IsAbs(path) {
			return path
		}
		return filepath.Join(f.Dir, path)
	}
	o := certs.ServerOptions{
		MinVersion: tls.VersionTLS12, ClientCAs: in(t.ClientCA), Logger: log,
		Clients: map[string]tls.ClientAuthType{
			"none": tls.NoClientCert, "optional": tls.VerifyClientCertIfGiven, "required": tls.RequireAndVerifyClientCert, "optional_any": tls.RequestClientCert,
		}[t.Clients],
		Where: func(setting string) string { return f.Position("tls." + setting) },
	}
	if t.MinVersion == "1.3" {
		o.MinVersion = tls.VersionTLS13
	}
	for _, p := range t.Certificates {
		o.Pairs = append(o.Pairs, certs.Pair{Certificate: in(p.Certificate), Key: in(p.Key)})
	}
	if a := &t.ACME; len(a.Domains) > 0 {
		private, err := ranges(f, a.Private, "tls.acme.private_ranges")
		if err != nil {
			return nil, err
		}
		trust, err := certs.Client(certs.ClientOptions{CA: in(a.CA), Where: func(setting string) string { return f.Position("tls.acme." + setting) }})
		if err != nil {
			return nil, err
		}
		if u, err := url.Parse(a.Directory); err == nil {
			private = append(private, egress.Named(u.Hostname())...)
		}
		o.ACME = &certs.ACME{
			Directory: a.Directory, Domains: a.Domains, Email: a.Email, Cache: in(a.Cache), Terms: a.Terms,
			HTTP: egress.Client(egress.Options{Allow: private, Timeout: 30 * time.Second, TLS: trust}),
		}
	}
	s, err := certs.NewServer(o)
	if err != nil {
		return nil, err // not the nil *certs.Server, which is no nil Certificates
	}
	return s, nil
}

// address is where the server is reached, for people.
func address(c *config.Config, l net.Addr) string {
	if c.TLS.On() {
		return "https://" + l.String() + "/mcp"
	}
	return "http://" + l.String() + "/mcp"
}
