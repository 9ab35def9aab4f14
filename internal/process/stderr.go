package process

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"time"
	"unicode/utf8"
)

const (
	stderrPiece = 4 << 10 // bytes of one log record; longer lines take several
	keptLines   = 5       // for ExitError
	keptBytes   = 1 << 10 // of each
)

// A teller passes on to the log what a child writes to standard error.
type teller struct {
	log       *slog.Logger
	perSecond int // bytes

	window         time.Time // when the current second began
	left           int       // bytes that may still pass in it
	lines, dropped int       // what did not pass since the last report
	kept           [][]byte  // the last lines, passed or not
}

// tell reads until the end. It never stops reading: a child must not hang because it complains.
// What does not pass is counted, and reported with the next line that comes, or at the end.
func (t *teller) tell(r io.Reader) {
	in := bufio.NewReaderSize(r, stderrPiece)
	for {
		line, err := in.ReadSlice('\n')
		if line = bytes.TrimRight(line, "\r\n"); len(line) > 0 {
			t.line(line)
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			t.report()
			return
		}
	}
}

func (t *teller) line(line []byte) {
	t.keep(line)
	if now := time.Now(); now.Sub(t.window) >= time.Second {
		t.report()
		t.window, t.left = now, t.perSecond
	}
	if len(line) > t.left {
		t.left = 0 // so that what passes is a whole stretch
		t.lines++
		t.dropped += len(line)
		return
	}
	t.left -= len(line)
	t.log.LogAttrs(context.Background(), slog.LevelInfo, "stderr", slog.String("line", escape(line)))
}

// report logs what was dropped.
func (t *teller) report() {
	if t.lines > 0 {
		t.log.LogAttrs(context.Background(), slog.LevelWarn, "the process writes too much to standard error; some was dropped",
			slog.Int("lines", t.lines), slog.Int("bytes", t.dropped))
		t.lines, t.dropped = 0, 0
	}
}

// keep remembers a line, in the memory of the one that it replaces.
func (t *teller) keep(line []byte) {
	var room []byte
	if len(t.kept) == keptLines {
		room = t.kept[0][:0]
		t.kept = append(t.kept[:0], t.kept[1:]...)
	}
	t.kept = append(t.kept, append(room, line[:min(len(line), keptBytes)]...))
}

// last returns the last lines, escaped.
func (t *teller) last() []string {
	out := make([]string, len(t.kept))
	for i, line := range t.kept {
		out[i] = escape(line)
	}
	return out
}

// escape makes text safe for a terminal: what is not graphic is written as Go would.
func escape(text []byte) string {
	out := make([]byte, 0, len(text))
	for len(text) > 0 {
		r, n := utf8.DecodeRune(text)
		switch {
		case r == utf8.RuneError && n == 1:
			out = fmt.Appendf(out, `\x%02x`, text[0])
		case strconv.IsGraphic(r):
			out = append(out, text[:n]...)
		default:
			q := strconv.QuoteRuneToGraphic(r)
			out = append(out, q[1:len(q)-1]...)
		}
		text = text[n:]
	}
	return string(out)
}
