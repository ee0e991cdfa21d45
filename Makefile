# Every step from a bare machine with Python 3.11 or newer: `make demo` and `make test` install what they need into .venv.

PYTHON ?= python3
BIN := .venv/bin
INTEROP := .venv-interop

.PHONY: demo test lint check fuzz wheel docs gpu-compile gpu-rehearsal interop interop-venv bench clean

.venv/runtime: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

# Torch by its exact version first: another request may bring gigabytes of CUDA libraries that no test needs.
.venv/tools: .venv/runtime
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,dev]'
	touch $@

demo: .venv/runtime
	$(BIN)/jgptq demo

test: lint check wheel

lint: .venv/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: .venv/tools
	$(BIN)/pytest --numprocesses 2 --dist worksteal --max-worker-restart 0 --durations 15 --ignore=tests/interop

# Checkpoint folders damaged at random, more cases than the tests run.
fuzz: .venv/tools
	PYTHONPATH=tests/support $(BIN)/python -m fuzz --cases 20000

# The tables of options in docs/options.md, from their declarations.
docs: .venv/runtime
	$(BIN)/python docs/make_options.py

# What users install, imported from another directory, with its embedded model.
wheel: .venv/tools
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist . >/dev/null
	scratch=$$(mktemp -d) && bin=$$(pwd)/$(BIN) \
	  && $$bin/pip install --quiet --disable-pip-version-check --no-deps --target $$scratch dist/*.whl \
	  && cd $$scratch && PYTHONPATH=$$scratch $$bin/python -c "$$WHEEL_CHECK" && rm -rf $$scratch

define WHEEL_CHECK
import os, converters, jgptq, pallas_kernels, jgptq.tinycode
for module in (jgptq, converters, pallas_kernels):
    assert os.path.realpath(module.__file__).startswith(os.path.realpath(os.getcwd())), module.__file__
print('wheel:', len(converters.load_hf(jgptq.tinycode.FOLDER).layers), 'blocks in the embedded model')
endef
export WHEEL_CHECK

# The GPU compiler and an assembler alone, without CUDA's libraries, in a folder of their own: elsewhere jax would look for a GPU.
.aot/ready: .venv/tools
	version=$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)') \
	  && $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .aot \
	    jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version nvidia-cuda-nvcc==13.0.88 nvidia-cuda-nvdisasm==13.5.37
	touch $@

# Every kernel compiled for an H200 that need not be there, against the recorded registers, spills and instructions.
gpu-compile: .aot/ready
	PYTHONPATH=.aot $(BIN)/python benchmarks/gpu/compile_kernels.py

# What runs on a GPU, on a CPU with tiny shapes: every script to its end.
gpu-rehearsal: .venv/tools
	$(BIN)/python benchmarks/gpu/run_all.py --rehearse

# Peers bring a torch and a transformers of their own.
$(INTEROP)/ready:
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(INTEROP)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 gptqmodel==7.6.0 compressed-tensors==0.20.0
	touch $@

interop-venv: $(INTEROP)/ready .venv/tools

interop: interop-venv
	$(BIN)/pytest --numprocesses 2 tests/interop

bench: interop-venv
	$(BIN)/python benchmarks/bench_quantize.py
	$(BIN)/python benchmarks/bench_memory.py

clean:
	rm -rf .venv .aot $(INTEROP) dist
