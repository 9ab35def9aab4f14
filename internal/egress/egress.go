// Package egress is the one way out: HTTP clients that reach only addresses they may.
//
// Start at [Client]. An address is checked when it is dialled, after names were resolved, so a name
// that changes its mind gains nothing (DNS rebinding). Redirects are not followed: each would be a
// new address that somebody else chose. It refuses private, loopback, link-local, multicast,
// reserved and metadata addresses, in every form that IPv6 can hide them in, unless the operator
// allows them. Behind an HTTP proxy it sees the address of the proxy alone: the proxy must check.
package egress

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"syscall"
	"time"

	"code.dny.dev/ssrf"
)

// Options configure a client. The zero value reaches public addresses only.
type Options struct {
	Allow    []netip.Prefix // private ranges that may be reached all the same
	Loopback bool           // allow 127.0.0.0/8 and ::1
	Timeout  time.Duration  // of a whole exchange [10 s]
}

// denied are addresses of cloud platforms that look public: Azure's wire server, and the metadata
// services of Alibaba and Oracle clouds.
var denied = []netip.Prefix{
	netip.MustParsePrefix("168.63.129.16/32"),
	netip.MustParsePrefix("100.100.100.200/32"),
	netip.MustParsePrefix("192.0.0.192/32"),
}

// Client returns an HTTP client for addresses that others chose. It is safe for concurrent use.
func Client(o Options) *http.Client {
	if o.Timeout <= 0 {
		o.Timeout = 10 * time.Second
	}
	dialer := &net.Dialer{Timeout: o.Timeout, Control: Control(o)}
	return &http.Client{
		Timeout: o.Timeout,
		Transport: &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			DialContext:            dialer.DialContext,
			TLSHandshakeTimeout:    o.Timeout,
			MaxIdleConnsPerHost:    4,
			IdleConnTimeout:        30 * time.Second,
			MaxResponseHeaderBytes: 64 << 10,
			ForceAttemptHTTP2:      true,
			DisableCompression:     true, // what was compressed to nothing would be unpacked without bound
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// Control returns the check of a dialer: it is asked with the address that is about to be dialled.
func Control(o Options) func(network, address string, c syscall.RawConn) error {
	allow := o.Allow
	if o.Loopback {
		allow = append([]netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}, allow...)
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
		return nil
	}
}

// Refused is an address that may not be reached.
type Refused struct {
	Address string
	cause   error
}

// Error says which address it was, and what an operator can do.
func (e *Refused) Error() string {
	return fmt.Sprintf("the address %s may not be reached from here (%v); an operator can allow private ranges", e.Address, e.cause)
}

// Unwrap returns the cause.
func (e *Refused) Unwrap() error { return e.cause }
