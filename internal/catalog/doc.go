// Package catalog holds what a server publishes: immutable snapshots, swapped whole.
//
// Start reading at [Build], which turns the capabilities of all backends into a [Snapshot] or
// an error that names every problem and where it was declared. A [Catalog] is the atomic
// pointer to the current snapshot; requests read it without locks. A [Hub] tells subscribers
// that lists or resources changed.
//
// Definitions are encoded once, at registration, so that a list costs its bytes and nothing
// else. The package does not decide who may see what, and it runs nothing.
package catalog
