# Everything is installed into .venv; all that is needed beforehand is Python (3.10 or newer, with venv) and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test test-long test-oldest test-newest api notebooks format clean

demo: $(VENV)/installed-experiments
	$(BIN)/python -m tf_dropmax.experiments demo $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto $(ARGS)

# What takes too long for every day: hundreds of other examples of each property, twenty kills.
test-long: export HYPOTHESIS_PROFILE = long
test-long: export TF_DROPMAX_KILLS = 20
test-long: test

# The same with the oldest dependencies that setup.cfg admits, its lower bounds, and with the newest that there are now.
test-oldest: .venv-oldest/constraints.txt
	PIP_CONSTRAINT='$(CURDIR)/$<' $(MAKE) test VENV=.venv-oldest

test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest

.venv-oldest/constraints.txt: setup.cfg
	rm -rf .venv-oldest
	mkdir .venv-oldest
	sed -n 's/^ *\([a-z-]*\)\(\[[a-z]*\]\)\{0,1\}>=\([0-9.]*\)$$/\1==\3/p' $< > $@

# The reference of all that is public, as web pages in build/api.
api: $(VENV)/installed-test
	$(BIN)/pdoc --docformat google --output-directory build/api tf_dropmax tf_dropmax.plots tf_dropmax.tuning

# Runs the notebooks and stores what they show in them.
notebooks: $(VENV)/installed-test
	TF_DROPMAX_STORE_NOTEBOOKS=1 $(BIN)/python -m pytest -n auto tests/test_notebooks.py
	$(BIN)/ruff format notebooks

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-oldest .venv-newest build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-%: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
