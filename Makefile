# Every target but gpu sets itself up: a virtual environment of its own in .venv, torch unless PYTHON has one already, the
# extension built in place. A second call does only what changed; C++ is compiled again, Python needs nothing.
#   make demo    the examples: our layer beside torch's        make lint     format check, ruff, mypy
#   make test    the test suite (ARGS="-k word" and the like)  make format   formats C++ and Python
#   make bench   measurements (ARGS=...)                       make clean    removes what was built
#   make kernels reads what nvcc made of every CUDA kernel for every architecture that was built (no GPU needed)
#   make gpu     on a machine with an NVIDIA GPU, ten minutes: builds in place for that GPU, tests, sanitizer and
#                benchmark on it, results in benchmarks/results. Uses PYTHON as it is and installs nothing; needs nvcc,
#                a CUDA build of torch 2.11 or newer, pytest and NumPy. ARGS="--only smoke bench" runs a part.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Several processes test (WORKERS= for one, as --pdb needs); their threads do not keep a core busy while they wait.
WORKERS ?= --numprocesses auto --maxprocesses 4 --dist loadfile

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
SOURCES := setup.py pyproject.toml $(shell find build_backend csrc -not -name '__pycache__' -not -name '*.pyc')
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')
ENVIRONMENT := $(VENV)/.environment
BUILT := $(VENV)/.built
TOOLS := $(VENV)/.tools

.PHONY: demo test lint format bench kernels gpu clean

demo: $(BUILT)
	$(PY) examples/notebook.py
	$(PY) examples/digits.py
	$(PY) examples/processes.py

test: $(BUILT)
	OMP_WAIT_POLICY=passive $(PY) -m pytest $(WORKERS) $(ARGS)

lint: $(TOOLS)
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict bnext

format: $(TOOLS)
	$(VENV)/bin/clang-format -i $(CXX_FILES)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(TOOLS)
	$(PY) -m benchmarks $(ARGS)

gpu:
	@found=$$($(PYTHON) -m benchmarks.gpu --needs) && export TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$found}" && \
	  echo "building bnext for compute capability $$TORCH_CUDA_ARCH_LIST" && \
	  BNEXT_CUDA=1 $(PYTHON) setup.py --quiet build_ext --inplace && \
	  $(PYTHON) -m benchmarks.gpu $(ARGS)

kernels: $(TOOLS)
	$(PY) -m benchmarks.kernels $(ARGS)

clean:
	rm -rf build dist *.egg-info bnext/_C*.so bnext/_build_info.py .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find bnext build_backend tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +
	rm -f $(ENVIRONMENT) $(BUILT) $(TOOLS)

# A torch that PYTHON has is used, through --system-site-packages. That means the base interpreter's packages: where
# PYTHON is itself in a virtual environment, a path file adds that environment's.
$(ENVIRONMENT):
	@$(PYTHON) -c 'import sys; sys.exit("bnext needs Python 3.10 or newer (make PYTHON=...)" if sys.version_info < (3, 10) else 0)'
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	  echo "using the torch of $(PYTHON)"; \
	  $(PYTHON) -m venv --system-site-packages $(VENV); \
	  $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"; \
	else \
	  echo "setting up $(VENV) with $(TORCH)"; \
	  $(PYTHON) -m venv $(VENV) && $(PIP) install '$(TORCH)'; \
	fi
	@touch $@

$(BUILT): $(ENVIRONMENT) $(SOURCES)
	@echo "building bnext: compiles csrc, a few minutes the first time"
	@$(PIP) install --editable '.[test,examples]'
	@touch $@

$(TOOLS): pyproject.toml | $(BUILT)
	@$(PIP) install --editable '.[bench,lint]'
	@touch $@
