# make demo   the whole path on the embedded digits, into outputs/demo
# make gallery   the pictures of README: the demo, then tokenizer and network of the emoji, into docs
# make test   the tests
# make docs   the documentation site, into build/site
# All create .venv first if it is absent. PYTHON=python3.12 chooses the interpreter.
# make gpu    the tests and benchmarks of a GPU, into outputs/gpu, within 8 minutes; creates no .venv
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo demo-clean gallery test gpu lint format docs clean

install: .venv/installed

# torch first and exactly: a range would fetch whatever is newest, gigabytes of CUDA packages included.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/lightning-mvar demo

EMOJI := outputs/emoji64
EMOJI_CLASSES := happy face,unhappy face,costume face,heart,person,person role,fruit,ship and plane,time,flag
EMOJI_DRAWING := --guidance 1 --temperature '[1,1,0.6,0.2,0.05]'
gallery: demo
	$(BIN)/lightning-mvar train-tokenizer --config configs/experiment/digits_tokenizer.yaml \
	  --config configs/data/emoji64_tokenizer.yaml --resume
	$(BIN)/lightning-mvar tokenize --images emoji64:train --tokenizer $(EMOJI)/tokenizer --out $(EMOJI)/shards/train
	$(BIN)/lightning-mvar tokenize --images emoji64:test --tokenizer $(EMOJI)/tokenizer --out $(EMOJI)/shards/val
	$(BIN)/lightning-mvar fit --config configs/experiment/digits.yaml --config configs/data/emoji64.yaml --resume
	$(BIN)/lightning-mvar sample $(EMOJI)/mvar/checkpoints/last.ckpt --classes '$(EMOJI_CLASSES)' \
	  --per_class 6 $(EMOJI_DRAWING) --out $(EMOJI)/samples.npz \
	  --grid docs/emoji_grid.png --strip docs/emoji_strip.png
	cp outputs/demo/grid.png docs/demo_grid.png
	cp outputs/demo/strip.png docs/demo_strip.png

demo-clean:
	rm -rf outputs/demo outputs/statistics

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Creates no .venv, which needs a package index. Collects only files with GPU tests: others may need packages that the GPU
# machine lacks. Several processes, because compiling kernels takes longer than running them.
GPU_PYTHON := $(if $(wildcard .venv/installed),$(BIN)/python,$(PYTHON))
gpu: export PYTHONPATH := $(CURDIR):$(PYTHONPATH)
gpu:
	status=0; \
	timeout --signal=INT 235 $(GPU_PYTHON) -m pytest -m cuda --numprocesses 8 \
	  $$(grep -rl pytest.mark.cuda tests --include='*.py') || status=$$?; \
	$(GPU_PYTHON) -m lightning_mvar bench-gpu --minutes 4 || status=$$?; \
	exit $$status

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

.venv/docs-installed: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
