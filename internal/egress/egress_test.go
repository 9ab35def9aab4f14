package egress

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
)

// Addresses that nobody outside may make us reach, in all the forms they come in.
var hostile = []string{
	"127.0.0.1:80", "127.1.2.3:80", "0.0.0.0:80", "0.1.2.3:80", "10.0.0.1:80", "172.16.0.1:80", "172.31.255.255:80", "192.168.1.1:80",
	"169.254.169.254:80", "169.254.0.1:80", "100.64.0.1:80", "100.100.100.200:80", "168.63.129.16:80", "192.0.0.1:80", "192.0.0.192:80", "192.0.2.1:80",
	"198.18.0.1:80", "198.51.100.1:80", "203.0.113.1:80", "224.0.0.1:80", "239.255.255.250:80", "240.0.0.1:80", "255.255.255.255:80",
	"[::1]:80", "[::]:80", "[::ffff:127.0.0.1]:80", "[::ffff:169.254.169.254]:80", "[::127.0.0.1]:80", "[64:ff9b::7f00:1]:80", "[64:ff9b::a9fe:a9fe]:80",
	"[64:ff9b:1::a00:1]:80", "[2002:7f00:1::]:80", "[2002:a9fe:a9fe::]:80", "[2001:0:a00:1::]:80", "[fc00::1]:80", "[fd00:ec2::254]:80", "[fe80::1]:80",
	"[fec0::1]:80", "[ff02::1]:80", "[100::1]:80", "[2001:db8::1]:80", "[5f00::1]:80",
}

func TestHostileAddresses(t *testing.T) {
	check := Control(Options{})
	for _, a := range hostile {
		network := "tcp4"
		if a[0] == '[' {
			network = "tcp6"
		}
		var refused *Refused
		if err := check(network, a, nil); !errors.As(err, &refused) {
			t.Errorf("%s may be reached: %v", a, err)
		}
	}
	for _, a := range []string{"1.1.1.1:443", "93.184.216.34:80", "8.8.8.8:8443"} {
		if err := check("tcp4", a, nil); err != nil {
			t.Errorf("%s: %v", a, err)
		}
	}
	if err := check("tcp6", "[2606:4700:4700::1111]:443", nil); err != nil {
		t.Error(err)
	}
}

func TestAllowed(t *testing.T) {
	check := Control(Options{Allow: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("192.168.7.0/24"), netip.MustParsePrefix("fd00:1::/32")}})
	if err := errors.Join(check("tcp4", "192.168.7.1:1", nil), check("tcp6", "[fd00:1::1]:1", nil)); err != nil {
		t.Error(err)
	}
	if err := check("tcp4", "10.1.2.3:443", nil); err != nil {
		t.Error(err)
	}
	if err := check("tcp4", "10.2.2.3:443", nil); err == nil {
		t.Error("a range that was not allowed")
	}
	if err := check("tcp4", "169.254.169.254:80", nil); err == nil {
		t.Error("metadata")
	}
}

// A client does not reach loopback, not by a redirect either, unless it may.
func TestClient(t *testing.T) {
	inner := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("it was reached") }))
	t.Cleanup(inner.Close)
	s := httptest.NewServer(http.RedirectHandler(inner.URL, http.StatusFound))
	t.Cleanup(s.Close)
	var refused *Refused
	if _, err := Client(Options{}).Get(s.URL); !errors.As(err, &refused) {
		t.Errorf("got %v", err)
	}
	resp, err := Client(Options{Loopback: true}).Get(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusFound {
		t.Errorf("status %d: a redirect was followed", resp.StatusCode)
	}
}

// A range does not open the addresses of metadata services in it; each by itself does.
func TestMetadata(t *testing.T) {
	for address, within := range map[string]string{"169.254.169.254": "169.254.0.0/16", "100.100.100.200": "100.64.0.0/10", "168.63.129.16": "168.63.0.0/16", "fd00:ec2::254": "fd00::/8"} {
		ip := netip.MustParseAddr(address)
		network := "tcp4"
		if ip.Is6() {
			network = "tcp6"
		}
		to := netip.AddrPortFrom(ip, 80).String()
		var refused *Refused
		if err := Control(Options{Allow: []netip.Prefix{netip.MustParsePrefix(within)}})(network, to, nil); !errors.As(err, &refused) {
			t.Errorf("%s was opened by %s: %v", address, within, err)
		}
		if err := Control(Options{Allow: []netip.Prefix{netip.PrefixFrom(ip, ip.BitLen())}})(network, to, nil); err != nil {
			t.Errorf("%s was allowed by itself: %v", address, err)
		}
	}
}

func TestNamed(t *testing.T) {
	for host, want := range map[string]string{
		"localhost": "127.0.0.0/8 ::1/128", "LocalHost.": "127.0.0.0/8 ::1/128", "127.0.0.2": "127.0.0.2/32", "::1": "::1/128", "10.1.2.3": "10.1.2.3/32", "fd00::7": "fd00::7/128",
		"example.com": "", "8.8.8.8": "", "169.254.169.254": "", "fd00:ec2::254": "", "100.100.100.200": "", "0.0.0.0": "",
	} {
		got := ""
		for _, p := range Named(host) {
			got += " " + p.String()
		}
		if strings.TrimSpace(got) != want {
			t.Errorf("%s: got%s, want %s", host, got, want)
		}
	}
}

// A proxy of the environment may be at a private address; addresses that are written out are
// checked in front of it all the same.
func TestProxy(t *testing.T) {
	var asked []string
	proxy := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { asked = append(asked, r.URL.String()) }))
	t.Cleanup(proxy.Close)
	t.Setenv("HTTP_PROXY", proxy.URL)
	t.Setenv("NO_PROXY", "")
	resp, err := Client(Options{}).Get("http://mcp.example.com/x")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	for _, hostile := range []string{"http://169.254.169.254/latest", "http://10.0.0.1/", "http://[::ffff:10.0.0.1]/", "http://[64:ff9b::a9fe:a9fe]/"} {
		var refused *Refused
		if _, err := Client(Options{}).Get(hostile); !errors.As(err, &refused) {
			t.Errorf("%s: got %v", hostile, err)
		}
	}
	if len(asked) != 1 || asked[0] != "http://mcp.example.com/x" {
		t.Errorf("the proxy was asked for %q", asked)
	}
}
