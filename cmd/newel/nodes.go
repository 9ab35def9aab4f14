package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"newel.dev/newel/internal/cluster"
	"newel.dev/newel/internal/config"
	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/redis"
)

// sharedStore opens what nodes share; nil: nothing is.
func sharedStore(f *config.File) (*redis.DB, func(context.Context) error, error) {
	if f.Config.Redis.URL.IsZero() {
		return nil, nil, nil
	}
	db, err := redis.Open(f.Config.Redis.URL)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", f.Position("redis.url"), err)
	}
	return db, func(context.Context) error { return db.Close() }, nil
}

// nodes makes what lets nodes share sessions; nil: they do not.
func nodes(f *config.File, shared *redis.DB, key secret.Key, log *slog.Logger) (*cluster.Cluster, error) {
	c := &f.Config
	switch {
	case !c.Redis.Sessions:
		return nil, nil
	case shared == nil:
		return nil, fmt.Errorf("%s: nodes share sessions in Redis; write redis.url", f.Position("redis.sessions"))
	case c.State.Engine == "memory":
		return nil, fmt.Errorf("%s: nodes that share sessions need a key that they share; write a state.engine with a state.key_file", f.Position("redis.sessions"))
	}
	derived, err := key.Derive("newel nodes")
	if err != nil {
		return nil, err
	}
	private, err := ranges(f, c.Redis.Private, "redis.private_ranges")
	if err != nil {
		return nil, err
	}
	all, err := cluster.New(cluster.Options{
		Address: c.Redis.Advertise, Key: derived, Store: shared, Logger: log,
		Transport: egress.Transport(egress.Options{Allow: private, Loopback: true, Timeout: 5 * time.Second}),
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Position("redis.advertise"), err)
	}
	return all, nil
}
