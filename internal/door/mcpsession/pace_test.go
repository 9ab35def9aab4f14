package mcpsession

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"newel.dev/newel/internal/catalog"
)

// Announcements to thousands of sessions make room for calls; those to few, and answers, wait for nothing.
func TestAnnouncementsMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, err := New(Options{Name: "test", Version: "1", Path: never, Hub: catalog.NewHub()})
		if err != nil {
			t.Fatal(err)
		}
		sent := 0
		send := d.onlyNews(func(context.Context, string, mcp.Request) (mcp.Result, error) { sent++; return nil, nil })
		for _, tt := range []struct {
			method string
			count  int
			want   time.Duration
		}{
			{"notifications/tools/list_changed", toldAtOnce - 1, 0},
			{"notifications/tools/list_changed", 10 * toldAtOnce, 10 * toldPause},
			{"notifications/resources/updated", 10 * toldAtOnce, 10 * toldPause},
			{"notifications/progress", 10 * toldAtOnce, 0},
		} {
			begun, before := time.Now(), sent
			for range tt.count {
				if _, err := send(t.Context(), tt.method, &mcp.ServerRequest[*mcp.ToolListChangedParams]{Session: &mcp.ServerSession{}}); err != nil {
					t.Fatal(err)
				}
			}
			if took := time.Since(begun); took != tt.want || sent-before != tt.count {
				t.Errorf("%d of %s took %v, not %v; %d were sent", tt.count, tt.method, took, tt.want, sent-before)
			}
		}
	})
}
