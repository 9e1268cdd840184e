# make demo: see it work.  make test: the test suite.  Both install what they need into .venv, once.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# Two test files at a time: more would not fit into the memory of a small machine.
TOGETHER = -n 2 --dist loadfile
# make soak SOAK="--kills 100 --minutes 120"
SOAK ?=

# make demo-full: three seeds of the demo, 25 to 35 minutes.
.PHONY: setup demo demo-full test test-all soak gpu-check doctor lint clean

setup:
	@$(PYTHON) tools/install.py $(VENV)

demo: setup
	@$(RUN) tools/demo.py

demo-full: setup
	@$(RUN) tools/demo.py --seeds 1 2 3 --out runs/demo_full

test: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m pytest -m "not long" $(TOGETHER)

test-all: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m pytest $(TOGETHER)

# Kills a training again and again and compares it with an undisturbed one: 20 kills or 20 minutes.
soak: setup
	@$(RUN) tools/soak.py $(SOAK)

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
