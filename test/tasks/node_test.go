// Package tasks kills nodes that run tasks: real processes, one PostgreSQL.
//
// Start reading at [TestKilledNode]. The test binary is the node too, if its environment says so. What
// tools did is in a ledger, a file that they write before they go on.
package tasks

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/postgres"
)

// Names of the environment of a node.
const (
	envDSN     = "TASKS_NODE_DSN"
	envDir     = "TASKS_NODE_DIR"
	envWorkers = "TASKS_NODE_WORKERS"
)

func TestMain(m *testing.M) {
	if dsn := os.Getenv(envDSN); dsn != "" {
		if err := node(dsn, os.Getenv(envDir)); err != nil {
			fmt.Fprintln(os.Stderr, "node:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// node serves until it is told to stop, or killed.
func node(dsn, dir string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	key, err := secret.OpenKey(filepath.Join(dir, "key"))
	if err != nil {
		return err
	}
	db, err := postgres.Open(ctx, secret.New(dsn), key)
	if err != nil {
		return err
	}
	workers := 2
	if _, err := fmt.Sscan(os.Getenv(envWorkers), &workers); err != nil {
		return err
	}
	h, err := assembly.Build(ctx, &assembly.Options{Backends: []call.Backend{ledger(dir)}, State: db, Key: key, Tasks: assembly.Tasks{Workers: workers}})
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	return errors.Join(h.Serve(ctx, l), db.Close())
}

// ledger is a backend whose tools write into a file of the folder, synced, what they do.
type ledger string

// Name implements call.Backend.
func (ledger) Name() string { return "ledger" }

// Capabilities implements call.Backend.
func (l ledger) Capabilities(context.Context) ([]*call.Capability, error) {
	tool := func(name string, e call.Effect, r call.Recovery) *call.Capability {
		return &call.Capability{Kind: call.Tool, Name: name, Description: name, Input: jsontext.Value(`{"type":"object"}`), Effect: e, Recovery: r, Tasks: call.TaskRequired, Run: func(ctx context.Context, c *call.Call) (*call.Result, error) {
			if err := l.write(name + " " + c.TaskID); err != nil {
				return nil, err
			}
			return call.Text("done"), l.wait(ctx)
		}}
	}
	return []*call.Capability{tool("pay", call.Write, call.RecoverNone), tool("set", call.Write, call.RecoverSafe), tool("read", call.Read, call.RecoverNone)}, nil
}

func (l ledger) write(line string) error {
	f, err := os.OpenFile(filepath.Join(string(l), "ledger"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(line + "\n")
	return errors.Join(err, f.Sync(), f.Close())
}

// wait ends when the file go is there.
func (l ledger) wait(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := os.Stat(filepath.Join(string(l), "go")); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}
