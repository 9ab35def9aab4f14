package live

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// A configuration counts for the first call after the order to load it was answered, and for every call
// that begins after one was answered by it. The times are printed: machines differ.
func TestChangeIsVisibleAtOnce(t *testing.T) {
	s := start(t, version(0))
	type seen struct {
		began, ended time.Time
		version      int
	}
	which := func(client *http.Client) (one seen) {
		one.began = time.Now()
		text, refused, err := call(client, s.url, "which")
		one.ended = time.Now()
		says := strings.ReplaceAll(text, `"version":`, "version ")
		if refused != "" {
			says = refused
		}
		if i := strings.LastIndex(says, "version "); err != nil || i < 0 {
			t.Errorf("%q %q %v", text, refused, err)
		} else if _, err := fmt.Sscanf(says[i:], "version %d", &one.version); err != nil {
			t.Errorf("%q: %v", says, err)
		}
		return one
	}
	var worstOrder, worstSwap time.Duration
	for n := 1; n <= 20; n++ {
		s.configure(version(n))
		done := make(chan struct{})
		var polls []seen
		var polling sync.WaitGroup
		polling.Go(func() { // on a connection that is there already
			for {
				polls = append(polls, which(http.DefaultClient))
				select {
				case <-done:
					polls = append(polls, which(http.DefaultClient)) // one that began after the order was answered
					return
				default:
				}
			}
		})
		ordered := time.Now()
		out, all := s.reload()
		if out != "applied" && out != "unchanged" { // the file may have been seen first
			t.Fatal(all)
		}
		if next := which(&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}); next.version != n {
			t.Fatalf("after version %d was loaded a call is answered by %d", n, next.version)
		}
		close(done)
		polling.Wait()
		var first, lastOld time.Time
		for _, p := range polls {
			switch {
			case p.version == n && first.IsZero():
				first = p.ended
			case p.version == n-1 && !first.IsZero() && p.began.After(first):
				t.Fatalf("version %d answers a call that began after one was answered by %d", n-1, n)
			case p.version == n-1:
				lastOld = p.began
			}
		}
		worstOrder = max(worstOrder, first.Sub(ordered))
		if !lastOld.IsZero() {
			worstSwap = max(worstSwap, first.Sub(lastOld))
		}
	}
	t.Logf("of 20: at most %v from the order to the first answer, of which at most %v between the last call of the old one and that answer", worstOrder, worstSwap)
}
