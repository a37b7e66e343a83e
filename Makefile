# make quickstart: a real model on real data, from nothing.  make test: the tests, from nothing.
VENV ?= .venv
PYTHON ?= python3
# Installed only where the environment has no torch yet; on a GPU machine: make TORCH="torch" quickstart
TORCH ?= torch==2.13.0
SHELL := /bin/bash
BIN := $(abspath $(VENV))/bin
# Deferred: DeepSpeed looks for ninja on the PATH, and runs on the CPU only if told so.
RUN = PATH="$(BIN):$$PATH" $$("$(BIN)/python" -c 'import torch; print("" if torch.cuda.is_available() else "env DS_ACCELERATOR=cpu OMP_NUM_THREADS=1")')
RANKS ?= 2
# Processes that run tests; each has ranks of its own.
WORKERS ?= 2
# On a CPU bf16 takes twice as long as fp32, or half, by its units: both are timed.
PRECISION = $$("$(BIN)/python" -c 'import timeit, torch; seconds = lambda x: min(timeit.repeat(lambda: x @ x, number=3)); x = torch.ones(1024, 1024); \
	print("" if torch.cuda.is_available() or seconds(x.bfloat16()) < seconds(x) else "--precision fp32")')

QUICKSTART = --model quickstart/model --train_file quickstart/train.jsonl --eval_file quickstart/heldout.jsonl \
	--max_length 256 --micro_batch 2 --max_steps 60 --samples 1 --logging_steps 5 --no_save --overwrite
LOSIA_FLAGS = --losia --losia_config short --learning_rate 2e-3
FULL_FLAGS = --learning_rate 5e-5

.PHONY: venv quickstart quickstart-4bit quickstart-full test test-full test-axolotl test-releases lint format clean

venv: $(VENV)/.ready

$(VENV)/.ready: setup.cfg pyproject.toml requirements/quickstart.txt
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade pip "setuptools>=77" wheel
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[deepspeed,quickstart,dev]'
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements/quickstart.txt
	@touch $@

quickstart: venv
	$(RUN) python launch/prepare_quickstart.py --output quickstart
	$(RUN) deepspeed --num_accelerators $(RANKS) launch/train.py $(LOSIA_FLAGS) --deepspeed configs/deepspeed/zero2.json \
		$(QUICKSTART) $(PRECISION) --output_dir runs/quickstart-losia

# The same run over a base in 4 bits.
quickstart-4bit: venv
	$(RUN) python launch/prepare_quickstart.py --output quickstart
	$(RUN) deepspeed --num_accelerators $(RANKS) launch/train.py $(LOSIA_FLAGS) --quantization nf4 --deepspeed configs/deepspeed/zero2.json \
		$(QUICKSTART) $(PRECISION) --output_dir runs/quickstart-4bit

# The same run without --losia: every weight trains, for comparison.
quickstart-full: venv
	$(RUN) python launch/prepare_quickstart.py --output quickstart
	$(RUN) deepspeed --num_accelerators $(RANKS) launch/train.py $(FULL_FLAGS) --deepspeed configs/deepspeed/zero2.json \
		$(QUICKSTART) $(PRECISION) --output_dir runs/quickstart-full

test: venv
	$(RUN) python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-full: venv
	$(RUN) python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not gpu"

# axolotl pins other releases of Transformers, TRL and Accelerate: its plugin is tested in an environment of its own.
AXOLOTL_VENV ?= .venv-axolotl
test-axolotl: venv
	@test -x $(AXOLOTL_VENV)/bin/axolotl || { $(PYTHON) -m venv $(AXOLOTL_VENV) && $(AXOLOTL_VENV)/bin/pip install -q "$(TORCH)" "axolotl==0.19.*"; }
	$(RUN) env LOSIA_AXOLOTL_BIN="$(abspath $(AXOLOTL_VENV))/bin" python -m pytest -q tests/integrations/test_axolotl.py

# The oldest and the newest releases that setup.cfg admits, each in an environment of its own; the table of docs/releases.md.
RELEASES ?= oldest newest
test-releases:
	$(PYTHON) tests/releases.py $(RELEASES)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf quickstart runs build *.egg-info
