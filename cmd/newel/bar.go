package main

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// bar shows how far long work has come: a bar on a terminal, nothing elsewhere.
type bar struct {
	w     io.Writer
	on    bool
	mu    sync.Mutex
	drawn bool
	last  time.Time
}

func newBar(w io.Writer) *bar { return &bar{w: w, on: isTerminal(w)} }

const (
	barWidth = 30
	barEvery = 50 * time.Millisecond
)

// report draws the bar; total 0 means unknown.
func (b *bar) report(label string, done, total int) { b.draw(label, float64(done), float64(total)) }

func (b *bar) draw(label string, done, total float64) {
	if !b.on {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if time.Since(b.last) < barEvery && done < total {
		return
	}
	b.last, b.drawn = time.Now(), true
	if total <= 0 {
		fmt.Fprintf(b.w, "\r\x1b[K%s %v", label, done)
		return
	}
	full := int(barWidth * min(done/total, 1))
	fmt.Fprintf(b.w, "\r\x1b[K[%s%s] %3.0f%% %s", strings.Repeat("█", full), strings.Repeat("·", barWidth-full), 100*min(done/total, 1), label)
}

// done removes the bar.
func (b *bar) done() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.drawn {
		fmt.Fprint(b.w, "\r\x1b[K")
		b.drawn = false
	}
}
