"""Without an optional package only the modules that are built on it cannot be imported."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from pipelines import Recipe, build_loader

ROOT = Path(__file__).resolve().parents[1]
# Modules built on a package: other loaders that are measured, and subclasses of its classes.
BUILT_ON: dict[str, list[str]] = {
    "ffcv": ["benchmarks.peers.with_ffcv"],
    "nvidia.dali": ["benchmarks.peers.with_dali"],
    "detectron2": [
        "detection.config",
        "detection.datasets",
        "detection.trainer",
        "detection.weights",
    ],
    "spdl": ["benchmarks.peers.with_spdl"],
    "lightly": ["benchmarks.race_lightly"],
    "simplejpeg": ["benchmarks.peers.decode_limit"],
}
# Packages that only some functions import.
OTHERS = ("cv2", "skimage", "sklearn", "timm", "wandb", "webdataset")
HIDDEN = [*((package,) for package in BUILT_ON), OTHERS]

# Imports the required packages once, and runs each job in a fork that cannot import some others.
_RUN_JOBS = """
import json, os, sys, traceback
import matplotlib.figure, numba, safetensors.torch, torch, torchvision, tyro

class Hider:
    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if any(name == package or name.startswith(package + ".") for package in self.packages):
            raise ImportError(f"{name} is hidden by the test")

for number, (hidden, code, args) in enumerate(json.load(sys.stdin)):
    assert not sys.modules.keys() & set(hidden)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        print(status)
        continue
    output = os.open(f"{sys.argv[1]}/{number}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.meta_path.insert(0, Hider(hidden))
    sys.argv[1:] = args
    status = 1
    try:
        exec(code, {"__name__": "job"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
"""
_IMPORT_ALL = """
import contextlib, importlib, io, json, pathlib, runpy, sys, traceback, warnings

warnings.simplefilter("ignore")
packages = ("pipelines", "models", "training", "dataset_tools", "detection", "benchmarks", "examples")
files = [file for package in packages for file in sorted(pathlib.Path(package).rglob("*.py"))]
files += sorted(pathlib.Path().glob("*.py"))
# They have no --help.
install = ("training.install.doctor", "training.install.activate")
without_help = (*install, "detection.repeat")
failed, programs = {}, {}
for file in files:
    name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
    if name in sys.argv[1:]:
        continue
    try:
        if file.name != "__main__.py":
            importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
        continue
    if '__name__ == "__main__"' not in file.read_text() or name in without_help:
        continue
    name = name.removesuffix(".__main__")
    sys.argv[0] = name
    arguments, sys.argv[1:] = sys.argv[1:], ["--help"]
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        programs[name] = "did not exit"
    except SystemExit as end:
        printed_usage = not end.code and "usage" in output.getvalue()
        programs[name] = "" if printed_usage else output.getvalue() or "printed nothing"
    except ImportError:
        programs[name] = traceback.format_exc()
    sys.argv[1:] = arguments
print(json.dumps([failed, programs]))
"""
_CONVERT_AND_LOAD = """
import pathlib, sys, torch
from dataset_tools.__main__ import main
from pipelines import Recipe, build_loader

folder, out = map(pathlib.Path, sys.argv[1:])
assert main(["convert", str(folder), str(out)]) == 0
assert main(["verify", str(out)]) == 0
loader = build_loader(out, Recipe(crop_px=32), batch_size=8, seed=3)
assert loader.decoder.name == "ffcv"
torch.save([batch.query for batch in loader], out.with_suffix(".pt"))
"""
_CONVERT_WITHOUT_DECODER = """
import pathlib, sys
from dataset_tools.__main__ import main
from pipelines.kernels import turbojpeg

turbojpeg._SYSTEM_NAME = "libturbojpeg-missing.so.0"
folder, out = map(pathlib.Path, sys.argv[1:])
assert main(["convert", str(folder), str(out)]) == 2
assert [file.name for file in out.parent.glob(out.stem + "*")] == []
"""


class Job(NamedTuple):
    """Code to run, and the packages that are hidden from it."""

    hidden: tuple[str, ...]
    code: str
    args: list[str]


@pytest.fixture(scope="module")
def results(
    picture_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[int, str]]:
    """Run all jobs once; returns a function that gives a job's exit status and output."""
    folder = tmp_path_factory.mktemp("jobs")
    jobs = {"convert": Job(("ffcv",), _CONVERT_AND_LOAD, [str(picture_folder), str(folder / "set.beton")])}
    jobs["no decoder"] = Job(
        ("ffcv",), _CONVERT_WITHOUT_DECODER, [str(picture_folder), str(folder / "other.beton")]
    )
    for hidden in HIDDEN:
        skipped = [name for package, names in BUILT_ON.items() if package not in hidden for name in names]
        jobs[hidden[0]] = Job(hidden, _IMPORT_ALL, skipped)
    done = subprocess.run(
        [sys.executable, "-c", _RUN_JOBS, str(folder)],
        input=json.dumps(list(jobs.values())),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=240,
    )
    numbers = {name: number for number, name in enumerate(jobs)}
    statuses = done.stdout.split()

    def result(name: str) -> tuple[int, str]:
        return int(statuses[numbers[name]]), (folder / str(numbers[name])).read_text()

    return result


@pytest.mark.parametrize("hidden", HIDDEN, ids=lambda names: names[0])
def test_only_modules_built_on_a_package_fail_without_it(
    hidden: tuple[str, ...], results: Callable[[str], tuple[int, str]]
) -> None:
    status, output = results(hidden[0])
    assert status == 0, output
    failed, programs = json.loads(output.splitlines()[-1])
    expected = {name for package in hidden for name in BUILT_ON.get(package, [])}
    assert failed.keys() == expected, failed
    failing = {name: message for name, message in programs.items() if message}
    # Its command line is parsed by Detectron2.
    assert "needs Detectron2" in failing.pop("detection.train_net", "needs Detectron2")
    assert not failing
    assert {"train_pretrain", "train_lincls", "train_finetune", "dataset_tools"} <= programs.keys()


def test_sets_are_compiled_and_loaded_without_ffcv(
    results: Callable[[str], tuple[int, str]], beton: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The bytes and views equal those with FFCV."""
    status, output = results("convert")
    assert status == 0, output
    (compiled,) = tmp_path_factory.getbasetemp().glob("jobs?/set.beton")
    assert compiled.read_bytes() == beton.read_bytes()
    views = [batch.query for batch in build_loader(beton, Recipe(crop_px=32), batch_size=8, seed=3)]
    for view, other in zip(views, torch.load(compiled.with_suffix(".pt")), strict=True):
        assert torch.equal(view, other)


def test_a_missing_decoder_is_an_error_and_not_a_set_of_damaged_images(
    results: Callable[[str], tuple[int, str]],
) -> None:
    status, output = results("no decoder")
    assert status == 0, output
    assert output.startswith("error: libturbojpeg 2.0 or newer was not found (libturbojpeg-missing.so.0: ")
    assert output.rstrip().endswith("or set LIBTURBOJPEG to its path")
