"""All measured figures on one page: bars with their spread, the demo's table, and what it was measured on.

    make report

Reads the JSON files in benchmarks/results/ and the last demo's summary, and writes runs/report.html, a single
file that needs no network.
"""

import functools
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import matplotlib
import tyro
from rich.console import Console

from engine import cli
from engine.checkpoint import write_atomically

console = Console(highlight=False, soft_wrap=True)

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Measured figures</title>
<style>
body {font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222}
h1 {font-size: 1.6rem} h2 {font-size: 1.2rem; margin-top: 2.2rem}
table {border-collapse: collapse} td, th {padding: .3rem .9rem; border-bottom: 1px solid #ddd;
text-align: right}
td:first-child, th:first-child {text-align: left} .note {color: #666; font-size: .9rem} svg {max-width: 100%}
</style>
<h1>Measured figures</h1>
{% if demo %}
<h2>Demo: Fashion-MNIST, frozen encoder</h2>
<table><tr><th>top-1</th><th>random encoder</th><th>pretrained with MixMask</th></tr>
{% for key, name in (("knn_top1", "kNN"), ("linear_top1", "linear")) %}
<tr><td>{{ name }}</td><td>{{ "%.1f" | format(100 * demo[key + "_random"]) }} %</td>
<td>{{ "%.1f" | format(100 * demo[key + "_mixmask"]) }} %</td></tr>
{% endfor %}</table>
<p class="note">{{ "%.1f" | format(100 * demo.data_wait_fraction) }} % of the pretraining was waiting for
data; the whole demo took {{ "%.0f" | format(demo.seconds) }} s.
{{ describe(demo.environment) }}</p>
{% endif %}
{% for name, result in loaders %}
<h2>Loaders: {{ result.work }}</h2>
{{ bars(result) }}
<table><tr><th>loader</th><th>samples/s, median</th><th>lowest … highest</th></tr>
{% for loader, rate in result.rates.items() %}
<tr><td>{{ loader }}</td><td>{{ "%.0f" | format(rate.median) }}</td>
<td>{{ "%.0f" | format(rate.low) }} … {{ "%.0f" | format(rate.high) }}</td></tr>
{% endfor %}</table>
<p class="note">{{ name }}: {{ result.pictures }} pictures, {{ result.threads }} threads each,
{{ result.rates.values() | map(attribute="turns") | first | length }} interleaved turns after a warm-up.
{{ describe(result.environment) }}</p>
{% endfor %}
</html>
"""


@dataclass(frozen=True)
class Report:
    """Draw the page of measured figures."""

    results: Path = Path("benchmarks/results")
    """Folder of the benchmarks' JSON files."""
    demo: Path = Path("runs/demo")
    """Folder of the last demo."""
    out: Path = Path("runs/report.html")
    """The page to write."""


def main(config: Report) -> None:
    """Draw the page; see the top of this file."""
    summary = config.demo / "summary.json"
    demo = json.loads(summary.read_text()) if summary.is_file() else None
    files = sorted(config.results.glob("*.json"))
    loaders = [(file.name, json.loads(file.read_text())) for file in files]
    loaders = [(name, result) for name, result in loaders if "rates" in result]
    if not demo and not loaders:
        raise ValueError(
            f"no figures in {config.results} or {summary}; measure with `make demo` or `make bench`"
        )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.globals |= {"describe": describe, "bars": lambda result: markupsafe.Markup(bars(result))}
    page = environment.from_string(_PAGE).render(demo=demo, loaders=loaders)
    write_atomically(config.out, lambda file: file.write(page.encode()))
    console.print(f"{config.out}: {len(loaders)} benchmark(s){' and the demo' if demo else ''}")


def describe(environment: dict[str, Any]) -> str:
    """One sentence of what figures were measured on."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    where = environment["gpu"] or f"{environment['processor']}, {environment['cores']} cores, no GPU"
    return f"{where}; Python {environment['python']}, {versions}."


def bars(result: dict[str, Any]) -> str:
    """An SVG of the loaders' medians, with whiskers from the lowest to the highest turn."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(result["rates"])
    rates = [result["rates"][name] for name in names]
    medians = [rate["median"] for rate in rates]
    spread = [
        [median - rate["low"] for median, rate in zip(medians, rates, strict=True)],
        [rate["high"] - median for median, rate in zip(medians, rates, strict=True)],
    ]
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.5 * len(names)))
    axis.barh(names[::-1], medians[::-1], xerr=[side[::-1] for side in spread], color="#1c7ed6", capsize=4)
    axis.set_xlabel("samples/s, two views each (whiskers: lowest and highest turn)")
    axis.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight")
    plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


if __name__ == "__main__":
    cli.run(functools.partial(lambda argv: main(tyro.cli(Report, args=argv)), sys.argv[1:]))
