# Two environments for tests, one per supported Transformers line, and one that holds what a user installs and no more;
# everything else is a thin wrapper around pytest and ruff.
PYTHON ?= python3
VERSION_t5 := 5.24.0
VERSION_t4 := 4.57.6
# Transformers' own server is in 5 only.
EXTRAS_t5 := ,serve
ENVIRONMENTS := t5 t4
PYTEST := -m pytest -n 2
# Two test processes share two cores; more threads would only get in each other's way.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: ask test test-slow test-app test-kernels test-slow-kernels lint format clean $(ENVIRONMENTS:%=test-%) $(ENVIRONMENTS:%=test-slow-%)

# The main job: a picture and a question in, an answer out.
ask: .venv/user/ready
	@mkdir -p build
	@.venv/user/bin/emma-hf tiny draw build/scene.png
	@.venv/user/bin/emma-hf ask build/scene.png "How many things are there?"

test: $(ENVIRONMENTS:%=test-%)

test-slow: $(ENVIRONMENTS:%=test-slow-%)

# What one version saves the other must load, so each environment's tests know the other's Python.
$(ENVIRONMENTS:%=test-%): test-%: $(ENVIRONMENTS:%=.venv/%/ready)
	EMMA_OTHER_PYTHON=$(abspath .venv/$(filter-out $*,$(ENVIRONMENTS))/bin/python) \
	.venv/$*/bin/python $(PYTEST) -m "not slow"

$(ENVIRONMENTS:%=test-slow-%): test-slow-%: .venv/%/ready
	.venv/$*/bin/python $(PYTEST) -m slow

# The kernels in Triton's interpreter, and through its compiler, which needs no GPU.
test-kernels: .venv/kernels/ready
	TRITON_INTERPRET=1 .venv/kernels/bin/python $(PYTEST) -m "not slow" tests/model/test_fused_alignment.py tests/model/test_fusion_emma.py tests/integrations/test_liger.py

test-slow-kernels: .venv/kernels/ready
	TRITON_INTERPRET=1 .venv/kernels/bin/python $(PYTEST) -m slow tests/model/test_fused_alignment.py
	.venv/kernels/bin/python $(PYTEST) -m slow tests/model/test_fused_alignment.py

lint: .venv/t5/ready
	.venv/t5/bin/ruff check .
	.venv/t5/bin/ruff format --check .
	.venv/t5/bin/mypy

format: .venv/t5/ready
	.venv/t5/bin/ruff check --fix .
	.venv/t5/bin/ruff format .

.venv/user/ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv --clear .venv/user
	.venv/user/bin/python -m pip install -q -c constraints.txt torch
	.venv/user/bin/python -m pip install -q -c constraints.txt transformers==$(VERSION_t5) -e .
	touch $@

# The chat page and Ray have an environment of their own, with an older Pillow, so the pixels are tested there too.
test-app: .venv/app/ready
	.venv/app/bin/python -m pytest tests/project/test_app.py tests/project/test_batch_inference.py tests/model/test_image_processing_emma.py

.venv/app/ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv --clear .venv/app
	grep -v ^pillow constraints.txt > .venv/app/constraints.txt
	.venv/app/bin/python -m pip install -q -c .venv/app/constraints.txt torch
	.venv/app/bin/python -m pip install -q -c .venv/app/constraints.txt transformers==$(VERSION_t5) -e ".[test-app]"
	touch $@

# open_clip is the independent check of the instruction tokens; its own requirements (torchvision) are not wanted.
.venv/%/ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv --clear .venv/$*
	.venv/$*/bin/python -m pip install -q -c constraints.txt torch
	.venv/$*/bin/python -m pip install -q -c constraints.txt transformers==$(VERSION_$*) -e ".[ftfy,lint,test$(EXTRAS_$*)]"
	.venv/$*/bin/python -m pip install -q --no-deps open_clip_torch==3.3.0
	touch $@

# Triton takes a gigabyte, and the other tests are to pass without it: an environment of its own that sees t5's packages.
.venv/kernels/ready: .venv/t5/ready
	$(PYTHON) -m venv --clear .venv/kernels
	.venv/kernels/bin/python -m pip install -q -c constraints.txt --no-deps triton liger-kernel
	echo "import site; site.addsitedir('$$(.venv/t5/bin/python -c 'import site; print(site.getsitepackages()[0])')')" \
	> $$(.venv/kernels/bin/python -c 'import site; print(site.getsitepackages()[0])')/t5.pth
	touch $@

clean:
	rm -rf .venv build
