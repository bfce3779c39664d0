# Two environments, one per supported Transformers line; everything else is a thin wrapper around pytest and ruff.
PYTHON ?= python3
VERSION_t5 := 5.23.0
VERSION_t4 := 4.57.6
# Transformers' own server is in 5 only.
EXTRAS_t5 := ,serve
ENVIRONMENTS := t5 t4
PYTEST := -m pytest -n 2
# Two test processes share two cores; more threads would only get in each other's way.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: ask test test-slow lint format clean $(ENVIRONMENTS:%=test-%) $(ENVIRONMENTS:%=test-slow-%)

# The main job: a picture and a question in, an answer out.
ask: .venv/t5/ready
	@mkdir -p build
	@.venv/t5/bin/emma-hf tiny draw build/scene.png
	@.venv/t5/bin/emma-hf ask build/scene.png "How many things are there?"

test: $(ENVIRONMENTS:%=test-%)

test-slow: $(ENVIRONMENTS:%=test-slow-%)

# What one version saves the other must load, so each environment's tests know the other's Python.
$(ENVIRONMENTS:%=test-%): test-%: $(ENVIRONMENTS:%=.venv/%/ready)
	EMMA_OTHER_PYTHON=$(abspath .venv/$(filter-out $*,$(ENVIRONMENTS))/bin/python) \
	.venv/$*/bin/python $(PYTEST) -m "not slow"

$(ENVIRONMENTS:%=test-slow-%): test-slow-%: .venv/%/ready
	.venv/$*/bin/python $(PYTEST) -m slow

lint: .venv/t5/ready
	.venv/t5/bin/ruff check .
	.venv/t5/bin/ruff format --check .
	.venv/t5/bin/mypy

format: .venv/t5/ready
	.venv/t5/bin/ruff check --fix .
	.venv/t5/bin/ruff format .

# open_clip is the independent check of the instruction tokens; its own requirements (torchvision) are not wanted.
.venv/%/ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv --clear .venv/$*
	.venv/$*/bin/python -m pip install -q -c constraints.txt torch
	.venv/$*/bin/python -m pip install -q -c constraints.txt transformers==$(VERSION_$*) -e ".[ftfy,lint,test$(EXTRAS_$*)]"
	.venv/$*/bin/python -m pip install -q --no-deps open_clip_torch==3.3.0
	touch $@

clean:
	rm -rf .venv build
