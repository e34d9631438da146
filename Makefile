# All that is needed beforehand: Python 3.11 with venv, git, make. Each target installs what it needs on first use.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# The commands of dvc.yaml call `python`: that of the environment.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help align ui test faults soak bench check lock

help:
	@echo "make align   run the pipeline: data, reward model, PPO, evaluation, registration"
	@echo "             PROFILE=harmless-cpu: with what profiles/harmless-cpu.yaml says over params.yaml"
	@echo "make ui      start the Prefect and MLflow UIs on this machine; Ctrl-C ends both"
	@echo "make test    run the tests"
	@echo "make faults  break it in the known ways and print what happened: fault, expected, seen"
	@echo "make soak    kill a tiny training 50 times at random and compare it with one left alone"
	@echo "make bench   time an iteration against TRL's on the same work (TRL gets an environment of its own)"
	@echo "make check   lint, formatting, types, import contract"
	@echo "make lock    bring requirements.lock and requirements-dev.lock up to date with the .in files"

align: $(VENV)/ready
	@$(BIN)/python -m flows.align $(if $(PROFILE),--profile $(PROFILE))

ui: $(VENV)/ready
	@$(BIN)/python -m flows.ui

# A process for each core; the tests of a file stay together, because they share what its fixtures make.
test: $(VENV)/ready-dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

faults: $(VENV)/ready-dev
	$(BIN)/python -m pytest -m "fault and not gpu"

soak: $(VENV)/ready-dev
	@$(BIN)/python tests/soak.py $(SOAK)

bench: $(VENV)/ready
	@test -d models/base || $(BIN)/python -m tasks ingest
	@$(BIN)/python -m benchmarks $(BENCH)

check: $(VENV)/ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

lock: $(VENV)/ready-dev
	$(foreach file,requirements requirements-dev,$(BIN)/uv pip compile $(file).in --output-file $(file).lock --quiet \
		--universal --python-version 3.11 --generate-hashes --no-annotate --custom-compile-command "make lock" \
		--excludes requirements-torch.txt &&) true

# Built anew when the lock changes. What pip installs from the lock it checks against the hashes there. The lock has all that its
# packages need, but for torch; without --no-deps pip would look for torch with a hash.
$(VENV)/ready: requirements.lock requirements-torch.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not here: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing the locked packages into $(VENV). This takes some minutes, and is not needed again."
	@$(PYTHON) -m venv --clear $(VENV)
	@echo "1/2 packages"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements.lock
	@echo "2/2 torch"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-torch.txt
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.lock
	@echo "Installing the tools of the tests"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.lock
	@touch $@
