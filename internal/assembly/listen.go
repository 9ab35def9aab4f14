package assembly

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
)

// Exposure is what stands between a listener and whoever can reach it.
type Exposure struct {
	Identities bool // callers are asked who they are
	Encrypted  bool // TLS is spoken here, or by a proxy in front
	Production bool // plain HTTP is refused
}

// Listen listens on addr (host:port). It refuses addresses that others can reach without
// identities, as nothing would ask who is calling and every tool would be open to the network; and
// in production without TLS, as tokens and results could be read on the way.
func Listen(ctx context.Context, addr string, x Exposure) (net.Listener, error) {
	if err := x.Check(addr); err != nil {
		return nil, err
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%s is in use by another program; choose another with --listen, for example --listen 127.0.0.1:0 for any free port", addr)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", addr, err)
	}
	return l, nil
}

// Check refuses what Listen refuses, of an address that may be listened on already.
func (x Exposure) Check(addr string) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%q is not an address to listen on; write host:port, for example 127.0.0.1:8080", addr)
	}
	ip, err := netip.ParseAddr(host)
	local := strings.EqualFold(host, "localhost") || err == nil && ip.IsLoopback()
	if !x.Identities && !local {
		return fmt.Errorf("refusing to listen on %s: without authentication everybody who can reach it could call every tool; listen on a loopback address such as 127.0.0.1, or configure auth", addr)
	}
	if x.Production && !x.Encrypted && !local {
		return fmt.Errorf("refusing to serve plain HTTP on %s in production: tokens and results could be read on the way; write tls with certificates (files) or acme, or, if a proxy in front speaks TLS, tls: {terminated_by_proxy: true, trusted_proxies: [its address, such as 10.0.3.7/32]}", addr)
	}
	return nil
}
