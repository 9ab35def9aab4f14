# make help lists the targets.
.DEFAULT_GOAL := help
SHELL := bash -o pipefail

# All is built in one way, that of releases, so that what one target has compiled is there for the next.
export CGO_ENABLED := 0
export GOFLAGS := $(shell go env GOFLAGS) -trimpath

FUZZTIME ?= 20s
BENCHFLAGS ?=
FAULTSFLAGS ?=
HOSTILEFLAGS ?=
SOAKFLAGS ?=

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

build: ## build dist/newel
	go build -o dist/newel ./cmd/newel

# Four packages at a time: tests of real servers wait most of the time.
test: ## run all tests, real databases and clients included (needs postgresql, npm)
	go test -p 4 ./...
	cd test/bench && go test ./...
	cd test/opa && go test ./...
	cd test/acme && go test ./...
	cd test/alerts && go test ./...
	cd test/s3 && go test ./...

# Two large tests have no goroutines: under the detector they take minutes.
race: ## run the tests that use goroutines with the race detector (needs a C compiler)
	CGO_ENABLED=1 go test -race -skip '^(TestBackendsAreBounded|TestTenThousandDocuments)$$' . ./call/... ./internal/... ./neweltest/... ./test/gateway/... ./test/https/...

lint: ## gofmt, go vet, staticcheck
	@unformatted=$$(git ls-files -co --exclude-standard '*.go' | xargs gofmt -l); \
		if [ -n "$$unformatted" ]; then echo "not formatted, run gofmt -w:"; echo "$$unformatted"; exit 1; fi
	go vet ./...
	cd test/bench && go vet ./...
	cd test/opa && go vet ./...
	cd test/acme && go vet ./...
	cd test/alerts && go vet ./...
	cd test/s3 && go vet ./...
	go tool staticcheck ./...
	@echo "lint: ok"

vuln: ## known vulnerabilities in what is linked (needs the vulnerability database)
	@log=$$(mktemp); trap 'rm -f "$$log"' EXIT; \
	go tool govulncheck ./... >"$$log" 2>&1; status=$$?; cat "$$log"; \
	case $$status in \
	0) echo "govulncheck: ok" ;; \
	1) if grep -q 'fetching vulnerabilities' "$$log"; then echo "govulncheck: NOT RUN (database unreachable)"; else exit 1; fi ;; \
	*) exit $$status ;; \
	esac

conformance: ## the official suite, both revisions on one URL (needs npm)
	@go run ./test/conformance

conformance-gateway: ## the same suite through the gateway, in front of six servers (needs npm)
	@go run ./test/conformance -gateway

conformance-auth: ## the suite's scenarios for authorization servers and their clients: the one for development, the gateway (needs npm)
	@go run ./test/conformance -auth

bench: ## what a call costs, against the floor and other libraries (ten minutes, Linux, two CPUs, PostgreSQL)
	@cd test/bench && go run . $(BENCHFLAGS)

bench-peers: ## the same against other SDKs and gateways, from npm and PyPI (ten minutes, the first time more; needs npm, python3)
	@cd test/bench && go run . -peers $(BENCHFLAGS)

supervisor-soak: ## 1,000 sessions and 200 crashes of a child process; nothing may be left (Linux)
	@go run ./test/supervisor

faults: ## crash a real server 500 times, at every moment of a call, on both engines, and break all around it; then attack it (Linux; needs postgresql, redis and the history; five minutes)
	@mkdir -p dist && go build -o dist/faults ./test/faults && dist/faults $(FAULTSFLAGS)
	@go build -o dist/hostile ./test/hostile && dist/hostile $(HOSTILEFLAGS)

faults-long: ## the same 30,000 times, in runs of 500 with a seed each; goes on where it was interrupted
	@mkdir -p dist && go build -o dist/faults ./test/faults && dist/faults -cycles 30000 -resume dist/faults-long.json $(FAULTSFLAGS)

faults-mutants: ## programs with one mistake each: the suite has to find every one
	@mkdir -p dist && go build -o dist/faults ./test/faults && dist/faults -mutants $(FAULTSFLAGS)

soak: ## an hour of mixed load with reloads; memory, goroutines and descriptors must stay flat (Linux)
	@go run ./test/soak $(SOAKFLAGS)

soak-nodes: ## 1,000 calls a second for ten minutes at two nodes, with a reload every second and one of them killed every minute; no call may fail
	@go run ./test/soak -nodes $(SOAKFLAGS)

fuzz: ## run every fuzz target for FUZZTIME (20s)
	@set -e; targets=$$(go test -list '^Fuzz' ./... | awk '/^Fuzz/ {names[++n]=$$1} /^ok/ {for (i=1; i<=n; i++) print $$2, names[i]; n=0}'); \
	test -n "$$targets" || { echo "fuzz: no targets found"; exit 1; }; \
	count=0; while read -r pkg name; do \
		echo "== $$name ($$pkg), $(FUZZTIME)"; \
		go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) "$$pkg" </dev/null; count=$$((count+1)); \
	done <<<"$$targets"; \
	echo "fuzz: $$count targets, no failure"

sbom: build ## write dist/newel.cdx.json, the bill of materials of the binary
	go run ./test/sbom dist/newel > dist/newel.cdx.json
	@echo "sbom: dist/newel.cdx.json"

ci: ## what CI runs
	.ci/run

.PHONY: help build test race lint vuln conformance conformance-gateway conformance-auth supervisor-soak soak soak-nodes bench bench-peers faults faults-long faults-mutants fuzz sbom ci
