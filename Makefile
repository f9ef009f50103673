# Everything here needs python3 and make; uv is fetched into .uv if it is not installed.
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
# Keeps the environment as it was synced: extras that were asked for stay.
RUN := $(UV) run --no-sync

.PHONY: quickstart demo test lint setup clean

quickstart: setup  ## the main job: a semi-supervised gain on synthetic data
	$(RUN) ssod quickstart

demo: setup  ## the same with three seeds
	$(RUN) ssod quickstart --seeds 3 --output output/demo

test: setup  ## the fast test suite
	$(RUN) pytest

lint: setup  ## formatting, lint, types and spelling
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy
	$(RUN) codespell

setup: .venv/.complete

.venv/.complete: pyproject.toml | $(UV)
	$(UV) sync
	@touch $@

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/python -m pip install --quiet uv

clean:
	rm -rf .venv .uv output build dist .pytest_cache .ruff_cache .mypy_cache
