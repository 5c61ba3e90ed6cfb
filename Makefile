# Every task a person does here. Bare `make` prints them. PACKAGE=name narrows a task to one package.
# TORCH=auto|cpu|cu130 picks the build of PyTorch where none is at hand (auto: CUDA if the machine has a GPU, else CPU).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PACKAGE ?=
TORCH ?= auto
RUNS ?= runs
CLAIMS ?=
WORKERS ?=
RAY ?=
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
PROJECTS := $(sort $(patsubst packages/%/pyproject.toml,%,$(wildcard packages/*/pyproject.toml)))
CHOSEN := $(or $(PACKAGE),$(PROJECTS))
MANIFESTS := pyproject.toml shared/pyproject.toml $(PROJECTS:%=packages/%/pyproject.toml)
# What pytest looks at: one package's tests, or everything.
TESTS := $(if $(PACKAGE),packages/$(PACKAGE)/tests tests --package=$(PACKAGE),tests shared/tests packages)
EDITABLE := -e './shared[glyphs]' $(foreach p,$(PROJECTS),-e './packages/$(p)[all]')

comma := ,
empty :=
space := $(empty) $(empty)
ifdef PIP_FIND_LINKS
# Wheels at hand come first, so that nobody downloads what lies here already.
export UV_FIND_LINKS := $(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS)))
else
export UV_TORCH_BACKEND := $(TORCH)
endif
export UV_LINK_MODE ?= copy
UV = $(BIN)/uv

ifneq ($(PACKAGE),)
ifeq ($(filter $(PACKAGE),$(PROJECTS) shared),)
$(error no package '$(PACKAGE)'; there are: $(PROJECTS))
endif
endif

.PHONY: help setup demo test claims lint typecheck format build matrix bench flower docs release-check reproduce lock clean

help:  ## print the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  packages: $(PROJECTS)   (PACKAGE=name means one of them)"

setup: $(VENV)/.ready  ## make .venv with everything pinned (demo and test do this themselves)

$(VENV)/.ready: $(MANIFESTS) constraints.txt
	@echo "setting up .venv (once; takes a few minutes where PyTorch has to be downloaded)"
	@[ -x $(UV) ] || scripts/make-venv "$(VENV)"
	@$(UV) pip install --quiet --python $(BIN)/python -c constraints.txt $(EDITABLE) --group dev
	@touch $@

demo: $(VENV)/.ready  ## run each method on real data, two at a time, and make one page of it: runs/report/index.html
ifdef PACKAGE
	@$(BIN)/$(PACKAGE) demo --overwrite --out $(RUNS)/$(PACKAGE)/demo
else
	@$(BIN)/python scripts/demos.py $(BIN) $(RUNS)
endif

test: $(VENV)/.ready  ## the fast tests, on every core; WORKERS=0 runs them in one process, one after another
	@$(BIN)/pytest -m "not claims" -n $(or $(WORKERS),logical) --dist worksteal $(TESTS)

claims: $(VENV)/.ready  ## the papers' claims on real data, over several seeds (minutes)
	@JAXTYPING_DISABLE=1 $(BIN)/pytest -m claims $(TESTS)

lint: $(VENV)/.ready  ## ruff, formatting, and who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

typecheck: $(VENV)/.ready  ## pyright, strict on src
	@$(BIN)/pyright $(if $(PACKAGE),$(if $(filter shared,$(PACKAGE)),shared/src,packages/$(PACKAGE)/src))

format: $(VENV)/.ready  ## let ruff mend what it can
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

build: $(VENV)/.ready  ## wheel and sdist of the core and every package, into dist/
	@rm -rf dist
	@for d in shared $(CHOSEN:%=packages/%); do $(UV) build --quiet --out-dir dist $$d; done
	@ls -1 dist

matrix: build  ## each package from its wheel in an empty environment: its demo, then its tests
	@for p in $(CHOSEN); do scripts/try-wheel $(UV) $(BIN)/python $$p; done

bench: .venv-bench/.ready  ## race each package against its strongest peers, in an environment that has them
	@for p in $(CHOSEN); do for f in packages/$$p/benchmarks/race_*.py; do \
	  echo "== $$f"; .venv-bench/bin/python $$f; done; done

.venv-bench/.ready: $(VENV)/.ready
	@[ -x .venv-bench/bin/python ] || scripts/make-venv .venv-bench
	@$(UV) pip install --quiet --python .venv-bench/bin/python -c constraints.txt $(EDITABLE) --group bench
	@touch $@

flower: .venv-flower/.ready  ## fedapc on Flower, workers on Ray, in an environment of their own; CLAIMS=1 with real programs on loopback
	@FLWR_TELEMETRY_ENABLED=0 .venv-flower/bin/python -m pytest -q -m "not claims" \
	  packages/fedapc/tests/test_flower.py packages/fedapc/tests/test_flower_absent.py
	@.venv-flower/bin/python -m pytest -q -k cluster shared/tests/test_workers.py
	@[ -z "$(CLAIMS)" ] || FLWR_TELEMETRY_ENABLED=0 JAXTYPING_DISABLE=1 .venv-flower/bin/python -m pytest -q -m claims \
	  packages/fedapc/tests/test_flower_claims.py

.venv-flower/.ready: $(VENV)/.ready packages/fedapc/pyproject.toml packages/fedapc/constraints-flower.txt
	@[ -x .venv-flower/bin/python ] || $(UV) venv --quiet --python $(BIN)/python .venv-flower
	@$(UV) pip install --quiet --python .venv-flower/bin/python -c packages/fedapc/constraints-flower.txt \
	  -e './shared[glyphs]' -e './packages/fedapc[flower-simulation]' --group packages/fedapc/pyproject.toml:test
	@touch $@

reproduce: $(VENV)/.ready  ## the experiments at full size, their JSON to docs/results/; WORKERS=4, RAY=auto spread them
	@for p in $(CHOSEN); do $(BIN)/python scripts/reproduce.py $$p $(BIN) $(RUNS) \
	  $(if $(WORKERS),--workers $(WORKERS)) $(if $(RAY),--ray $(RAY)); done

docs: .venv-docs/.ready  ## build the site into build/site: tutorials are run, links are checked
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet
	@echo "build/site/index.html"

.venv-docs/.ready: $(VENV)/.ready
	@[ -x .venv-docs/bin/python ] || scripts/make-venv .venv-docs
	@$(UV) pip install --quiet --python .venv-docs/bin/python -c constraints.txt $(EDITABLE) --group docs
	@touch $@

release-check: .venv-release/.ready  ## see that what would be released can be: builds, metadata, licences, installation
	@$(BIN)/python scripts/release_check.py $(UV) .venv-release/bin

.venv-release/.ready: $(VENV)/.ready
	@[ -x .venv-release/bin/python ] || $(UV) venv --quiet --python $(BIN)/python .venv-release
	@$(UV) pip install --quiet --python .venv-release/bin/python -c constraints.txt --group release
	@touch $@

lock: $(VENV)/.ready  ## pin every dependency anew in constraints.txt
	@# Every extra but those of Flower, which asks for an older Typer: they have an environment of their own.
	@env -u UV_FIND_LINKS -u UV_TORCH_BACKEND $(UV) pip compile --quiet --universal --upgrade --python-version 3.11 \
	  --extra all --extra bcf --extra cevae --extra forests --extra glyphs --extra hershey --extra tables \
	  --group pyproject.toml:dev --group pyproject.toml:bench --group pyproject.toml:docs --group pyproject.toml:release --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links --no-emit-package shared-core \
	  shared/pyproject.toml $(PROJECTS:%=packages/%/pyproject.toml) -o constraints.txt
	@echo "constraints.txt: $$(wc -l < constraints.txt) pins"

clean:  ## remove environments, builds, caches and runs
	@rm -rf .venv .venv-bench .venv-docs .venv-flower .venv-release build dist runs .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
