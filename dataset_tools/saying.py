"""How results are written out: one line each, as it is."""

from rich.console import Console


def pace(count: int, seconds: float) -> str:
    """Count, time and rate."""
    return f"{count:,} in {seconds:.1f} s ({count / max(seconds, 1e-9):,.0f}/s)"


def line(out: Console, text: str, style: str | None = None) -> None:
    """Write one line as it is: no wrapping, no markup from file names."""
    out.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
