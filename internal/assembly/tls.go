package assembly

import (
	"context"
	"crypto/tls"
	"net/http"
	"net/netip"
	"time"

	"github.com/go-json-experiment/json"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// Certificates are what a listener shows its clients. Implementations are safe for concurrent use;
// the library links none that asks an authority.
type Certificates interface {
	Config() *tls.Config            // for the listener; what changes is looked up with each handshake
	Run(ctx context.Context) error  // keeps them fresh until ctx ends
	Expiries() map[string]time.Time // when they end, by name
	Warnings() []string             // which end soon, for people
}

// expiryMetric publishes when certificates end, as seconds since 1970.
func (h *House) expiryMetric() error {
	if h.opts.TLS == nil {
		return nil
	}
	_, err := h.opts.Meter.Meter("newel.dev/newel").Float64ObservableGauge("newel.tls.certificate.expiry.timestamp",
		metric.WithUnit("s"), metric.WithDescription("When the certificate of a name ends, in seconds since 1970."),
		metric.WithFloat64Callback(func(_ context.Context, out metric.Float64Observer) error {
			for name, t := range h.opts.TLS.Expiries() {
				out.Observe(float64(t.Unix()), metric.WithAttributes(attribute.String("name", name)))
			}
			return nil
		}))
	return err
}

// answerReady says that the server is ready, and which certificates end soon: that is no reason to
// send it no requests.
func (h *House) answerReady(w http.ResponseWriter) {
	answer := struct {
		Status   string   `json:"status"`
		Warnings []string `json:"warnings,omitempty"`
	}{Status: "ready"}
	if h.opts.TLS != nil {
		answer.Warnings = h.opts.TLS.Warnings()
	}
	body, err := json.Marshal(answer)
	if err != nil {
		body = []byte(`{"status":"ready"}`) // text and lists of it can be encoded
	}
	status(w, http.StatusOK, string(body))
}

// behindProxy refuses peers that are neither the proxy that speaks TLS for this server nor on this
// machine: what they send would have been readable on the way.
func (h *House) behindProxy(next http.Handler) http.Handler {
	proxies := h.opts.Proxies
	if proxies == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !isProbe(r.URL.Path) && !isTrusted(r.RemoteAddr, proxies) {
			http.Error(w, "this server speaks with its proxy only; an operator can add an address to tls.trusted_proxies", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func isProbe(path string) bool { return path == "/health" || path == "/ready" || path == "/metrics" }

func isTrusted(peer string, proxies []netip.Prefix) bool {
	a, err := netip.ParseAddrPort(peer)
	if err != nil {
		return false
	}
	ip := a.Addr().Unmap().WithZone("")
	for _, p := range proxies {
		if p.Contains(ip) {
			return true
		}
	}
	return ip.IsLoopback()
}
