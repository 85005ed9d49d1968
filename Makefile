# Sprat: two commands.   make quickstart   the whole road, then the chat page (SERVE=0 ends after the report)
#                        make test         the tests
# Also: make install, make lint, make clients, make nightly (hours), make clean.   Variables: SERVE SEED OUT TEXT PYTHON JOBS PYTEST
SHELL := /bin/sh
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# The version is read from pyproject.toml, so that it is written once.
TORCH := $(shell sed -n 's/^ *"\(torch==[0-9.]*\)",*$$/\1/p' pyproject.toml)
GYM := $(shell sed -n 's/^gym = \["\(reasoning-gym==[0-9.]*\)"\]$$/\1/p' pyproject.toml)

KERNELS := $(wildcard sprat/kernels/src/*)

SERVE ?= 1
SEED ?= 0
OUT ?= runs/quickstart
TEXT ?=
PYTHON ?=
JOBS ?= 2
PYTEST ?=

.PHONY: help quickstart test install browser clients lint nightly clean
help:
	@sed -n '1,3s/^# //p' Makefile

quickstart: $(VENV)/.installed
	@$(VENV)/bin/sprat quickstart --out "$(OUT)" --seed "$(SEED)" $(if $(TEXT),--text "$(TEXT)") \
	  $(if $(filter 0 no false,$(SERVE)),--no-serve,--serve)

# One torch thread for each test process: two processes share two cores without fighting for them. Compiled files are
# kept, whatever the shell says: a hundred processes would compile them anew.
test: $(VENV)/.installed-test browser
	@OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST)

install: $(VENV)/.installed

# A Python that is new enough and able to make environments. Looked for in this order; PYTHON=... comes first.
$(VENV)/.made:
	@echo "sprat: making $(VENV)"; seen=""; \
	for p in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python; do \
	  v=$$("$$p" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	  "$$p" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null \
	    || { seen="$$seen $$p is $$v;"; continue; }; \
	  "$$p" -c 'import ensurepip, venv' 2>/dev/null \
	    || { seen="$$seen $$p ($$v) has no venv module, on Debian: apt-get install python3-venv;"; continue; }; \
	  "$$p" -m venv $(VENV) && touch $@ && exit 0; exit 1; \
	done; \
	echo "sprat: no usable Python from 3.11 to 3.14 was found; seen:$${seen:- none at all} Install one, or name it: make PYTHON=/path/to/python3" >&2; \
	exit 9

# torch goes first and by plain pip: that takes the CPU build where one is at hand.
# reasoning-gym goes without its dependencies, then those that need no compiler; pycosat (C) only where it builds.
$(VENV)/.installed: pyproject.toml constraints.txt CMakeLists.txt $(KERNELS) | $(VENV)/.made
	@echo "sprat: installing $(TORCH) (1 of 3; the largest, be patient)"
	@$(PIP) install --quiet "$(TORCH)"
	@echo "sprat: installing sprat and what it needs (2 of 3)"
	@$(PIP) install --quiet -c constraints.txt -e '.[gym-pure,parquet]'
	@echo "sprat: installing the procedural tasks (3 of 3)"
	@$(PIP) install --quiet --no-deps "$(GYM)"
	@$(PIP) install --quiet -c constraints.txt pycosat >/dev/null 2>&1 \
	  || echo "sprat: pycosat was not built (no C compiler?): reasoning-gym's logic puzzles are left out, the rest works"
	@touch $@

# Only what is not there yet: Sprat itself, which takes a while to compile, is not installed a second time.
$(VENV)/.installed-test: $(VENV)/.installed
	@echo "sprat: installing what the tests need"
	@$(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["test"], sep="\n")' \
	  > $(VENV)/test-requirements.txt
	@$(PIP) install --quiet -c constraints.txt -r $(VENV)/test-requirements.txt
	@touch $@

# Chromium for the browser tests: by apt-get where we may, else those tests skip and say why.
browser:
	@if command -v chromium >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	  echo "sprat: installing chromium for the browser tests"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1 \
	    || echo "sprat: chromium could not be installed; the browser tests will skip"; \
	else echo "sprat: no chromium and no right to install it; the browser tests will skip"; fi

# Unchanged clients of OpenAI's and Anthropic's APIs, each in an environment of its own (600 MB); without them their tests skip.
clients: $(VENV)/.installed-test
	@echo "sprat: installing the clients that the server is tested with"
	@$(PY) -m bench.oracles clients clients-openai3 schemathesis

lint: $(VENV)/.installed-test
	@$(PY) -m ruff check . && $(PY) -m mypy && $(VENV)/bin/lint-imports

# What a night has time for: planted bugs, every setting of processor and threads, long fuzz, random models, and
# fine-tuning stopped at twenty instants of each kind, other ones every night (the seed is printed).
nightly: $(VENV)/.installed-test browser
	@$(PY) -m bench.mutants --jobs $(JOBS)
	@$(PY) -m bench.settings
	@$(PY) -m bench.random_configs --count 300
	@SPRAT_FUZZ=5000 SPRAT_FUZZ_DOMAINS=20000 SPRAT_ALL_TEMPLATES=1 $(PY) -m pytest -n $(JOBS) --dist loadfile \
	  tests/fault/test_names.py tests/unit/data/test_domains.py tests/parity/test_chat_templates.py
	@SPRAT_KILLS=20 SPRAT_KILLS_SEED=$$(date +%s) $(PY) -m pytest -rP tests/fault/test_finetune_resume.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
