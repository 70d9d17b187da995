# nodeagent. `make help` lists the targets.

TAGS          := libvirt_dlopen
EMULATED_TAGS := libvirt_dlopen,emulated
LINTER        := .cache/bin/golangci-lint
SHELL         := bash
.SHELLFLAGS   := -o pipefail -c

.DEFAULT_GOAL := help
.PHONY: help setup demo build test test-full test-rig soak lint fmt generate check-dirty bench fuzz clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what building and testing need (root)
	@.ci/setup.sh

demo: setup ## run the main job on this machine, step by step with times; cleans up after itself
	@echo "build    programs and guest images (minutes the first time)"
	@go run -tags $(EMULATED_TAGS) ./tests/demo build
	@.cache/trial/bin/demo

build: setup ## build the agent into bin/
	go build -trimpath -tags $(TAGS) -o bin/nodeagent ./nodeagent

test: setup ## run all tests; ends with the skipped ones and what each misses
	go vet -tags $(TAGS) ./...
	go build -race -tags $(EMULATED_TAGS) ./...
	@# One package at a time: real guests on two cores starve each other.
	{ go test -tags $(TAGS) -json ./nodeagent/... ./vm/... ./tests/arch && \
	  go test -race -p 1 -timeout 40m -tags $(EMULATED_TAGS) -json ./...; } | go run ./tests/summary

test-full: setup ## kill the agent at every point and every sync of a guest's life, change every byte of the state file (root)
	FAULT_ALL=1 go test -tags $(EMULATED_TAGS) -count=1 -timeout 4h -v -run TestWhateverByteChanges ./nodeagent/store
	FAULT_ALL=1 go test -tags $(EMULATED_TAGS) -count=1 -timeout 4h -v ./tests/fault

RIG_IMAGE ?= $(or $(XDG_CACHE_HOME),/var/cache)/nodeagent/rig
MATCH     ?=
test-rig: setup ## a provider's host in a virtual machine: real kernel, IOMMU, systemd, emulated GPUs; MATCH=regexp for some steps (root)
	@.ci/setup.sh debootstrap e2fsprogs >/dev/null
	@tests/hostvm/image.sh $(RIG_IMAGE)
	@mkdir -p .cache/rig
	@go build -tags $(EMULATED_TAGS) -o .cache/rig/ ./nodeagent ./tests/controlplane/cmd/controlplane ./tests/emulator/gpu/cmd/fakegpu
	@CGO_ENABLED=0 go build -o .cache/rig/ ./tests/hostvm
	@cp packaging/nodeagent.service packaging/modules-load.conf .cache/rig/
	@dpkg-deb --fsys-tarfile .cache/debs/kernel.deb | tar -xO --wildcards './boot/vmlinuz-*' >.cache/rig/vmlinuz
	@.cache/rig/hostvm run --image $(RIG_IMAGE) --programs .cache/rig --match '$(MATCH)'

DURATION ?= 2h
SEED     ?= 0
soak: setup ## launch, kill and break at random; DURATION=2h, SEED=n repeats (root)
	@go run -tags $(EMULATED_TAGS) ./tests/demo build
	@go build -tags $(EMULATED_TAGS) -o .cache/trial/bin/soak ./tests/soak
	@.cache/trial/bin/soak -duration $(DURATION) -seed $(SEED)

$(LINTER): .ci/tools/go.mod .ci/tools/go.sum
	cd .ci/tools && go build -o ../../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

lint: setup $(LINTER) ## run the linters, for both sets of build tags
	$(LINTER) run --build-tags $(TAGS)
	$(LINTER) run --build-tags $(EMULATED_TAGS)

fmt: $(LINTER) ## format the code
	$(LINTER) fmt

generate: ## make the protobuf code
	@.ci/setup.sh protobuf-compiler libprotobuf-dev
	go -C .ci/tools build -o ../../.cache/bin/protoc-gen-go google.golang.org/protobuf/cmd/protoc-gen-go
	PATH="$(CURDIR)/.cache/bin:$$PATH" protoc -I nodeagent/api -I /usr/include --go_out=. --go_opt=module=github.com/confidential-node/agent nodeagent/api/node.proto

check-dirty: generate fmt ## fail when generated or formatted files differ from what is committed
	git diff --exit-code
	@test -z "$$(git status --porcelain)" || { git status --short; exit 1; }

bench: setup ## print tables of ratios: launch, boot, digest, blob fetch, result upload, idle agent (root)
	go test -tags $(EMULATED_TAGS) -run '^$$' -bench . ./firmware/measure ./firmware/snp ./firmware/verify ./nodeagent/endorsements ./nodeagent/blob ./nodeagent/metadata ./network/relay ./gpu/spdm ./gpu/ccmode ./gpu/pool ./tests/bench
	@go build -tags $(EMULATED_TAGS) -o .cache/trial/bin/bench ./tests/bench
	@.cache/trial/bin/bench build
	@.cache/trial/bin/bench

fuzz: setup ## fuzz every parser for FUZZTIME (10m each); MATCH=regexp for some of them
	go run ./tests/fuzz -time $(or $(FUZZTIME),10m) -match '$(MATCH)' -log .cache/fuzz.log

clean: ## remove what building made
	rm -rf bin .cache/bin
