"""The probe: every file format gives the same encoder, both protocols learn, errors are messages."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from tests.processes import in_two_processes
from train_lincls import main, parse
from train_pretrain import main as pretrain
from train_pretrain import parse as parse_pretraining
from training import cli, supervised
from training.checkpoint import CheckpointError, latest, load_checkpoint
from training.distributed import StopRequest


def _probe(*argv: object) -> dict[str, float]:
    config = parse([*map(str, argv), "--num-threads", "1"])
    main(config)
    name = "knn" if config.knn_only else "cached" if config.cached else "result"
    return json.loads((config.out / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def run(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pretraining of a few steps."""
    out = tmp_path_factory.mktemp("run")
    argv = "--arch resnet10w16 --crop-px 32 --grid-size 4 --batch-size 8 --moco-k 24 --bn-splits 1 --epochs 1"
    pretrain(parse_pretraining([str(beton), "--out", str(out), *argv.split(), "--num-threads", "1"]))
    return out


def _on_itself(beton: Path, run: Path) -> tuple[object, ...]:
    """Arguments for a set that is its own test set."""
    return (beton, "--val", beton, "--pretrained", run / "backbone.safetensors")


@pytest.fixture(scope="module")
def dark_cats(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One class is dark, so the features of any encoder separate the classes in any crop."""
    folder = tmp_path_factory.mktemp("dark") / "pictures"
    shutil.copytree(picture_folder, folder)
    for file in (folder / "cat").iterdir():
        with Image.open(file) as picture:
            dark = picture.point(lambda level: level // 4)
        dark.save(file, quality=92)
    return folder


def test_every_layout_gives_the_same_encoder(run: Path, beton: Path, tmp_path: Path) -> None:
    common = (beton, "--val", beton, "--knn-only", "--knn-k", 5, "--crop-px", 32, "--out", tmp_path)
    files = (run / "backbone.safetensors", latest(run), run / "checkpoint.pth.tar")
    results = [_probe(*common, "--pretrained", file) for file in files]
    assert results[0]["knn_top1"] == results[1]["knn_top1"] == results[2]["knn_top1"] > 0.5
    assert len({result["encoder_sha256"] for result in results}) == 1
    assert "linear_top1" not in results[0]


def test_the_published_protocol_learns_and_keeps_the_encoder(
    run: Path, dark_cats: Path, tmp_path: Path
) -> None:
    result = _probe(
        *(dark_cats, "--val", dark_cats, "--pretrained", run / "backbone.safetensors", "--epochs", 20),
        *("--lr", 0.5, "--batch-size", 8, "--knn-k", 5, "--leave-one-out", "--out", tmp_path / "probe"),
    )
    assert result["linear_top1"] > 0.9 and result["linear_top5"] == 1
    assert result["protocol"] == "random crops" and result["settings"]["epochs"] == 20
    assert result["linear_best_top1"] >= result["linear_top1"] and result["knn_k"] == 5
    assert 0.5 < result["knn_leave_one_out_top1"] <= 1
    state = load_checkpoint(latest(tmp_path / "probe"))
    backbone = safetensors.torch.load_file(run / "backbone.safetensors")
    assert all(torch.equal(state.model[f"encoder.{name}"], tensor) for name, tensor in backbone.items())
    rows = [json.loads(line) for line in (tmp_path / "probe" / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if row["kind"] == "eval"]
    assert [row["epoch"] for row in measured] == list(range(1, 21))
    assert measured[-1]["top1"] == result["linear_top1"]
    rates = {row["epoch"]: row["lr"] for row in rows if row["kind"] == "step"}
    assert rates[0] == 0.5 and rates[12] == pytest.approx(0.05) and rates[19] == pytest.approx(0.005)


def test_only_the_published_values_are_named_published() -> None:
    def published(*words: str) -> bool:
        return parse(["TRAIN", "--pretrained", "CKPT", *words]).is_published()

    assert published() and published("--schedule", "60", "80") and published("--no-knn")
    for other in ("--epochs 10", "--lr 3", "--cos", "--wd 1e-4", "-b 512", "--schedule 30 60"):
        assert not published(*other.split()), other


def test_a_changed_encoder_is_an_error(
    run: Path, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = supervised.train_step

    def step_with_change(run, forward, batch):
        run.model.encoder.bn1.running_mean.add_(1e-6)
        return step(run, forward, batch)

    monkeypatch.setattr(supervised, "train_step", step_with_change)
    with pytest.raises(RuntimeError, match=r"1 tensors of the frozen encoder have changed.*bn1.running_mean"):
        _probe(
            *(beton, "--val", beton, "--pretrained", run / "backbone.safetensors", "--epochs", 1),
            *("--batch-size", 8, "--no-knn", "--out", tmp_path),
        )


def test_many_classifiers_on_cached_features(run: Path, dark_cats: Path, tmp_path: Path) -> None:
    result = _probe(
        *(dark_cats, "--val", dark_cats, "--pretrained", run / "backbone.safetensors", "--cached"),
        *("--cached-lr", 0.001, 0.5, "--cached-wd", 0, 0.5, "--epochs", 20, "--batch-size", 8),
        *("--out", tmp_path / "probe"),
    )
    assert result["linear_top1"] > 0.9 and result["protocol"] == "cached centre view"
    rows = result["linear_settings"]
    assert len(rows) == 4 and result["linear_top1"] == max(row["top1"] for row in rows)
    best = next(row for row in rows if row["top1"] == result["linear_top1"])
    assert (best["lr"], best["weight_decay"]) == (result["linear_lr"], result["linear_weight_decay"])


@pytest.mark.parametrize("stop_after", [2, 5, 6, 12])
def test_a_stopped_probe_resumes_to_the_same_weights(
    stop_after: int, run: Path, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the first epoch, at its last step, and at the end of both epochs before measuring."""
    more = "--epochs 2 --batch-size 8 --no-knn --num-threads 1"

    def argv(name: str) -> list[str]:
        return [*map(str, _on_itself(beton, run)), "--out", str(tmp_path / name), *more.split()]

    main(parse(argv("whole")))

    steps = iter(range(1, 100))

    def stop_there(self: StopRequest, launch: object, *, exchange: bool) -> bool:
        self.requested = self.requested or next(steps) >= stop_after
        return self.requested

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "agreed", stop_there)
        main(parse(argv("parts")))
    assert not (tmp_path / "parts" / "result.json").exists()
    main(parse([*argv("parts"), "--resume"]))
    main(parse([*argv("parts"), "--resume"]))  # a finished run prints its figures again
    figures = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "parts")]
    assert {**figures[0], "seconds": 0} == {**figures[1], "seconds": 0}
    whole, parts = (load_checkpoint(latest(tmp_path / name)) for name in ("whole", "parts"))
    assert 0 < float(parts.meta["seconds"]) < figures[1]["seconds"] + 0.05  # which is rounded
    assert whole.step == parts.step == 10
    for name, tensor in whole.model.items():
        assert torch.equal(tensor, parts.model[name]), name


def test_a_resumed_probe_may_change_its_rate_and_nothing_else(
    run: Path, beton: Path, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (*_on_itself(beton, run), "--batch-size", 8, "--no-knn", "--epochs", 2, "--out", tmp_path)
    _probe(*common)
    _probe(*common, "--resume", "--lr", 3)
    assert "lr is 3.0 from here on, it was 30.0" in capsys.readouterr().out
    _probe(*common, "--resume", "--knn", "--knn-k", 3)
    with pytest.raises(CheckpointError, match=r"weight_decay: 0\.0 then, 0\.1 now"):
        _probe(*common, "--resume", "--wd", 0.1)
    with pytest.raises(CheckpointError, match=r"test_set: .* then, .* now"):
        _probe(*common, "--resume", "--val", picture_folder)


def test_two_processes_measure_the_same_as_one(run: Path, beton: Path, tmp_path: Path) -> None:
    common = [
        *map(str, _on_itself(beton, run)),
        *["--epochs", "2", "--batch-size", "8", "--num-threads", "1", "--out"],
    ]
    for more, file in (("--lr 0.1", "result.json"), ("--cached --cached-lr 0.1", "cached.json")):
        in_two_processes(main, parse([*common, str(tmp_path / "two"), *more.split()]))
        main(parse([*common, str(tmp_path / "one"), *more.split()]))
        one, two = (json.loads((tmp_path / name / file).read_text()) for name in ("one", "two"))
        # Other batch sizes round differently: one of the 40 images may change its class.
        for name in ("knn_top1", "linear_top1"):
            assert one[name] == pytest.approx(two[name], abs=1.01 / 40)
    weights = [load_checkpoint(latest(tmp_path / name)).model["fc.weight"] for name in ("one", "two")]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_folder_with_train_and_val(run: Path, picture_folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(picture_folder, tmp_path / "set" / split)
    result = _probe(
        *(tmp_path / "set", "--pretrained", run / "backbone.safetensors", "--knn-only", "--knn-k", 1),
        *("--out", tmp_path / "out"),
    )
    assert result["knn_top1"] == 1.0  # every test image is its own neighbour


def test_errors_of_the_user_are_one_message(
    run: Path, beton: Path, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*argv: object) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda: _probe("--out", tmp_path / "out", *argv))
        assert stop.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    good = ("--pretrained", run / "backbone.safetensors")
    flat = tmp_path / "flat"
    shutil.copytree(picture_folder / "cat", flat)
    assert "give --val" in refusal(beton, *good)
    assert "images of " in refusal(flat, "--val", beton, *good, "--knn-k", 5)
    assert "no checkpoint" in refusal(beton, "--val", beton, "--pretrained", tmp_path / "absent.pt")
    assert "--arch says resnet18" in refusal(beton, "--val", beton, *good, "--arch", "resnet18")
    assert "--small-stem" in refusal(beton, "--val", beton, "--pretrained", _as_resnet18(run, tmp_path))
    for words, message in {
        "--cached --lr 3": "lr 3.0 has no effect with --cached",
        "--knn-only --epochs 3": "epochs 3 has no effect with --knn-only",
        "--cached-lr 3": "cached_lr (3.0,) has no effect without --cached",
        "--no-knn --leave-one-out": "leave_one_out True has no effect with --no-knn",
        "--cached --knn-only": "leave one of them out",
        "--knn-only --no-knn": "leave nothing to measure",
        "--cos --schedule 5": "no effect on a cosine",
        "--cached --cached-lr 0": "rates must be more than 0",
        "--cached --cached-wd -1": "weight decays at least 0",
        f"--out {run}": "is the folder of --pretrained, which must not change",
        "--knn-t 0": "knn_t is 0.0; it must be more than 0",
    }.items():
        assert message in refusal(beton, "--val", beton, *good, *words.split())
    other = tmp_path / "other"
    shutil.copytree(picture_folder / "cat", other / "cat")
    shutil.copytree(picture_folder / "bird", other / "ant")
    assert "'bird' in place of 'ant'" in refusal(beton, "--val", other, *good)
    shutil.copytree(picture_folder / "bird", other / "dog")
    assert "differ" in refusal(beton, "--val", other, *good)
    empty = tmp_path / "empty"
    (empty / "cat").mkdir(parents=True)
    assert "no images in" in refusal(beton, "--val", empty, *good)
    assert "torchrun starts the processes" in refusal(beton, *good, "--world-size", 1)


def _as_resnet18(run: Path, tmp_path: Path) -> Path:
    """A file with a wrong architecture in its description."""
    tensors = safetensors.torch.load_file(run / "backbone.safetensors")
    path = tmp_path / "wrong.safetensors"
    safetensors.torch.save_file(tensors, path, {"arch": "resnet18", "feature_dim": "512"})
    return path
