"""The card agrees with the files, and its code loads the backbone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.encoders import build_encoder
from training.card import Card, main
from training.export import BackboneMeta, fingerprint, load_backbone, save_backbone

ROOT = Path(__file__).resolve().parents[2]


def _backbone(folder: Path, arch: str, **options: bool) -> Path:
    encoder, feature_dim = build_encoder(arch, **options)
    meta = BackboneMeta(
        arch=arch,
        feature_dim=feature_dim,
        method="mixmask",
        trained_on="pictures.beton, 1,234 pictures",
        recipe=json.dumps({"epochs": 7, "mixing": {"grid_size": 5}}),
        crop_px=64,
        mean=(0.5, 0.25, 0.5),
        std=(0.2, 0.2, 0.2),
        small_stem=options.get("small_stem", False),
    )
    save_backbone(folder / "backbone.safetensors", encoder, meta)
    with torch.no_grad():
        torch.save(encoder.eval()(torch.ones(1, 3, 64, 64)), folder / "expected.pt")
    return folder / "backbone.safetensors"


def _runs(code: str, folder: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    check = (
        f"{code}\nimport torch\nfeatures = encoder.eval()(torch.ones(1, 3, 64, 64))\n"
        "torch.testing.assert_close(features, torch.load('expected.pt'), rtol=1e-4, atol=1e-5)"
    )
    subprocess.run([sys.executable, "-c", check], cwd=folder, env=env, check=True)


@pytest.mark.parametrize(
    ("arch", "options"), [("resnet18", {}), ("resnet18", {"small_stem": True}), ("resnet10w16", {})]
)
def test_the_code_on_the_card_loads_the_backbone(arch: str, options: dict[str, bool], tmp_path: Path) -> None:
    text = main(Card(_backbone(tmp_path, arch, **options))).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    plain = arch == "resnet18" and not options
    assert len(blocks) == (2 if plain else 1)
    for block in blocks:
        if "timm" in block and "CI" not in os.environ:
            pytest.importorskip("timm")
        _runs(block, tmp_path)


def test_figures_come_from_the_files(tmp_path: Path) -> None:
    backbone = _backbone(tmp_path, "resnet18")
    log = [
        {"kind": "step", "step": 99, "samples_per_s": 1234.0},
        {"kind": "eval", "step": 99, "knn_top1": 0.4321, "rankme": 12.34},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    own = {"encoder_sha256": fingerprint(load_backbone(backbone).state)}
    results = {
        "lincls": {"linear_top1": 0.6543, "protocol": "published", "knn_top1": 0.5},
        "tenth": {"top1": 0.7, "best_top1": 0.71, "labelled_pictures": 1000},
        "again": {"top1": 0.22, "best_top1": 0.73, "exported_sha256": own["encoder_sha256"]},
        "voc": {
            "figures": {"bbox": {n: {"mean": 50.0, "std": 0.5} for n in ("AP", "AP50", "AP75")}},
            "runs": [1, 2],
        },
        "coco": {"figures": {"segm": {"AP": 30.0, "AP50": 40.0, "AP75": 35.5}}, "config": "coco_R_50_C4_2x"},
    }
    for name, result in results.items():
        (tmp_path / name / "run-0").mkdir(parents=True)
        (tmp_path / name / "result.json").write_text(json.dumps(result | own))
        (tmp_path / name / "run-0" / "result.json").write_text(json.dumps({"knn_top1": 0.11} | own))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (tmp_path / "lincls" / "cached.json").write_text("{")  # damaged, and ignored
    (foreign / "knn.json").write_text(json.dumps({"knn_top1": 0.99, "encoder_sha256": "of another"}))
    text = main(Card(backbone)).read_text()
    assert "99.00 %" not in text and "11.00 %" not in text
    assert "22.00 %" not in text and "| fine-tuned top-1, best epoch | 73.00 % |" in text
    with pytest.raises(ValueError, match=r"knn.json is of another backbone"):
        main(Card(backbone, (foreign / "knn.json",)))
    for expected in (
        "| linear top-1 (published) | 65.43 % |",
        "| kNN top-1 | 50.00 % |",
        "| fine-tuned top-1, best epoch, 1,000 labels | 71.00 % |",
        "| bbox AP75, 2 runs | 50.00 ± 0.50 |",
        "| segm AP75, coco_R_50_C4_2x | 35.50 |",
        "100 steps, 1,234 images/s; online kNN at the end 43.21 %, effective rank 12.3.",
        "| epochs | 7 |",
        "| mixing.grid_size | 5 |",
        "Trained on pictures.beton, 1,234 pictures by mixmask",
        "views of 64 px",
    ):
        assert expected in text, text


def test_the_backbones_folder_may_be_named_like_a_repeated_run(tmp_path: Path) -> None:
    (tmp_path / "run-1").mkdir()
    backbone = _backbone(tmp_path / "run-1", "resnet18")
    own = fingerprint(load_backbone(backbone).state)
    (tmp_path / "run-1" / "result.json").write_text(json.dumps({"best_top1": 0.5, "exported_sha256": own}))
    assert "50.00 %" in main(Card(backbone)).read_text()


def test_incomplete_files_are_refused(tmp_path: Path) -> None:
    backbone = _backbone(tmp_path, "resnet18")
    strange = tmp_path / "strange.json"
    own = fingerprint(load_backbone(backbone).state)
    strange.write_text(json.dumps({"loss": 3, "encoder_sha256": own}))
    with pytest.raises(ValueError, match="none of the known figures"):
        main(Card(backbone, (strange,)))
    strange.write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a result"):
        main(Card(backbone, (strange,)))
    import safetensors.torch

    safetensors.torch.save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="is not an exported backbone"):
        main(Card(tmp_path / "checkpoint.pt"))
    with pytest.raises(ValueError, match="does not name its architecture"):
        main(Card(tmp_path / "bare.safetensors"))
    assert not (tmp_path / "MODEL_CARD.md").exists()
