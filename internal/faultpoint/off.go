//go:build !faults || !linux

package faultpoint

import (
	"net"
	"time"
)

// On says that the program is built for these tests.
const On = false

// Reached does nothing.
func Reached(Point) {}

// Resolver returns nil, which is the system's.
func Resolver() *net.Resolver { return nil }

// Now returns the time.
func Now() time.Time { return time.Now() }
