"""The blocks of figures in README.md and docs/benchmarks.md, and docs/evidence.svg."""

from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.marked_block import MarkedBlock
from benchmarks.peers.contract import DECODE_LIMIT, OURS
from benchmarks.report.charts import picture
from benchmarks.report.formats import number
from benchmarks.report.page import curves_of, templates
from benchmarks.report.results import RACERS, Figures
from training.files import write_atomically

PAGE, PICTURE = Path("docs/benchmarks.md"), Path("docs/evidence.svg")
"""Where the blocks and the picture are, relative to README.md."""
BLOCKS = {name: MarkedBlock(f"<!-- {name}: begin -->", f"<!-- {name}: end -->")
          for name in ("figures", "loader figures", "training figures")}  # fmt: skip
"""The block in README.md, and those in docs/benchmarks.md. A template of this folder writes each."""
_NEED_LOADER = ("figures", "loader figures")
"""Blocks that are left as they are without the loader's figures."""
_COLUMNS = {"reencoded": "re-encoded", "pass_through": "as they are"}


def figure_blocks(results: Mapping[str, Figures]) -> dict[str, str]:
    """Return the blocks that the results give, without the figures of quick runs; empty ones included."""
    full = _full(results)
    known: dict[str, Any] = dict.fromkeys(("loader", "scale", "step", "race", "evidence")) | full
    known |= {"racers": RACERS, "has_picture": drawn(results) is not None}
    if "loader" in full:
        known["peers"] = _peers(full["loader"]["tables"])
    texts = {
        name: templates().get_template(f"{name.replace(' ', '_')}.md").render(known).strip("\n")
        for name in BLOCKS
        if "loader" in full or name not in _NEED_LOADER
    }
    return {name: f"\n{text}\n" if text else "\n" for name, text in texts.items()}


def drawn(results: Mapping[str, Figures]) -> str | None:
    """Return the picture of kNN by epoch as SVG; None without the figures of a full run."""
    evidence = _full(results).get("evidence")
    figure = curves_of(evidence, "knn_top1") if evidence else None
    note = "Fashion-MNIST, frozen encoder, kNN among a part of the training images; thin lines: single runs"
    return picture(figure, "kNN top-1 during training", note) if figure else None


def update(readme: Path, results: Mapping[str, Figures], *, check: bool) -> list[str]:
    """Write the blocks and the picture, or only compare them.

    A block without figures is skipped if its page does not have its comments.

    Returns:
        The names of what differed, the picture included, and of blocks that need a full run.

    Raises:
        FileNotFoundError: if a page with figures does not exist.
        ValueError: if a page lacks the comments of a block.
    """
    quick = results.get("loader", {}).get("quick")
    changed = list(_NEED_LOADER) if quick and check else []
    for name, text in figure_blocks(results).items():
        page, block = readme if name == "figures" else readme.parent / PAGE, BLOCKS[name]
        if text == "\n" and block.begin not in page.read_text(encoding="utf-8"):
            continue
        if block.current(page) != text if check else block.rewrite(page, text):
            changed.append(name)
    file, svg = readme.parent / PICTURE, drawn(results)
    if svg and not (file.is_file() and file.read_text(encoding="utf-8") == svg):
        changed.append(PICTURE.name)
        if not check:
            write_atomically(file, lambda opened: opened.write(svg.encode()))
    return changed


def _full(results: Mapping[str, Figures]) -> dict[str, Figures]:
    return {name: figures for name, figures in results.items() if not figures.get("quick")}


def _peers(tables: Figures) -> Figures:
    """Return the columns and rows of the table of loaders, the fastest first and the decode limit last."""
    columns = {
        f"{work}, {words}": {name: rate["median"] for name, rate in tables[images][work].items()}
        for work in ("crops", "recipe")
        for images, words in _COLUMNS.items()
        if work in tables.get(images, {})
    }
    # By the first column that has a figure.
    fastest = dict(ChainMap(*columns.values()))
    rows = {}
    for name in sorted(fastest, key=lambda name: (name == DECODE_LIMIT, -fastest[name])):
        bold = "**" if OURS in name else ""
        limit = f"*{name}: no loader of JPEGs can be faster*"
        cells = [number(rates[name]) if name in rates else "–" for rates in columns.values()]
        rows[limit if name == DECODE_LIMIT else f"{bold}{name}{bold}"] = [
            f"{bold}{cell}{bold}" for cell in cells
        ]
    return {"columns": list(columns), "rows": rows}
