package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"newel.dev/newel/test/engines"
)

// A disturbance is a fault that begins and ends, so that several can be there at once.
type disturbance struct {
	name       string
	engine     string // of the state, if it is about that
	begin, end func() error
}

// scene is what disturbances are about.
type scene struct {
	*lane
	r         *rand.Rand
	proxy     *proxy
	redis     *engines.RedisServer
	authority *authority
	sections  func(mark string) string
	background
}

// background runs something again and again while a disturbance is there.
type background struct {
	stop chan struct{}
	all  sync.WaitGroup
}

func (b *background) every(d time.Duration, f func()) {
	stop := b.stop
	b.all.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(d):
				f()
			}
		}
	})
}

// disturbances are all there are, in the order in which they end: a process that is started again
// finds what it needs.
func (s *scene) disturbances() []disturbance {
	stop := func(pid func() int) func() error { return func() error { return halt(pid()) } }
	goOn := func(pid func() int) func() error { return func() error { return syscall.Kill(pid(), syscall.SIGCONT) } }
	nothing := func() error { return nil }
	var hung time.Time
	victim := s.nodes[s.r.IntN(len(s.nodes))]
	power := s.r.IntN(2) == 0
	var down int64
	return []disturbance{
		{name: "the upstream hangs", begin: func() error {
			hung = time.Now()
			return halt(s.ledger.PID())
		}, end: func() error {
			err := syscall.Kill(s.ledger.PID(), syscall.SIGCONT)
			if took := time.Since(hung); took > settleTime*3/4 {
				return errors.Join(err, fmt.Errorf("the upstream hung for %v, and it was said to hold a call for at most %v: this says nothing", took, settleTime))
			}
			return err
		}},
		{name: "connections break", begin: func() error {
			r := rand.New(rand.NewPCG(s.r.Uint64(), 19))
			s.every(25*time.Millisecond, func() {
				what := []string{swallow, reset, halfClose}[r.IntN(3)]
				up := what != halfClose && r.IntN(2) == 0 // of half a request the ledger says that it is bad, and is right
				s.proxy.plan(what, up, r.IntN(2000))
			})
			return nil
		}, end: func() error { s.proxy.plan("", false, 0); s.proxy.cut(); return nil }},
		{name: "the upstream is away", begin: func() error { s.proxy.refuse(true); return nil }, end: func() error { s.proxy.refuse(false); return nil }},
		{name: "Redis is away", begin: func() error { s.redis.Stop(); return nil }, end: func() error { s.redis.Restart(s.host); return nil }},
		{name: "the identity provider hangs", begin: stop(s.authority.PID), end: goOn(s.authority.PID)},
		{name: "the database ends", engine: "postgres", begin: func() error {
			s.server.Stop()
			down = time.Now().UnixNano()
			return nil
		}, end: func() error {
			s.journal.add(Event{Kind: outage, Time: down, Until: time.Now().UnixNano()})
			s.server.Restart(s.host)
			return nil
		}},
		{name: "configurations change", begin: func() error {
			turn := 0
			s.every(60*time.Millisecond, func() {
				turn++
				text := s.sections(fmt.Sprint(turn))
				if turn%3 == 0 {
					text += "polcy: {}\n"
				}
				if s.rewrite(victim, text) == nil {
					_, _ = victim.reload(time.Second) // it may be gone, or stopped
				}
			})
			return nil
		}, end: func() error { return s.rewrite(victim, s.sections("0")) }},
		{name: "callers go away", begin: func() error {
			r := rand.New(rand.NewPCG(s.r.Uint64(), 10))
			s.every(15*time.Millisecond, func() {
				o := operation{Tool: "find", Token: s.token, Attempts: 1}
				_, _, _ = s.exchange(victim.addr, o.message(victim.addr, ""), way{send: 1 + r.IntN(700), interrupt: func() {}})
			})
			return nil
		}, end: nothing},
		{name: "the process is stopped", begin: stop(victim.PID), end: goOn(victim.PID)},
		{name: "the process is killed", begin: func() error { victim.Kill(); return nil }, end: func() error {
			return s.restart(victim, power)
		}},
		{name: "the disk is full", engine: "sqlite", begin: func() error { return victim.arm("disk full") }, end: func() error { victim.disarm(); return nil }},
	}
}

// settleTime is how long a ledger that hangs may hold what was sent to it: longer than it hangs.
const settleTime = 8 * time.Second

// everythingAtOnce has two to four faults at once, chosen by the seed, while a crowd calls.
func everythingAtOnce(l *lane) error {
	s := &scene{lane: l, r: rand.New(rand.NewPCG(l.options.seed, hash("E19 "+l.engine))), redis: engines.Redis(l.host)}
	var err error
	if s.proxy, err = newProxy("127.0.0.1:0", l.ledgers); err != nil {
		return err
	}
	defer s.proxy.close()
	if s.authority, err = l.issuer(); err != nil {
		return err
	}
	k, err := newKey("k")
	if err != nil {
		return err
	}
	if l.token, err = s.authority.sign(k, tokenLife); err != nil {
		return err
	}
	if err := s.authority.publish(k); err != nil {
		return err
	}
	l.settles = fmt.Sprintf(", settle: %s", settleTime)
	l.longest = "3s" // an outcome that a full disk does not take is held for that and ten seconds
	s.sections = func(mark string) string {
		return s.authority.auth() + fmt.Sprintf(`redis: {url: "${env:NEWEL_FAULTS_REDIS}"}
quotas:
  rules:
    - {name: all, rate: 1000/s, burst: %s1000}
policy:
  rules:
    - {name: most %s, then: allow, tools: [plain, resend, lookup, find]}
backends:
`, mark, mark) + backend("ledger", s.proxy.addr(), ", call_timeout: 700ms, refresh_interval: 1s")
	}
	for _, n := range l.nodes {
		n.env = append(n.env, "NEWEL_FAULTS_REDIS="+s.redis.URL)
		if err := errors.Join(l.rewrite(n, s.sections("0")), l.restart(n, false)); err != nil {
			return err
		}
	}
	var told []string
	rounds := 6
	for range rounds {
		names, err := s.round()
		if err != nil {
			return fmt.Errorf("with seed %d, %s: %w", l.options.seed, strings.Join(names, " + "), err)
		}
		told = append(told, strings.Join(names, " + "))
	}
	for _, o := range l.pending {
		o.Broken = time.Now()
	}
	l.settleAll(l.nodes[len(l.nodes)-1].addr, true)
	l.measure("E19", "seed %d: %s", l.options.seed, strings.Join(told, "; "))
	return nil
}

// round is one choice of faults: they begin one after the other, are there together, and end.
func (s *scene) round() (names []string, err error) {
	all := s.disturbances()
	n := 2 + s.r.IntN(3)
	var chosen []int
	for _, i := range s.r.Perm(len(all)) {
		d := &all[i]
		apart := slices.ContainsFunc(chosen, func(j int) bool { return exclude(d.name, all[j].name) })
		if d.engine != "" && d.engine != s.engine || apart || len(chosen) == n {
			continue
		}
		chosen = append(chosen, i)
		names = append(names, d.name)
	}
	held := time.Duration(800+s.r.IntN(600)) * time.Millisecond
	var gaps []time.Duration
	for range chosen {
		gaps = append(gaps, time.Duration(s.r.IntN(200))*time.Millisecond)
	}
	s.stop = make(chan struct{})
	quiet := make(chan struct{})
	var turn atomic.Int64
	wait := s.crowd(6, "E19", func() string { return s.nodes[int(turn.Add(1))%len(s.nodes)].addr }, quiet)
	begun := 0
	for i, c := range chosen {
		<-time.After(gaps[i])
		if err = all[c].begin(); err != nil {
			break
		}
		begun++
	}
	if err == nil {
		<-time.After(held)
	}
	close(s.stop)
	s.all.Wait()
	over := slices.Sorted(slices.Values(chosen[:begun]))
	for _, c := range over {
		err = errors.Join(err, all[c].end())
	}
	s.incident("E19")
	<-time.After(300 * time.Millisecond)
	close(quiet)
	wait()
	return names, err
}

// exclude reports whether two faults cannot be there at once: a process that is stopped cannot be
// told anything, and one that is killed has no disk.
func exclude(a, b string) bool {
	process := []string{"the process is stopped", "the process is killed", "the disk is full"}
	return slices.Contains(process, a) && slices.Contains(process, b)
}
