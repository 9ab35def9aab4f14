package slo

import (
	"strings"
	"testing"
	"time"
)

func TestCheck(t *testing.T) {
	good := Objective{Name: "orders", Tools: []string{"*_order"}, Success: 0.999, Latency: 500 * time.Millisecond, LatencySuccess: 0.95, Window: 30 * day}
	if err := good.Check(); err != nil {
		t.Fatal(err)
	}
	for want, spoil := range map[string]func(o *Objective){
		"is no name":          func(o *Objective) { o.Name = `x"} or vector(1)` },
		"success must be":     func(o *Objective) { o.Success = 1 },
		"nearest that is: 5s": func(o *Objective) { o.Latency = 6 * time.Second },
		"latency_success":     func(o *Objective) { o.LatencySuccess = 0 },
		"whole days":          func(o *Objective) { o.Window = 36 * time.Hour },
		"not a pattern":       func(o *Objective) { o.Tools = []string{"["} },
	} {
		o := good
		spoil(&o)
		if err := o.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}
