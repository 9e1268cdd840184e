# make demo: see it work.  make test: the test suite.  Both install what they need into .venv, once.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

# make demo-full: three seeds of the demo, 25 to 35 minutes.
.PHONY: setup demo demo-full test test-all gpu-check doctor lint clean

setup:
	@$(PYTHON) tools/install.py $(VENV)

demo: setup
	@$(RUN) tools/demo.py

demo-full: setup
	@$(RUN) tools/demo.py --seeds 1 2 3 --out runs/demo_full

test: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m pytest -m "not long"

test-all: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m pytest

# On a GPU machine with its packages installed: nothing is installed here. PYTHON is the interpreter to check.
gpu-check:
	@$(PYTHON) tools/gpu_check.py

doctor:
	@$(PYTHON) tools/doctor.py

lint: setup
	@$(RUN) -m ruff format .
	@$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis runs/demo
