PYTHON ?= python3
JOBS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-thorough test-oldest test-gpu fuzz docs dist smoke clean

demo: .venv/installed-demo
	$(BIN)/python examples/demo.py

test: .venv/installed-test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal
	$(BIN)/python -m mypy --strict
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# the laws of the algebra, on at least 2,000 random examples each
test-thorough: .venv/installed-test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --hypothesis-profile=thorough tests/test_laws.py

# N random programs, converted and compared; the counts go to tests/fuzz/results.json
N ?= 1000
fuzz: .venv/installed-test
	$(BIN)/python -m tests.fuzz $(N)

# tests/gpu on a CUDA device, in the environment of PYTHON, whose torch is built for it; writes docs/gpu.md
test-gpu:
	$(PYTHON) -m pytest tests/gpu --gpu-page

# the suite on the oldest torch that pyproject.toml allows, in an environment of its own
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n $(JOBS) --dist worksteal

docs: .venv/installed-docs .venv/installed-test
	$(BIN)/python docs/make_catalogue.py
	$(BIN)/python -m mkdocs build --strict

# sdist and wheel, the wheel built from the sdist; one built from the tree has to be the same
dist: .venv/installed-dist
	rm -rf dist build/tree
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m build --wheel --outdir build/tree
	cmp dist/*.whl build/tree/*.whl

# the wheel as users have it: in an environment of its own, run outside this folder
smoke: dist
	rm -rf build/smoke
	$(PYTHON) -m venv build/smoke
	build/smoke/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt \
		"$$(ls dist/*.whl)[weights,plot]" mypy
	build/smoke/bin/python -m pip check
	cd / && $(CURDIR)/build/smoke/bin/python -I $(CURDIR)/tests/smoke.py

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
