# Two commands need Python 3.11 (or later) and make, nothing else: `make demo` and `make test`.

.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
UV := .boot/bin/uv

.PHONY: help demo test lint verify generate bench bench-router clean e2e e2e-local e2e-kubernetes e2e-rollouts e2e-thousand e2e-ranks e2e-autoscaler images gpu-test gpu-bench

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# uv (from PyPI, in an environment of its own) installs the pinned set in seconds.
$(UV):
	@test -n "$(PYTHON)" || { echo "Shoal needs Python 3.11 or later, and found none. Install it, or say where it is: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Shoal needs Python 3.11 or later, but $(PYTHON) is $$($(PYTHON) -V). Say where a later one is: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .boot || { rm -rf .boot; echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@free=$$(df -Pk . | awk 'NR==2 {print $$4}'); test "$$free" -gt 7000000 || { echo "Shoal needs about 7 GB of disk (nearly all of it torch), but $$((free / 1000000)) GB are free here. Make room and run the command again."; exit 1; }
	@.boot/bin/python -m pip install --quiet --disable-pip-version-check "uv>=0.8"

# Installing also compiles the native kernels, where there is a C++ compiler.
NATIVE := hatch_build.py kernels/native_build.py $(wildcard kernels/shoal/kernels/csrc/*)

$(VENV)/run.stamp: $(UV) pyproject.toml constraints.txt $(NATIVE)
	@test -x $(BIN)/python || $(UV) venv --quiet --python "$(PYTHON)" $(VENV)
	@echo "Installing Shoal and its pinned dependencies into $(VENV) ..."
	@$(UV) pip install --python $(BIN)/python --constraint constraints.txt --editable ".[all]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	@$(UV) pip install --python $(BIN)/python --constraint constraints.txt --editable ".[all,ray,bench,dev]"
	@touch $@

demo: $(VENV)/run.stamp ## serve a small real model on this machine and ask it something
	@$(BIN)/shoal demo

test: $(VENV)/dev.stamp ## install what the tests need and run them
	@$(BIN)/python -m pytest
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/gpu

e2e: e2e-local e2e-kubernetes ## real processes and a real Kubernetes, under load and faults

e2e-local: $(VENV)/dev.stamp ## the half of it that needs no Kubernetes
	@$(BIN)/python -m pytest e2e --ignore e2e/kubernetes --ignore e2e/ranks \
	  --ignore e2e/test_rollout_kills.py $(E2E_FLAGS)

e2e-kubernetes: $(VENV)/dev.stamp ## the half of it on a cluster, which it starts
	@$(BIN)/python -m pytest e2e/kubernetes $(addprefix --ignore e2e/kubernetes/test_,$(APART)) $(E2E_FLAGS)

# Minutes each, and figures rather than a gate: they have targets of their own.
APART := thousand.py autoscaler.py driver.py groups.py rollouts.py rollout_faults.py load_step.py

e2e-thousand: $(VENV)/dev.stamp ## a thousand services on a real Kubernetes: minutes, figures and goals
	@$(BIN)/python -m pytest e2e/kubernetes/test_thousand.py

e2e-rollouts: $(VENV)/dev.stamp ## SIGKILL at fifty moments of a canary, twice; canaries and their troubles on a real Kubernetes
	@$(BIN)/python -m pytest e2e/test_rollout_kills.py
	@$(BIN)/python -m pytest e2e/kubernetes/test_rollouts.py e2e/kubernetes/test_rollout_faults.py

e2e-autoscaler: $(VENV)/dev.stamp ## Kubernetes' own autoscaler: the same load beside ours, and driving a service; a load step
	@$(BIN)/python -m pytest e2e/kubernetes/test_autoscaler.py e2e/kubernetes/test_driver.py \
	  e2e/kubernetes/test_load_step.py

e2e-ranks: $(VENV)/dev.stamp ## groups over three hosts, each failure three times; groups over pods
	@SHOAL_E2E_TRIALS=3 $(BIN)/python -m pytest e2e/ranks
	@$(BIN)/python -m pytest e2e/kubernetes/test_groups.py

images: ## container images of router, operator and worker (docker, podman or buildah; see images/)
	@images/build.sh

lint: $(VENV)/dev.stamp ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

generate: $(VENV)/dev.stamp ## write what is generated: CRD, schemas, protobuf stubs, manifests
	$(BIN)/python -m shoal.api.generate
	$(BIN)/python -m charts.generate
	$(BIN)/python -m shoal.worker.generate

verify: $(VENV)/dev.stamp ## regenerate them and fail if the committed ones differ
	$(BIN)/python -m shoal.api.generate --check
	$(BIN)/python -m charts.generate --check
	$(BIN)/python -m shoal.worker.generate --check

bench: $(VENV)/dev.stamp ## W1 to W4 against the peers that are installed; results under bench/results
	$(BIN)/python -m bench.engine

bench-router: $(VENV)/dev.stamp ## router overhead against a worker that answers at once
	$(BIN)/python -m bench.router

# On a machine with a GPU, whose Python has torch, triton, transformers, pytest and hypothesis: from
# the source tree alone, with nothing installed.
GPU_PYTHON ?= python3
GPU_SECONDS ?= 270
GPU_PATH := .:api:kernels:worker:router:operator:cli
GPU_ENV := PYTHONPATH=$(GPU_PATH) TRITON_DEFAULT_FP_FUSION=1
GPU_RUN := $(GPU_ENV) $(GPU_PYTHON)

gpu-test: ## the kernels against their oracles and the engine against transformers, on a GPU
	@$(GPU_RUN) -c "import importlib.util as u, sys; lacks = [n for n in ('torch', 'triton', 'transformers', 'pytest', 'hypothesis') if u.find_spec(n) is None]; sys.exit(f'$(GPU_PYTHON) lacks {\", \".join(lacks)}. Where another has them: make gpu-test GPU_PYTHON=/path/to/python3' if lacks else 0)"
	@$(GPU_RUN) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "torch of $(GPU_PYTHON) finds no GPU here. Where another one does: make gpu-test GPU_PYTHON=/path/to/python3")'
	@$(GPU_ENV) timeout 480 $(GPU_PYTHON) -m pytest -W default tests/gpu

gpu-bench: ## kernels and models on a GPU beside its limits, in GPU_SECONDS; results under bench/results
	@$(GPU_RUN) -m bench.gpu --seconds $(GPU_SECONDS)

clean: ## remove the environments and caches, and the test cluster if one runs
	@test ! -e e2e/cluster/.run || $(BIN)/python -m e2e.cluster down
	rm -rf .venv .boot .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache e2e/cluster/.last-logs e2e/cluster/.evidence
