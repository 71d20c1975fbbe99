# Everything is documented by 'make help'.

BIN     ?= bin
VERSION ?= $(shell git describe --always --dirty 2>/dev/null || echo unknown)
GOFLAGS_BUILD = -trimpath -ldflags '-s -w -X main.version=$(VERSION)'

.PHONY: help build
.DEFAULT_GOAL := help

help: ## Show the targets.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

build: ## Build the programs into bin/.
	CGO_ENABLED=0 go build $(GOFLAGS_BUILD) -o $(BIN)/ ./cmd/...
	ln -f $(BIN)/nix-dispatch $(BIN)/nix-dispatch-hook
