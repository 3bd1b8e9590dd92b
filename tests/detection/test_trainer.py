"""Converted weights give torchvision's features in Detectron2; detectors are trained and evaluated."""

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.shapes import CLASSES
from detection.train_net import main
from tests.detection.conftest import CONFIGS, write_weights
from training import cli

if os.environ.get("CI"):
    import detectron2  # noqa: F401
else:
    pytest.importorskip("detectron2")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from detection import config, datasets, trainer

SMALL = """
INPUT.MIN_SIZE_TRAIN (96,) INPUT.MIN_SIZE_TEST 96 SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 3 SOLVER.STEPS ()
SOLVER.WARMUP_ITERS 1 SOLVER.BASE_LR 0.005 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 DATALOADER.NUM_WORKERS 0
MODEL.RPN.PRE_NMS_TOPK_TEST 50 MODEL.RPN.POST_NMS_TOPK_TEST 20 MODEL.RPN.POST_NMS_TOPK_TRAIN 50
MODEL.RPN.PRE_NMS_TOPK_TRAIN 100 TEST.PRECISE_BN.NUM_ITER 2 SEED 3
"""
FPN = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
Refusal = Callable[..., str]


def _file(name: str) -> tuple[str, str]:
    return "--config-file", str(CONFIGS / f"{name}.yaml")


def _args(*argv: str) -> argparse.Namespace:
    return config.parse(list(argv), None)


def _stages(encoder: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(images))))
    found = {}
    for number in range(1, 5):
        x = found[f"res{number + 1}"] = getattr(encoder, f"layer{number}")(x)
    return found


@pytest.mark.parametrize(
    ("arch", "name"), [("resnet50", "coco_R_50_C4_1x"), ("resnet18", "coco_R_50_FPN_1x")]
)
def test_converted_weights_give_the_same_features(arch: str, name: str, tmp_path: Path) -> None:
    encoder = write_weights(arch, tmp_path / "weights.pth")
    argv = ["--config-file", str(CONFIGS / f"{name}.yaml"), "MODEL.WEIGHTS", str(tmp_path / "weights.pth")]
    argv += FPN if arch == "resnet18" else []
    cfg = config.configure(config.parse(argv, None))
    model = build_model(cfg).eval()
    checkpointer = DetectionCheckpointer(model)
    incompatible = []
    load = checkpointer._load_model
    checkpointer._load_model = lambda checkpoint: incompatible.append(load(checkpoint)) or incompatible[0]
    checkpointer.load(cfg.MODEL.WEIGHTS)
    assert not incompatible[0].unexpected_keys
    ours = ("backbone.stem", "backbone.res", "backbone.bottom_up", "roi_heads.res5")
    missing = [key for key in incompatible[0].missing_keys if key.startswith(ours)]
    assert all(key.startswith("roi_heads.res5.norm.") for key in missing)
    images = torch.randn(2, 3, 64, 96)
    expected = _stages(encoder, images)
    with torch.no_grad():
        if arch == "resnet18":
            got = model.backbone.bottom_up(images)
        else:
            got = model.backbone(images)
            last = model.roi_heads.res5[:3](got["res4"])
            torch.testing.assert_close(last, expected["res5"], rtol=1e-4, atol=1e-4)
    for stage, features in got.items():
        torch.testing.assert_close(features, expected[stage], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["coco", "voc"])
def test_a_detector_trains_and_is_evaluated(
    layout: str, sets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    check = datasets.check_sets
    monkeypatch.setattr(
        datasets, "check_sets", lambda *given, **more: checked.append(given) or check(*given, **more)
    )
    if layout == "coco":
        name, train, test, tasks = "coco_R_50_C4_1x", sets["coco"], sets["coco"], {"bbox", "segm"}
    else:
        name, train, test, tasks = "pascal_voc_R_50_C4_24k", sets["trainval"], sets["test"], {"bbox"}
    write_weights("resnet50", tmp_path / "weights.pth", encoder_sha256="f00d")
    argv = [
        *(*_file(name), *SMALL.split()),
        *("DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", f"('{test}',)"),
        *("MODEL.WEIGHTS", str(tmp_path / "weights.pth"), "OUTPUT_DIR", str(tmp_path / "out")),
        *("MODEL.ROI_HEADS.NUM_CLASSES", str(len(CLASSES))),
    ]
    main(argv)
    assert checked == [((train,), (test,), len(CLASSES))]
    path = tmp_path / "out" / "result.json"
    result = _read_json(path)
    assert tasks <= result["figures"].keys() and result["iterations"] == 3 and result["seed"] == 3
    assert all(0 <= result["figures"][task]["AP"] <= 100 for task in tasks)
    assert result["encoder_sha256"] == "f00d"
    if layout == "coco":
        assert result["figures"]["bbox"]["AP-triangle"] is None  # there is none
    # As after a run that was interrupted between its last iteration and its result.
    path.unlink()
    final = tmp_path / "out" / "model_final.pth"
    written = final.stat().st_mtime_ns
    (tmp_path / "weights.pth").unlink()  # no longer needed
    main(["--resume", *argv])
    assert _read_json(path) == result and final.stat().st_mtime_ns == written
    if layout == "voc":
        path.unlink()
        main(["--eval-only", *argv, "MODEL.WEIGHTS", str(final)])
        assert _read_json(path.with_name("evaluation.json"))["figures"] == result["figures"]
        assert not path.exists()
        write_weights("resnet50", tmp_path / "weights.pth", encoder_sha256="another")
        with pytest.raises(ValueError, match="holds a run from another encoder than the one in"):
            main(["--resume", *argv])
        with pytest.raises(ValueError, match=r"lacks \d+ tensors of the detector.*/model_final\.pth"):
            main(["--eval-only", *argv])


def _read_json(path: Path) -> dict[str, dict[str, dict[str, float | None]]]:
    """Read standard JSON, which has no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_figures_that_are_not_finite_become_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config.configure(_args(*_file("coco_R_50_C4_1x"), "OUTPUT_DIR", str(tmp_path)))
    row = {"AP": 12.5, "AP50": math.nan, "AP75": 0.0, "AP-disc": -math.inf}
    trainer.write_result(cfg, _args("--config-file", "some/name.yaml"), {"bbox": row})
    result = _read_json(tmp_path / "result.json")
    assert result["figures"] == {"bbox": {"AP": 12.5, "AP50": None, "AP75": 0.0, "AP-disc": None}}
    assert result["config"] == "name" and "encoder_sha256" not in result
    assert "bbox: AP 12.50  AP50 none  AP75 0.00" in capsys.readouterr().out


def test_an_evaluation_without_figures_fails(
    sets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The started process does not repeat the checks."""
    monkeypatch.setattr(trainer, "default_setup", lambda cfg, args: None)
    monkeypatch.setattr(trainer, "_evaluate", lambda cfg, resume: {})
    monkeypatch.setattr(datasets, "check_sets", lambda *given: pytest.fail("checked again"))
    test = ("DATASETS.TEST", f"('{sets['test']}',)")
    args = _args("--eval-only", *_file("pascal_voc_R_50_C4_24k"), *test, "OUTPUT_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"evaluation on voc:\S+:test gave no figures; \S+log\.txt says why"):
        trainer.train_and_evaluate(args)
    assert not (tmp_path / "result.json").exists()


def test_plain_batchnorm_on_a_cpu_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    def norms(name: str, verbose: bool) -> tuple[str, str]:
        args = _args(*_file(name), "MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "2")
        cfg = config.configure(args, verbose=verbose)
        return cfg.MODEL.RESNETS.NORM, capsys.readouterr().out

    norm, printed = norms("coco_R_50_C4_1x", verbose=True)
    sentence = "on a CPU: plain BatchNorm in place of SyncBN in RESNETS; statistics are over 2 images\n"
    assert (norm, printed) == ("BN", sentence)
    norm, printed = norms("coco_R_50_FPN_1x", verbose=True)
    assert norm == "BN" and "in RESNETS, FPN, ROI_MASK_HEAD; statistics" in printed
    assert norms("coco_R_50_FPN_1x", verbose=False) == ("BN", "")


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refusal:
    """Run train_net, which must exit with code 2 before it starts a process; returns its message."""
    monkeypatch.setattr(trainer, "launch", lambda *args, **options: pytest.fail("processes were started"))

    def refused(*argv: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda: main([*argv, "OUTPUT_DIR", str(tmp_path / "out")]))
        assert stop.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    return refused


def test_invalid_configs_are_reported_in_one_sentence(
    refusal: Refusal, sets: dict[str, str], tmp_path: Path
) -> None:
    c4, fpn = _file("coco_R_50_C4_1x"), _file("coco_R_50_FPN_1x")
    assert "give --config-file" in refusal()
    assert "there is no absent.yaml" in refusal("--config-file", "absent.yaml")
    assert "there is no absent.pth" in refusal(*c4, "MODEL.WEIGHTS", "absent.pth")
    assert "the config is refused" in refusal(*c4, "MODEL.NO_SUCH", "3")
    assert "options on the command line must be pairs, such as SOLVER.MAX_ITER 1000" in refusal(
        *c4, "SOLVER.MAX_ITER"
    )
    (tmp_path / "cut.yaml").write_text("MODEL: {RESNETS: [")
    assert "cut.yaml must be YAML" in refusal("--config-file", str(tmp_path / "cut.yaml"))
    two = f"('{sets['test']}', '{sets['val']}')"
    assert "DATASETS.TEST has 2 sets" in refusal(*c4, "DATASETS.TEST", two)
    assert "DATASETS.TEST has 0 sets, []; give exactly one" in refusal(*c4, "DATASETS.TEST", "()")
    assert "--num-gpus is 9, this machine has" in refusal(*c4, "--num-gpus", "9")
    assert "--num-gpus is 0" in refusal(*c4, "--num-gpus", "0")
    assert "--num-machines is 0" in refusal(*c4, "--num-machines", "0")
    assert "DATASETS.TRAIN is empty" in refusal(*c4, "DATASETS.TRAIN", "()")
    assert "cannot share evenly" in refusal(*c4, "--num-machines", "3")
    for depth in ("18", "34"):
        said = refusal(*c4, "MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", "64")
        assert f"DEPTH is {depth}, but Res5ROIHeadsExtraNorm always builds" in said
        assert "use detection/configs/coco_R_50_FPN_1x.yaml" in said
        said = refusal(*fpn, "MODEL.RESNETS.DEPTH", depth)
        assert "RES2_OUT_CHANNELS is 256" in said and "give MODEL.RESNETS.RES2_OUT_CHANNELS 64" in said
    assert "NORM is empty, but Res5ROIHeadsExtraNorm ends in a norm" in refusal(*c4, "MODEL.RESNETS.NORM", "")


def test_unsuitable_sets_and_weights_are_reported_in_one_sentence(
    refusal: Refusal, sets: dict[str, str], tmp_path: Path
) -> None:
    c4 = _file("coco_R_50_C4_1x")
    test = ("DATASETS.TEST", f"('{sets['coco']}',)")
    classes = ("MODEL.ROI_HEADS.NUM_CLASSES", str(len(CLASSES)))

    def with_set(name: str, *more: str) -> str:
        return refusal(*c4, "DATASETS.TRAIN", f"('{name}',)", *test, *more)

    assert "neither coco:" in with_set("mine:here")
    assert "does not exist" in with_set(f"coco:{tmp_path}/none.json:{tmp_path}")
    assert "allows 0 … 1" in with_set(sets["coco"], "MODEL.ROI_HEADS.NUM_CLASSES", "2")
    boxes_alone = ("MODEL.MASK_ON", "False", *classes)
    assert "give MODEL.MASK_ON False" in with_set(sets["trainval"], *classes)
    assert "differ in their order" in with_set(sets["trainval"], *boxes_alone)
    # --eval-only checks the test set alone; the training set need not exist.
    missing = ("DATASETS.TRAIN", "('mine:here',)", "DATASETS.TEST", f"('{sets['val']}',)")
    assert "1 classes have no box in" in refusal("--eval-only", *c4, *missing, *boxes_alone)
    write_weights("resnet18", tmp_path / "weights.pth", pixel_mean=[0.0, 0.0, 0.0])
    given = ("MODEL.WEIGHTS", str(tmp_path / "weights.pth"), *classes)
    assert "give MODEL.PIXEL_MEAN '[0.0, 0.0, 0.0]'" in with_set(sets["coco"], *given)
    said = with_set(sets["coco"], *given, "MODEL.PIXEL_MEAN", "[0.0, 0.0, 0.0]")
    assert "of the backbone's tensors are not in" in said and "MODEL.RESNETS.DEPTH is 50" in said
