"""The checks of every program before it starts."""

import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest

from dataset_tools.__main__ import main
from training import cli

ROOT = Path(__file__).resolve().parents[2]


def pretend(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version if name == "torch" else known(name)
    )


@pytest.mark.parametrize("version", ["2.8.0", "2.8.0a0+git1234", "2.10.0+cu130", "2.14.1", "3.0", "10.0.0"])
def test_new_enough(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(version, monkeypatch)
    cli.check_torch()


@pytest.mark.parametrize("version", ["2.7.1", "2.7.1+cu126", "1.13.1", "0.9", "unknown"])
def test_too_old(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(version, monkeypatch)
    with pytest.raises(ImportError) as old:
        cli.check_torch()
    assert str(old.value) == (f"torch {version} is too old, at least 2.8 is needed; pip install 'torch>=2.8'")


def test_the_check_does_not_import_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    cli.check_torch()


def test_the_number_is_that_of_the_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = ".".join(map(str, cli.OLDEST_TORCH))
    assert f"torch>={oldest},<3" in project["dependencies"]


def test_programs_report_it_and_do_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend("2.7.0", monkeypatch)
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: pytest.fail("the program was run"))
    assert ended.value.code == cli.USER_ERROR
    assert "error: torch 2.7.0 is too old" in capsys.readouterr().err
    assert main(["stats", str(tmp_path / "nothing.beton")]) == cli.USER_ERROR
    assert "error: torch 2.7.0 is too old" in capsys.readouterr().err
