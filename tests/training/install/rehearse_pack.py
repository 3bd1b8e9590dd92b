"""Rehearsal of a pack: unpack, convert, load, train and probe with torch only and without a network.

    make pack-rehearsal

Not part of the suite, because it downloads gigabytes: it makes an environment of another Python with torch,
torchvision, numpy and numba below data/pack-cache, unless PACK_BARE names the interpreter of one.
"""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.training.install.bare import run_bash
from training.install import pack
from training.install.pack import Pack

PYTHON = os.environ.get("PACK_PYTHON") or "3.12"
DALI = bool(os.environ.get("PACK_DALI"))
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "numpy", "numba")
LOAD = """
from pipelines import Recipe, build_loader
batch = next(iter(build_loader("../set.beton", Recipe(crop_px=32), batch_size=8)))
assert batch.query.shape == (8, 3, 32, 32) and batch.query.isfinite().all() and batch.query.std() > 0.1
"""
TINY = "--arch resnet10w16 --crop-px 32 --grid-size 4 --batch-size 8 --moco-k 24 --bn-splits 1 --epochs 1"


def _bare() -> Path:
    """The bin folder of an environment with torch only."""
    if named := os.environ.get("PACK_BARE"):
        return Path(named).absolute().parent
    folder = pack.ROOT / f"data/pack-cache/torch-alone-{PYTHON}"
    if not (folder / "ready").exists():
        try:
            subprocess.run([f"python{PYTHON}", "-m", "venv", str(folder)], check=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip(
                f"there is no python{PYTHON} here; install it, or name an environment: BARE=…/bin/python3"
            )
        subprocess.run([str(folder / "bin/pip"), "install", *TORCH], check=True)
        (folder / "ready").touch()
    return folder / "bin"


def test_a_machine_with_only_torch_trains_and_probes(picture_folder: Path, tmp_path: Path) -> None:
    bare = _bare()
    pack.main(Pack(tmp_path / "out", PYTHON, dali=DALI))
    backends = ("ffcv", "dali") if DALI else ("ffcv",)
    threads = "--num-threads 1"
    train = "\n".join(
        f"python3 train_pretrain.py ../set.beton --backend {backend} --out ../{backend} {TINY} {threads}"
        for backend in backends
    )
    script = f"""
        set -eu
        LOAD={shlex.quote(LOAD)}
        set -x
        for name in tyro rich ffcv matplotlib; do
            if python3 -c "import $name" 2>/dev/null; then echo "$name is installed already"; exit 1; fi
        done
        cd out
        sha256sum --quiet -c SHA256SUMS
        mkdir ../maskmix
        cat maskmix-*.tar.gz | tar -xzi -C ../maskmix
        source ../maskmix/activate
        cd ../maskmix
        python3 -m dataset_tools convert {picture_folder} ../set.beton
        python3 -m dataset_tools convert {picture_folder} ../set.shards
        python3 -c "$LOAD"
        {train}
        python3 train_pretrain.py ../set.shards --out ../shards {TINY} {threads}
        python3 train_lincls.py ../set.beton --val ../set.beton --pretrained ../ffcv/backbone.safetensors \\
            --crop-px 32 --batch-size 8 --knn-k 5 --epochs 1 --out ../probe {threads}
        python3 -m pytest -q tests/models/test_losses.py tests/training/install/test_pack.py
    """
    ended = run_bash(script, tmp_path, bare)
    print(ended.stdout, ended.stderr)  # noqa: T201
    assert ended.returncode == 0
    for run in (*backends, "shards"):
        rows = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        assert max(row["step"] for row in rows if row["kind"] == "step") >= 1
    assert json.loads((tmp_path / "probe/result.json").read_text())["knn_top1"] > 0
