# Each target sees to what it needs: missing Debian packages are installed where that is allowed,
# and named where it is not.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test lint fuzz bench manifests image image-test release

# command:package pairs, for .ci/need
# g++ brings what gcc alone only recommends: the headers and start files of the C library.
BUILD   := c++:g++ make:make git:git
NETWORK := ip:iproute2 nft:nftables
TRAFFIC := iperf3:iperf3 tcpdump:tcpdump
NAMES   := dnsmasq:dnsmasq-base
ASKING  := dig:bind9-dnsutils musl-gcc:musl-tools
WATCH   := prometheus:prometheus promtool:prometheus
BROWSER := chromium:chromium
LOAD    := wrk:wrk nginx:nginx-light
SHELLS  := shellcheck:shellcheck
ENGINE  := dockerd:docker.io docker:docker.io

CARGO_DENY := 0.20.2
CARGO_FUZZ := 0.13.2
CARGO_SBOM := 0.10.0
# How long each fuzz target runs.
SECONDS := 60

help: ## Show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: ## Two nodes and four pods as network namespaces, real traffic through the proxy (ARGS=--keep leaves them up)
	@.ci/need $(BUILD) $(NETWORK) $(TRAFFIC)
	cargo build --release -p culvert -p tests --bins
	target/release/culvert demo $(ARGS)

test: ## Unit, property and end-to-end tests
	@.ci/need $(BUILD) $(NETWORK) $(TRAFFIC) $(NAMES) $(ASKING) $(WATCH) $(BROWSER)
	@.ci/openbao >/dev/null
	@.ci/envoy >/dev/null
	@.ci/kubetools >/dev/null
	cargo build -p culvert -p tests --bins
	cargo test --workspace --doc
	TESTKIT_MESH=istiod cargo test -p tests --test routing --test policy --test app_tunnel
	@if cargo nextest --version >/dev/null 2>&1; then \
	  set -x; cargo nextest run --workspace; \
	else \
	  set -x; cargo test --workspace --lib --bins --tests; \
	fi

lint: ## Formatting, clippy, documentation, scripts, dependencies; warnings are errors
	@.ci/need $(BUILD) $(SHELLS)
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --features tests/image -- -D warnings
	cargo clippy -p culvert --all-targets --features heap-profile -- -D warnings
	shellcheck .ci/* deploy/*/*.sh benches/kind/*.sh deploy/image/{assemble,binary,order,release}
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps
	@cargo deny --version >/dev/null 2>&1 || { set -x; cargo install cargo-deny --version $(CARGO_DENY) --locked --debug; }
	cargo deny check bans licenses sources
	@if timeout 120 cargo deny fetch db >/dev/null 2>&1; then \
	  set -x; cargo deny check --disable-fetch advisories; \
	else \
	  echo "make lint: the advisory database cannot be fetched; known vulnerabilities are not checked" >&2; \
	fi

fuzz: ## What foreign bytes do to each decoder, for 60 seconds each (SECONDS=1800 for longer)
	@.ci/need $(BUILD)
	@cargo fuzz --version >/dev/null 2>&1 || { set -x; cargo install cargo-fuzz --version $(CARGO_FUZZ) --locked; }
	@export RUSTC_BOOTSTRAP=1; \
	for crate in proxy cert-agent xds-client; do \
	  for target in $$(cd $$crate && cargo fuzz list); do \
	    mkdir -p $$crate/fuzz/corpus/$$target $$crate/fuzz/seeds/$$target; \
	    (set -x; cd $$crate && cargo fuzz run --sanitizer none $$target fuzz/corpus/$$target fuzz/seeds/$$target \
	      -- -max_total_time=$(SECONDS) -timeout=25) || exit 1; \
	  done; \
	done

bench: ## Criterion benchmarks, then load through the proxy compared with direct traffic
	@.ci/need $(BUILD) $(NETWORK) $(TRAFFIC) $(LOAD) $(NAMES)
	cargo build --release -p culvert -p benches --bins
	cargo bench -p benches
	target/release/culvert-bench $(ARGS)

manifests: ## Render deploy/manifests/base from the chart
	$$(.ci/kubetools)/helm template culvert deploy/chart --namespace istio-system \
	  --values deploy/manifests/base/values.yaml >deploy/manifests/base/culvert.yaml

# The program of each architecture of the image, built only when it is asked for.
ARCH := amd64 arm64
VERSION = $(shell sed -nE '/^\[workspace.package\]/,/^\[/s/^version = "(.*)"/\1/p' Cargo.toml)

image: ## Static programs in images for amd64 and arm64, as archives in target/image (ARCH=amd64: that one only)
	@.ci/need $(BUILD)
	@set -e; for arch in $(ARCH); do \
	  program=$$(deploy/image/binary $$arch); \
	  deploy/image/assemble target/image/culvert-$(VERSION)-$$arch.tar $$arch=$$program; \
	  ls -l --block-size=kB target/image/culvert-$(VERSION)-$$arch.tar; \
	done

image-test: ## The image of this machine's architecture in a container, as the proxy of a node
	@.ci/need $(BUILD) $(NETWORK) $(ENGINE)
	cargo build -p culvert -p tests --bins
	$(MAKE) image ARCH=amd64
	CULVERT_IMAGE=$(CURDIR)/target/image/culvert-$(VERSION)-amd64.tar cargo test -p tests --features image --test image

release: image ## What is published, with checksums, in target/release-VERSION: images, chart, manifests, SBOM
	@cargo sbom --version >/dev/null 2>&1 || { set -x; cargo install cargo-sbom --version $(CARGO_SBOM) --locked --debug; }
	deploy/image/release $(VERSION)
