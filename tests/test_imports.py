"""The packages of the project: which may import which, and what lies at the top of each folder."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {"train_pretrain", "train_lincls", "train_finetune"}
MAY_USE = {
    "models": set(),
    "pipelines": {"models"},
    "training": {"pipelines", "models"},
    "presets": {"training", "pipelines", "models"},
    "train_pretrain": {"presets", "training", "pipelines", "models"},
    "train_lincls": {"training", "pipelines", "models"},
    "train_finetune": {"training", "pipelines", "models"},
    "detection": {"training"},
    "dataset_tools": {"training", "pipelines", "models"},
    "benchmarks": {"presets", "training", "pipelines", "models"},
    "examples": {"benchmarks", "dataset_tools", "presets", "training", "pipelines", "models"},
}
"""The packages and modules of the project, and those that each may import."""
LEAVES = {"examples", "detection", *PROGRAMS}
"""Imported by no other package."""
PIPELINES = {
    *("__init__.py", "recipe.py", "randomness.py", "loader.py", "workers.py", "device.py"),
    *("sets", "decode", "kernels", "augment"),
}
"""What lies at the top of pipelines/."""


def python_files(package: str) -> list[Path]:
    """All Python files of a package, or the file of a single module."""
    module = ROOT / f"{package}.py"
    return [module] if module.exists() else sorted((ROOT / package).rglob("*.py"))


def _imported(tree: ast.AST) -> set[str]:
    """Top-level names of all imported modules."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(MAY_USE))
def test_package_imports_only_what_it_may(package: str) -> None:
    for file in python_files(package):
        used = _imported(ast.parse(file.read_text())) & MAY_USE.keys() - {package}
        assert used <= MAY_USE[package], f"{file.relative_to(ROOT)} imports {sorted(used - MAY_USE[package])}"


def test_tools_and_programs_are_imported_by_nothing_below_them() -> None:
    for package, used in MAY_USE.items():
        assert not used & LEAVES
        if package != "examples":
            assert not used & {"benchmarks", "dataset_tools"}


def test_pipelines_imports_only_the_batch_of_models() -> None:
    for file in python_files("pipelines"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "models":
                assert node.module == "models.batch", f"{file.relative_to(ROOT)}:{node.lineno}"


def test_top_level_holds_only_the_programs_and_the_presets() -> None:
    assert {file.stem for file in ROOT.glob("*.py")} == {*PROGRAMS, "presets"}


def test_pipelines_has_ten_entries() -> None:
    entries = {path for path in (ROOT / "pipelines").iterdir() if path.name != "__pycache__"}
    assert {path.name for path in entries} == PIPELINES


def test_pillow_opens_only_documented_formats() -> None:
    """Without a list of formats Pillow tries all it knows, and runs Ghostscript for PostScript."""
    for file in [file for package in MAY_USE for file in python_files(package)]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                assert any(keyword.arg == "formats" for keyword in node.keywords), f"{file}:{node.lineno}"
            assert not (isinstance(node, ast.Name) and node.id in ("pil_loader", "default_loader")), file
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ImageFolder"):
                assert any(keyword.arg == "loader" for keyword in node.keywords), f"{file}:{node.lineno}"
