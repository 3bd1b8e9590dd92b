"""The pretraining program from its command line: its files, resuming, and its error messages."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

import train_pretrain
from tests.processes import started
from train_pretrain import main, parse, train_step
from training import cli
from training.checkpoint import latest, load_checkpoint, save_checkpoint
from training.distributed import StopRequest, init_launch
from training.step import TrainStep

ROOT = Path(__file__).resolve().parents[1]
SMALL = shlex.split(
    "--arch resnet10w16 --crop-px 32 --grid-size 4 --batch-size 8 --moco-k 24 --bn-splits 2 --epochs 2 "
    "--knn-k 5 --knn-every-epochs 1 --num-threads 1 --log-every-s 0"
)

STREAMED = ("--backend", "dali", "--reading", "stream")


def _argv(data: Path, out: Path, *more: str) -> list[str]:
    return [str(data), "--out", str(out), *SMALL, *more]


def _rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["moco", "mixmask", "unmix", "both", "erase"])
def test_every_method_runs_and_writes_its_files(method: str, beton: Path, tmp_path: Path) -> None:
    main(parse(_argv(beton, tmp_path, "--method", method, "--val", str(beton))))
    rows = _rows(tmp_path)
    steps = [row for row in rows if row["kind"] == "step"]
    assert steps[-1]["step"] == 9
    assert all(row["loss"] > 0 for row in steps)
    assert ("loss_mix" in steps[0]) == (method != "moco")
    evaluated = [row for row in rows if row["kind"] == "eval"]
    assert [row["epoch"] for row in evaluated] == [1, 2]
    assert all(0 <= row["knn_top1"] <= 1 and 1 <= row["rankme"] <= 40 for row in evaluated)
    assert list((tmp_path / "tensorboard").iterdir())

    published = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    assert published["arch"] == "resnet10w16" and published["epoch"] == 2
    assert "module.encoder_q.fc.2.weight" in published["state_dict"]
    assert published["state_dict"]["module.queue"].shape == (128, 24)
    backbone = safetensors.torch.load_file(tmp_path / "backbone.safetensors")
    for name, tensor in backbone.items():
        assert torch.equal(tensor, published["state_dict"][f"module.encoder_q.{name}"])


def test_symmetric_joint_and_bf16_train_together(beton: Path, tmp_path: Path) -> None:
    flags = ("--symmetric", "--joint-forward", "--method", "both", "--precision", "bf16", "--epochs", "1")
    main(parse(_argv(beton, tmp_path, *flags)))
    steps = [row for row in _rows(tmp_path) if row["kind"] == "step"]
    assert steps[-1]["queue_filled"] == 1 and steps[-1]["queue_age"] == 1
    # The effective rank is logged without --val, too.
    (evaluated,) = (row for row in _rows(tmp_path) if row["kind"] == "eval")
    assert evaluated["rankme"] >= 1 and "knn_top1" not in evaluated


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(parse(_argv(beton, tmp_path, "--epochs", "1")))
    good = latest(tmp_path)
    diverging = _argv(beton, tmp_path, "--epochs", "1", "--lr", "1e38", "--resume")
    state = load_checkpoint(good)
    state.epoch, state.step = 0, 0
    state.loader["epoch"], state.loader["batches_done"] = 0, 0
    save_checkpoint(good, state)
    message = _refusal(diverging, capsys)
    assert "not finite" in message or "the loss became nan in step" in message
    assert str(good) in message
    assert latest(tmp_path) == good
    assert all(tensor.isfinite().all() for tensor in load_checkpoint(good).model.values())


def test_learning_rate_and_precision_may_change_on_resume(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(parse(_argv(beton, tmp_path, "--epochs", "1")))
    main(parse(_argv(beton, tmp_path, "--epochs", "1", "--lr", "0.01", "--precision", "bf16", "--resume")))
    printed = capsys.readouterr().out
    assert "lr is 0.01 from here on, it was 0.03" in printed
    assert "precision is bf16 from here on, it was auto" in printed


class _NoHostSync(TorchDispatchMode):
    """Fails for operations that make the host wait for a device."""

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique"), name
        return func(*args, **(kwargs or {}))


STEPS_OF_ALL_KINDS = [("--method", "both"), ("--symmetric", "--joint-forward", "--method", "erase")]


@pytest.mark.parametrize("flags", STEPS_OF_ALL_KINDS)
def test_a_step_has_no_host_sync(flags: tuple[str, ...], beton: Path, tmp_path: Path) -> None:
    """Shown on a CPU by operations that read a tensor's value."""
    config = parse(_argv(beton, tmp_path, *flags))
    with init_launch("cpu") as launch:
        run = train_pretrain.assemble(config, launch)
        batches, step = list(run.loader), TrainStep(run.model, run.optimizer, run.precision)
        train_step(run, step, batches[0])
        with _NoHostSync():
            for batch in batches[1:]:
                train_step(run, step, batch)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), _NoHostSync():
        torch.ones(1).item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("flags", STEPS_OF_ALL_KINDS)
def test_loader_and_step_never_make_the_host_wait(
    flags: tuple[str, ...], precision: str, beton: Path, tmp_path: Path
) -> None:
    config = parse(_argv(beton, tmp_path, *flags, "--precision", precision, "--device", "cuda"))
    with init_launch("cuda") as launch:
        run = train_pretrain.assemble(config, launch)
        batches, step = iter(run.loader), TrainStep(run.model, run.optimizer, run.precision)
        train_step(run, step, next(batches))
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches:
                train_step(run, step, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_step_trains_to_the_same_weights(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced by torch.compile but run eagerly, because generating CPU code takes minutes."""
    main(parse(_argv(beton, tmp_path / "eager", "--epochs", "1")))
    options_seen = []
    real = torch.compile

    def traced(*args: object, **options: object) -> object:
        options_seen.append(options)
        return real(*args, **options, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    main(parse(_argv(beton, tmp_path / "compiled", "--epochs", "1", "--compile")))
    assert options_seen == [{"fullgraph": True}], "the forward pass is one graph"
    eager, compiled = (load_checkpoint(latest(tmp_path / name)).model for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    # The gradients of BN splits are summed in another order, and training amplifies the difference.
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=2e-3)


def test_backbone_loads_in_torchvision(beton: Path, tmp_path: Path) -> None:
    main(parse(_argv(beton, tmp_path, "--arch", "resnet18", "--epochs", "0")))
    encoder = torchvision.models.resnet18()
    keys = encoder.load_state_dict(
        safetensors.torch.load_file(tmp_path / "backbone.safetensors"), strict=False
    )
    assert keys.missing_keys == ["fc.weight", "fc.bias"] and not keys.unexpected_keys


@pytest.mark.parametrize(
    ("data", "stop_after", "flags", "one_ahead"),
    [
        ("beton", 3, (), False),
        ("beton", 5, (), False),
        ("beton", 7, (), False),
        pytest.param("shards", 7, STREAMED, False, marks=pytest.mark.needs("nvidia.dali")),
        pytest.param("shards", 7, STREAMED, True, marks=pytest.mark.needs("nvidia.dali")),
    ],
)
def test_a_stopped_run_resumes_to_the_same_weights(
    data: str,
    stop_after: int,
    flags: tuple[str, ...],
    one_ahead: bool,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped in the first epoch, at its end, and in the second; also with a batch prefetched, as on GPUs."""
    if one_ahead:
        monkeypatch.setattr("pipelines.loader._ASYNC_DEVICES", {"cpu"})
    pictures, more = request.getfixturevalue(data), ("--method", "both", *flags)
    main(parse(_argv(pictures, tmp_path / "whole", *more)))

    steps = iter(range(1, 100))

    def stop_there(self: StopRequest, launch: object, *, exchange: bool) -> bool:
        self.requested = self.requested or next(steps) >= stop_after
        return self.requested

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "agreed", stop_there)
        main(parse(_argv(pictures, tmp_path / "parts", *more)))
    assert "--resume" in capsys.readouterr().out
    assert not (tmp_path / "parts" / "backbone.safetensors").exists()
    main(parse(_argv(pictures, tmp_path / "parts", *more, "--resume")))

    whole, parts = (load_checkpoint(latest(tmp_path / name)) for name in ("whole", "parts"))
    assert whole.step == parts.step == 10
    assert whole.model.keys() == parts.model.keys()
    for name, tensor in whole.model.items():
        assert torch.equal(tensor, parts.model[name]), name
    last, other = (_rows(tmp_path / name)[-2:] for name in ("whole", "parts"))
    assert last[0]["loss"] == other[0]["loss"] and last[1]["rankme"] == other[1]["rankme"]


def test_state_holds_everything(beton: Path, tmp_path: Path) -> None:
    config = parse(_argv(beton, tmp_path))
    main(config)
    state = load_checkpoint(latest(tmp_path))
    assert {"queue_KD", "queue_ptr"} <= state.model.keys()
    assert state.optimizer["state"] and state.generators["cpu"].numel()
    assert state.loader["seed"] == 0
    assert state.config == config.as_json()
    assert int(state.model["queue_ptr"]) == 10 * 8 % 24


def _refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: main(parse(argv)))
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_errors_of_the_user_are_one_message(
    beton: Path, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    run = tmp_path / "run"
    assert "larger than the set of 40" in _refusal(_argv(beton, run, "--batch-size", "64"), capsys)
    assert "no images" in _refusal(_argv(empty, run), capsys)
    assert "make convert" in _refusal(_argv(tmp_path / "absent.beton", run), capsys)
    assert "resnet50" in _refusal(_argv(beton, run, "--arch", "resnet51"), capsys)
    assert "mask_lam" in _refusal(_argv(beton, run, "--mask-lam", "0.01"), capsys)
    assert "fp16" in _refusal(_argv(beton, run, "--precision", "fp16", "--device", "cpu"), capsys)
    assert "--cuda-graph needs a GPU" in _refusal(
        _argv(beton, run, "--cuda-graph", "--device", "cpu"), capsys
    )
    assert "equal parts for BatchNorm" in _refusal(_argv(beton, run, "--bn-splits", "3"), capsys)
    assert "--moco-kk" in _refusal(_argv(beton, run, "--moco-kk", "3"), capsys)
    flat = tmp_path / "flat"
    shutil.copytree(picture_folder / "cat", flat)
    assert "has no labels" in _refusal(_argv(beton, run, "--val", str(flat)), capsys)
    assert "is a compiled set" in _refusal([str(beton), "--out", str(run), "--backend", "folder"], capsys)
    main(parse(_argv(beton, run, "--epochs", "1")))
    assert "--resume" in _refusal(_argv(beton, run, "--epochs", "1"), capsys)
    assert "knn_bank is 0" in _refusal(_argv(beton, run, "--knn-bank", "0"), capsys)
    assert "moco_t" in _refusal(_argv(beton, run, "--epochs", "1", "--moco-t", "0.5", "--resume"), capsys)


def test_the_rate_drops_at_the_epochs_of_the_schedule(beton: Path, tmp_path: Path) -> None:
    main(parse(_argv(beton, tmp_path, "--no-cos", "--schedule", "1", "--lr", "0.5")))
    rates = {row["epoch"]: row["lr"] for row in _rows(tmp_path) if row["kind"] == "step"}
    assert rates == {0: 0.5, 1: pytest.approx(0.05)}


def test_sigterm_finishes_the_step_and_prints_the_command_that_resumes(beton: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "train_pretrain.py"), *_argv(beton, tmp_path, "--epochs", "4000")]
    with started(script, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:  # the first row of metrics: the loop is running
            if line.startswith("epoch"):
                break
        process.terminate()
        rest = process.stdout.read()
        assert process.wait(60) == 0
    assert "--resume" in rest
    assert load_checkpoint(latest(tmp_path)).step > 0


def test_nothing_happens_at_import() -> None:
    assert callable(train_pretrain.main)
