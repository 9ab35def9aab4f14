package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"newel.dev/newel/internal/config"
	"newel.dev/newel/internal/guard/quota"
	"newel.dev/newel/internal/store/redis"
)

// limiter makes what holds calls to the quotas; nil means that nothing is counted. Positions of what
// is wrong come from f.
func limiter(f *config.File, o, before *opened, shared *redis.DB, t *telemetry) (*quota.Limiter, error) {
	c := &f.Config
	// What was counted stays counted when rules change.
	store, err := reuse(o, before, "counts", nil, func() (quota.Store, func(context.Context) error, error) {
		if shared == nil {
			return quota.NewMemory(), nil, nil
		}
		return shared, nil, nil
	})
	if err != nil || len(c.Quotas.Rules) == 0 {
		return nil, err
	}
	return reuse(o, before, "quotas", c.Quotas, func() (*quota.Limiter, func(context.Context) error, error) {
		l, err := newLimiter(f, store, t)
		return l, nil, err
	})
}

func newLimiter(f *config.File, store quota.Store, t *telemetry) (*quota.Limiter, error) {
	c := &f.Config
	log, meter := t.logger, t.meter.Meter("newel.dev/newel")
	fallbacks, err1 := meter.Int64Counter("newel.quota.fallbacks", metric.WithDescription("Times that quotas could not be counted for all nodes, so that this node granted its share."))
	alerts, err2 := meter.Int64Counter("newel.quota.alerts", metric.WithDescription("Budgets used up to their alert_at, by the quota."))
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	options := quota.Options{
		NotCritical: c.Quotas.NotCritical, Share: c.Quotas.Share, Store: store,
		Alert: func(ctx context.Context, a quota.Alert) {
			if a.Err != nil {
				fallbacks.Add(ctx, 1)
				log.LogAttrs(ctx, slog.LevelError, "quotas cannot be counted for all nodes; this node grants its share", slog.String("error", a.Err.Error()))
				return
			}
			alerts.Add(ctx, 1, metric.WithAttributes(attribute.String("newel.quota.rule", a.Rule)))
			log.LogAttrs(ctx, slog.LevelWarn, "a budget runs out", slog.String("quota", a.Rule), slog.String("of", a.Of),
				slog.String("what", a.What), slog.Int64("used", a.Used), slog.Int64("limit", a.Limit))
		},
	}
	for i := range c.Quotas.Rules {
		q := &c.Quotas.Rules[i]
		at := fmt.Sprintf("quotas.rules[%d]", i)
		r := quota.Rule{
			Name: q.Name, Per: q.Per, Tools: q.Tools, Tenants: q.Tenants, Burst: q.Burst, Concurrent: q.Concurrent, AlertAt: q.AlertAt, DegradeAt: q.DegradeAt,
			Budget: quota.Budget{Calls: q.Budget.Calls, Tokens: q.Budget.Tokens, Cost: q.Budget.Cost, Every: quota.Window(q.Budget.Every)},
		}
		if q.Rate != "" {
			var err error
			if r.Rate, err = quota.ParseRate(q.Rate); err != nil {
				return nil, fmt.Errorf("%s: %w", f.Position(at+".rate"), err)
			}
		}
		if err := r.Check(); err != nil {
			return nil, fmt.Errorf("%s: quota %q: %w", f.Position(at), q.Name, err)
		}
		options.Rules = append(options.Rules, r)
	}
	for _, one := range c.Quotas.Costs {
		options.Costs = append(options.Costs, quota.Cost(one))
	}
	l, err := quota.New(options)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Position("quotas"), err)
	}
	return l, nil
}
