# An environment for each supported Transformers, and one that holds what a user installs and no more; everything else is
# a thin wrapper around pytest and ruff.
PYTHON ?= python3
# The supported versions stand here and nowhere else; CONTRIBUTING says how the next one is added. `t5` is the newest.
VERSION_t5 := 5.24.0
VERSION_t520 := 5.20.2
VERSION_t516 := 5.16.1
VERSION_t4 := 4.57.6
# These run every test, the others the core: `tests/model`, `tests/data`, and what is marked so.
WHOLE := t5 t4
CORE := t520 t516
# Transformers' own server is in 5 only.
EXTRAS_t5 := lint,serve,test
EXTRAS_t4 := test
EXTRAS_mutation := mutation,test
EXTRAS_CORE := test-core
PYTEST := -m pytest -n 2 --dist worksteal
# Two test processes share two cores; more threads would only get in each other's way.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
# Python compiles what it imports, once; pip would compile the whole of every package, which takes longer than the rest.
unexport PYTHONDONTWRITEBYTECODE
export PIP_COMPILE := 0

.PHONY: ask test test-all test-newest test-slow test-torchao test-app test-clients test-fuzz test-kernels test-slow-kernels \
	fuzz mutation lint format clean \
	$(WHOLE:%=test-%) $(CORE:%=test-%) $(WHOLE:%=test-slow-%) $(WHOLE:%=test-torchao-%)

# The main job: a picture and a question in, an answer out.
ask: .venv/user/ready
	@mkdir -p build
	@.venv/user/bin/emma-hf tiny draw build/scene.png
	@.venv/user/bin/emma-hf ask build/scene.png "How many things are there?"

test: test-t5

# The other supported versions.
test-all: test-t4 $(CORE:%=test-%)

test-slow: $(WHOLE:%=test-slow-%)

test-torchao: $(WHOLE:%=test-torchao-%)

$(WHOLE:%=test-%): test-%: .venv/%/ready
	.venv/$*/bin/python $(PYTEST) -m "not slow"

$(CORE:%=test-%): test-%: .venv/%/ready
	.venv/$*/bin/python $(PYTEST) -m "core and not slow"

# What each version saves the others must load, so the newest one's tests know the others' Pythons.
test-slow-t5: $(WHOLE:%=.venv/%/ready) $(CORE:%=.venv/%/ready)
	EMMA_OTHER_PYTHONS="$(foreach name,$(filter-out t5,$(WHOLE) $(CORE)),$(abspath .venv/$(name)/bin/python))" \
	.venv/t5/bin/python $(PYTEST) -m slow

test-slow-t4: .venv/t4/ready
	.venv/t4/bin/python $(PYTEST) -m "slow and not once"

$(WHOLE:%=test-torchao-%): test-torchao-%: .venv/%/ready .venv/torchao/ready
	PYTHONPATH="$(abspath .venv/torchao):$$PYTHONPATH" .venv/$*/bin/python -m pytest tests/model/test_torchao.py

# The core on whatever the registry's newest Transformers is, also one that the package's cap keeps out.
test-newest: .venv/newest/ready
	.venv/newest/bin/python -m pip install -q --upgrade transformers
	.venv/newest/bin/python -m pip show transformers | head -n 2
	.venv/newest/bin/python $(PYTEST) -m "core and not slow"

# The kernels in Triton's interpreter, and through its compiler, which needs no GPU.
test-kernels: .venv/kernels/ready
	TRITON_INTERPRET=1 .venv/kernels/bin/python $(PYTEST) -m "not slow" tests/model/test_fused_alignment.py tests/model/test_fusion_emma.py tests/integrations/test_liger.py

test-slow-kernels: .venv/kernels/ready
	TRITON_INTERPRET=1 .venv/kernels/bin/python $(PYTEST) -m slow tests/model/test_fused_alignment.py
	.venv/kernels/bin/python $(PYTEST) -m slow tests/model/test_fused_alignment.py

# Generated inputs: for two minutes, the same ones each time.
test-fuzz: .venv/t5/ready
	.venv/t5/bin/python $(PYTEST) tests/fuzz

# Fifty times as many, other ones each time. `make fuzz SEED=7` repeats those of a seed.
fuzz: SEED := $(or $(SEED),$(shell od -An -N4 -tu4 /dev/urandom))
fuzz: .venv/t5/ready
	@echo "SEED=$(strip $(SEED))"
	EMMA_FUZZ=50 .venv/t5/bin/python $(PYTEST) tests/fuzz --hypothesis-seed=$(strip $(SEED))

# Changes of the code that the tests should notice: an hour. What they do not notice is listed at the end.
mutation: .venv/mutation/ready
	.venv/mutation/bin/mutmut run --max-children 2
	.venv/mutation/bin/mutmut results

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

# Clients of OpenAI's protocol in an environment of their own, without torch; the server runs in t5's.
test-clients: .venv/t5/ready .venv/clients/ready
	EMMA_CLIENTS="$(abspath .venv/clients)" .venv/t5/bin/python -m pytest -m slow tests/serving/test_clients.py

# pip would install the package and torch with an extra of it, so the extra's lines are read from pyproject.toml. Without
# npm, or a registry that it reaches, the clients in JavaScript are skipped.
.venv/clients/ready: pyproject.toml constraints.txt Makefile tests/serving/clients/package.json
	$(PYTHON) -m venv --clear .venv/clients
	.venv/clients/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	print(*project['optional-dependencies']['test-clients'], sep='\n')" > .venv/clients/requirements.txt
	.venv/clients/bin/python -m pip install -q -c constraints.txt -r .venv/clients/requirements.txt
	mkdir .venv/clients/node
	cp tests/serving/clients/package.json .venv/clients/node
	if command -v npm > /dev/null; then \
	cd .venv/clients/node && npm install --no-audit --no-fund --fetch-retries=1 || rm -rf node_modules; fi
	touch $@

# open_clip is the independent check of the instruction tokens; its own requirements (torchvision) are not wanted.
.venv/%/ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv --clear .venv/$*
	.venv/$*/bin/python -m pip install -q -c constraints.txt torch
	.venv/$*/bin/python -m pip install -q -c constraints.txt transformers==$(or $(VERSION_$*),$(VERSION_t5)) \
	-e ".[$(or $(EXTRAS_$*),$(EXTRAS_CORE))]"
	.venv/$*/bin/python -m pip install -q --no-deps open_clip_torch==3.3.0
	touch $@

# Where torchao is installed, Transformers imports it, which takes seconds in every process: a folder of its own that
# both environments take it from.
.venv/torchao/ready: pyproject.toml constraints.txt Makefile .venv/t5/ready
	rm -rf .venv/torchao
	.venv/t5/bin/python -m pip install -q -c constraints.txt --no-deps --target .venv/torchao torchao
	touch $@

# Triton takes a gigabyte, and the other tests are to pass without it: an environment of its own that sees t5's packages.
.venv/kernels/ready: .venv/t5/ready
	$(PYTHON) -m venv --clear .venv/kernels
	.venv/kernels/bin/python -m pip install -q -c constraints.txt --no-deps triton liger-kernel
	echo "import site; site.addsitedir('$$(.venv/t5/bin/python -c 'import site; print(site.getsitepackages()[0])')')" \
	> $$(.venv/kernels/bin/python -c 'import site; print(site.getsitepackages()[0])')/t5.pth
	touch $@

clean:
	rm -rf .venv build mutants
