# `make demo` and `make test` do their own set-up; see scripts/bootstrap.

PGVAE := .venv/bin/pgvae
ARGS :=

.DEFAULT_GOAL := help
.PHONY: help bootstrap demo test survival lint bench bench-full accuracy gpu wheel clean

help: ## List these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r target text; do \
		printf '%-18s %s\n' "$$target" "$$text"; done

bootstrap: ## Install what is missing: PostgreSQL with PL/Python, numpy, a virtual environment
	@scripts/bootstrap

demo: bootstrap ## A shop from nothing to recommendations on a private server, in a few minutes
	@$(PGVAE) demo $(ARGS)

test: bootstrap ## The whole test suite, on a throwaway server per core; ARGS='-k word' selects
	@.venv/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

survival: bootstrap ## Kills at random moments and many sessions while versions change, for a quarter of an hour; prints counts
	@.venv/bin/python -m pytest tests/test_drills.py tests/test_survival.py tests/test_topologies.py -q -s \
		--drill-sessions 50 --drill-seconds 180 --drill-kills 30 --drill-trainers 20 $(ARGS)

lint: bootstrap ## Style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: bootstrap ## Measure refreshes, live calls and other ways at a small size, in five minutes; writes benchmarks/results
	@.venv/bin/python -m benchmarks.scoring $(ARGS)
	@.venv/bin/python -m benchmarks.refresh
	@.venv/bin/python -m benchmarks.live --users 5000 --items 5000 --calls 200 --idle 20
	@.venv/bin/python -m benchmarks.monitoring
	@.venv/bin/python -m benchmarks.external --rounds 3

bench-full: bootstrap ## The same at the size of a large shop, and how time and memory grow; about an hour
	@.venv/bin/python -m benchmarks.scoring --users 100000 --items 20000 --width 200
	@.venv/bin/python -m benchmarks.scoring --users 100000 --items 20000 --width 200 --k 100
	@.venv/bin/python -m benchmarks.scoring --users 100000 --items 20000 --width 600 --no-peers
	@.venv/bin/python -m benchmarks.scoring --users 100000 --items 20000 --width 600 --k 100 --no-peers
	@.venv/bin/python -m benchmarks.refresh --users 200000 --items 20000
	@.venv/bin/python -m benchmarks.live
	@.venv/bin/python -m benchmarks.curves

gpu: ## On a machine with a GPU, torch and cupy: parity with the CPU, then speed; PYTHON=… chooses the Python
	@$(or $(PYTHON),python3) benchmarks/gpu.py $(ARGS)

accuracy: bootstrap ## How well pgvae ranks on public data sets; ARGS='--split DIR' takes any
	@.venv/bin/python -m benchmarks.accuracy $(or $(ARGS),--all)

wheel: bootstrap ## Build the wheel into dist/
	@rm -rf dist
	@.venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean: ## Remove what was built here: .venv, dist, build, caches; no database
	rm -rf .venv dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
