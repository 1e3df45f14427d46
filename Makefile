# The commands of the project; CI runs the same ones.
#   make train   environment, install, train the default model (again: goes on, or says it is done)
#   make test    format, lint, types and the whole test suite
#   make check   format, lint and types only;  make format  mends what can be mended

PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test check format golden clean

train: .venv/installed
	$(BIN)/python launch.py train --config=configs/shakespeare.py --workdir=runs/shakespeare

test: check
	$(BIN)/python -m pytest

check: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# After an intended change of a recipe, of a sharding or of the numerics: write what the tests
# compare with anew, and read the difference before committing it.
golden: .venv/installed-test
	GPTJAX_UPDATE_GOLDEN=1 $(BIN)/python -m pytest tests/test_configs.py tests/test_curve.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gptjax needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,reference]'
	@touch $@

clean:
	rm -rf .venv .jax_cache .mypy_cache .pytest_cache .ruff_cache
