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

// Listen listens on addr (host:port). Without identities it refuses addresses that others can
// reach: nothing would ask who is calling, and every tool would be open to the network.
func Listen(ctx context.Context, addr string, identities bool) (net.Listener, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("%q is not an address to listen on; write host:port, for example 127.0.0.1:8080", addr)
	}
	ip, err := netip.ParseAddr(host)
	if !identities && !strings.EqualFold(host, "localhost") && (err != nil || !ip.IsLoopback()) {
		return nil, fmt.Errorf("refusing to listen on %s: without authentication everybody who can reach it could call every tool; listen on a loopback address such as 127.0.0.1, or configure auth", addr)
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
