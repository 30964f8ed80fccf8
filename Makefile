# One command per intention; `make help` lists them. GNU make 3.81 or later.
#   make book PROFILE=smoke|quick|full CHAPTERS="03_temperature"

PROFILE  ?= quick
CHAPTERS ?=
WORKERS  ?= 2
PORT     ?= 8000

VENV := .venv
BIN  := $(VENV)/bin
BOOK := $(VENV)/.installed
DEV  := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help env data book lab reference site serve test torture lint format bench bench-gpu clean distclean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

env: $(DEV) ## make .venv with everything that changing the book takes

data: $(BOOK) ## fetch MNIST and check it
	$(BIN)/kdlib data mnist --fetch

book: $(BOOK) ## execute the chapters and render _build/html/index.html
	$(BIN)/kdlib run --profile $(PROFILE) $(CHAPTERS)
	$(BIN)/kdlib build

lab: $(BOOK) ## open the chapters in JupyterLab
	$(BIN)/jupyter lab book

reference: $(BOOK) ## record the results of PROFILE in book/reference, and in the text
	$(BIN)/kdlib reference record --profile $(PROFILE) $(CHAPTERS)
	$(BIN)/python tools/fill.py

site: $(BOOK) ## render again what has been executed
	$(BIN)/kdlib build

serve: ## read the book at http://localhost:8000 (PORT=…)
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

# One thread per worker: more of them than cores slow each other down tenfold.
test: lint ## everything that checks the project
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

torture: $(DEV) ## ten minutes of kills, flipped bytes and full disks (TORTURE_SECONDS=…)
	PYTHONPATH=tests $(BIN)/python -m torture

lint: $(DEV) ## style, types and clean notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/normalise.py --check
	$(BIN)/mypy

format: $(DEV) ## put code, notebooks and recorded numbers into their one form
	$(BIN)/python tools/fill.py
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python tools/normalise.py

bench: $(DEV) ## speed against the loops that people use
	$(BIN)/python -m benchmarks

bench-gpu: ## a GPU's part, by the PyTorch at hand (OUT=folder for its record)
	$(or $(PYTHON),$(wildcard $(BIN)/python),python3) -m benchmarks --gpu $(if $(OUT),--results $(OUT))

clean: ## remove what was built; the environment and the store of runs stay
	rm -rf _build .mypy_cache .pytest_cache .ruff_cache .hypothesis

distclean: clean ## remove the environment too
	rm -rf $(VENV)

# `.installing` stands from before the first byte to after the last: where one is left, an
# install was cut short, and what it half wrote goes with the whole environment.
$(BOOK): EXTRA = book
$(DEV): EXTRA = dev
$(BOOK) $(DEV): pyproject.toml constraints.txt
	@test ! -e $(VENV)/.installing || rm -rf $(VENV)
	@mkdir -p $(VENV) && touch $(VENV)/.installing && rm -f $(BOOK) $(DEV)
	@test -x $(BIN)/python || { \
	  for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	    $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	      2>/dev/null && exec $$python -m venv $(VENV); \
	  done; \
	  echo "make: found no Python 3.11 or later that can make environments." >&2; \
	  echo "Install one (Debian: python3-venv too) or name one: make PYTHON=/path/to/python3" >&2; \
	  exit 1; }
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$(EXTRA)]'
	@mv $(VENV)/.installing $@ && touch $(BOOK)
