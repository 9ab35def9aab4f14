package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
)

// access is the main case with access tokens and a policy of fifty rules.
func (b *bench) access(ctx context.Context) (*table, error) {
	defer b.stopAll()
	s, err := b.start(ctx, "secured")
	if err != nil {
		return nil, err
	}
	token, err := get(ctx, "http://"+s.addr+"/token")
	if err != nil {
		return nil, err
	}
	echo := echoRequest()
	echo.bearer = string(token)
	floor, err := b.start(ctx, "floor")
	if err != nil {
		return nil, err
	}
	t := &table{name: fmt.Sprintf("tools/call echo with an access token and 50 rules, %d connections", connections), floor: "floor"}
	var runners []*runner
	for _, s := range []*server{floor, s} {
		r, err := newRunner(ctx, s, connections, []request{echo})
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
		runners = append(runners, r)
	}
	return t, b.rounds(ctx, t, b.plan, runners)
}

func get(ctx context.Context, url string) ([]byte, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", url, resp.Status)
	}
	return io.ReadAll(resp.Body)
}

// guardCosts returns a table of what each guard costs, measured inside one process.
func (b *bench) guardCosts(ctx context.Context) (string, error) {
	b.bar.say("the cost of each guard")
	out, err := exec.CommandContext(ctx, filepath.Join(b.temp, "secured"), "-costs").Output()
	if err != nil {
		return "", fmt.Errorf("the cost of each guard: %w", err)
	}
	return string(out), nil
}
