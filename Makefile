# Two commands set everything up on a fresh machine: `make demo` and `make test`. Both make .venv when it is needed.
PYTHON ?= python3
PY := .venv/bin/python
# Other fields of the demonstration's recipe, e.g. make demo DEMO="--max_steps 40 --output_dir runs/short" RUN=runs/short
DEMO ?=
RUN ?= runs/demo
# make bench OUT=DIR BENCH="--dataset DIR --hellaswag FILE --tokenizer DIR", or "--only optimizers --dataset DIR"
OUT ?= runs/bench
BENCH ?=
# make matrix MATRIX="floor newest"; --docs writes the rows into docs/compatibility.md
MATRIX ?=

define NEXT

The curves are in $(RUN)/curves.png. Four commands that lead on:
  .venv/bin/python -m gpt2repro.tools.app $(RUN)/latest  # talk to it, on a web page of this machine
  .venv/bin/python train_accelerate.py --text README.md  # your own text: name your file instead
  .venv/bin/python -m gpt2repro.tools.inspect $(RUN)/latest --output $(RUN)/inside.png  # look inside
  .venv/bin/accelerate launch train_accelerate.py --recipe recipes/gpt2-124m-1gpu.yaml  # GPT-2 124M (GPU, network)
endef
export NEXT

.PHONY: demo test check slow matrix bench verify-gpt2 clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/.installed  ## train a small GPT-2 on Python's own documentation, draw its curves, let it write
	$(PY) train_accelerate.py --recipe recipes/demo.yaml $(DEMO)
	$(PY) -m gpt2repro.tools.report $(RUN) --output $(RUN)/curves.png
	@echo "$$NEXT"

test: .venv/.installed  ## every test but the long campaigns
	$(PY) -m pytest -q

slow: .venv/.installed  ## the long campaigns
	$(PY) -m pytest -q -m slow

matrix:  ## the tests that touch the libraries, with their oldest, pinned and newest releases and on a bare image
	$(PYTHON) tests/matrix.py $(MATRIX)

check: .venv/.installed  ## lint and types
	.venv/bin/ruff check .
	.venv/bin/mypy

bench:  ## checks, then every benchmark of this machine; no .venv, since a bare GPU machine cannot make one
	$(PYTHON) -m benchmarks.gpu_suite --output $(OUT) $(BENCH)

verify-gpt2: .venv/.installed  ## the released GPT-2 124M through conversion and scoring; needs the network
	$(PY) -m gpt2repro.tools.verify

clean:
	rm -rf .venv .matrix runs data build dist *.egg-info
