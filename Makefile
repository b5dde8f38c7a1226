# Everything is installed into .venv. All that is needed beforehand is make and Python (3.10 or
# newer, with venv).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo check check-oldest test test-long test-oldest test-newest api notebooks format clean

demo: $(VENV)/installed-experiments
	$(BIN)/python -m tf_dropmax.experiments demo $(ARGS)

# Style, types and the fast unit tests.
check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto -m "not long and not slow" tests/unit $(ARGS)

# Everything that a change can break.
test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto -m "not long" $(ARGS)

# What takes long: kills, several processes, notebooks, hundreds of examples of each property.
test-long: export HYPOTHESIS_PROFILE = long
test-long: export TF_DROPMAX_KILLS = 20
test-long: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto -m long $(ARGS)

# The fast unit tests, or all tests, with the oldest dependencies that setup.cfg admits, its lower
# bounds; and all tests with the newest that there are now.
check-oldest: .venv-oldest/constraints.txt
	PIP_CONSTRAINT='$(CURDIR)/$<' $(MAKE) check VENV=.venv-oldest

test-oldest: .venv-oldest/constraints.txt
	PIP_CONSTRAINT='$(CURDIR)/$<' $(MAKE) test VENV=.venv-oldest

test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest

.venv-oldest/constraints.txt: setup.cfg
	rm -rf .venv-oldest
	mkdir .venv-oldest
	sed -n 's/^ *\([a-z-]*\)\(\[[a-z]*\]\)\{0,1\}>=\([0-9.]*\)$$/\1==\3/p' $< > $@
	# Newer versions of onnx need a newer ml_dtypes than TensorFlow 2.17 admits.
	echo 'onnx<1.18' >> $@

# The API reference, as web pages in build/api.
api: $(VENV)/installed-test
	$(BIN)/pdoc --docformat google --output-directory build/api tf_dropmax tf_dropmax.plots tf_dropmax.tuning

# Runs the notebooks and stores their outputs.
notebooks: $(VENV)/installed-test
	TF_DROPMAX_STORE_NOTEBOOKS=1 $(BIN)/python -m pytest -n auto -m long tests/integration/test_notebooks.py
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
