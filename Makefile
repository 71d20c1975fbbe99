# Everything is documented by 'make help'.

BIN     ?= bin
PREFIX  ?= /usr/local
DESTDIR ?=
# How long each fuzz target runs.
FUZZTIME ?= 30s

# Who has made a package.
MAINTAINER ?= nix-dispatch <root@localhost>
# How a package is compressed: xz, zstd, gzip or none.
COMPRESSION ?= xz
# The time of all files in a package, so that the same commit makes the same bytes.
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)

VERSION ?= $(shell git describe --always --dirty 2>/dev/null || echo unknown)
# grpcnotrace leaves out request tracing, which nobody reads: a smaller program
# that starts faster, and one is started for every build.
GOFLAGS_BUILD = -ldflags '-s -w -X main.version=$(VERSION)'

# All is compiled in the same way, and so once; only the race detector needs C and
# its own. git may distrust a checkout of another user's; VERSION needs no help
# from Go.
export GOFLAGS := $(GOFLAGS) -trimpath -tags=grpcnotrace -buildvcs=false
export CGO_ENABLED = 0

STATICCHECK        = honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK        = golang.org/x/vuln/cmd/govulncheck@v1.1.4
PROTOC_GEN_GO      = google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
PROTOC_GEN_GO_GRPC = google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2

# What runs on the fleet takes minutes and mostly waits; the rest is run with the
# race detector.
INTEGRATION = ./deploy/integration
UNIT        = $$(go list ./... | grep -v /deploy/integration)
# Nothing in these is concurrent, which deploy/doctest checks: the race detector
# could find nothing. All others are run with it.
PLAIN       = ./cmd/internal/cli ./cmd/internal/daemonsocket ./deploy/doctest ./deploy/graph ./deploy/nixos \
	./deploy/prometheus/... ./deploy/simulate ./proto/nix ./proto/nix/hook ./proto/nix/nar ./scheduler
RACED       = $$(go list ./... | grep -v /deploy/integration | grep -vxF "$$(go list $(PLAIN))")

# Programs the tests need, each with the Debian package that brings it.
TEST_TOOLS = gcc=gcc /usr/include/stdlib.h=libc6-dev as=binutils git=git ssh=openssh-client \
	ssh-keygen=openssh-client ssh-agent=openssh-client sshd=openssh-server nix-store=nix-bin \
	systemctl=systemd mandoc=mandoc zsh=zsh fish=fish \
	prometheus=prometheus promtool=prometheus chromium=chromium

# Tests that run only on request, by their name or by the reason that they are
# skipped for: see docs/hacking.md.
OPT_IN = ^TestGolden|NIX_DISPATCH_NIGHTLY is not set

TOOLS           = $(CURDIR)/bin/tools
# Vetting is a step of its own.
# Many tests wait, so that more of them than processors run at once. A program with
# the race detector sleeps for a second when it ends, and tests start many.
PLAIN_RUN       = go test -vet=off -count=1 -timeout 20m
RACE_RUN        = CGO_ENABLED=1 GORACE=atexit_sleep_ms=10 go test -race -vet=off -count=1 -timeout 20m -parallel 4
INTEGRATION_RUN = NIX_DISPATCH_REQUIRE_FLEET=1 go test -vet=off -count=1 -timeout 90m -parallel 6
# All that is tested, and nothing of it is left when it ends, however it does.
REPORT          = NIX_DISPATCH_REQUIRE_FLEET=1 $(TOOLS)/testreport -opt-in '$(OPT_IN)' -finally '$(TOOLS)/fleet reap'
# Integration tests that measure, and in make nightly want the machine for themselves.
MEASURING       = ^TestFasterThanStockHook$$

.PHONY: help build demo bench test nightly unit race integration chaos docs fuzz lint staticcheck vulncheck reproducible generate check-generated dashboard install uninstall deb clean
.PHONY: tools prepare prepare-tests
.DEFAULT_GOAL := help

help: ## Show the targets.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

build: ## Build the programs into bin/ (BIN=).
	go build $(GOFLAGS_BUILD) -o $(BIN)/ ./cmd/...

demo: ## See it work: real builds on three real machines, made here (KEEP=1: go on). Needs root.
	@deploy/demo/start.sh
	@$(MAKE) --no-print-directory build tools
	@$(TOOLS)/demo -bin $(BIN) $(if $(KEEP),-keep)

# ONLY=dispatch,accept measures these rows; RECORD=yes writes them into docs/performance.md.
BENCH_RECORD = $(if $(RECORD),-json docs/performance.json -into docs/performance.md,-json $(BIN)/bench.json)

bench: build tools prepare ## Measure us, the stock hook and the limits: ONLY=row,row RECORD=yes. Needs root.
	@CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o $(TOOLS)/ ./deploy/bench/...
	@$(TOOLS)/bench -bin $(BIN) -only '$(ONLY)' $(BENCH_RECORD)

test: prepare-tests ## Everything: checks, unit tests with the race detector, integration. Needs root.
	@$(REPORT) \
		'gofmt: test -z "$$(gofmt -l . | tee /dev/stderr)"' \
		'vet: go vet ./...' \
		'unit: $(PLAIN_RUN) -json $(PLAIN)' \
		+'unit, race: $(RACE_RUN) -json $(RACED)' \
		+'integration: $(INTEGRATION_RUN) -json $(INTEGRATION)'

nightly: prepare-tests ## The long forms of make test: every Nix version, every mishap, what measures. Needs root.
	@NIX_DISPATCH_NIGHTLY=1 $(REPORT) \
		'measuring: $(INTEGRATION_RUN) -json -run "$(MEASURING)" $(INTEGRATION)' \
		'unit, race: $(RACE_RUN) -json $(UNIT)' \
		'integration, whole: $(INTEGRATION_RUN) -json -skip "$(MEASURING)" $(INTEGRATION)' \
		'rules: go run ./deploy/rules'

unit: ## The tests that need neither root nor other programs, in seconds.
	go test $(UNIT)

race: ## The same, with the race detector where something is concurrent.
	$(PLAIN_RUN) $(PLAIN)
	$(RACE_RUN) $(RACED)

integration: prepare-tests ## The tests on real Nix machines made here. Needs root.
	$(INTEGRATION_RUN) $(INTEGRATION)

# ONLY=Soak runs the tests that are called TestChaosSoak..., SEED=N does what it did before.
chaos: prepare-tests ## Everything that can go wrong with machines, callers and the daemon: ONLY=name SEED=N. Needs root.
	NIX_DISPATCH_NIGHTLY=1 NIX_DISPATCH_CHAOS_SEED=$(SEED) $(INTEGRATION_RUN) -v -run '^TestChaos$(ONLY)' $(INTEGRATION)

docs: prepare-tests ## Type every command in the documentation, on hosts made here, as test does. Needs root.
	$(INTEGRATION_RUN) -v -run '^TestDocs$$' $(INTEGRATION)

fuzz: ## Run every fuzz target for a while (FUZZTIME=30s).
	@set -e; grep -rn --include='*_test.go' '^func Fuzz' . | \
	sed 's|^\(.*\)/[^/]*_test.go:[0-9]*:func \(Fuzz[A-Za-z0-9_]*\).*|\1 \2|' | sort -u | \
	while read -r dir name; do \
		echo "$$dir $$name"; \
		go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) "$$dir" </dev/null; \
	done

lint: ## gofmt and go vet.
	@test -z "$$(gofmt -l . | tee /dev/stderr)"
	go vet ./...

staticcheck: ## Staticcheck, which is fetched and built first.
	go run $(STATICCHECK) ./...

vulncheck: ## Known vulnerabilities in what is linked in. Asks the Go vulnerability database.
	go run $(GOVULNCHECK) ./...

reproducible: ## Build twice, in two places with empty caches, and compare programs and package.
	@deploy/reproducible.sh

generate: ## Make the Go code of the gRPC interface anew, and its page.
	@deploy/install-missing.sh protoc=protobuf-compiler /usr/include/google/protobuf/duration.proto=libprotobuf-dev
	GOBIN=$(TOOLS) go install $(PROTOC_GEN_GO)
	GOBIN=$(TOOLS) go install $(PROTOC_GEN_GO_GRPC)
	PATH=$(TOOLS):$$PATH protoc -I proto \
		--go_out=proto --go_opt=paths=source_relative \
		--go-grpc_out=proto --go-grpc_opt=paths=source_relative \
		dispatch/v1/dispatch.proto
	go test ./deploy/doctest -run '^TestAPIPage$$' -update

dashboard: ## Write the Grafana dashboard anew.
	go run ./deploy/prometheus/dashboard >deploy/prometheus/dashboard.json.new
	mv deploy/prometheus/dashboard.json.new deploy/prometheus/dashboard.json

check-generated: generate ## Check that the committed Go code is what generate makes.
	git diff --exit-code -- proto/dispatch/v1 docs/api.md

install: build ## Install programs, units, manual pages, completions (PREFIX=/usr/local, DESTDIR=).
	deploy/install.sh install $(BIN) $(PREFIX) '$(DESTDIR)'

uninstall: ## Remove what install has installed; Nix's own hook is back first.
	deploy/install.sh uninstall $(BIN) $(PREFIX) '$(DESTDIR)'

deb: build ## Make the Debian package in bin/ (BIN=, VERSION=). Needs dpkg-deb.
	@MAINTAINER='$(MAINTAINER)' COMPRESSION=$(COMPRESSION) SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) GOARCH=$$(go env GOARCH) \
		deploy/deb/build.sh $(BIN) $(VERSION)

clean: ## Remove what was built.
	rm -rf bin

tools:
	@go build -o $(TOOLS)/ ./deploy/...

prepare: tools
	@$(TOOLS)/fleet prepare

prepare-tests: tools
	@deploy/install-missing.sh $(TEST_TOOLS)
	@$(TOOLS)/fleet prepare --systemd
