"""The one-way import rule of the house: who may use whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"pipelines", "models", "training", "dataset_tools", "detection", "benchmarks", "examples", "presets"}
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


def _files(room: str) -> list[Path]:
    single = ROOT / f"{room}.py"
    return [single] if single.exists() else sorted((ROOT / room).rglob("*.py"))


def _imported(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", sorted(MAY_USE))
def test_room_imports_only_what_it_may(room: str) -> None:
    for file in _files(room):
        used = _imported(ast.parse(file.read_text())) & (ROOMS | set(MAY_USE)) - {room}
        assert used <= MAY_USE[room], f"{file.relative_to(ROOT)} imports {sorted(used - MAY_USE[room])}"


def test_pillow_opens_no_formats_but_the_documented_ones() -> None:
    """Without a list it tries all it knows, and starts Ghostscript for PostScript under any name."""
    for file in [*ROOT.glob("train_*.py"), *(f for room in ROOMS for f in _files(room))]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                assert any(keyword.arg == "formats" for keyword in node.keywords), f"{file}:{node.lineno}"
            assert not (isinstance(node, ast.Name) and node.id in ("pil_loader", "default_loader")), file
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ImageFolder"):
                assert any(keyword.arg == "loader" for keyword in node.keywords), f"{file}:{node.lineno}"
