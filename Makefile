# make golden   the main job: set up, generate every suite, verify, check a sample port, show the tables
# make test     set up and run the tests
# make lint     ruff and mypy
# make crosscheck-env   add torch and transformers (large), which the tests marked `crosscheck` need
# make plot-env         add matplotlib, which the tests of pictures need

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
OUT ?= build/golden

.PHONY: golden test lint crosscheck-env plot-env clean

golden: $(VENV)/.package
	$(BIN)/refimpl golden generate --out $(OUT) --jobs $(JOBS)
	$(BIN)/refimpl golden list $(OUT)
	$(BIN)/refimpl golden verify golden --jobs $(JOBS)
	$(BIN)/python golden/sample_port.py --demo --cases $(OUT)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

crosscheck-env: $(VENV)/.crosscheck

plot-env: $(VENV)/.plot

$(VENV)/.package: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.test $(VENV)/.lint $(VENV)/.crosscheck $(VENV)/.plot: $(VENV)/.%: $(VENV)/.package
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build
