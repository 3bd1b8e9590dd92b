"""The doctor reports what is missing and how to fix it, and leaves torch's settings unchanged."""

import importlib.metadata
import io
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pipelines.kernels import turbojpeg
from training.install import doctor
from training.install.doctor import Finding


def test_absent_and_broken_packages_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_more.py").write_text("import not_there_either\n")
    (tmp_path / "falls_over.py").write_text("raise OSError('libopencv.so: cannot open')\n")
    (tmp_path / "greedy.py").write_text("import torch\ntorch.set_num_threads(1)\n")
    absent = doctor.check_package("not_there", "not-there", "pip install not-there")
    assert (absent.status, absent.fix) == ("absent", "pip install not-there")
    nested = doctor.check_package("not_there.inner", "not-there", "pip install not-there")
    assert nested.status == "absent"
    needy = doctor.check_package("needs_more", "needs-more", "fix")
    assert needy.status == "broken" and "needs not_there_either" in needy.detail
    broken = doctor.check_package("falls_over", "falls-over", "fix")
    assert broken.status == "broken" and "libopencv.so: cannot open" in broken.detail
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert doctor.check_package("greedy", "greedy", "fix").status == "ok"
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(num_threads)
        for name in ("greedy", "needs_more", "falls_over"):
            sys.modules.pop(name, None)


def test_the_decoder_is_the_one_that_the_loader_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_decoder() == Finding("libturbojpeg", "ok", turbojpeg.library()._name, needed=True)
    monkeypatch.setattr(turbojpeg, "library", turbojpeg.library.__wrapped__)
    monkeypatch.setenv("LIBTURBOJPEG", "libm.so.6")
    wrong = doctor.check_decoder()
    assert wrong.status == "broken" and "LIBTURBOJPEG is 'libm.so.6'" in wrong.detail and wrong.fix
    monkeypatch.delenv("LIBTURBOJPEG")
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.setattr(turbojpeg, "_SYSTEM_NAME", "libnowhere.so.0")
    absent = doctor.check_decoder()
    assert absent.status == "absent" and "apt install libturbojpeg0" in absent.fix and absent.needed


def test_an_old_torch_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_torch("make setup").status == "ok"
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.7.1")
    old = doctor.check_torch("make setup")
    assert (old.status, old.fix, old.needed) == ("broken", "make setup", True) and "2.7.1" in old.detail


def test_low_memory_and_missing_images_are_found(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:    1048576 kB\n")
    memory = doctor.check_memory(meminfo)
    assert memory.status == "broken" and memory.detail == "1.0 of 16.0 GiB free" and memory.fix
    assert doctor.check_memory(tmp_path / "none").status == "absent"
    images = doctor.check_fashion_mnist(tmp_path)
    assert images.status == "absent" and images.fix == "apt install dataset-fashion-mnist"
    for name in "abcd":
        (tmp_path / f"{name}-idx1-ubyte.gz").touch()
    assert doctor.check_fashion_mnist(tmp_path).status == "ok"


@pytest.mark.parametrize(
    ("findings", "status", "says"),
    [
        (
            [Finding("torch", "ok", "2.14", needed=True), Finding("ffcv", "absent", "not installed")],
            0,
            "can run",
        ),
        ([Finding("torch", "broken", "no", "pip", needed=True)], 1, "cannot run here: first fix torch"),
    ],
)
def test_exit_status_is_0_if_the_demo_can_run(findings: list[Finding], status: int, says: str) -> None:
    console = Console(file=io.StringIO(), width=200)
    assert doctor.main(console, lambda: findings) == status
    assert says in console.file.getvalue()


def test_brackets_in_commands_are_printed() -> None:
    console = Console(file=io.StringIO(), width=200)
    doctor.main(console, lambda: [Finding("ffcv", "absent", "not installed", "pip install -e '.[ffcv]'")])
    assert "pip install -e '.[ffcv]'" in console.file.getvalue()


def test_every_problem_on_this_machine_has_a_fix() -> None:
    num_threads = torch.get_num_threads()
    findings = doctor.check_machine()
    assert torch.get_num_threads() == num_threads
    names = {finding.name for finding in findings}
    assert {"torch", "ffcv", "nvidia.dali", "detectron2", "libturbojpeg", "backend folder", "cores"} <= names
    for finding in findings:
        if finding.status != "ok" and finding.name != "gpu":
            assert finding.fix, finding
