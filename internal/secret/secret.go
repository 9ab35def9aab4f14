// Package secret is a type for values that must never be printed.
package secret

import "log/slog"

// A String is a secret. It prints as "[redacted]" wherever it is formatted, logged or encoded;
// only Reveal gives it away. The zero value is no secret at all.
type String struct{ value string }

// New returns the secret value.
func New(value string) String { return String{value} }

const redacted = "[redacted]"

// Reveal returns the secret, for handing it to what needs it.
func (s String) Reveal() string { return s.value }

// IsZero reports whether there is no secret.
func (s String) IsZero() bool { return s.value == "" }

// String implements fmt.Stringer.
func (String) String() string { return redacted }

// GoString implements fmt.GoStringer.
func (String) GoString() string { return redacted }

// LogValue implements slog.LogValuer.
func (String) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText implements encoding.TextMarshaler.
func (String) MarshalText() ([]byte, error) { return []byte(redacted), nil }
