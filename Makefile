# make demo: install and run the main job on this machine's CPU. make test: install and pass the tests. make gpu: install
# for an NVIDIA GPU, into a virtual environment of its own.
PYTHON ?= python3
VENV ?= .venv
LOCK := requirements/cpu.txt
STAMP := $(VENV)/.installed
GPU_VENV ?= .venv-gpu

.PHONY: demo install gpu test test-slow test-slurm check

demo: $(STAMP)
	$(VENV)/bin/rapo demo --out runs/demo

install: $(STAMP)

$(STAMP): $(LOCK) requirements/install.sh pyproject.toml
	@requirements/install.sh $(PYTHON) $(VENV) $(LOCK)
	@touch $@

gpu: $(GPU_VENV)/.installed

$(GPU_VENV)/.installed: requirements/gpu.txt requirements/install.sh pyproject.toml
	@requirements/install.sh $(PYTHON) $(GPU_VENV) requirements/gpu.txt
	@touch $@

# By file on two processes: the trainings of test_runs.py beside everything else.
test: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(VENV)/bin/python -m pytest -m slow

# On a mini Slurm cluster in namespaces: root and Debian's slurmctld slurmd slurm-client munge shellcheck; skipped without.
test-slurm: $(STAMP)
	$(VENV)/bin/python -m pytest -m slurm tests/slurm

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
