// Command newel serves databases and documents to MCP clients, and talks to any MCP server.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"newel.dev/newel/modules/standard"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// The first signal asks for a clean end; from then on a second one ends at once.
	context.AfterFunc(ctx, stop)
	code := run(ctx, os.Args[1:], environment{
		in: os.Stdin, out: os.Stdout, err: os.Stderr, getenv: os.LookupEnv, modules: standard.Modules(), program: os.Args,
	})
	os.Exit(code)
}
