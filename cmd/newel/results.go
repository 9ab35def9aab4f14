package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"log/slog"
	"reflect"
	"slices"

	"newel.dev/newel/internal/config"
	"newel.dev/newel/internal/guard/cache"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/redis"
)

// resultCache makes what keeps results; nil means that every call is made. It is one of its own for each
// configuration: another may answer otherwise.
func resultCache(f *config.File, o, before *opened, shared *redis.DB, key secret.Key, log *slog.Logger) (*cache.Cache, error) {
	c := &f.Config.Cache
	counts, err := reuse(o, before, "cache counts", nil, func() (*cache.Stats, func(context.Context) error, error) { return &cache.Stats{}, nil, nil })
	if err != nil || len(c.Rules) == 0 {
		return nil, err
	}
	options := cache.Options{MaxBytes: int(c.MaxBytes), MaxEntry: int(c.MaxEntry), Stats: counts}
	for i, r := range c.Rules {
		one := cache.Rule(r)
		if err := one.Check(); err != nil {
			return nil, fmt.Errorf("%s: %w", f.Position(fmt.Sprintf("cache.rules[%d]", i)), err)
		}
		options.Rules = append(options.Rules, one)
	}
	if c.Shared {
		at := f.Position("cache.shared")
		switch {
		case shared == nil:
			return nil, fmt.Errorf("%s: nodes share results in Redis; write redis.url", at)
		case f.Config.State.Engine == "memory":
			return nil, fmt.Errorf("%s: nodes that share results need a key that they share; write a state.engine with a state.key_file", at)
		}
		scope := answering(&f.Config)
		options.Shared, err = reuse(o, before, "shared results", scope, func() (*cache.Shared, func(context.Context) error, error) { // which knows what other nodes were not told of
			s, err := cache.NewShared(shared, key, scope, log)
			return s, nil, err
		})
		if err != nil {
			return nil, fmt.Errorf("%s: %w", at, err)
		}
	}
	results, err := cache.New(options)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Position("cache"), err)
	}
	return results, nil
}

// answering stands for the part of a configuration that results depend on. Nodes differ in the rest,
// such as their addresses.
func answering(c *config.Config) string {
	h := sha256.New()
	for _, b := range c.Backends {
		stamp(h, reflect.ValueOf([]string{b.Type, b.Name}))
		stamp(h, reflect.ValueOf(b.Settings))
	}
	stamp(h, reflect.ValueOf(c.Servers))
	stamp(h, reflect.ValueOf(c.Cache.Rules))
	stamp(h, reflect.ValueOf(c.ToolSearch))
	return hex.EncodeToString(h.Sum(nil))
}

// stamp adds a value of a configuration to a digest, secrets included.
func stamp(h hash.Hash, v reflect.Value) {
	if !v.IsValid() {
		fmt.Fprint(h, "none;")
		return
	}
	if s, ok := v.Interface().(secret.String); ok {
		fmt.Fprintf(h, "%q;", s.Reveal())
		return
	}
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface:
		stamp(h, v.Elem())
	case reflect.Struct:
		fmt.Fprintf(h, "%v{", v.Type())
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				stamp(h, v.Field(i))
			}
		}
		fmt.Fprint(h, "}")
	case reflect.Slice, reflect.Array:
		fmt.Fprintf(h, "%d[", v.Len())
		for i := range v.Len() {
			stamp(h, v.Index(i))
		}
		fmt.Fprint(h, "]")
	case reflect.Map:
		fmt.Fprintf(h, "%d(", v.Len())
		keys := v.MapKeys()
		slices.SortFunc(keys, func(a, b reflect.Value) int { return cmp.Compare(a.String(), b.String()) })
		for _, k := range keys {
			stamp(h, k)
			stamp(h, v.MapIndex(k))
		}
		fmt.Fprint(h, ")")
	case reflect.Func: // what is made of the settings
	default:
		fmt.Fprintf(h, "%#v;", v.Interface())
	}
}
