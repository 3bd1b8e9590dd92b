"""Which backend `auto` chooses, and the reasons it gives."""

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import pipelines
from dataset_tools.convert import convert
from dataset_tools.normalise import Normalising
from dataset_tools.sources import FolderSource
from pipelines import Recipe, build_loader
from pipelines.decode import choose as choosing
from pipelines.decode.choose import (
    IMAGES_PER_CORE_S,
    IMAGES_PER_GPU_S,
    JpegUnit,
    Machine,
    choose,
    describe_machine,
)
from pipelines.decode.dali_operators import import_dali
from pipelines.kernels import turbojpeg

ROOT = Path(__file__).resolve().parents[3]

UNIT, NO_UNIT = JpegUnit(True), JpegUnit(False, "nvJPEG reports no JPEG unit (status 7)")
ENOUGH = 6
"""Fewest cores that feed a GPU."""


def never() -> JpegUnit:
    raise AssertionError("no JPEG unit should be looked for")


def on_gpu(cores: int, unit: JpegUnit, dali: bool = True) -> Machine:
    return Machine(turbojpeg=True, dali=dali, cores=cores, jpeg_unit=lambda: unit)


NOTHING = Machine(turbojpeg=False, dali=False, jpeg_unit=never)
ON_CPU = Machine(turbojpeg=True, dali=True, cores=1)


def test_the_rule_in_numbers() -> None:
    """The rate agrees with the result file, and the need with its arithmetic."""
    tables = json.loads((ROOT / "benchmarks/results/loader.json").read_text())
    assert tables["config"]["crop_px"] == 224
    rates = [
        tables["tables"][pictures]["crops"]["ours"]["median"] / tables["config"]["threads"]
        for pictures in ("reencoded", "pass_through")
    ]
    assert min(rates) / 2 < IMAGES_PER_CORE_S < min(rates), "the margin is missing or too large"
    moco, mixmask = 1 + 1 / 3, 2 + 1 / 3
    assert [round(4000 / share) for share in (moco, mixmask)] == [IMAGES_PER_GPU_S, 1714]
    assert (ENOUGH - 1) * IMAGES_PER_CORE_S < IMAGES_PER_GPU_S <= ENOUGH * IMAGES_PER_CORE_S


def test_with_enough_cores_the_host_decodes_and_the_gpu_is_not_examined(beton: Path, shards: Path) -> None:
    for path, cores in itertools.product((beton, shards), (ENOUGH, 64)):
        choice = choose(path, "auto", Machine(turbojpeg=True, dali=True, cores=cores, jpeg_unit=never))
        assert choice.backend == "ffcv"
        assert f"{cores} CPU cores decode about {cores * 560:,} images/s" in choice.reason
        assert "one GPU uses at most 3,000" in choice.reason


def test_with_few_cores_the_unit_decodes(beton: Path, shards: Path) -> None:
    for path, cores in itertools.product((beton, shards), range(1, ENOUGH)):
        choice = choose(path, "auto", on_gpu(cores, UNIT))
        assert choice.backend == "dali" and "hardware" in choice.reason
        choice = choose(path, "auto", on_gpu(cores, NO_UNIT))
        assert choice.backend == "ffcv" and "but nvJPEG reports no JPEG unit (status 7)" in choice.reason
        choice = choose(path, "auto", on_gpu(cores, UNIT, dali=False))
        assert choice.backend == "ffcv" and "pip install -e '.[dali]'" in choice.reason
    assert "1 CPU core decode" in choose(beton, "auto", on_gpu(1, UNIT)).reason


def test_batches_for_the_cpu_are_decoded_on_it(beton: Path, shards: Path) -> None:
    for path in (beton, shards):
        assert str(choose(path, "auto", ON_CPU)) == (
            "backend ffcv: the fastest on CPU cores, and batches stay on the CPU"
        )


def test_missing_packages_are_named_with_the_command_that_installs_them(beton: Path, shards: Path) -> None:
    for path in (beton, shards):
        with pytest.raises(
            ImportError, match=r"apt-get install libturbojpeg0.*LIBTURBOJPEG to its path\. Or DALI"
        ):
            choose(path, "auto", NOTHING)
        choice = choose(path, "auto", Machine(turbojpeg=False, dali=True, jpeg_unit=never))
        assert choice.backend == "dali" and "apt-get install libturbojpeg0" in choice.reason


def test_a_set_without_a_manifest_is_read_by_the_backend_of_all_tiers(beton: Path, tmp_path: Path) -> None:
    bare = shutil.copy(beton, tmp_path / "bare.beton")
    assert "no manifest" in str(choose(bare, "auto", on_gpu(1, UNIT)))
    assert choose(bare, "auto", Machine(turbojpeg=False, dali=True)).backend == "dali"


@pytest.mark.needs("nvidia.dali")
def test_dali_reads_a_set_without_a_manifest(beton: Path, tmp_path: Path) -> None:
    bare = shutil.copy(beton, tmp_path / "bare.beton")
    assert build_loader(bare, Recipe(crop_px=32), "dali", batch_size=8).decoder.name == "dali"


def test_only_one_backend_reads_pixels(picture_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "raw.beton"
    convert(FolderSource(picture_folder), path, Normalising(tier="raw", short_side=32))
    assert str(choose(path, "auto", on_gpu(1, UNIT))) == "backend ffcv: only it reads the tier raw"
    with pytest.raises(ImportError, match=r"set LIBTURBOJPEG to its path\.$"):
        choose(path, "auto", Machine(turbojpeg=False, dali=True))


def test_folders_of_images_have_one_backend(picture_folder: Path) -> None:
    for machine, backend in itertools.product((NOTHING, ON_CPU), ("auto", "folder")):
        assert choose(picture_folder, backend, machine).backend == "folder"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is neither; convert it with `make convert"):
        choose(picture_folder, "dali", ON_CPU)


def test_tars_without_an_index_are_refused_with_the_command(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "000000.tar").write_bytes((shards / "000000.tar").read_bytes())
    with pytest.raises(ValueError, match=r"without an index; .*dataset_tools index"):
        build_loader(tmp_path, Recipe(crop_px=32), batch_size=1)


def test_a_tar_next_to_class_folders_is_ignored(picture_folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(picture_folder, tmp_path / "pictures")
    (root / "bird.tar").touch()
    assert build_loader(root, Recipe(crop_px=32), batch_size=8).set.count == 40


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    found = describe_machine(torch.device("cpu"), 3)
    assert (found.turbojpeg, found.cores, found.jpeg_unit) == (True, 3, None)
    try:
        import_dali()
    except ImportError:
        assert not found.dali
    else:
        assert found.dali
    examined: list[torch.device] = []

    def examine(device: torch.device) -> JpegUnit:
        examined.append(device)
        return NO_UNIT

    monkeypatch.setattr(choosing, "find_jpeg_unit", examine)
    gpu = describe_machine(torch.device("cuda", 1), 3)
    assert not examined, "the GPU is examined only if the result matters"
    assert gpu.jpeg_unit is not None and gpu.jpeg_unit() == NO_UNIT and examined == [torch.device("cuda", 1)]


def test_a_loader_for_the_cpu_never_looks_for_a_jpeg_unit(
    beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "find_jpeg_unit", lambda _: never())
    for backend in ("auto", "ffcv"):
        loader = build_loader(beton, Recipe(crop_px=32), backend, batch_size=8, num_threads=1)
        assert loader.decoder.name == "ffcv"


@pytest.mark.parametrize(("num_threads", "ranks", "cores"), [(0, 1, 16), (0, 4, 4), (3, 4, 3)])
def test_cores_are_those_of_this_rank_or_the_given_threads(
    num_threads: int, ranks: int, cores: int, beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def look(device: torch.device, cores: int) -> Machine:
        seen.append(cores)
        raise LookupError

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(pipelines, "describe_machine", look)
    with pytest.raises(LookupError):
        build_loader(beton, Recipe(crop_px=32), batch_size=8, num_threads=num_threads)
    assert seen == [cores]


def test_a_missing_library_is_no_error_but_a_wrong_name_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> None:
        raise ImportError("none")

    monkeypatch.setenv("LIBTURBOJPEG", "nowhere.so")
    monkeypatch.setattr(turbojpeg, "library", turbojpeg.library.__wrapped__)
    with pytest.raises(ValueError, match=r"LIBTURBOJPEG is 'nowhere\.so'"):
        describe_machine(torch.device("cpu"), 1)
    monkeypatch.setattr(turbojpeg, "library", missing)
    assert not describe_machine(torch.device("cpu"), 1).turbojpeg


def test_a_missing_dali_is_an_error_that_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match=r"DALI is not installed.*make setup"):
        import_dali()
