"""The tables of docs/parity.md, made of the JSON alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.marked_block import MarkedBlock

BLOCK = MarkedBlock("<!-- parity: begin -->", "<!-- parity: end -->")


def block(result: Mapping[str, Any]) -> str:
    """The block in Markdown, with the line breaks that part it from the comments."""
    used = [row for row in result["rows"] if row["used"]]
    others = [row for row in result["rows"] if not row["used"]]
    paragraphs = [
        _introduction(result, used),
        _table(used),
        *[f"Not measured: {name}, {reason}." for name, reason in result["left_out"].items()],
    ]
    if others:
        paragraphs += ["## DALI's own operators", _table(others)]
    paragraphs += ["## Why so much is allowed", _reasons(result)]
    return "\n" + "\n\n".join(paragraphs) + "\n"


def _introduction(result: Mapping[str, Any], used: Sequence[Mapping[str, Any]]) -> str:
    versions = result["environment"]["versions"]
    libraries = ", ".join(
        f"{name} {versions[name]}"
        for name in ("torch", "torchvision", "pillow", "ffcv", "nvidia-dali-cuda130")
        if versions.get(name)
    )
    failed = sum(not row["ok"] for row in used)
    verdict = "all within their limits" if not failed else f"{failed} of them beyond their limits"
    return f"{len(used)} comparisons, {verdict}. {libraries}; {result['environment']['processor']}."


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        "| operation | by | against | mean error | largest | allowed: mean, largest | unit | |",
        "|---|---|---|---:|---:|---:|---|---|",
    ]
    for row in rows:
        by = row["how"] or row["backend"]
        allowed = f"{row['mean_tolerance']:g}, {row['tolerance']:g}"
        cells = (
            row["operation"], by, row["against"], f"{row['mean_error']:g}", f"{row['max_error']:g}", allowed,
            row["unit"], "ok" if row["ok"] else "**no**",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _reasons(result: Mapping[str, Any]) -> str:
    """Operations and references by their reason, in the order of the rows."""
    by_reason: dict[str, list[str]] = {}
    for row in result["rows"]:
        names = by_reason.setdefault(row["why"], [])
        if (name := f"{row['operation']} (against {row['against']})") not in names:
            names.append(name)
    return "\n".join(f"- {'; '.join(names)}: {reason}." for reason, names in by_reason.items())
