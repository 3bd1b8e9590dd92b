# `make help` lists the targets. Everything runs in .venv, which `make setup` makes.

PYTHON ?= python3
# `make pack PYTHON=3.12` names the Python of other machines, no interpreter here.
PYTHON_VERSION := 3.12
ifneq (,$(and $(filter pack pack-rehearsal,$(MAKECMDGOALS)),$(filter 3.%,$(PYTHON))))
PYTHON_VERSION := $(PYTHON)
override PYTHON := python3
endif
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# libturbojpeg is what the loader decodes with; FFCV, a peer of the benchmarks, is compiled against all of these. The
# data set is optional, torchvision can download it instead.
SYSTEM_PACKAGES := build-essential pkg-config libopencv-dev libturbojpeg0-dev
DATA_PACKAGES := dataset-fashion-mnist
# One of the loader's peers, SPDL, decodes through FFmpeg's libraries; `make bench` installs them.
BENCH_PACKAGES := ffmpeg
# Detectron2 has no release on PyPI. This wheel's compiled part is for Python 3.10, and is not used here; the rest
# runs on a CPU with any Python. For GPUs install Detectron2 from source first: a working one is left alone.
DETECTRON2 = --no-deps --target $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])') \
	--python-version 3.10 --implementation cp --only-binary=:all: sal-detectron2==0.7.2

# What the user gives: make pretrain DATA=data/in1k-train.beton ARGS="--epochs 100 --val data/in1k-val.beton"
DATA ?=
VAL ?=
OUT ?=
PRETRAINED ?= runs/pretrain/backbone.safetensors
RUNS ?= 5
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup system doctor demo convert shards index pretrain lincls knn finetune card detect-voc \
	detect-coco samples bench half-hour system-bench \
	step race evidence probes detector scale parity report pack pack-rehearsal lint test clean

help:  ## |this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {split($$2, part, "|"); printf "  %-46s %s\n", "make " $$1 " " part[1], part[2]}' $(MAKEFILE_LIST)

setup: $(READY)  ## |make .venv with everything in it, system packages first

$(READY): pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory system PYTHON="$(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11; name a newer one: make setup PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "no venv module; apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --constraint constraints.txt --editable '.[ffcv,dali,samples,bench,detection,dev]'
	@$(BIN)/python -c 'import detectron2' 2>/dev/null || $(BIN)/pip install $(DETECTRON2)
	@touch $@

# Installs what is missing where root or sudo allows it, and says the exact command where not. The data set is a
# convenience: without it torchvision downloads one.
system:
	@command -v apt-get >/dev/null || { echo "no apt-get here; install libturbojpeg, and for FFCV OpenCV, pkg-config and a C++ compiler by hand"; exit 0; }; \
	wanted="$(SYSTEM_PACKAGES)"; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || wanted="$$wanted python3-venv"; \
	$(PYTHON) -c 'import pathlib, sysconfig, sys; sys.exit(not (pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h").exists())' || wanted="$$wanted python3-dev"; \
	missing=""; for package in $$wanted; do dpkg -s $$package >/dev/null 2>&1 || missing="$$missing $$package"; done; \
	data=""; for package in $(DATA_PACKAGES); do dpkg -s $$package >/dev/null 2>&1 || data="$$data $$package"; done; \
	test -z "$$missing$$data" && exit 0; \
	if [ "$$(id -u)" = 0 ]; then sudo=""; elif sudo -n true 2>/dev/null; then sudo="sudo"; else \
		echo "this user may not install system packages; run"; \
		echo "    sudo apt-get update && sudo apt-get install --no-install-recommends$$missing$$data"; \
		test -z "$$missing" || exit 1; \
		echo "only the data set is missing, torchvision will download it"; exit 0; fi; \
	echo "installing$$missing$$data"; \
	install="$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends"; \
	$$sudo apt-get update -qq || exit 1; \
	test -z "$$missing" || $$install $$missing || exit 1; \
	test -z "$$data" || $$install $$data || echo "$$data cannot be installed here; torchvision will download the data set"

doctor:  ## |what is installed, which backends work, and the mend for what is missing
	@test -x $(BIN)/python || { echo "there is no $(VENV) yet; run make setup"; exit 1; }
	@$(BIN)/python -m training.install.doctor

demo: $(READY)  ## |from pictures to a probed encoder, with a preview, in minutes on two cores
	@$(BIN)/python -m examples.demo $(ARGS)

convert: $(READY)  ## DATA=folder [OUT=x.beton]|compile a folder or a tar of pictures into one file
	@$(call need,DATA,a folder or a tar of pictures)
	@$(BIN)/python -m dataset_tools convert $(DATA) $(or $(OUT),data/$(name).beton) $(ARGS)

shards: $(READY)  ## DATA=folder [OUT=x.shards]|compile a folder or a tar of pictures into WebDataset shards
	@$(call need,DATA,a folder or a tar of pictures)
	@$(BIN)/python -m dataset_tools convert $(DATA) $(or $(OUT),data/$(name).shards) $(ARGS)

index: $(READY)  ## DATA=folder|make a set of WebDataset shards that are there already
	@$(call need,DATA,a folder of tars)
	@$(BIN)/python -m dataset_tools index $(DATA) $(ARGS)

pretrain: $(READY)  ## DATA=x.beton [ARGS="…"]|pretrain an encoder; ARGS=--help lists the options
	@$(call need,DATA,a compiled set or a folder)
	@$(BIN)/python train_pretrain.py $(DATA) $(ARGS)

lincls: $(READY)  ## DATA=x.beton VAL=y.beton|linear probe and kNN of a frozen encoder
	@$(call need,DATA,a labelled training set)
	@$(BIN)/python train_lincls.py $(judged) --out $(call beside,lincls) $(ARGS)

knn: $(READY)  ## DATA=x.beton VAL=y.beton|nearest neighbours alone; ARGS=--leave-one-out also in the training set
	@$(call need,DATA,a labelled training set)
	@$(BIN)/python train_lincls.py $(judged) --out $(call beside,lincls) \
		--knn-only $(ARGS)

finetune: $(READY)  ## DATA=x.beton VAL=y.beton|fine-tune an encoder; ARGS="--labels 0.1" with a tenth of the labels
	@$(call need,DATA,a labelled training set)
	@$(BIN)/python train_finetune.py $(judged) --out $(call beside,finetune) \
		$(ARGS)

card: $(READY)  ## PRETRAINED=run/backbone.safetensors|write a model card beside a backbone
	@$(BIN)/python -m training.card $(PRETRAINED) $(ARGS)

detect-voc: $(READY)  ## PRETRAINED=… [RUNS=5]|fine-tune on VOC 2007+2012 several times: mean and spread of AP
	@$(BIN)/python -m detection.convert_to_detectron2 $(PRETRAINED) $(dir $(PRETRAINED))detectron2.pth
	@$(BIN)/python -m detection.repeat --runs $(RUNS) --config-file detection/configs/pascal_voc_R_50_C4_24k.yaml \
		$(ARGS) MODEL.WEIGHTS $(dir $(PRETRAINED))detectron2.pth OUTPUT_DIR $(call beside,voc)

detect-coco: $(READY)  ## PRETRAINED=… [CONFIG=…]|fine-tune on COCO by a file of detection/configs, coco_R_50_C4_2x if none is given
	@$(BIN)/python -m detection.convert_to_detectron2 $(PRETRAINED) $(dir $(PRETRAINED))detectron2.pth
	@$(BIN)/python -m detection.train_net --config-file detection/configs/$(or $(CONFIG),coco_R_50_C4_2x).yaml \
		$(ARGS) MODEL.WEIGHTS $(dir $(PRETRAINED))detectron2.pth OUTPUT_DIR $(call beside,coco)

samples: $(READY)
	@$(BIN)/python -m dataset_tools photographs data/photographs
	@test -f data/photographs.beton || $(BIN)/python -m dataset_tools convert data/photographs/train data/photographs.beton

bench: $(READY) system-bench  ## [ARGS=--help]|our loader beside its peers on the same pictures, some twenty minutes
	@$(BIN)/python -m benchmarks.loader --json benchmarks/results/loader.json $(ARGS)

system-bench: $(READY)
	@$(MAKE) --no-print-directory system SYSTEM_PACKAGES="$(BENCH_PACKAGES)" DATA_PACKAGES=

step: samples  ## [ARGS=--help]|a training step and a whole epoch beside the published formulation
	@$(BIN)/python -m benchmarks.step --json benchmarks/results/step.json $(ARGS)

race: $(READY)  ## [ARGS="--seconds 240"]|pretraining on Fashion-MNIST against lightly, for the same wall time
	@$(BIN)/python -m benchmarks.race --json benchmarks/results/race.json $(ARGS)

evidence: $(READY)  ## [ARGS=--help]|every method, three seeds, pretrained and probed; restartable, ninety minutes
	@$(BIN)/python -m benchmarks.evidence --json benchmarks/results/evidence.json $(ARGS)

probes: $(READY)  ## after evidence|how far the fast probe lies from the published one; forty minutes
	@$(BIN)/python -m benchmarks.probes --json benchmarks/results/probes.json $(ARGS)

detector: $(READY)  ## [ARGS=--help]|a detector from pretrained and from random weights, on drawn shapes; half an hour
	@$(BIN)/python -m benchmarks.detector --json benchmarks/results/detector.json $(ARGS)

scale: samples  ## [ARGS="--count 1281167"]|what opening, shuffling and resuming cost at 1.28 and 10 million pictures
	@$(BIN)/python -m benchmarks.scale --json benchmarks/results/scale.json $(ARGS)

parity: $(READY)  ## [ARGS=--check]|how near every backend and operation is to torchvision, for docs/parity.md
	@$(BIN)/python -m tests.parity --json benchmarks/results/parity.json $(ARGS)

half-hour: $(READY)  ## [ARGS="step --minutes 15"]|the first half hour on a GPU: tests, ceilings, loaders, steps, real runs
	@$(BIN)/python -m benchmarks.half_hour $(ARGS)

report: $(READY)  ## [ARGS=--check]|all measured figures: runs/report.html, docs/benchmarks.md, and three of them in README.md
	@$(BIN)/python -m benchmarks.report $(ARGS)

pack: $(READY)  ## [DALI=1] [PYTHON=3.12] [OUT=dist/pack]|archives for machines that have torch and no network
	@$(BIN)/python -m training.install.pack --python $(PYTHON_VERSION) --out $(or $(OUT),dist/pack) $(if $(DALI),--dali) $(ARGS)

# Makes an environment with torch alone, several GB, unless BARE names the interpreter of one.
pack-rehearsal: $(READY)  ## [DALI=1] [BARE=python3]|pack, unpack, train and probe with torch alone and no network
	@PACK_BARE="$(BARE)" PACK_DALI="$(DALI)" PACK_PYTHON="$(PYTHON_VERSION)" \
		$(BIN)/pytest tests/training/install/rehearse_pack.py --timeout 3600 -s $(ARGS)

lint: $(READY)  ## |ruff and the strict type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(READY)  ## [ARGS="-k masks"]|the whole test suite
	$(BIN)/pytest $(ARGS)

clean:  ## |remove runs and made data, keep .venv
	rm -rf runs data

# $(call need,NAME,what it is): refuse, with a sentence, to go on without a value.
need = test -n "$($(1))$(findstring --help,$(ARGS))" || { echo "$(1) is not given: $(2), such as make $@ $(1)=…; see make help"; exit 2; }

# VAL is not needed where DATA is a folder with train/ and val/.
judged = $(DATA) $(addprefix --val ,$(VAL)) --pretrained $(PRETRAINED)

# Where what is found out about an encoder goes: into its own folder, where `make card` looks for it.
beside = $(or $(OUT),$(dir $(PRETRAINED))$(1))

# What a set made of DATA is called.
name = $(patsubst %.tar,%,$(notdir $(patsubst %/,%,$(DATA))))
