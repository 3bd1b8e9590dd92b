"""Foreign configs and weights run no code and download nothing; pickled arrays are read unchanged."""

import io
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from tests.detection.conftest import CONFIGS, write_weights
from training.checkpoint import CheckpointError

if os.environ.get("CI"):
    import detectron2  # noqa: F401
else:
    pytest.importorskip("detectron2")

from detectron2.config import get_cfg

from detection import config, trainer, weights
from detection.foreign_files import config_files, read_pickled_weights

C4 = "coco_R_50_C4_1x"


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._mark),)


# ------------------------------------------------------------------------------------------------------------
# Configs


def _configure(*argv: str) -> Any:
    return config.configure(config.parse(list(argv), None))


def test_yaml_tags_are_not_executed(tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "c.yaml"
    trap = f"!!python/object/apply:os.mkdir ['{mark}']"
    for text in (f"OUTPUT_DIR: {trap}\n", f"_BASE_: {trap}\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"the config is refused: .*os.mkdir"):
            _configure("--config-file", str(file))
    base = tmp_path / "base.yaml"
    base.write_text(f"OUTPUT_DIR: {trap}\n")
    for bases in ("base.yaml", "[base.yaml]", str(base)):
        file.write_text(f"_BASE_: {bases}\nSEED: 3\n")
        with pytest.raises(ValueError, match=r"the config is refused: .*base.yaml must be YAML"):
            _configure("--config-file", str(file))
    assert not mark.exists()


def test_bases_must_be_local(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for base in ("https://example.com/x.yaml", "detectron2://x.yaml", "[a.yaml, http://example.com/x.yaml]"):
        file.write_text(f"_BASE_: {base}\n")
        (tmp_path / "a.yaml").write_text("SEED: 1\n")
        with pytest.raises(ValueError, match=r"is based on '\w+://\S+'; a base must be a local file"):
            _configure("--config-file", str(file))
    file.write_text("_BASE_: c.yaml\n")
    with pytest.raises(ValueError, match="is based on itself"):
        _configure("--config-file", str(file))
    for text, message in (
        ("_BASE_: ~nosuchuser/x.yaml", r"there is no \S+nosuchuser/x.yaml"),
        ("SEED: 2024-13-45", r"the config is refused: month .*c.yaml must be YAML"),
        ('_BASE_: "a\\0b"', r"a base must be a local file"),
        ("- 1", r"c.yaml holds a list"),
    ):
        file.write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            _configure("--config-file", str(file))
    file.write_text("_BASE_: gone.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"there is no \S+gone.yaml, which \S+c.yaml is based on"):
        _configure("--config-file", str(file))
    file.write_text(f"_BASE_: [a.yaml, {CONFIGS / (C4 + '.yaml')}]\n")
    assert _configure("--config-file", str(file)).SEED == 1
    assert config_files(file)[:2] == [file, tmp_path / "a.yaml"]


def test_weights_are_not_downloaded_and_proposals_not_unpickled(tmp_path: Path) -> None:
    argv = ("--config-file", str(CONFIGS / f"{C4}.yaml"))
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is https://example\.com/x\.pkl; download the file"):
        _configure(*argv, "MODEL.WEIGHTS", "https://example.com/x.pkl")
    args = config.parse([*argv, "MODEL.LOAD_PROPOSALS", "True", "MODEL.WEIGHTS", ""], None)
    with pytest.raises(ValueError, match="LOAD_PROPOSALS is on, but Detectron2 reads proposals from pickles"):
        config.check_config(config.configure(args), args)


# ------------------------------------------------------------------------------------------------------------
# Weights


def test_code_in_weights_is_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "w.pkl"
    fine = {"a": np.zeros(3, np.float32)}
    for content in (
        Trap(mark),
        {"model": {"a": Trap(mark)}, "__author__": "x"},
        {"model": fine, "__author__": "x", "other": Trap(mark)},
        {"model": fine, "__author__": Trap(mark)},
    ):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            path.write_bytes(pickle.dumps(content, protocol))
            with pytest.raises(CheckpointError, match=r"imports \w+\.mkdir, which could run"):
                read_pickled_weights(path)
    torch.save({"model": {"a": Trap(mark)}}, tmp_path / "w.pth")
    cfg = _configure("--config-file", str(CONFIGS / f"{C4}.yaml"), "MODEL.WEIGHTS", str(tmp_path / "w.pth"))
    with pytest.raises(CheckpointError, match=r"mkdir, which could run code"):
        weights.check_weights(cfg)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["x.pkl", "../x.pth", "/tmp/x.pth", "https://example.com/x.pth", ""])
def test_a_run_continues_only_from_its_own_checkpoints(name: str, tmp_path: Path) -> None:
    (tmp_path / "last_checkpoint").write_text(name)
    args = config.parse(["--resume", "--config-file", str(CONFIGS / f"{C4}.yaml"),
                         "OUTPUT_DIR", str(tmp_path)], None)  # fmt: skip
    with pytest.raises(ValueError, match=r"last_checkpoint names .*a run's own checkpoint is a \.pth"):
        trainer.check_run(args)
    with pytest.raises(ValueError, match="last_checkpoint names"):
        weights.Checkpointer(torch.nn.Linear(1, 1), save_dir=str(tmp_path)).resume_or_load("", resume=True)


def test_the_trainer_uses_our_checkpointer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It detects a damaged checkpoint, from which Detectron2 would continue."""
    write_weights("resnet50", tmp_path / "model_0000001.pth")
    content = bytearray((tmp_path / "model_0000001.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model_0000001.pth").write_bytes(content)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    ours = trainer.Trainer.__new__(trainer.Trainer)
    ours.cfg = get_cfg()
    ours.cfg.OUTPUT_DIR = str(tmp_path)
    ours.checkpointer = weights.DetectionCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        ours.resume_or_load(resume=True)


ARRAYS = {
    "float": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "by columns": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "big-endian": np.arange(4, dtype=">f4"),
    "half": np.ones(3, np.float16),
    "count": np.array(7, np.int64),
    "none": np.zeros((0, 3), np.float32),
    "flags": np.array([True, False]),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_are_read_unchanged(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "w.pkl"
    ours = {"model": OrderedDict(ARRAYS), "__author__": "x", "matching_heuristics": True, "more": [1.5, None]}
    path.write_bytes(pickle.dumps(ours, protocol))
    found = read_pickled_weights(path)
    assert {**found, "model": 0} == {"model": 0, "__author__": "x", "matching_heuristics": True}
    caffe2 = {"blobs": {**ARRAYS, "conv1_w_momentum": np.ones(2)}}
    path.write_bytes(pickle.dumps(caffe2, protocol))
    others = read_pickled_weights(path)
    assert {**others, "model": 0} == {"model": 0, "__author__": "Caffe2", "matching_heuristics": True}
    for model in (found["model"], others["model"]):
        assert list(model) == list(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(model[name], array)
            assert model[name].dtype == array.dtype.newbyteorder("=") and model[name].flags.writeable


def test_a_pickle_of_python_2_is_read() -> None:
    """Written by Python 2.7's pickle, protocol 2, of {'conv1_w': numpy.array([1, -2], 'float32')}."""
    payload = (
        b"\x80\x02}q\x01U\x07conv1_wq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04"
        b"K\x00\x85U\x01b\x87Rq\x05(K\x01K\x02\x85cnumpy\ndtype\nq\x06U\x02f4K\x00K\x01\x87Rq\x07(K\x03U\x01<"
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x80?\x00\x00\x00\xc0tbs."
    )
    path = Path(os.devnull)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _: payload)
        np.testing.assert_array_equal(read_pickled_weights(path)["model"]["conv1_w"], [1, -2])


def test_a_pickle_cannot_change_our_replacements(tmp_path: Path) -> None:
    """A pickle may set attributes on the objects it names."""
    path = tmp_path / "w.pkl"
    state = b"N}q\x00X\x0c\x00\x00\x00__defaults__K\x01s\x86b"
    for name in (b"c_codecs\nencode\n", b"cnumpy\ndtype\n", b"ccollections\nOrderedDict\n"):
        path.write_bytes(b"\x80\x02" + name + state + b"0}.")
        with pytest.raises(CheckpointError, match="not a pickle of arrays"):
            read_pickled_weights(path)


def test_weights_of_an_unknown_layout_are_refused(tmp_path: Path) -> None:
    for content in ({"model_state": {"a": torch.zeros(1)}}, [1, 2], {"model": [1]}):
        torch.save(content, tmp_path / "w.pyth")
        cfg = _configure(
            "--config-file", str(CONFIGS / f"{C4}.yaml"), "MODEL.WEIGHTS", str(tmp_path / "w.pyth")
        )
        with pytest.raises(CheckpointError, match=r"w\.pyth has an unknown layout: found"):
            weights.check_weights(cfg)


@given(
    changes=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), min_size=1, max_size=4),
    protocol=st.integers(0, pickle.HIGHEST_PROTOCOL),
    cut=st.one_of(st.just(0), st.integers(0, 900)),
)
@settings(deadline=None, max_examples=300)
def test_a_damaged_pickle_is_refused_or_gives_arrays(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], protocol: int, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.pkl"
    content = bytearray(pickle.dumps({"model": {"a": np.arange(6.0), "b": np.ones((2, 3))}}, protocol))
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content[: len(content) - cut % len(content)])
    try:
        found = read_pickled_weights(path)
    except CheckpointError:
        return
    assert all(isinstance(array, np.ndarray) for array in found["model"].values())


# ------------------------------------------------------------------------------------------------------------
# Images


def test_images_of_other_formats_are_not_opened(sets: dict[str, str], tmp_path: Path) -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    (tmp_path / "a.jpg").write_bytes(eps)
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    mapper = trainer.Mapper(get_cfg(), is_train=False)
    image = {"file_name": str(tmp_path / "a.jpg"), "height": 9, "width": 9}
    with pytest.raises(UnidentifiedImageError, match=re.escape(str(tmp_path / "a.jpg"))):
        mapper(image)
    photo = Image.new("RGB", (9, 9))
    photo.save(tmp_path / "a.jpg", "JPEG")
    assert mapper(image)["image"].shape[0] == 3
    (tmp_path / "seg.png").write_bytes(eps)
    with pytest.raises(UnidentifiedImageError, match=re.escape(str(tmp_path / "seg.png"))):
        mapper(image | {"sem_seg_file_name": str(tmp_path / "seg.png")})
