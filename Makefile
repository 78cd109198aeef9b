# All targets set up what they need; PYTHON names the interpreter (>= 3.11) for the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check lint types docs results slow fuzz audit sbom clean

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

# Tables and figures of the pages, from the stored results (experiments/results/*.json).
results: $(STAMP)
	$(BIN)/python experiments/book.py pages
	$(BIN)/python docs/methods.py

# The documentation site, into site/. Its reference is read from the files that a wheel installs.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	rm -rf build .typecheck
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target .typecheck .
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	rm -rf build

# The long form of what `make check` has in short.
fuzz: $(STAMP)
	FUZZ=30 $(BIN)/python -m pytest tests/config/test_fuzz.py tests/runs/test_fuzz.py tests/rounds/test_admission.py

# Tests of more than a minute; run them before a release.
slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Known vulnerabilities of everything that is installed (asks PyPI's database), and the list of it that a release has.
# They are tools: an environment of their own keeps what they need out of the list.
AUDIT := .audit
$(AUDIT)/.installed: constraints.txt
	test -x $(AUDIT)/bin/python || $(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip-audit cyclonedx-bom
	touch $@

audit: $(STAMP) $(AUDIT)/.installed
	$(AUDIT)/bin/pip-audit --strict --skip-editable --path "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')"

sbom: $(STAMP) $(AUDIT)/.installed
	mkdir -p dist
	$(AUDIT)/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible \
		-o dist/fedmaestro.cdx.json $(BIN)/python

clean:
	rm -rf $(VENV) $(AUDIT) build dist site .typecheck .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
