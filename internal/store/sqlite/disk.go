//go:build !faults

package sqlite

import "net/url"

// throughFaults is for tests of what a disk can do: see disk_faults.go.
func throughFaults(url.Values) {}
