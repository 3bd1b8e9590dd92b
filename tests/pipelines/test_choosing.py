"""Which backend `auto` takes, and what it says of it."""

import itertools
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dataset_tools.convert import convert
from dataset_tools.sources import FolderSource
from pipelines import Recipe, build_loader
from pipelines.choosing import Here, choose, look_around
from pipelines.dali_operators import import_dali

NOTHING = Here(ffcv=False, dali=False, jpeg_unit=False)
ALL = Here(ffcv=True, dali=True, jpeg_unit=True)


def test_the_machine_decides(beton: Path, shards: Path) -> None:
    for path in (beton, shards):
        assert choose(path, "auto", ALL).backend == "dali"
        assert choose(path, "auto", Here(True, True, False)).backend == "ffcv"
        assert choose(path, "auto", Here(True, False, True)).backend == "ffcv"
        assert "hardware" in str(choose(path, "auto", ALL))
    assert choose(shards, "auto", Here(False, True, False)).backend == "dali"
    # A unit without DALI is worth a word.
    assert "pip install -e '.[dali]'" in choose(shards, "auto", Here(True, False, True)).why


def test_what_is_missing_is_named_with_its_mend(beton: Path, shards: Path) -> None:
    with pytest.raises(ImportError, match=r"pip install ffcv.*Or DALI"):
        choose(shards, "auto", NOTHING)
    for unit in (False, True):
        with pytest.raises(ImportError, match="pip install ffcv"):
            choose(beton, "auto", Here(ffcv=False, dali=True, jpeg_unit=unit))


def test_a_set_without_a_manifest_is_read_by_the_backend_of_all_tiers(beton: Path, tmp_path: Path) -> None:
    bare = shutil.copy(beton, tmp_path / "bare.beton")
    assert "no manifest" in str(choose(bare, "auto", ALL))
    assert build_loader(bare, Recipe(crop_px=32), "dali", batch_size=8).engine.name == "dali"


def test_only_one_backend_reads_pixels(picture_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "raw.beton"
    convert(FolderSource(picture_folder), path, tier="raw", short_side=32)
    assert str(choose(path, "auto", ALL)) == "backend ffcv: only it reads pictures of the tier raw"


def test_folders_of_pictures_have_one_backend(picture_folder: Path) -> None:
    for here, backend in itertools.product((NOTHING, ALL), ("auto", "folder")):
        assert choose(picture_folder, backend, here).backend == "folder"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is neither; convert it with `make convert"):
        choose(picture_folder, "dali", ALL)


def test_tars_without_an_index_are_refused_with_the_command(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "000000.tar").write_bytes((shards / "000000.tar").read_bytes())
    with pytest.raises(ValueError, match=r"without an index; .*dataset_tools index"):
        build_loader(tmp_path, Recipe(crop_px=32), batch_size=1)


def test_a_tar_beside_class_folders_is_no_matter(picture_folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(picture_folder, tmp_path / "pictures")
    (root / "bird.tar").touch()
    assert build_loader(root, Recipe(crop_px=32), batch_size=8).engine.count == 40


def test_what_is_installed_and_what_the_gpu_has_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look_around(torch.device("cpu")) == Here(ffcv=True, dali=True, jpeg_unit=False)
    for capability, unit in (((9, 0), True), ((8, 6), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert look_around(torch.device("cuda", 0)).jpeg_unit is unit


def test_a_missing_dali_is_an_error_that_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match=r"DALI is not installed.*make setup"):
        import_dali()
