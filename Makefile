# make demo    pre-train a small model on generated scenes and show what it learned
# make test    lint, then the default tests
# make slow    the tests that take minutes

VENV ?= .venv
PYTHON ?= python3
OUT ?= runs/demo
BIN := $(VENV)/bin

.PHONY: demo test slow install
install: $(BIN)/.installed

# The index's newest torch and torchvision are built for each other; pip must be left to choose both.
$(BIN)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing torch and what else is needed; this takes minutes and gigabytes"
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev,photos]'
	touch $@

demo: $(BIN)/.installed
	ACCELERATE_USE_CPU=true $(BIN)/accelerate launch --config_file configs/accelerate/demo.yaml \
	  pretrain/train.py configs/pretrain/demo.yaml out=$(OUT)

test: $(BIN)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

slow: $(BIN)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --timeout 3600
