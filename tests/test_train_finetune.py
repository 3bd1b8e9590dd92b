"""Fine-tuning uses the chosen images and a rate for each part, and writes usable files."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from models.classifier import Classifier
from models.encoders import build_encoder
from pipelines import evaluation_batches
from pipelines.recipe import Recipe, evaluation
from tests.processes import in_two_processes
from train_finetune import main, parse
from train_pretrain import main as pretrain
from train_pretrain import parse as parse_pretraining
from training import cli
from training.checkpoint import latest, load_checkpoint
from training.distributed import StopRequest
from training.evaluate import Accuracy, count_hits
from training.export import fingerprint, load_backbone


@pytest.fixture(scope="module")
def backbone(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained encoder."""
    out = tmp_path_factory.mktemp("run")
    argv = "--arch resnet10w16 --crop-px 32 --grid-size 4 --batch-size 8 --moco-k 24 --bn-splits 1 --epochs 0"
    pretrain(parse_pretraining([str(beton), "--out", str(out), *argv.split(), "--num-threads", "1"]))
    return out / "backbone.safetensors"


def _finetune(beton: Path, backbone: Path, out: Path, *more: object) -> dict[str, float]:
    words = (beton, "--val", beton, "--pretrained", backbone, "--out", out, "--num-threads", 1, *more)
    main(parse([str(word) for word in words]))
    return json.loads((out / "result.json").read_text())


def test_a_share_of_each_class(beton: Path, backbone: Path, tmp_path: Path) -> None:
    result = _finetune(beton, backbone, tmp_path, "--labels", 0.4, "--epochs", 3, "--batch-size", 8)
    assert result["labelled_pictures"] == 16
    names = (tmp_path / "labels.txt").read_text().split()
    assert sorted(name.split("/")[0] for name in names) == ["bird"] * 8 + ["cat"] * 8
    assert result["best_top1"] >= result["top1"] > 0
    listed = _finetune(
        *(beton, backbone, tmp_path / "again", "--labels", tmp_path / "labels.txt"),
        *("--epochs", 3, "--batch-size", 8),
    )
    assert {**listed, "seconds": 0} == {**result, "seconds": 0}
    assert (tmp_path / "again" / "labels.txt").read_text() == (tmp_path / "labels.txt").read_text()


def test_a_set_without_names(beton: Path, backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.beton").write_bytes(beton.read_bytes())
    few = ("--epochs", 1, "--batch-size", 4)
    _finetune(tmp_path / "alone.beton", backbone, tmp_path / "by share", "--labels", 0.1, *few)
    lines = (tmp_path / "by share" / "labels.txt").read_text()
    assert len(lines.split()) == 4 and lines.startswith("#")
    _finetune(
        tmp_path / "alone.beton",
        backbone,
        tmp_path / "list",
        "--labels",
        tmp_path / "by share" / "labels.txt",
        *few,
    )
    assert (tmp_path / "list" / "labels.txt").read_text() == lines


def test_everything_is_trained_and_exported(beton: Path, backbone: Path, tmp_path: Path) -> None:
    result = _finetune(beton, backbone, tmp_path, "--epochs", 4, "--batch-size", 8)
    assert result["labelled_pictures"] == 40 and not (tmp_path / "labels.txt").exists()
    before, after = (
        safetensors.torch.load_file(path) for path in (backbone, tmp_path / "backbone.safetensors")
    )
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before if name.endswith("conv1.weight"))
    best = load_backbone(tmp_path / "best.pt")
    assert all(torch.equal(best.state[name], tensor) for name, tensor in after.items())
    meta, first = load_backbone(tmp_path / "backbone.safetensors").meta, load_backbone(backbone).meta
    assert meta.method == f"{first.method}, fine-tuned" and meta.crop_px == first.crop_px == 32
    assert meta == best.meta and meta.trained_on == f"{first.trained_on}, then {beton.name} with labels"
    recipe = json.loads(meta.recipe or "")
    assert recipe["pretraining"]["arch"] == "resnet10w16" and recipe["fine_tuning"]["epochs"] == 4
    measured = json.loads(load_checkpoint(latest(tmp_path)).meta["measured"])
    assert measured["best_top1"] == result["best_top1"] and measured["epoch"] == 4
    assert measured["accuracy"] == {"top1": result["top1"], "top5": result["top5"]}


def test_encoder_and_classifier_have_their_own_rates(beton: Path, backbone: Path, tmp_path: Path) -> None:
    _finetune(beton, backbone, tmp_path, "--epochs", 1, "--batch-size", 8, "--lr", 0, "--head-lr", 0.3)
    before = safetensors.torch.load_file(backbone)
    state = load_checkpoint(latest(tmp_path))
    parameters = [name for name in before if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(before[name], state.model[f"encoder.{name}"]) for name in parameters)
    # Its BatchNorm statistics are still those of the new data.
    assert not torch.equal(before["bn1.running_mean"], state.model["encoder.bn1.running_mean"])
    assert [group["initial_lr"] for group in state.optimizer["param_groups"]] == [0, 0.3]


def test_two_processes_measure_the_model_that_they_write(beton: Path, backbone: Path, tmp_path: Path) -> None:
    """The accuracy of two processes is that of their checkpoint, measured by one and after a resume."""
    words = (beton, "--val", beton, "--pretrained", backbone, "--out", tmp_path, "--num-threads", 1)
    argv = [*map(str, words), "--labels", "0.9", "--epochs", "2", "--batch-size", "8", "--resume"]
    in_two_processes(main, parse(argv))
    result = json.loads((tmp_path / "result.json").read_text())
    model = Classifier(*build_encoder("resnet10w16"), num_classes=2, frozen=False).eval()
    model.load_state_dict(load_checkpoint(latest(tmp_path)).model)
    with torch.no_grad():
        batches = evaluation_batches(beton, evaluation(Recipe(crop_px=32)))
        hits = sum(count_hits(model(images), labels) for images, labels in batches)
    # Other batch sizes round differently: one of the 40 images may change its class.
    assert Accuracy.of(hits).top1 == pytest.approx(result["top1"], abs=1.01 / 40) and hits[2] == 40
    main(parse(argv))  # one process resumes a finished run of two
    again = json.loads((tmp_path / "result.json").read_text())
    assert {**again, "seconds": 0} == {**result, "seconds": 0}


@pytest.mark.parametrize("stop_after", [2, 5])
def test_a_stopped_run_resumes_to_the_same_weights(
    stop_after: int, beton: Path, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of the first epoch, and at its end before measuring."""
    common = ("--labels", 0.9, "--epochs", 2, "--batch-size", 8, "--resume")
    whole = _finetune(beton, backbone, tmp_path / "whole", *common)
    calls = iter(range(1, 100))

    def stop_there(self: StopRequest, launch: object, *, exchange: bool) -> bool:
        self.requested = self.requested or next(calls) >= stop_after
        return self.requested

    with monkeypatch.context() as patch, pytest.raises(FileNotFoundError, match=r"result\.json"):
        patch.setattr(StopRequest, "agreed", stop_there)
        _finetune(beton, backbone, tmp_path / "parts", *common)
    parts = _finetune(beton, backbone, tmp_path / "parts", *common)
    assert {**parts, "seconds": 0} == {**whole, "seconds": 0}
    exported = [load_backbone(tmp_path / name / "backbone.safetensors") for name in ("whole", "parts")]
    assert exported[0].meta == exported[1].meta
    assert fingerprint(exported[0].state) == fingerprint(exported[1].state)
    assert (tmp_path / "parts" / "labels.txt").read_text() == (tmp_path / "whole" / "labels.txt").read_text()


def test_errors_of_the_user_are_one_message(
    beton: Path, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*more: object) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda: _finetune(beton, backbone, tmp_path / "out", *more))
        assert stop.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    assert "share of labels is 1.5" in refusal("--labels", 1.5)
    assert "absent.txt is neither a share in (0, 1] nor a file" in refusal(
        "--labels", tmp_path / "absent.txt"
    )
    assert "larger than the set of 4 images" in refusal("--labels", 0.1, "--batch-size", 8)
    assert "needs GPUs" in refusal("--sync-bn", "--device", "cpu", "--batch-size", 8)
    assert "head_lr -1" in refusal("--head-lr", -1)
