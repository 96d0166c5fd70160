# kvm-demand-paging: the entry to everything. `make` alone lists what there is.
#
# Everything is built and run inside a toolbox (scripts/toolbox), so the host needs root, git, make and apt only.
# What is derived goes to build/; what outlives a checkout goes to a cache (KDP_CACHE, see scripts/lib.sh).
SHELL := /bin/bash
.DEFAULT_GOAL := help

TOOLBOX := scripts/toolbox run

.PHONY: help
help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9.-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The kernel of the VM: stock, stock-7.2, fast or debug (scripts/kernel).
KDP_KERNEL ?= stock
export KDP_KERNEL

.PHONY: setup
setup: ## all set-up: toolbox, kernel, module, tools (each once); KDP_KERNEL=stock|stock-7.2|fast|debug
	@scripts/setup test

.PHONY: modules
modules: ## the module; against your own kernel with KDIR=/path/to/its/build
ifdef KDIR
	@scripts/module kdir "$(KDIR)"
else
	@scripts/toolbox setup
	@scripts/kernel setup $(KDP_KERNEL)
	@scripts/module $(KDP_KERNEL)
endif

.PHONY: tools
tools: ## the userspace: kdp, kdp-vmm, kdp-bench (build/bin), man pages, completions
	@scripts/toolbox setup
	@scripts/tools build release

.PHONY: test
test: setup ## every test; T=PATTERN runs those whose names match (abi-, fault-, notify-, ...)
	@scripts/test --host $(KDP_KERNEL) $(if $(T),'$(T)')

# The tests of what differs between kernels: the ABI's edge cases, faults, vCPUs and KVM's
# tracepoints, huge mappings, memory errors, and a Linux guest under QEMU.
SUBSET := abi- fault- vcpu- huge- poison- demo-resume-unmodified-qemu

.PHONY: test-7.2
test-7.2: ## a subset of the selftests on Debian's own kernel 7.2
	@KDP_KERNEL=stock-7.2 scripts/setup test
	@KDP_KERNEL=stock-7.2 scripts/test stock-7.2 $(SUBSET)

.PHONY: test-debug
test-debug: ## the selftests on the debug kernel (KASAN, lockdep, kmemleak, ...); takes T, too
	@KDP_KERNEL=debug scripts/setup test
	@KDP_KERNEL=debug scripts/test debug $(if $(T),'$(T)')

.PHONY: soak
soak: setup ## the long run: each failure of migrations, and each race, N times (10); takes T, too
	@scripts/soak $(or $(N),10) $(if $(T),'$(T)')

.PHONY: demo
demo: ## restore a Linux guest on demand, under unmodified QEMU
	@scripts/setup demo
	@scripts/demo

.PHONY: bench
bench: ## the benchmark, on both clocks (build/bench/latest.json, report.html); QUICK=1 for 1 vCPU
	@scripts/setup bench
	@$(if $(QUICK),true,scripts/demand-paging-test setup)
	@scripts/bench $(if $(QUICK),--quick)

.PHONY: bench-migration
bench-migration: ## post-copy of a Linux guest, compared with userfaultfd (build/bench/migration.json)
	@scripts/setup bench
	@scripts/bench-migration

.PHONY: shell
shell: setup ## a shell in the test VM with the module loaded
	@scripts/vm shell --hugepages 128

.PHONY: man
man: tools ## the man pages (build/man)

.PHONY: deb
deb: ## the Debian packages (build/deb); lintian checks them
	@scripts/deb

.PHONY: test-packages
test-packages: ## install the packages in a clean root, build with DKMS, boot that kernel; takes T, too
	@scripts/test-packages $(if $(T),'$(T)')

.PHONY: dist
dist: ## what `make install` installs: kdp, kdp-vmm, man pages, completions (build/dist)
	@scripts/toolbox setup
	@$(TOOLBOX) scripts/with-target target tools/Cargo.toml scripts/dist build

.PHONY: install install-module install-dkms
install: ## commands, units, udev rule and header: DESTDIR, prefix (/usr/local), sysconfdir (/etc)
	@DESTDIR='$(DESTDIR)' prefix='$(prefix)' sysconfdir='$(sysconfdir)' scripts/dist install tools dev

install-module: ## the module of `make modules KDIR=…`: INSTALL_MOD_PATH
	@DESTDIR='$(DESTDIR)' INSTALL_MOD_PATH='$(INSTALL_MOD_PATH)' scripts/dist install module

install-dkms: ## the module's source, for DKMS (/usr/src): DESTDIR
	@DESTDIR='$(DESTDIR)' sysconfdir='$(sysconfdir)' scripts/dist install dkms

.PHONY: lint
lint: setup ## rustfmt, clippy, checkpatch, shellcheck
	@scripts/lint

.PHONY: clean
clean: ## remove what this checkout has built; the cache stays
	rm -rf build
