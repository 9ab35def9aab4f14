// Package clients takes official MCP clients through the conformance fixture: the TypeScript SDK
// in both major versions, the Go SDK, and the Inspector's command line, over HTTP and stdio, in
// the stateless revision and in session revisions. All of it is in the tests; start reading at
// TestWalk. walk.mjs is the way every TypeScript client takes.
//
// The tests need npm; a machine without it fails, so that nobody believes the clients were asked.
package clients
