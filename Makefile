# What one types here; `make` alone lists it. Everything runs in .venv, which is made once, the only time that needs a network.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test test-data lab docs quarto prepare clean

help:
	@echo "make demo      an agent learns a stream of tasks on real data, with and without memory: table, figure, runs/agent/"
	@echo "make test      run every chapter and every test, and count them"
	@echo "make test-data the chapters and tests that read real data sets, which are fetched where they are missing"
	@echo "make lab       read and change the book in JupyterLab"
	@echo "make docs      build the pages in _docs/ (needs Quarto)"
	@echo "make prepare   before a commit: clean, export, test, clean, README"
	@echo "make clean     remove what was built (not .venv, not runs)"

# One thread: the networks are small, and threads that wait for each other on a busy machine take five times as long.
demo: .venv/ready
	$(BIN)/memory_notebook run agent --data digits --seeds 3 --out runs

test: .venv/ready
	$(BIN)/python .ci/test.py

test-data: .venv/ready
	$(BIN)/python .ci/test.py --data

lab: .venv/ready
	$(BIN)/jupyter lab nbs/index.ipynb

# README.md is made first and is then the newer file, or nbdev_docs would make its own.
docs: quarto .venv/ready
	$(BIN)/python .ci/docs.py --readme
	touch README.md
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_docs

quarto:
	@command -v quarto >/dev/null || { echo "quarto is missing: see https://quarto.org/docs/get-started/"; exit 1; }

prepare: .venv/ready
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python .ci/test.py
	$(BIN)/nbdev_clean
	$(BIN)/python .ci/docs.py --readme

clean:
	rm -rf _docs _proc build dist .pytest_cache
	find memory_notebook nbs tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

# torch comes first and alone: it is most of the download, and an interrupted set-up then goes on behind it.
.venv/ready: settings.ini setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.10 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$$($(PYTHON) --version 2>&1) is too old: name a Python from 3.10 on, as in make PYTHON=python3.12 demo"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || { echo "Making .venv"; $(PYTHON) -m venv --clear .venv; }
	@echo "Installing into .venv, which takes a few minutes, once"
	@$(PIP) install -c constraints.txt torch && $(PIP) install -c constraints.txt -e '.[dev]' || \
		{ echo "The installation has not finished: the reason stands above. With a network, the same command goes on from here."; exit 1; }
	@touch $@
