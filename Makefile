# make install | demo | serve-demo | test | test-all | browser | coverage | lint | types | format | bench | soak | docs | clean
#
# PYTHON       the interpreter that .venv is made with (3.11 or newer)
# WORKERS      processes of make test, each with one thread: auto (one a core, at most four), or 0 for none
# TURNS        of the soak, e.g. make soak TURNS=6 SOAK_CAP=12MiB POSITIONS=1800
# CFLAGS       of make install's compiled attention, e.g. "-Wall -Wextra -Werror"
# TORCH_INDEX  where torch comes from, e.g. https://download.pytorch.org/whl/cpu; empty: pip's own index

TORCH_INDEX ?=
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

WORKERS ?= auto
TURNS ?= 200
SOAK_CAP ?= 16MiB
POSITIONS ?= 0

CORE := engine memory planning
comma := ,
space := $(subst ,, )
BIN := .venv/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALLED := .venv/.installed
SITE := build/site
SOURCES := $(shell find agentmem policies -name '*.py' -o -name '*.pyi' -o -name '*.c') pyproject.toml

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install model demo serve-demo test test-all browser coverage lint types format bench soak docs clean

help:
	@sed -n '1,7s/^# \{0,1\}//p' Makefile

install: $(INSTALLED)

$(PY):
	@test -n "$(PYTHON)" || { echo "agentmem needs Python 3.11 or newer; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv

$(INSTALLED): pyproject.toml constraints.txt $(wildcard agentmem/attention/*.[ch]) | $(PY)
	$(if $(TORCH_INDEX),$(PIP) install --constraint constraints.txt --index-url $(TORCH_INDEX) torch)
	$(PIP) install --constraint constraints.txt --editable '.[adapters,cli,dev,docs,eval,server]'
	@touch $@

model: install
	$(BIN)/agentmem model fetch

# First a task that a window fails and agentmem does, at equal bytes; then a long thought, for the picture of its memory.
demo: model
	@mkdir -p build/demo
	$(BIN)/agentmem ablate demos/evidence.yaml --out build/demo/evidence
	$(BIN)/agentmem run --prompt-file demos/long_task.txt --cap 16MiB --policy am-halving --max-new-tokens 1500 \
		--ignore-eos --temperature 0.95 --top-p 0.95 --seed 7 \
		--plot build/demo --json build/demo/report.json --trace build/demo/trace.jsonl

# The server, and the real OpenAI client against it: streaming, several caps, compaction, a restart.
serve-demo: model
	$(PY) demos/07_serve.py

# The dashboard in Debian's Chromium: its console, its charts, and pictures of it in build/browser.
browser: install
	PYTHONPATH=tests $(PY) -m browser.dashboard

# Those of the core come first, with the lines that they run, and then all others.
test: model coverage
	$(PY) -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal --durations 10 $(CORE:%=--ignore=tests/%)

# All combinations of the parameters of which `make test` runs those that have every two values together.
test-all: model
	$(PY) -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal --exhaustive

# Lines of the packages that hold the cap which their own tests run. All of the suite would take a third longer.
coverage: model
	@mkdir -p build
	$(PY) -m slipcover --source $(subst $(space),$(comma),$(CORE:%=agentmem/%)) --out build/coverage.txt \
		-m pytest -q -n $(WORKERS) --maxprocesses 4 -W "ignore:Module already imported:pytest.PytestAssertRewriteWarning" \
		$(CORE:%=tests/%)
	@echo "lines of $(CORE) that their tests run: $$(awk '/^[(]summary[)]/ { print $$NF }' build/coverage.txt) %, see build/coverage.txt"

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The wheel is what users get, and the only place where agentmem.policies is a folder that mypy sees.
types: $(SITE)/.built
	cd $(SITE) && ../../$(PY) -m mypy --config-file ../../pyproject.toml -p agentmem

# Its compiled attention, which takes half a minute, is left out: mypy reads what it is from the .pyi files.
$(SITE)/.built: $(SOURCES) | $(INSTALLED)
	rm -rf build/lib* build/temp* build/bdist.* build/wheel $(SITE)
	CC=false $(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(PIP) install --quiet --no-deps --target $(SITE) build/wheel/*.whl
	cd $(SITE) && ../../$(PY) -P -c 'import sys; sys.path.insert(0, "."); import agentmem.policies.am_halving as p; print("wheel:", p.__file__)'
	@touch $@

bench: install
	@mkdir -p build
	$(PY) -m benchmarks.decode

soak: model
	$(PY) -m benchmarks.soak --turns $(TURNS) --cap $(SOAK_CAP) --positions $(POSITIONS)

# The guide, and the reference out of the docstrings, as one site that can be searched; a dead link ends the build.
docs: install
	$(PY) -m mkdocs build --strict --quiet --site-dir build/docs

clean:
	rm -rf build dist *.egg-info agentmem/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis out
