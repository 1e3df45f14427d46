# The commands of the project; CI runs the same ones.
#   make train   environment, install, train the default model (again: goes on, or says it is done)
#   make test    format, lint, types and the whole test suite
#   make quick   floors and the tests of what differs from main, for at most 90 seconds
#   make check   format, lint and types only;  make format  mends what can be mended
#   make docs    the site of the documents and docstrings, into site/
#   make compilers  the tests of plans that ask the compilers of TPUs and GPUs (1.1 GB to download)
#   make lanes   the suite on the oldest and the newest versions that pyproject.toml allows

PYTHON ?= python3
BIN := .venv/bin

# The ends of requires-python; uv finds these interpreters, or downloads them.
OLDEST_PYTHON ?= 3.11
NEWEST_PYTHON ?= 3.13

# Files of tests go to so many processes, of some 3 GB each.
JOBS ?= 2
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: train test quick check format docs compilers lanes golden clean

train: .venv/installed
	$(BIN)/python launch.py train --config=configs/shakespeare.py --workdir=runs/shakespeare

test: check
	$(BIN)/python -m pytest $(PARALLEL)

# No test starts after 70 s; a warm .jax_cache makes most of them short.
quick: .venv/installed-test
	$(BIN)/python -m pytest -m "not slow" --durations=3 --seconds=70 $$($(BIN)/python -m tests.changed)

check: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Strictly: a link or reference that leads nowhere, or a docstring that cannot be read, fails it.
# mkdocs warns of its version 2, which pyproject.toml does not allow.
docs: .venv/installed-docs
	rm -rf build/pages && mkdir -p build/pages
	for page in README.md CONTRIBUTING.md CHANGELOG.md docs experiments configs; do \
		ln -s ../../$$page build/pages/$$page || exit; done
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Beside the environment: jax would speak of a GPU that is not there at the start of every command.
compilers: .venv/installed-test .compilers/installed
	PYTHONPATH=.compilers $(BIN)/python -m pytest tests/test_plan.py -k compiler

.compilers/installed: constraints.txt | .venv/installed-test
	rm -rf .compilers
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --target .compilers \
		libtpu jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12 nvidia-cudnn-cu12
	@touch $@

# Without the extra `reference`: newer Pythons get torch with CUDA only, 3 GB. Each lane has a cache
# of compiled programs of its own.
lanes: .lanes/oldest .lanes/newest
	for lane in oldest newest; do JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.lanes/cache-$$lane \
		.lanes/$$lane/bin/python -m pytest $(PARALLEL) || exit; done

.lanes/oldest: VERSION = $(OLDEST_PYTHON)
.lanes/oldest: RESOLUTION = lowest-direct
.lanes/newest: VERSION = $(NEWEST_PYTHON)
.lanes/newest: RESOLUTION = highest
.lanes/oldest .lanes/newest: pyproject.toml | .lanes/uv
	.lanes/uv/bin/uv venv --quiet --clear --python $(VERSION) $@
	.lanes/uv/bin/uv pip install --quiet --python $@ --resolution $(RESOLUTION) --editable '.[test]'
	@touch $@

.lanes/uv:
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet uv

# After an intended change of a recipe, of a sharding or of the numerics: write what the tests
# compare with anew, and read the difference before committing it.
golden: .venv/installed-test
	GPTJAX_UPDATE_GOLDEN=1 $(BIN)/python -m pytest tests/test_configs.py tests/test_curve.py tests/test_speed.py

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

.venv/installed-docs: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

clean:
	rm -rf .venv build/pages site .compilers .lanes .jax_cache .mypy_cache .pytest_cache .ruff_cache
