# make quickstart   the main job: real text → Ray → token shards → DeepSpeed → MLflow → a model that writes
# make test         lint, types and all tests that this machine can run
# PYTHON=/path/to/python3.12 make …   chooses the interpreter that .venv is made of
SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help venv quickstart test lint clean-venv

help:
	@sed -n 's/^# //p' Makefile

venv:
	@./setup-venv.sh

quickstart: venv
	@.venv/bin/python -m launch.quickstart

# Every part runs and reports, whichever fails.
define run_all
	@failed=(); \
	for part in $(1); do \
	    echo "== $$part"; \
	    $$part || failed+=("$$part"); \
	done; \
	[ $${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "$${failed[@]}" >&2; exit 1; }
endef

LINT := "ruff check ." "ruff format --check ." "mypy"

test: venv
	$(call run_all,$(LINT) "pytest -n 2 --dist loadfile --no-loadscope-reorder")

lint: venv
	$(call run_all,$(LINT))

clean-venv:
	rm -rf .venv
