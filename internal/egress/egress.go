// Package egress is the one way out: HTTP clients that reach only addresses they may.
//
// Start at [Client], or at [Transport] for those who read answers their own way. An address is
// checked when it is dialled, after names were resolved, so a name that changes its mind gains
// nothing (DNS rebinding). Redirects are not followed: each would be a new address that somebody
// else chose. It refuses private, loopback, link-local, multicast, reserved and metadata addresses,
// in every form that IPv6 can hide them in, unless the operator allows them. Proxies of the
// environment (HTTP_PROXY, HTTPS_PROXY, NO_PROXY) are used and may be anywhere; behind one, names
// are resolved by the proxy, which has to check what they resolve to.
package egress

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"code.dny.dev/ssrf"
	"golang.org/x/net/http/httpproxy"

	"newel.dev/newel/internal/faultpoint"
)

// Options configure a client. The zero value reaches public addresses only.
type Options struct {
	Allow    []netip.Prefix // private ranges that may be reached all the same
	Loopback bool           // allow 127.0.0.0/8 and ::1
	Timeout  time.Duration  // of a whole exchange; for a Transport of dialling and the handshake, each [10 s]
	TLS      *tls.Config    // what is shown to servers and expected of them; nil: the system's authorities
}

// denied are addresses of cloud platforms that look public: Azure's wire server, and the metadata
// services of Alibaba and Oracle clouds.
var denied = []netip.Prefix{
	netip.MustParsePrefix("168.63.129.16/32"),
	netip.MustParsePrefix("100.100.100.200/32"),
	netip.MustParsePrefix("192.0.0.192/32"),
}

// metadata are addresses that hand out credentials of the machine. A range that holds one of them
// does not open it: it has to be allowed by itself.
var metadata = []netip.Addr{
	netip.MustParseAddr("169.254.169.254"),
	netip.MustParseAddr("168.63.129.16"),
	netip.MustParseAddr("100.100.100.200"),
	netip.MustParseAddr("192.0.0.192"),
	netip.MustParseAddr("fd00:ec2::254"),
}

var loopback = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}

// Client returns an HTTP client for addresses that others chose. It is safe for concurrent use.
func Client(o Options) *http.Client {
	return &http.Client{
		Timeout:       cmp.Or(max(o.Timeout, 0), defaultTimeout),
		Transport:     Transport(o),
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

const (
	defaultTimeout = 10 * time.Second
	// pingAfter is how long nothing has to come on a connection of HTTP/2 before it is asked for a sign
	// of life: it is shared by all requests, and would be used on long after the other side is gone.
	pingAfter = 15 * time.Second
)

// Transport returns what a client is made of. It follows no redirects and unpacks nothing; the size
// of answers is for the caller to bound. It is safe for concurrent use.
func Transport(o Options) *http.Transport {
	o.Timeout = cmp.Or(max(o.Timeout, 0), defaultTimeout)
	out := &exit{
		guarded: &net.Dialer{Timeout: o.Timeout, KeepAlive: 30 * time.Second, Control: Control(o), Resolver: faultpoint.Resolver()},
		free:    &net.Dialer{Timeout: o.Timeout, KeepAlive: 30 * time.Second},
		proxy:   httpproxy.FromEnvironment().ProxyFunc(),
	}
	return &http.Transport{
		Proxy:                  out.proxyOf,
		DialContext:            out.dial,
		TLSClientConfig:        o.TLS.Clone(), // the transport writes to it
		TLSHandshakeTimeout:    o.Timeout,
		MaxIdleConnsPerHost:    4,
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		ForceAttemptHTTP2:      true,
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: o.Timeout},
		DisableCompression:     true, // what was compressed to nothing would be unpacked without bound
	}
}

// exit dials: proxies, which the operator named, freely, everything else with the check.
type exit struct {
	guarded, free *net.Dialer
	proxy         func(*url.URL) (*url.URL, error)
	proxies       sync.Map // host:port of proxies in use; as many as the environment names
}

// proxyOf returns the proxy for a request, if there is one. An address that is written out is
// checked here: behind a proxy nobody else may.
func (e *exit) proxyOf(r *http.Request) (*url.URL, error) {
	to, err := e.proxy(r.URL)
	if err != nil || to == nil {
		return nil, err
	}
	if ip, err := netip.ParseAddr(r.URL.Hostname()); err == nil {
		ip = ip.Unmap().WithZone("")
		network := "tcp4"
		if ip.Is6() {
			network = "tcp6"
		}
		if err := e.guarded.Control(network, netip.AddrPortFrom(ip, 443).String(), nil); err != nil {
			return nil, err
		}
	}
	ports := map[string]string{"http": "80", "https": "443", "socks5": "1080", "socks5h": "1080"}
	e.proxies.Store(net.JoinHostPort(to.Hostname(), cmp.Or(to.Port(), ports[to.Scheme])), true)
	return to, nil
}

func (e *exit) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if _, ok := e.proxies.Load(address); ok {
		return e.free.DialContext(ctx, network, address)
	}
	return e.guarded.DialContext(ctx, network, address)
}

// Control returns the check of a dialer: it is asked with the address that is about to be dialled.
func Control(o Options) func(network, address string, c syscall.RawConn) error {
	allow := o.Allow
	if o.Loopback {
		allow = slices.Concat(loopback, allow)
	}
	var v4, v6 []netip.Prefix
	for _, p := range allow {
		if p.Addr().Is4() {
			v4 = append(v4, p)
		} else {
			v6 = append(v6, p)
		}
	}
	safe := ssrf.New(ssrf.WithAnyPort(), ssrf.WithDeniedV4Prefixes(denied...), ssrf.WithAllowedV4Prefixes(v4...), ssrf.WithAllowedV6Prefixes(v6...)).Safe
	return func(network, address string, c syscall.RawConn) error {
		if err := safe(network, address, c); err != nil {
			return &Refused{Address: address, cause: err}
		}
		to, err := netip.ParseAddrPort(address)
		if err != nil {
			return &Refused{Address: address, cause: err}
		}
		ip := to.Addr().Unmap().WithZone("")
		if slices.Contains(metadata, ip) && !slices.Contains(allow, netip.PrefixFrom(ip, ip.BitLen())) {
			return &Refused{Address: address, cause: errors.New("it hands out credentials of this machine")}
		}
		return nil
	}
}

// Named returns the addresses that an operator names by writing host into an address of a server:
// loopback for localhost, and one that is written out itself if it is loopback or private. What
// another name resolves to was not written by the operator.
func Named(host string) []netip.Prefix {
	if host = strings.ToLower(strings.TrimSuffix(host, ".")); host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return loopback
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return nil
	}
	if ip = ip.Unmap().WithZone(""); ip.IsLoopback() || ip.IsPrivate() && !slices.Contains(metadata, ip) {
		return []netip.Prefix{netip.PrefixFrom(ip, ip.BitLen())}
	}
	return nil
}

// Refused is an address that may not be reached.
type Refused struct {
	Address string
	cause   error
}

// Error says which address it was, and what an operator can do.
func (e *Refused) Error() string {
	return fmt.Sprintf("the address %s may not be reached from here (%v); an operator can allow it in private_ranges", e.Address, e.cause)
}

// Unwrap returns the cause.
func (e *Refused) Unwrap() error { return e.cause }
