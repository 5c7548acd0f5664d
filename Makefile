# Each target makes its own environment in .venv on first use.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
CORES := $(shell getconf _NPROCESSORS_ONLN)
LAUNCH = $(BIN)/accelerate launch --config_file training/accelerate/cpu.yaml --num_cpu_threads_per_process $(CORES) -m training.train --config training/configs/demo.yaml
EXAMPLES ?= 400
SEED ?= 0
DEMO ?= runs/demo$(patsubst %,-%,$(filter-out 0,$(SEED)))
SCENES = $(DEMO)/scenes
TRAIN = $(LAUNCH) --data.train $(SCENES) --data.validation $(SCENES)/validation.parquet --model.tokenizer $(SCENES)/tokenizer --seed $(SEED) --resume
HALF := 350
WHOLE := 700

export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: help demo search-demo test lint bench hf-suite soak fuzz mutants
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@echo "make demo      stretch a small CLIP, fine-tune it on long and short captions, evaluate and reload it"
	@echo "make search-demo  index drawn GeoTIFFs with the demo's model and find places by describing them"
	@echo "make test      the test suite"
	@echo "make lint      ruff"
	@echo "make soak      kill training and indexing 20 times each, resume them, and compare to the bit with runs left alone"
	@echo "make fuzz      damaged files of every kind, some minutes; EXAMPLES of each kind, from SEED"
	@echo "make mutants   small mistakes put into modules, which their tests must notice"
	@echo "make bench     speed against other implementations"
	@echo "make hf-suite  transformers' own model tests on ours, beside stock CLIP"

$(READY): setup.py constraints.txt
	@echo "== Making the environment $(VENV) (once, about four minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable '.[train,eval,lrs2m,geosearch,map,ray,onnx,dev]'
	@touch $@

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

hf-suite: $(READY)
	$(BIN)/python tests/hf_suite/run.py

soak: $(READY)
	$(BIN)/python -m tests.soak --kills 20
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.geosearch.kills --kills 20

fuzz: $(READY)
	FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q -n $(CORES) tests/fuzz --hypothesis-seed=$(SEED)

mutants: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants --seed $(SEED)

bench: $(READY)
	$(BIN)/python -m tests.speed.encoding
	$(BIN)/python -m tests.speed.recall
	$(BIN)/python -m tests.speed.localization
	$(BIN)/python -m tests.speed.large_batch loss
	$(BIN)/python -m tests.speed.training --batch 8 --layers 4
	$(BIN)/python -m tests.speed.geosearch_index rate
	$(BIN)/python -m tests.speed.geosearch_index memory

# ---------------------------------------------------------------------------------------------------------------- demo
# Table VII of the paper in small: the same scenes, architecture and number of steps for every row. An interrupted
# demo goes on where it stopped when made again. SEED draws other scenes and other weights to begin with, into a folder of
# its own. Training is watched on the validation scenes, and the table is of the test scenes. Learning rate and loss weight
# were once chosen on the test scenes of SEED=0; no setting was chosen on those of another seed.

demo: $(DEMO)/clip77-short/final/config.json $(DEMO)/clip77-long-stretched/config.json $(DEMO)/lrsclip/final/config.json
	@echo
	@echo "== 6/7 Long and short retrieval on the test scenes"
	$(BIN)/python -m evaluation.run --tasks zcrl,zcrs --data $(DEMO)/scenes --output $(DEMO)/results --model \
	  $(DEMO)/clip77-short/final $(DEMO)/clip77-long/final $(DEMO)/clip77-long-stretched $(DEMO)/lrsclip/final
	@echo
	@echo "== 7/7 Reloading through AutoModel, as somebody would who downloads the folder"
	cd $(DEMO) && $(CURDIR)/$(BIN)/python $(CURDIR)/model_cards/reload_folder.py lrsclip/final scenes/test.parquet
	@echo
	@echo "The table:        $(DEMO)/results/results.md"
	@echo "The two pictures: $(DEMO)/results/recall_vs_tokens.png, $(DEMO)/results/retrieval_gallery.png"
	@echo "The model folder: $(DEMO)/lrsclip/final"

$(DEMO)/scenes/scenes.json: | $(READY)
	@echo
	@echo "== 1/7 Drawing aerial scenes, each with a long and a short caption"
	$(BIN)/python -m evaluation.benchmarks.aerial_scenes $(DEMO)/scenes --scenes 16000 --validation-scenes 512 --test-scenes 2048 --image-size 96 --seed $(SEED)

$(DEMO)/clip77-short/final/config.json: $(DEMO)/scenes/scenes.json
	@echo
	@echo "== 2/7 (a) CLIP, 77 positions, on the short captions only"
	$(TRAIN) --output_dir $(DEMO)/clip77-short --loss.long_weight 0 --loop.steps $(WHOLE)

$(DEMO)/clip77-long/final/config.json: $(DEMO)/scenes/scenes.json
	@echo
	@echo "== 3/7 (b) CLIP, 77 positions, on the long captions only, which it cuts at 77 tokens"
	$(TRAIN) --output_dir $(DEMO)/clip77-long --loss.long_weight 1 --loop.steps $(WHOLE)

$(DEMO)/clip77-long-stretched/config.json: $(DEMO)/clip77-long/final/config.json
	@echo
	@echo "== 4/7 (b') the same, stretched to 248 positions without further training"
	$(BIN)/python -m modeling_lrsclip.convert $(DEMO)/clip77-long/final $(DEMO)/clip77-long-stretched --stretch

$(DEMO)/lrsclip/final/config.json: $(DEMO)/scenes/scenes.json
	@echo
	@echo "== 5/7 (c) LRSCLIP: a CLIP of 77 positions trained for half the steps, stretched to 248, fine-tuned for the other half"
	$(TRAIN) --output_dir $(DEMO)/clip77 --loop.steps $(HALF) --optim.schedule constant
	$(TRAIN) --output_dir $(DEMO)/lrsclip --loop.steps $(HALF) --model.init $(DEMO)/clip77/final --seed $$(($(SEED) + 1))

# --------------------------------------------------------------------------------------------------------- search demo
# Places found by describing them, in GeoTIFFs drawn for it, with the model of the demo (which is made first).

search-demo: $(DEMO)/search/places.jsonl $(DEMO)/lrsclip/final/config.json
	@echo
	@echo "== 2/3 Encoding the GeoTIFFs, window by window"
	$(BIN)/geosearch index $(DEMO)/search/scenes --model $(DEMO)/lrsclip/final --window 256 --output $(DEMO)/search/index
	@echo
	@echo "== 3/3 Ten descriptions whose places are known"
	$(BIN)/python -m geosearch.demo $(DEMO)/search/index $(DEMO)/search/places.jsonl $(DEMO)/search
	@echo "On a map:     $(BIN)/geosearch serve $(DEMO)/search/index"

$(DEMO)/search/places.jsonl: | $(READY)
	@echo
	@echo "== 1/3 Drawing GeoTIFFs: 16 bit, four bands, three UTM zones, one of them rotated"
	$(BIN)/python -m evaluation.benchmarks.scene_archive $(DEMO)/search
