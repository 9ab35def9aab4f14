# make help lists the targets.
.DEFAULT_GOAL := help
SHELL := bash

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

test: ## run all tests, with the race detector
	go test -race ./...

.PHONY: help test
