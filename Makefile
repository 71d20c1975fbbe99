# Everything is documented by 'make help'.

BIN     ?= bin
VERSION ?= $(shell git describe --always --dirty 2>/dev/null || echo unknown)
# grpcnotrace leaves out request tracing, which nobody reads: a smaller program
# that starts faster, and one is started for every build.
GOFLAGS_BUILD = -trimpath -tags grpcnotrace -ldflags '-s -w -X main.version=$(VERSION)'

.PHONY: help build
.DEFAULT_GOAL := help

help: ## Show the targets.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

build: ## Build the programs into bin/.
	CGO_ENABLED=0 go build $(GOFLAGS_BUILD) -o $(BIN)/ ./cmd/...
	ln -f $(BIN)/nix-dispatch $(BIN)/nix-dispatch-hook
