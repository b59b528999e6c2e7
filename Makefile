PYTHON ?= python3
JOBS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-pages lint format test-thorough test-oldest test-gpu fuzz bench bench-full docs dist smoke clean

demo: .venv/installed-demo
	$(BIN)/python examples/demo.py

test: .venv/installed-test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --ignore tests/pages
	$(MAKE) lint

# what the pages print, the benchmarks' and the example's smallest runs, whole models of others
test-pages: .venv/installed-test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/pages

lint: .venv/installed-test
	$(BIN)/python -m mypy --strict
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: .venv/installed-test
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# the laws of the algebra, on at least 2,000 random examples each
test-thorough: .venv/installed-test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --hypothesis-profile=thorough tests/law/test_algebra.py

# N random programs, converted and compared; the counts go to tests/law/fuzz/results.json
N ?= 1000
fuzz: .venv/installed-test
	$(BIN)/python -m tests.law.fuzz $(N)

# tests/needs/gpu on a CUDA device, in the environment of PYTHON, whose torch is built for it: errors in GPU_JOBS processes, then
# what measures time, alone; writes docs/gpu.md, also of a run that failed
GPU_JOBS ?= 10
test-gpu:
	rm -rf build/gpu
	failed=0; \
	$(PYTHON) -m pytest tests/needs/gpu -m "not alone" -n $(GPU_JOBS) --gpu-results build/gpu || failed=1; \
	$(PYTHON) -m pytest tests/needs/gpu -m alone --gpu-results build/gpu || failed=1; \
	$(PYTHON) -m tests.needs.gpu build/gpu && exit $$failed

# the suite on the oldest torch that pyproject.toml allows, in an environment of its own
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n $(JOBS) --dist worksteal

# the quick set: every script's smallest case, in some minutes; nothing is written
bench: .venv/installed-dev
	for one in conversion growth memory latency beyond measured; do $(BIN)/python -m benchmarks.$$one --quick || exit 1; done

# all of it, hours on 2 cores; writes benchmarks/results, docs/benchmarks.md and docs/runtimes.md
bench-full: .venv/installed-dev
	for one in cold_start conversion growth memory plain latency beyond measured runtimes adapters; do \
		$(BIN)/python -m benchmarks.$$one || exit 1; done
	$(BIN)/python -m benchmarks.page

docs: .venv/installed-docs .venv/installed-test
	for one in make_catalogue make_pictures draw_borders; do $(BIN)/python docs/$$one.py || exit 1; done
	$(BIN)/python -m mkdocs build --strict

# sdist and wheel, the wheel built from the sdist; one built from the tree has to be the same
dist: .venv/installed-dist
	rm -rf dist build/tree
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m build --wheel --outdir build/tree
	cmp dist/*.whl build/tree/*.whl

# the wheel as users have it: in an environment of its own, run outside this folder; bare first, then with extras
SMOKE := $(CURDIR)/build/smoke/bin/python
smoke: dist
	rm -rf build/smoke
	$(PYTHON) -m venv build/smoke
	$(SMOKE) -m pip --disable-pip-version-check install --quiet -c constraints.txt dist/*.whl
	$(SMOKE) -m pip check
	cd / && $(SMOKE) -I $(CURDIR)/tests/needs/smoke.py bare
	$(SMOKE) -m pip --disable-pip-version-check install --quiet -c constraints.txt \
		"$$(ls dist/*.whl)[weights,plot]" mypy
	$(SMOKE) -m pip check
	cd / && $(SMOKE) -I $(CURDIR)/tests/needs/smoke.py

clean:
	rm -rf .venv .venv-oldest build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PRECIOUS: .venv/installed-%
.venv/installed-%: .venv/made
	$(PIP) install --quiet -c constraints.txt -e '.[$*]'
	touch $@

# A change of pins starts afresh: pip would leave what is no longer asked for.
.venv/made: pyproject.toml constraints.txt
	rm -rf .venv
	$(PYTHON) -m venv .venv
	touch $@

.venv-oldest/installed: pyproject.toml constraints.txt constraints-oldest.txt
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	{ grep -Ev '^torch(vision)?==' constraints.txt; cat constraints-oldest.txt; } > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip --disable-pip-version-check install --quiet -c .venv-oldest/constraints.txt -e '.[test]'
	touch $@
