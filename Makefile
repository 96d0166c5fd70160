# kvm-demand-paging: the entry to everything. `make` alone lists what there is.
#
# Everything is built and run inside a toolbox (scripts/toolbox), so the host needs root, git, make and apt only.
# What is derived goes to build/; what outlives a checkout goes to a cache (KDP_CACHE, see scripts/lib.sh).
SHELL := /bin/bash
.DEFAULT_GOAL := help

TOOLBOX := scripts/toolbox run

.PHONY: help
help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## all set-up: toolbox, test kernel, module, tools (each once)
	@scripts/toolbox setup
	@scripts/kernel setup fast
	@scripts/module fast
	@scripts/tools build
	@scripts/demo-image

.PHONY: modules
modules: ## the module; against your own kernel with KDIR=/path/to/its/build
ifdef KDIR
	@scripts/module kdir "$(KDIR)"
else
	@scripts/toolbox setup
	@scripts/kernel setup fast
	@scripts/module fast
endif

.PHONY: tools
tools: ## the userspace: kdp, kdp-vmm, kdp-bench, the test programs (build/bin, build/selftests)
	@scripts/toolbox setup
	@scripts/kernel setup fast
	@scripts/tools build

.PHONY: test
test: setup ## every test; T=PATTERN runs those whose names match (abi-, fault-, notify-, ...)
	@scripts/test fast $(if $(T),'$(T)')

.PHONY: test-debug
test-debug: setup ## the selftests on the debug kernel (KASAN, lockdep, kmemleak, ...); takes T, too
	@scripts/kernel setup debug
	@scripts/module debug
	@scripts/test debug $(if $(T),'$(T)')

.PHONY: soak
soak: setup ## the long run: each failure of migrations, and each race, N times (10); takes T, too
	@scripts/soak $(or $(N),10) $(if $(T),'$(T)')

.PHONY: demo
demo: setup ## the main job on a real guest: a lazy restore under an unmodified QEMU
	@scripts/demo

.PHONY: bench
bench: setup ## the benchmark, on both clocks (build/bench/latest.json, report.html); QUICK=1 for 1 vCPU
	@$(if $(QUICK),true,scripts/demand-paging-test setup)
	@scripts/bench $(if $(QUICK),--quick)

.PHONY: bench-migration
bench-migration: setup ## post-copy of a Linux guest beside userfaultfd's (build/bench/migration.json)
	@scripts/bench-migration

.PHONY: shell
shell: setup ## a shell in the test VM with the module loaded
	@scripts/vm shell --hugepages 128

.PHONY: man
man: tools ## the man pages (build/man)

.PHONY: lint
lint: setup ## rustfmt, clippy, checkpatch, shellcheck
	@scripts/lint

.PHONY: clean
clean: ## remove what this checkout has built; the cache stays
	rm -rf build
