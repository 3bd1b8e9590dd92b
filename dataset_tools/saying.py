"""How results are written out: one line each, as it is."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from dataset_tools.report import NUM_NAMED


def pace(count: int, seconds: float) -> str:
    """Count, time and rate."""
    return f"{count:,} in {seconds:.1f} s ({count / max(seconds, 1e-9):,.0f}/s)"


def printable(text: str) -> str:
    """The same, with ``\\udc…`` for the bytes of file names that are no UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def line(out: Console, text: str, style: str | None = None) -> None:
    """Write one line as it is: no wrapping, no markup from file names."""
    out.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)


def report_left_out(
    names: Path, replaced: Mapping[str, int], skipped: Sequence[str], num_skipped: int, out: Console
) -> None:
    """Say what was encoded anew or left out, and name the first pictures left out; the file has all."""
    for reason, count in replaced.items():
        line(out, f"{count:,} {reason}")
    for named in skipped[:NUM_NAMED]:
        line(out, f"  {named}")
    if num_skipped > NUM_NAMED:
        line(out, f"  … and {num_skipped - NUM_NAMED:,} more; all are in {names}")
