# All targets set up what they need; PYTHON names the interpreter (>= 3.11) for the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check lint types docs slow fuzz clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# PyTorch first and by itself: the pinned build is then what every other package's requirement finds.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/fedmaestro run

# A process per core, four at the most: each loads PyTorch.
test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What CI runs.
check: lint types test

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The installed wheel is what gets checked: in a checkout, strategies/ and clients/ are not below fedmaestro/.
types: $(STAMP)
	rm -rf build .typecheck
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target .typecheck .
	cd .typecheck && ../$(BIN)/mypy --cache-dir ../.mypy_cache --config-file ../pyproject.toml -p fedmaestro
	rm -rf build

# The documentation site, into site/. Its reference is read from the files that a wheel installs.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	rm -rf build .typecheck
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target .typecheck .
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	rm -rf build

# Tests of more than a minute; run them before a release.
# The long form of what `make check` has in short.
fuzz: $(STAMP)
	FUZZ=30 $(BIN)/python -m pytest tests/config/test_fuzz.py tests/runs/test_fuzz.py

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) build dist site .typecheck .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
