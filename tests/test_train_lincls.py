"""The probe: every kind of file gives the same encoder, both protocols learn, mistakes are sentences."""

import json
import shutil
from pathlib import Path

import pytest
import tyro
from PIL import Image

from engine import cli
from engine.checkpoint import latest
from train_lincls import ProbeConfig, main
from train_pretrain import main as pretrain
from train_pretrain import parse


def _probe(*argv: object) -> dict[str, float]:
    config = tyro.cli(ProbeConfig, args=[str(word) for word in argv])
    main(config)
    return json.loads((config.out / "result.json").read_text())


@pytest.fixture(scope="module")
def run(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few steps."""
    out = tmp_path_factory.mktemp("run")
    argv = "--arch resnet10w16 --crop-px 32 --grid-size 4 --batch-size 8 --moco-k 24 --bn-splits 1 --epochs 1"
    pretrain(parse([str(beton), "--out", str(out), *argv.split(), "--num-threads", "1"]))
    return out


def test_every_layout_gives_the_same_encoder(run: Path, beton: Path, tmp_path: Path) -> None:
    common = (beton, "--val", beton, "--knn-only", "--knn-k", 5, "--crop-px", 32, "--out", tmp_path)
    files = (run / "backbone.safetensors", latest(run), run / "checkpoint.pth.tar")
    results = [_probe(*common, "--pretrained", file) for file in files]
    assert results[0]["knn_top1"] == results[1]["knn_top1"] == results[2]["knn_top1"] > 0.5
    assert "linear_top1" not in results[0]


@pytest.mark.parametrize("how", [("--cached",), ()])
def test_classifier_learns_to_tell_two_classes(
    how: tuple[str, ...], run: Path, picture_folder: Path, tmp_path: Path
) -> None:
    """One class is dark, so any encoder's features tell it apart, whatever the crop."""
    folder = tmp_path / "pictures"
    shutil.copytree(picture_folder, folder)
    for file in (folder / "cat").iterdir():
        with Image.open(file) as picture:
            dark = picture.point(lambda level: level // 4)
        dark.save(file, quality=92)
    result = _probe(
        *(folder, "--val", folder, "--pretrained", run / "backbone.safetensors", *how),
        *("--epochs", 20, "--lr", 0.5, "--batch-size", 8, "--knn-k", 5, "--out", tmp_path / "probe"),
    )
    assert result["linear_top1"] > 0.9
    assert result["protocol"] == ("cached centre view" if how else "published")


def test_folder_with_train_and_val(run: Path, picture_folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(picture_folder, tmp_path / "set" / split)
    result = _probe(
        *(tmp_path / "set", "--pretrained", run / "backbone.safetensors", "--knn-only", "--knn-k", 1),
        *("--out", tmp_path / "out"),
    )
    assert result["knn_top1"] == 1.0  # every test picture is its own neighbour


def test_mistakes_are_one_sentence(
    run: Path, beton: Path, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*argv: object) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda: _probe(*argv, "--out", tmp_path / "out"))
        assert stop.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    good = ("--pretrained", run / "backbone.safetensors")
    flat = tmp_path / "flat"
    shutil.copytree(picture_folder / "cat", flat)
    assert "give --val" in refusal(beton, *good)
    assert "−1 means no label" in refusal(flat, "--val", beton, *good, "--knn-k", 5)
    assert "no checkpoint" in refusal(beton, "--val", beton, "--pretrained", tmp_path / "absent.pt")
    assert "--arch says resnet18" in refusal(beton, "--val", beton, *good, "--arch", "resnet18")
    assert "--small-stem" in refusal(
        *(beton, "--val", beton, "--pretrained", _as_resnet18(run, tmp_path)),
    )


def _as_resnet18(run: Path, tmp_path: Path) -> Path:
    """A file that claims another architecture than it holds."""
    import safetensors.torch

    tensors = safetensors.torch.load_file(run / "backbone.safetensors")
    path = tmp_path / "wrong.safetensors"
    safetensors.torch.save_file(tensors, path, {"arch": "resnet18", "feature_dim": "512"})
    return path
