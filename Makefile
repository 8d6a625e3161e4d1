# make demo: set up .venv and run the whole job on the packaged default. make test: set up and run all tests.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# Installed with the tests' packages; a newer pyproject.toml installs again, otherwise nothing is fetched.
READY := $(VENV)/.ready

.PHONY: demo test slow gpu dev lint clean
.DELETE_ON_ERROR:

$(READY): pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit("crumb needs Python 3.11 or newer; say make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[test,dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/crumb demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -m "not slow and not gpu" -n auto --maxprocesses 8 --dist loadfile

slow: $(READY)
	$(BIN)/python -P -m pytest -m slow

# Needs a CUDA GPU: the tests that do, then the measurements that go to benchmarks/results.
gpu: $(READY)
	$(BIN)/python -P -m pytest -m gpu
	$(BIN)/python -P benchmarks/kernels.py

lint: $(READY)
	$(BIN)/ruff check .

# For editors and type checkers that don't run import hooks: crumb.engine as .dev/crumb/engine.
dev: $(READY)
	mkdir -p .dev && ln -sfn .. .dev/crumb

clean:
	rm -rf $(VENV) .dev build *.egg-info
