# Everything is set up on first use, in .venv; a second run installs and builds nothing without need.

PYTHON ?= python3

# Debian packages that tests and the demo want and the build does not: QEMU to check against, clang for the headers,
# spin for the models, GRUB and its companions for the probe on a CD, acpica-tools to read our ACPI tables with, the rest
# for the lab.
# What the build needs, scripts/make-venv.sh knows.
DEBIAN_PACKAGES := qemu-system-x86 busybox-static kmod file spin clang grub-pc-bin grub-common xorriso mtools \
	acpica-tools

# A browser to look at reports with, and what scrapes a watch.
WEB_PACKAGES := chromium prometheus

# The tests of `make test`; those of `make test-lab` and `make test-web` are the others.
QUICK := not (lab or long or web) or smoke

VENV := .venv
BIN := $(VENV)/bin
STEP := scripts/step.sh
export PYTHON VENV

# Where it is set, each of hundreds of processes compiles all that it imports: a minute in all.
unexport PYTHONDONTWRITEBYTECODE

# Cython's C, of modules that begin with "_", is none of them.
SOURCES := $(shell find pvclock -name '*.pyx' -o -name '*.pxd' -o -name '*.h' -o -name '*.[sS]' -o -name '*.ld' \
	-o -name '[!_]*.c')
CYTHON := $(filter %.pyx %.pxd,$(SOURCES))
MODULES := $(subst /,.,$(basename $(filter %.pyx,$(SOURCES))))

# Stamps: what was done, for which Python and which packages.
INSTALLED := $(VENV)/stamps/installed-$(notdir $(PYTHON))
BUILT := $(VENV)/stamps/built-$(notdir $(PYTHON))
PACKAGES := $(VENV)/stamps/$(subst $() ,+,packages $(sort $(DEBIAN_PACKAGES)))
WEB := $(VENV)/stamps/$(subst $() ,+,packages $(sort $(WEB_PACKAGES)))

.PHONY: build demo test test-lab test-web conformance mutants bench drift lint clean help

build: $(BUILT) ## build the extension modules in place (the default)
	@:

demo: build $(PACKAGES) ## show a guest's clock at work, in the lab where there is no /dev/kvm
	@scripts/demo.sh

test: lint $(PACKAGES) ## build, lint, and run the quick tests, all that this machine can run, with a smoke of the lab
	@$(BIN)/python -m pytest -n auto -m '$(QUICK)'

test-lab: build $(PACKAGES) ## run the long tests and those of the lab, and in the lab all that has to do with KVM
	@$(BIN)/python -m pytest -n auto -m 'lab or long'
	@scripts/test-in-lab.sh

test-web: build $(PACKAGES) $(WEB) ## look at reports in a browser, and have Prometheus scrape a watch
	@$(BIN)/python -m pytest -n auto -m web

conformance: build $(PACKAGES) ## hold docs/verdicts.tsv against a run of the tests, and write docs/conformance.md
	@$(BIN)/python -m pytest -n auto -q -m '$(QUICK)' -p tests.conformance.plugin --conformance docs

mutants: build $(PACKAGES) ## apply every deliberate mistake in a copy, and see the tests of its row notice; resumable
	@$(BIN)/python -m tests.mutants --summary docs/mutants.json

bench: build ## run the benchmarks
	@$(BIN)/python -m pytest bench --benchmark-only --benchmark-columns=median,iqr,rounds

drift: build ## measure the kernel's clock and the engine's against the host's for 10 minutes, and draw docs/drift.svg
	@$(BIN)/pvclock drift --seconds 600 --output docs/drift.jsonl --output docs/drift.svg

lint: build ## check style and types
	@$(STEP) "ruff check" $(BIN)/ruff check --no-fix .
	@$(STEP) "ruff format" $(BIN)/ruff format --diff .
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(STEP) "cython-lint" $(BIN)/cython-lint $(CYTHON)
	@$(STEP) "mypy" $(BIN)/mypy
	@$(STEP) "stubtest" $(BIN)/stubtest $(MODULES)

clean: ## remove what was built; .venv stays
	@rm -rf build dist *.egg-info $(VENV)/stamps/built-* .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	@find pvclock \( -name '*.so' -o -name '_*.c' \) -delete
	@find pvclock qemu_glue tests bench -name __pycache__ -prune -exec rm -rf {} +

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

$(INSTALLED): pyproject.toml setup.py scripts/make-venv.sh
	@scripts/make-venv.sh
	@mkdir -p $(@D) && touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	@$(STEP) "build $(words $(MODULES)) extension modules" $(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(PACKAGES): WANTED = $(DEBIAN_PACKAGES)
$(WEB): WANTED = $(WEB_PACKAGES)
$(PACKAGES) $(WEB): $(INSTALLED)
	@if scripts/debian-packages.sh $(WANTED); then touch $@; else echo "  going on without them: tests that need them are skipped"; fi
