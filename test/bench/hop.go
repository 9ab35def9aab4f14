package main

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
)

const (
	manyUpstreams = 20
	toolsOfEach   = 50
)

// hop is one call through something in front of a server, which is the floor on the CPU of the
// load: what passes bytes on without looking, Newel with every guard, and a proxy of SDK parts.
func (b *bench) hop(ctx context.Context) (*table, error) {
	defer b.stopAll()
	// The floor says what Newel says of itself, so that a gateway and the SDK's client can list it.
	model, err := b.start(ctx, "newel")
	if err != nil {
		return nil, err
	}
	said := []request{discoverRequest(), listRequest(""), otherList("resources/list"), otherList("resources/templates/list"), otherList("prompts/list")}
	for i := range said {
		if _, err := model.answer(ctx, &said[i]); err != nil {
			return nil, err
		}
	}
	replay := filepath.Join(b.temp, "hop.json")
	if err := writeReplay(replay, said); err != nil {
		return nil, err
	}
	upstream, err := b.startOn(ctx, loadCPU, "floor", "-replay="+replay)
	if err != nil {
		return nil, err
	}
	t := &table{name: fmt.Sprintf("tools/call echo through a hop, %d connections", connections), floor: "reverseproxy"}
	var runners []*runner
	for _, name := range []string{"reverseproxy", "gateway", "sdkproxy"} {
		s, err := b.start(ctx, name, "-upstream=http://"+upstream.addr+"/mcp")
		if err != nil {
			return nil, err
		}
		r, err := newRunner(ctx, s, connections, []request{echoRequest()})
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		runners = append(runners, r)
	}
	return t, b.rounds(ctx, t, b.plan, runners)
}

// manyLists is tools/list of a gateway in front of many servers, one caller at a time.
func (b *bench) manyLists(ctx context.Context) (*table, error) {
	defer b.stopAll()
	upstream, err := b.startOn(ctx, loadCPU, "newel", fmt.Sprintf("-tools=%d", toolsOfEach-1))
	if err != nil {
		return nil, err
	}
	s, err := b.start(ctx, "gateway", "-upstream=http://"+upstream.addr+"/mcp", fmt.Sprintf("-times=%d", manyUpstreams))
	if err != nil {
		return nil, err
	}
	pages, tools, err := listPages(ctx, s)
	if err != nil {
		return nil, err
	}
	if tools != manyUpstreams*toolsOfEach {
		return nil, fmt.Errorf("the list has %d tools, want %d", tools, manyUpstreams*toolsOfEach)
	}
	r, err := newRunner(ctx, s, 1, pages)
	if err != nil {
		return nil, err
	}
	t := &table{name: fmt.Sprintf("tools/list of %d servers, %d tools, one connection", manyUpstreams, tools), floor: "gateway"}
	return t, b.rounds(ctx, t, b.plan, []*runner{r})
}

// otherList is a list that may be empty.
func otherList(method string) request {
	return request{method: method, check: func(json.RawMessage) error { return nil }}
}

func discoverRequest() request {
	return request{method: "server/discover", check: func(result json.RawMessage) error {
		var r struct{ SupportedVersions []string }
		if err := json.Unmarshal(result, &r); err != nil {
			return err
		}
		if len(r.SupportedVersions) == 0 {
			return fmt.Errorf("no versions: %.300s", result)
		}
		return nil
	}}
}
