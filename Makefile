# `make demo` and `make test` need Python >= 3.10 and make; they set up .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
# torch goes first and by itself: other packages would pull in its GPU build.
define install
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(1)]'
	touch $@
endef

.PHONY: demo check-demo test test-all coverage fuzz fuzz-forwards fuzz-interrupts soak lint docs results costs costs-gpu speech dist clean

demo: .venv/demo.done
	$(BIN)/abpem demo

check-demo: demo
	$(BIN)/python -m lightning_abpem.demo.check

# In as many processes as JOBS says, each with one thread. `make test-all` runs those after it that are marked as slow.
JOBS ?= 2
test: .venv/test.done
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not slow'

test-all: test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow

# The share of lines and branches that the fast tests reach, at least `fail_under` of pyproject.toml.
coverage: .venv/test.done
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(JOBS) --dist worksteal -m 'not slow'
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered

# Forwards put together at random, other ones every time. `make test` tries 30 of them, `make test-all` 300.
fuzz-forwards: .venv/test.done
	FUZZ_FORWARDS=5000 $(BIN)/python -m pytest tests/zoo/test_random_forwards.py -o faulthandler_timeout=7200

# Runs put together at random: models, batches, options, methods, 10,000 of them in ten minutes. `make test` tries 50, `make test-all` 500.
fuzz: .venv/test.done
	FUZZ=10000 $(BIN)/python -m pytest tests/engine/test_fuzz.py -s -o faulthandler_timeout=7200

# 50,000 updates each, attached and in a Trainer, in one process and in two: nothing grows. `make test-all` takes 1,000 in all.
soak: .venv/test.done
	$(BIN)/python -m benchmarks.costs.soak --way attach
	$(BIN)/python -m benchmarks.costs.soak --way Trainer
	$(BIN)/python -m benchmarks.costs.soak --way attach --processes 2
	$(BIN)/python -m benchmarks.costs.soak --way Trainer --processes 2

# Interrupts at 5,000 byte codes of opening, two batches and closing, in a quarter of an hour. `make test-all` tries 200.
fuzz-interrupts: .venv/test.done
	FUZZ_INTERRUPTS=5000 $(BIN)/python -m pytest tests/engine/test_interrupts.py -s

lint: .venv/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/docs.done
	$(BIN)/mkdocs build --strict --quiet

# Every run of docs/results, into runs/: about three hours on two cores, and resumable.
RESULTS := choose iid large protocols protocols-large batch-size severity ablation ablation-large defaults
results: .venv/test.done
	for name in $(RESULTS); do $(BIN)/abpem bench digits-avc --config benchmarks/experiments/$$name.yaml --out runs/$$name || exit 1; done

# What adapting costs, for docs/performance and docs/distributed, into runs/: three quarters of an hour on a machine that does nothing else.
costs: .venv/test.done
	$(BIN)/python -m benchmarks.costs.step_cost
	$(BIN)/python -m benchmarks.costs.step_cost --model digits --batch-size 8 --rounds 40 --batches 20
	$(BIN)/python -m benchmarks.costs.token_sweep --rounds 3
	$(BIN)/python -m benchmarks.costs.scaling
	$(BIN)/python -m benchmarks.costs.scaling --paper

# The same and more on a GPU, for docs/performance, into runs/gpu: ten minutes, and resumable. It needs a torch that sees the GPU.
costs-gpu: .venv/test.done
	$(BIN)/python -m benchmarks.costs.gpu

# The wheel and the source distribution, into dist/, checked.
dist: .venv/dist.done
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

speech: .venv/demo.done
	$(BIN)/python -m lightning_abpem.data.spoken_digits.make

# Building needs none of the package's dependencies.
.venv/dist.done: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build twine
	touch $@

.venv/%.done: pyproject.toml constraints.txt
	$(call install,$*)

clean:
	rm -rf .venv build demo/output dist site
