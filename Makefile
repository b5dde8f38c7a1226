# Everything is installed into .venv; all that is needed beforehand is Python (3.10 or newer, with venv) and make.
PYTHON ?= python3
BIN := .venv/bin
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test format clean

demo: .venv/installed-experiments
	$(BIN)/python -m tf_dropmax.experiments demo $(ARGS)

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto $(ARGS)

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/installed-%: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
