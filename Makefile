# SPDX-License-Identifier: LGPL-2.1-or-later
# Each target sets up what it needs. `make help` lists them.

PYTHON ?= python3
VENV := .venv
comma := ,
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
SOURCES := xenaltp2m cdefs tests examples setup.py
XEN ?= 4.17

# Networks fail now and then: three tries, each after a longer pause.
retry = for pause in 5 20 0; do $(1) && break; \
	[ $$pause -ne 0 ] || { echo "make: failed three times: $(firstword $(2))" >&2; exit 1; }; \
	echo "make: trying again in $$pause s" >&2; sleep $$pause; done

apt = apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
	apt-get -qq install --no-install-recommends $(1) >/dev/null

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-example check lint format types docs ffi ffi-check abi bench bench-sim \
	bench-recording bench-xen bench-report fuzz fuzz-xen interrupts guest dist deb clean headers \
	debian-tools lab \
	lab-shell test-xen test-xen-all test-xen-deb conformance recordings support manual pictures \
	demo-xen

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | \
	while IFS='|' read -r name text; do printf '%-12s %s\n' "$$name" "$$text"; done

demo: $(READY) ## trace a function of a guest that checks itself, in the simulator
	$(VENV)/bin/xenaltp2m demo

test: $(READY) headers ## run every test that needs no Xen; T=unit: those of tests/unit; THOROUGH=1: repeat more
	XENALTP2M_THOROUGH=$(THOROUGH) $(RUN) -m pytest -rfEs --numprocesses=auto --dist=worksteal \
		$(if $(T),$(T:%=tests/%),tests --ignore=tests/site) $(PYTEST)
	$(if $(T),,$(MAKE) test-example)

test-example: $(READY) ## the example agent's tests, with the wheel in an empty environment without Xen
	@set -e; rm -rf build; scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	$(call retry,$(RUN) -m build --wheel --outdir "$$scratch" . >/dev/null,build); \
	$(PYTHON) -m venv "$$scratch/venv"; \
	wheel=$$(ls "$$scratch"/xenaltp2m-*.whl); \
	$(call retry,"$$scratch/venv/bin/pip" install -qq "$$wheel[sim]" pytest,pip install); \
	cp -r examples/agent examples/guest "$$scratch"; cd "$$scratch/agent"; \
	XENALTP2M_LIBXENCTRL=/no/such/library "$$scratch/venv/bin/python" -m pytest -q -rs

check: lint types ffi-check test docs ## what CI runs: linters, types, the generated module, tests, docs

lint: $(READY) ## ruff: rules and format; words and phrases that have to be read twice
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) tests/lint/prose.py

format: $(READY) ## let ruff format and sort
	$(RUN) -m ruff check --fix --select I .
	$(RUN) -m ruff format .

types: $(READY) ## mypy --strict
	$(RUN) -m mypy

docs: $(READY) ## build the documentation as a site, in build/docs/html, and check it
	$(RUN) docs/site/errors_page.py
	$(RUN) -m pytest -q -n0 tests/site
	@echo build/docs/html/index.html

ffi: $(READY) ## write xenaltp2m/abi/_ffi.py anew from cdefs/
	$(RUN) cdefs/build.py

ffi-check: $(READY) ## fail if xenaltp2m/abi/_ffi.py is not what cdefs/ says
	$(RUN) cdefs/build.py --check

abi: $(READY) headers ## prove cdefs/ against Xen's headers; without them it fails
	XENALTP2M_ABI=1 $(RUN) -m pytest -rfEs tests/abi $(PYTEST)

bench: $(READY) ## measure what calls cost against C
	$(RUN) tests/bench/bench.py

bench-sim: $(READY) ## measure the simulator against Unicorn alone
	$(RUN) tests/bench/bench_sim.py

bench-recording: $(READY) ## measure what recording a session costs
	$(RUN) tests/bench/bench_recording.py

bench-xen: $(READY) ## measure the monitor against xen-access and C on real Xen in the lab
	$(RUN) tests/bench/bench_xen.py

bench-report: $(READY) headers ## all benchmarks, several times: docs/performance-report.md (root; the lab)
	$(RUN) tests/bench/report.py $(REPORT)

fuzz: $(READY) ## mutated requests, hostile images and tables, random programs under breakpoints
	$(RUN) tests/fuzz/events.py $(FUZZ)
	$(RUN) tests/fuzz/guests.py
	$(RUN) tests/fuzz/transparency.py

fuzz-xen: $(READY) ## 2000 random programs under breakpoints on real Xen in the lab; XEN chooses
	for xen in $(XEN); do $(RUN) tests/lab/transparency.py --xen $$xen || exit 1; done

interrupts: $(READY) ## press Ctrl-C at every line of whole sessions: nothing may be left in the guest
	XENALTP2M_EACH_LINE=0 $(RUN) -m pytest -rfEs -n auto --timeout 0 tests/unit/test_every_line.py $(PYTEST)

guest: ## build the guests anew (gcc -m32)
	$(MAKE) -C examples/guest --always-make
	cp examples/guest/checker.elf xenaltp2m/cli/checker.elf
	$(MAKE) -C tests/lab/guest --always-make

dist: $(READY) ## build sdist and wheel twice, compare, and use each in an empty environment
	$(RUN) tests/package/dist.py

deb: $(READY) debian-tools ## build Debian's packages twice, compare, lintian, and run what is in them
	$(RUN) tests/package/deb.py

test-xen-deb: deb ## install what `make deb` left by dpkg in dom0 of real Xen, and run an agent
	for xen in $(XEN); do $(RUN) tests/lab/package.py --xen $$xen || exit 1; done

lab: ## build the lab, real Xen in an emulator (root, Debian; several minutes)
	$(PYTHON) tests/lab/boot.py --install

lab-shell: ## a prompt in dom0 of real Xen, with the package and a running guest; Ctrl-] ends it
	$(PYTHON) tests/lab/shell.py --install --xen $(firstword $(XEN))

test-xen: $(READY) ## run the live tests on real Xen in the lab; XEN="4.17 4.20" chooses
	for xen in $(XEN); do $(RUN) tests/lab/suite.py --xen $$xen || exit 1; done

test-xen-all: ## the same on every release the lab has
	$(MAKE) test-xen XEN="4.17 4.20 4.14"

recordings: $(READY) ## record the session of tests/recorded anew on real Xen in the lab, and replay others there
	rm -rf results/recordings
	$(RUN) tests/lab/run.py --install --xen 4.17 --results results/recordings --put xenaltp2m \
		--put tests/recorded:tests/recorded --put examples/guest:examples/guest -- \
		'touch tests/__init__.py; python3 -m tests.recorded.sessions "$$RESULTS"'
	install -D -m 644 results/recordings/calls.session tests/recorded/xen-4.17/calls.session

conformance: $(READY) ## compare simulated guests with real Xen in the lab, event by event
	for xen in $(XEN); do $(RUN) tests/lab/conformance.py --xen $$xen $(CONFORMANCE) || exit 1; done

support: $(READY) ## write docs/support.md from what `make test-xen-all` left in results/
	PYTHONPATH=. $(RUN) tests/lab/support.py

manual: $(READY) ## write the manual page and the shells' completions anew, from the parser
	$(RUN) docs/manual/make.py

pictures: $(READY) ## draw the pictures in docs/pictures/ anew, from real runs
	$(RUN) docs/pictures/make.py
	$(RUN) docs/pictures/layers.py

demo-xen: ## the same script, the same guest and the same table on real Xen in the lab
	$(PYTHON) tests/lab/run.py --install --xen $(firstword $(XEN)) --put xenaltp2m \
		--put examples/guest -- \
		'cd guest && xl create -p -q -e checker.cfg && cd .. && python3 -m xenaltp2m demo --connect libxc'

clean: ## remove what these targets made
	rm -rf $(VENV) build dist results *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp comes last: an interrupted set-up starts over.
$(READY): pyproject.toml setup.py Makefile
	@echo "make: setting up $(VENV), about half a minute" >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then :; \
	elif [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then \
		$(call retry,{ $(call apt,python3-venv ca-certificates); },apt-get); \
	else echo "make: $(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; exit 1; fi
	@$(PYTHON) -m venv --clear $(VENV)
	@$(call retry,$(RUN) -m pip install -qq 'pip>=25.1',pip)
	@$(call retry,$(RUN) -m pip install -qq --config-settings editable_mode=compat \
		--editable '.[cli$(comma)sim]' --group dev,pip)
	@touch $@

# What debian/control asks for, and lintian.
debian-tools:
	@if [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then \
		$(call retry,{ apt-get -qq update && \
			DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends \
			dpkg-dev lintian >/dev/null && \
			DEBIAN_FRONTEND=noninteractive apt-get -qq build-dep --no-install-recommends \
			. >/dev/null; },apt-get); \
	else echo "make: not root, or no apt-get: dpkg-buildpackage says what is missing" >&2; fi

# The ABI proofs and the guest want more than Python; where it is not there, they skip.
headers:
	@if [ -e /usr/include/xenctrl.h ] && command -v gcc >/dev/null; then :; \
	elif [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then \
		$(call retry,{ $(call apt,gcc libc6-dev libxen-dev); },apt-get); \
	else echo "make: no gcc or no Xen headers (libxen-dev): the ABI proofs will be skipped" >&2; fi
