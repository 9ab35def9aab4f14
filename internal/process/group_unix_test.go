//go:build unix && !linux

package process

func systemRole(name, _ string) { panic("no role " + name) }
