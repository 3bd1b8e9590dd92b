"""Numbers, times and sizes as text."""


def number(value: float) -> str:
    """Three significant digits, or all digits of a larger integer: 1,234; 123; 12.3; 1.23; 0.0123."""
    if value == 0:
        return "0"
    # The exponent of the rounded value: 9.999 becomes 10.0, not 10.00.
    exponent = int(f"{value:.2e}".split("e")[1])
    return f"{value:,.{max(0, 2 - exponent)}f}"


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.2f} ×"


def seconds(value: float) -> str:
    """A duration in s, ms or µs."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if abs(value) * factor >= 0.9995:
            return f"{number(value * factor)} {unit}"
    return f"{number(value * 1e6)} µs"


def mebibytes(value: float) -> str:
    """Memory in GiB or MiB, to a tenth of a MiB; smaller differences are allocator noise."""
    if abs(value) >= 1024:
        return f"{number(value / 1024)} GiB"
    return f"{value:,.0f} MiB" if abs(value) >= 99.95 else f"{value:.1f} MiB"


def megabytes(num_bytes: float) -> str:
    """Bytes in MB or GB, which are powers of 1,000."""
    return f"{number(num_bytes / 1e9)} GB" if num_bytes >= 1e9 else f"{number(num_bytes / 1e6)} MB"


def percent(share: float, std: float | None = None, digits: int = 2) -> str:
    """A share in [0, 1] with its standard deviation, if there is one: 81.62 ± 0.13 %."""
    spread = "" if std is None else f" ± {100 * std:.{digits}f}"
    return f"{100 * share:.{digits}f}{spread} %"


FILTERS = {f.__name__: f for f in (number, times, seconds, mebibytes, megabytes, percent)}
"""The formats by their names in the templates."""
