# make demo    Train on real digits, draw samples and evaluate them.
# make test    Run the tests.
# make slow    Run the full matrices, of which `make test` runs representative cases.
# make parity  Compare samplers and networks with the peers of requirements-peers.txt.
# make chaos   Kill, stop, hang and fill the disk of trainings, about a hundred times: half an hour.
# make system  Test sweeps in a browser and on a one-node Slurm: requires chromium, slurmctld, slurmd, munge, and root.
# make fuzz    Try 2,500 random invalid inputs.
# make orders  Print the order of accuracy of every solver.
# make lint    Run ruff, check and format.
# Each target sets up .venv as it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/digits
TRAIN_FLAGS ?=

.PHONY: demo test slow parity system chaos fuzz orders lint clean

$(VENV)/base: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is required, this is " + sys.version.split()[0] + "; set PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/dev: $(VENV)/base requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/peers: $(VENV)/dev requirements-peers.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-peers.txt
	@touch $@

demo: $(VENV)/base
	$(BIN)/python -m experiments.train --config=configs/digits.py --workdir=$(WORKDIR) $(TRAIN_FLAGS)
	$(BIN)/python -m experiments.sample --workdir=$(WORKDIR) --num=100
	$(BIN)/python -m experiments.evaluate --workdir=$(WORKDIR)

test: $(VENV)/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

slow: $(VENV)/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not peers and not chaos"

parity: $(VENV)/peers
	$(BIN)/python -m pytest -n 2 --dist worksteal -m peers

$(VENV)/system: $(VENV)/dev requirements-system.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-system.txt
	@touch $@

system: $(VENV)/system
	$(BIN)/python -m pytest -m system

fuzz: $(VENV)/dev
	FUZZ=2500 $(BIN)/python -m pytest tests/experiments/test_fuzz.py

chaos: $(VENV)/dev
	CHAOS=5 $(BIN)/python -m pytest -s -m "chaos or not chaos" tests/chaos

orders: $(VENV)/base
	$(BIN)/python -m experiments.orders

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs
