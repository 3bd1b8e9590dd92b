# `make help` lists the commands. Everything runs in .venv, which `make setup` creates.

# An interpreter (make setup PYTHON=python3.12), or for `make pack` the Python version of other machines (PYTHON=3.12).
PYTHON ?= python3
INTERPRETER := $(if $(filter 3.%,$(PYTHON)),python3,$(PYTHON))
PACK_PYTHON := $(if $(filter 3.%,$(PYTHON)),$(PYTHON),3.12)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The loader decodes with libturbojpeg. FFCV, which the benchmarks compare with, is compiled against all of these.
SYSTEM_PACKAGES := build-essential pkg-config libopencv-dev libturbojpeg0-dev
# Optional: torchvision can download the data set instead.
DATA_PACKAGES := dataset-fashion-mnist
# SPDL, another loader in the benchmarks, uses FFmpeg's libraries; `make bench` installs them.
BENCH_PACKAGES := ffmpeg
# Detectron2 has no release on PyPI. Only the Python part of this wheel is used: its compiled part is for Python 3.10.
# It runs on CPUs. For GPUs install Detectron2 from source first: `make setup` keeps an installation that works.
DETECTRON2 = --no-deps --target $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])') \
	--python-version 3.10 --implementation cp --only-binary=:all: sal-detectron2==0.7.2

# Arguments of the commands: make pretrain DATA=data/in1k-train.beton ARGS="--epochs 100 --val data/in1k-val.beton"
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

help:  ## |print this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {split($$2, part, "|"); printf "  %-48s %s\n", "make " $$1 " " part[1], part[2]}' $(MAKEFILE_LIST)

setup: $(READY)  ## |install missing system packages, then create .venv with all Python packages

$(READY): pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory system
	@$(INTERPRETER) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(INTERPRETER) is older than 3.11; name a newer one: make setup PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(INTERPRETER) -m venv $(VENV) || { echo "no venv module; apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --constraint constraints.txt --editable '.[ffcv,dali,samples,bench,detection,dev]'
	@$(BIN)/python -c 'import detectron2' 2>/dev/null || $(BIN)/pip install $(DETECTRON2)
	@touch $@

# Installs missing system packages as root or with sudo; without these rights it prints the command to run.
system:
	@command -v apt-get >/dev/null || { echo "no apt-get here; install libturbojpeg by hand, and for FFCV also OpenCV, pkg-config and a C++ compiler"; exit 0; }; \
	required="$(SYSTEM_PACKAGES)"; \
	$(INTERPRETER) -c 'import ensurepip' 2>/dev/null || required="$$required python3-venv"; \
	$(INTERPRETER) -c 'import pathlib, sysconfig, sys; sys.exit(not (pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h").exists())' || required="$$required python3-dev"; \
	missing=""; for package in $$required; do dpkg -s $$package >/dev/null 2>&1 || missing="$$missing $$package"; done; \
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

doctor:  ## |show what is installed, which backends work, and how to install what is missing
	@test -x $(BIN)/python || { echo "there is no $(VENV) yet; run make setup"; exit 1; }
	@$(BIN)/python -m training.install.doctor

demo: $(READY)  ## |pretrain and probe an encoder on sample sets, in minutes on two cores
	@$(BIN)/python -m examples.demo $(ARGS)

convert: $(READY)  ## DATA=folder [OUT=x.beton]|compile a folder or a tar of images into one file
	@$(call need,DATA,a folder or a tar of images)
	@$(BIN)/python -m dataset_tools convert $(DATA) $(or $(OUT),data/$(name).beton) $(ARGS)

shards: $(READY)  ## DATA=folder [OUT=x.shards]|compile a folder or a tar of images into WebDataset shards
	@$(call need,DATA,a folder or a tar of images)
	@$(BIN)/python -m dataset_tools convert $(DATA) $(or $(OUT),data/$(name).shards) $(ARGS)

index: $(READY)  ## DATA=folder|index existing WebDataset shards, without copying them
	@$(call need,DATA,a folder of tars)
	@$(BIN)/python -m dataset_tools index $(DATA) $(ARGS)

pretrain: $(READY)  ## DATA=x.beton [ARGS=--help]|pretrain an encoder; ARGS=--help lists the options
	@$(call need,DATA,a compiled set or a folder)
	@$(BIN)/python train_pretrain.py $(DATA) $(ARGS)

lincls: $(READY)  ## DATA=x.beton VAL=y.beton|evaluate an encoder by a linear probe and kNN; ARGS=--cached is faster
	@$(call need,DATA,a labelled training set)
	@$(BIN)/python train_lincls.py $(evaluated) --out $(call result_folder,lincls) $(ARGS)

knn: $(READY)  ## DATA=x.beton VAL=y.beton|evaluate an encoder by kNN; ARGS=--leave-one-out also on the training set
	@$(call need,DATA,a labelled training set)
	@$(BIN)/python train_lincls.py $(evaluated) --out $(call result_folder,lincls) \
		--knn-only $(ARGS)

finetune: $(READY)  ## DATA=x.beton VAL=y.beton|fine-tune an encoder; ARGS="--labels 0.1" uses a tenth of the labels
	@$(call need,DATA,a labelled training set)
	@$(BIN)/python train_finetune.py $(evaluated) --out $(call result_folder,finetune) \
		$(ARGS)

card: $(READY)  ## PRETRAINED=run/backbone.safetensors|write a model card next to the encoder
	@$(BIN)/python -m training.card $(PRETRAINED) $(ARGS)

detect-voc: $(READY)  ## PRETRAINED=x.safetensors [RUNS=5]|train detectors on VOC 2007+2012 with RUNS seeds; mean and spread of AP
	@$(BIN)/python -m detection.convert_to_detectron2 $(PRETRAINED) $(dir $(PRETRAINED))detectron2.pth
	@$(BIN)/python -m detection.repeat --runs $(RUNS) --config-file detection/configs/pascal_voc_R_50_C4_24k.yaml \
		$(ARGS) MODEL.WEIGHTS $(dir $(PRETRAINED))detectron2.pth OUTPUT_DIR $(call result_folder,voc)

detect-coco: $(READY)  ## PRETRAINED=x.safetensors [CONFIG=name]|train a detector on COCO; CONFIG=coco_R_50_C4_2x names a file in detection/configs
	@$(BIN)/python -m detection.convert_to_detectron2 $(PRETRAINED) $(dir $(PRETRAINED))detectron2.pth
	@$(BIN)/python -m detection.train_net --config-file detection/configs/$(or $(CONFIG),coco_R_50_C4_2x).yaml \
		$(ARGS) MODEL.WEIGHTS $(dir $(PRETRAINED))detectron2.pth OUTPUT_DIR $(call result_folder,coco)

samples: $(READY)
	@$(BIN)/python -m dataset_tools photographs data/photographs
	@test -f data/photographs.beton || $(BIN)/python -m dataset_tools convert data/photographs/train data/photographs.beton

bench: $(READY) system-bench  ## [ARGS=--help]|measure our loader and others on the same images; twenty minutes
	@$(BIN)/python -m benchmarks.loader --json benchmarks/results/loader.json $(ARGS)

system-bench: $(READY)
	@$(MAKE) --no-print-directory system SYSTEM_PACKAGES="$(BENCH_PACKAGES)" DATA_PACKAGES=

step: samples  ## [ARGS=--help]|measure a training step and an epoch, and the published implementation
	@$(BIN)/python -m benchmarks.step --json benchmarks/results/step.json $(ARGS)

race: $(READY)  ## [ARGS="--seconds 240"]|pretrain on Fashion-MNIST, with this project and with lightly, for the same time
	@$(BIN)/python -m benchmarks.race --json benchmarks/results/race.json $(ARGS)

evidence: $(READY)  ## [ARGS=--help]|pretrain and evaluate every method with three seeds; resumable, ninety minutes
	@$(BIN)/python -m benchmarks.evidence --json benchmarks/results/evidence.json $(ARGS)

probes: $(READY)  ## |compare the cached probe with the published one; after make evidence, forty minutes
	@$(BIN)/python -m benchmarks.probes --json benchmarks/results/probes.json $(ARGS)

detector: $(READY)  ## [ARGS=--help]|train a detector on drawn shapes from pretrained and from random weights; half an hour
	@$(BIN)/python -m benchmarks.detector --json benchmarks/results/detector.json $(ARGS)

scale: samples  ## [ARGS="--count 1281167"]|measure opening, shuffling and resuming of sets of 1.28 and 10 million images
	@$(BIN)/python -m benchmarks.scale --json benchmarks/results/scale.json $(ARGS)

parity: $(READY)  ## [ARGS=--check]|compare every backend and operation with torchvision; writes docs/parity.md
	@$(BIN)/python -m tests.parity --json benchmarks/results/parity.json $(ARGS)

half-hour: $(READY)  ## [ARGS="step --minutes 15"]|make all GPU measurements in half an hour: tests, limits, loaders, steps, runs
	@$(BIN)/python -m benchmarks.half_hour $(ARGS)

report: $(READY)  ## [ARGS=--check]|write all measured figures to runs/report.html, docs/benchmarks.md and README.md
	@$(BIN)/python -m benchmarks.report $(ARGS)

pack: $(READY)  ## [DALI=1] [PYTHON=3.12] [OUT=dist/pack]|make archives for machines that have torch but no network
	@$(BIN)/python -m training.install.pack --python $(PACK_PYTHON) --out $(or $(OUT),dist/pack) $(if $(DALI),--dali) $(ARGS)

# Creates an environment with torch only, several GB, unless BARE names an interpreter that has it.
pack-rehearsal: $(READY)  ## [DALI=1] [BARE=python3]|test the archives: unpack, train and probe with torch only and no network
	@PACK_BARE="$(BARE)" PACK_DALI="$(DALI)" PACK_PYTHON="$(PACK_PYTHON)" \
		$(BIN)/pytest tests/training/install/rehearse_pack.py --timeout 3600 -s $(ARGS)

lint: $(READY)  ## |run ruff, the strict type checker, and the spell-check with docs/words.txt
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

test: $(READY)  ## [ARGS="-k masks"]|run the tests
	$(BIN)/pytest $(ARGS)

clean:  ## |delete runs/ and data/ with all results and sets, keep .venv
	rm -rf runs data

# $(call need,NAME,description): stop with an error message if a variable is not given.
need = test -n "$($(1))$(findstring --help,$(ARGS))" || { echo "$(1) is not given: $(2), such as make $@ $(1)=…; see make help"; exit 2; }

# Arguments of the programs that evaluate an encoder. A folder with train/ and val/ needs no VAL.
evaluated = $(DATA) $(addprefix --val ,$(VAL)) --pretrained $(PRETRAINED)

# $(call result_folder,NAME): by default in the encoder's folder, where `make card` looks for results.
result_folder = $(or $(OUT),$(dir $(PRETRAINED))$(1))

# Name of the set that is made of DATA.
name = $(patsubst %.tar,%,$(notdir $(patsubst %/,%,$(DATA))))
