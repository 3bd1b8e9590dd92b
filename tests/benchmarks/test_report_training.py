"""Training's section, its block and its picture: true to the JSON, strict about its shape."""

import json
import re
import statistics
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.epoch import OURS, OURS_ONE_BN, PLAIN
from benchmarks.evidence import METHODS, RANDOM
from benchmarks.race import LIGHTLY, LIGHTLY_AT_BEST, MIXMASK, figures
from benchmarks.race import OURS as OUR_RACER
from benchmarks.report import charts
from benchmarks.report.__main__ import ReportConfig, main
from benchmarks.report.blocks import BLOCKS, PAGE, PICTURE, drawn, figure_blocks
from benchmarks.report.page import curves_of, render, templates
from benchmarks.report.results import read_results

BLOCK = BLOCKS["training figures"]
XLINK = "{http://www.w3.org/1999/xlink}href"
MARKERS = f"# Title\n\n{BLOCK.begin}\n{BLOCK.end}\n\nlast line ×\n"

# These figures are made up for the tests.
_ENVIRONMENT = {
    "processor": "Test Processor <1>",
    "cores": 2,
    "memory_gib": 23.5,
    "gpu": None,
    "python": "3.11.7",
    "system": "Linux 0",
    "versions": {"torch": "2.0", "ffcv": None},
}


def _turns(median: float, **more: Any) -> dict[str, Any]:
    turns = [0.96 * median, median, 1.03 * median]
    return {"median": median, "low": turns[0], "high": turns[2], "turns": turns, **more}


def step_json() -> dict[str, Any]:
    """Made-up figures in the shape that the step benchmark writes."""

    def method(ours: float, naive: float, ours_mib: float, naive_mib: float) -> dict[str, Any]:
        return {
            "ours": _turns(ours, peak_memory_mib=ours_mib),
            "naive": _turns(naive, peak_memory_mib=naive_mib),
            "time_vs_naive": round(ours / naive, 4),
            "peak_memory_vs_naive": round(ours_mib / naive_mib, 4),
        }

    methods = {
        "moco": method(150, 300, 60, 240),
        "mixmask": method(250, 1000, 100, 800),
        "both": method(400, 1000, 100, 1200),
    }
    return {
        "benchmark": "step",
        "quick": False,
        "config": {"batch_size": 256, "queue_len": 65536, "arch": "resnet18", "turns": 3, "threads": 2},
        "environment": _ENVIRONMENT,
        "step": {"time_vs_naive": 0.25, "peak_memory_vs_naive": 0.125, "unit": "ms", "methods": methods},
        "epoch": {
            "speedup": 1.5,
            "settings": [_setting("resnet18", 224, 40), _setting("resnet10w16", 64, 4)],
        },
    }


def _setting(arch: str, crop_px: int, seconds: float) -> dict[str, Any]:
    def row(data: float, encoder: float, loss: float) -> dict[str, Any]:
        split = {"data": data * seconds, "encoder": encoder * seconds, "loss": loss * seconds}
        return {**_turns(sum(split.values())), "split": split, "loss": 9.5}

    facts = {"arch": arch, "crop_px": crop_px, "pictures": 2000, "batch_size": 64, "epochs": 2}
    rows = {PLAIN: row(0.5, 0.7, 0.3), OURS: row(0.05, 0.8, 0.15), OURS_ONE_BN: row(0.05, 0.75, 0.15)}
    return {**facts, "rows": rows, "speedup": 1.5, "speedup_one_bn": 1.58}


def race_json(num_seeds: int = 3) -> dict[str, Any]:
    """Made-up figures in the shape of the race's."""

    def runs(rate: float, after: float) -> list[dict[str, float]]:
        return [
            {
                "samples_per_s": rate * (1 + 0.01 * seed),
                "samples": 240 * rate,
                "seconds": 240.0,
                "knn_before": 0.7 + 0.002 * seed,
                "knn_whole_before": 0.75,
                "knn_whole_after": after + 0.05,
                "knn_after": after + 0.004 * seed,
            }
            for seed in range(num_seeds)
        ]

    found = {OUR_RACER: runs(2000, 0.80), MIXMASK: runs(1200, 0.81), LIGHTLY: runs(500, 0.76)}
    found[LIGHTLY_AT_BEST] = runs(625, 0.77)
    return {
        "benchmark": "race",
        "quick": False,
        "race": figures(found, dict.fromkeys(found, "so & <so>")),
        "config": {
            "seconds": 240.0,
            "seeds": list(range(num_seeds)),
            "threads": 2,
            "knn": {"k": 200, "temperature": 0.1, "bank": 5000},
        },
        "environment": _ENVIRONMENT,
    }


def evidence_json(num_seeds: int = 3, epochs: int = 4) -> dict[str, Any]:
    """Made-up figures in the shape of the evidence's."""

    def run(method: str, number: int, seed: int) -> dict[str, Any]:
        probes = {
            "knn_top1": 0.76 + 0.01 * number + 0.003 * seed,
            "linear_top1": 0.77 + 0.015 * number - 0.002 * seed,
        }
        trained = method != RANDOM
        curve = [
            {
                "epoch": epoch,
                "knn_top1": 0.70 + 0.012 * number * epoch / epochs + 0.004 * seed,
                "rankme": 20.0 + 4 * number + epoch,
                "loss": 5.0 + number - 0.2 * epoch,
                "loss_clean": 5.0 - 0.2 * epoch,
            }
            for epoch in range(1, epochs + 1)
        ]
        rates = {"samples_per_s": 2000.0 - 200 * number + seed if trained else None}
        return {"method": method, "seed": seed, **probes, "curve": curve if trained else [], **rates}

    methods = {}
    for number, method in enumerate((RANDOM, *METHODS)):
        runs = [run(method, number, seed) for seed in range(num_seeds)]
        probed = {name: [run[name] for run in runs] for name in ("knn_top1", "linear_top1")}
        methods[method] = {
            name: {
                "mean": statistics.mean(found),
                "std": statistics.stdev(found) if num_seeds > 1 else 0.0,
            }
            for name, found in probed.items()
        } | {"runs": runs}
    return {
        "benchmark": "evidence",
        "evidence": methods,
        "config": {"epochs": epochs, "seeds": list(range(num_seeds)), "pictures": 60000},
        "environment": _ENVIRONMENT,
    }


FILES = {"step": step_json, "race": race_json, "evidence": evidence_json}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    for name, made in FILES.items():
        (folder / f"{name}.json").write_text(json.dumps(made()))
    return folder


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    """docs/benchmarks.md; its README.md need not exist."""
    file = tmp_path / PAGE
    file.parent.mkdir()
    file.write_text(MARKERS)
    return file


def _report(results: Path, page_file: Path, *, check: bool = False) -> int:
    readme = page_file.parents[1] / "README.md"
    return main(
        ReportConfig(results=results, demo=results, out=results / "page.html", readme=readme, check=check)
    )


def _block(results: Path) -> str:
    return figure_blocks(read_results(results))["training figures"]


def _drawing(page: str) -> ElementTree.Element:
    """The page's body as XML, which holds elements closed in order and attributes in quotes."""
    body = re.sub(r"<!doctype html>|<meta[^>]*>", "", page)
    return ElementTree.fromstring(body)


def _rows(page: str) -> list[list[str]]:
    return [["".join(cell.itertext()) for cell in row] for row in _drawing(page).iter("tr")]


# ------------------------------------------------------------------------------------------------ page


def test_every_figure_stands_in_a_table(results: Path) -> None:
    rows = _rows(render(read_results(results)))
    times = ["250 ms", "240 … 258", "1,000 ms", "960 … 1,030", "0.25 ×"]
    assert ["mixmask", *times, "100 MiB", "800 MiB", "0.12 ×"] in rows
    assert [OURS, "38.4 … 41.2 s", "2.00 s", "32.0 s", "6.00 s"] in rows
    row = [OUR_RACER, "2,020 ± 20.0", "4.00 ×", "3.20 ×", "480,000", "70.2 %", "80.4 ± 0.4 %"]
    assert [*row, "+4.0 points", "+3.0 points", "75.0 → 85.0 %"] in rows
    row = [LIGHTLY, "505 ± 5.00", "–", "–", "120,000", "70.2 %", "76.4 ± 0.4 %"]
    assert [*row, "–", "–", "75.0 → 81.0 %"] in rows
    assert [RANDOM, "76.30 ± 0.30 %", "76.80 ± 0.20 %", "–", "3"] in rows
    assert ["moco", "77.30 ± 0.30 %", "78.30 ± 0.20 %", "1,801", "3"] in rows


def test_the_page_needs_no_network_and_its_links_lead_somewhere(results: Path) -> None:
    page = render(read_results(results))
    elements = list(_drawing(page).iter())
    links = {element.get("href") for element in elements} - {None}
    assert links == {"#gpu", "#step", "#epoch", "#race", "#evidence", "#machine"}
    ids = [element.get("id") for element in elements if element.get("id")]
    assert links == {f"#{element.get('id')}" for element in elements if element.tag == "h2"}
    assert len(set(ids)) == len(ids)
    assert {address for element in elements if (address := element.get(XLINK))} <= {f"#{i}" for i in ids}
    assert not re.search(r"url\(|@import|<script|<link|<img|\bsrc=", page)
    assert "so &amp; &lt;so&gt;" in page and "A quick run." not in page


@pytest.mark.parametrize("name", FILES)
def test_the_page_is_drawn_from_any_of_the_files_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.json").write_text(json.dumps(FILES[name]() | {"quick": True}))
    page = render(read_results(tmp_path))
    ids = {element.get("id") for element in _drawing(page).iter("h2")}
    assert ids == {name, "gpu", "machine"} | ({"epoch"} if name == "step" else set())
    assert "A quick run." in page and f"<code>make {name}</code>" in page


def test_one_seed_and_no_training_leave_no_spread_and_no_curves(tmp_path: Path) -> None:
    evidence = evidence_json(num_seeds=1)
    evidence["evidence"] = {RANDOM: evidence["evidence"][RANDOM]}
    step = step_json()
    del step["epoch"]
    for name, content in (("evidence", evidence), ("race", race_json(1)), ("step", step)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    page = render(read_results(tmp_path))
    assert [RANDOM, "76.00 %", "77.00 %", "–", "1"] in _rows(page)
    assert "by epoch" not in page and 'id="epoch"' not in page
    assert not any("±" in cell for row in _rows(page) for cell in row)
    assert drawn(read_results(tmp_path)) is None
    block = _block(tmp_path)
    assert PICTURE.name not in block and "one seed" in block
    assert "MixMask epoch" not in block and "±" not in block


def test_the_picture_stands_alone_with_every_trained_method_in_its_legend(results: Path) -> None:
    svg = drawn(read_results(results))
    assert svg
    root = ElementTree.fromstring(svg)
    texts = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text in (RANDOM, *METHODS)] == list(METHODS)
    assert {"1", "2", "3", "4", "epoch"} <= set(texts)
    assert not re.search(r'url\(|@import|<script|href="[^#]|var\(', svg)


def test_every_method_has_a_colour_of_its_own() -> None:
    methods = [RANDOM, *METHODS]
    assert set(methods) <= set(charts.COLOURS)
    for shade in (0, 1):
        assert len({charts.COLOURS[name][shade] for name in methods}) == len(methods)
    # The page finds a drawing's colours by their light shade.
    assert len({light for light, _ in charts.COLOURS.values()}) == len(charts.COLOURS)


# -------------------------------------------------------------------------------------------- drawings


def test_curves_have_their_values_and_their_mean() -> None:
    figure = charts.curves(
        {"moco": [{1: 0.70, 2: 0.75, 3: 0.80}, {1: 0.72, 2: 0.75, 3: 0.78}], "random": []}, share=True
    )
    assert figure
    (axes,) = figure.axes
    first, second, mean = (line.get_xydata().tolist() for line in axes.lines)
    assert first == [[1, 0.70], [2, 0.75], [3, 0.80]] and second == [[1, 0.72], [2, 0.75], [3, 0.78]]
    assert [x for x, _ in mean] == [1, 2, 3]
    assert [y for _, y in mean] == pytest.approx([0.71, 0.75, 0.79])
    assert axes.lines[2].get_marker() == "o" and axes.lines[2].get_label() == "moco"
    texts = re.findall(r">([^<>]+)</text>", charts.svg(figure, "kNN"))
    assert texts == ["1", "2", "3", "70.0 %", "72.5 %", "75.0 %", "77.5 %", "80.0 %"]


def test_every_run_of_every_method_is_drawn(results: Path) -> None:
    evidence = read_results(results)["evidence"]
    figure = curves_of(evidence, "knn_top1")
    assert figure and len(figure.axes[0].lines) == len(METHODS) * (3 + 1)


def test_long_curves_have_no_dots_and_few_ticks() -> None:
    figure = charts.curves({"moco": [{epoch: 1 / epoch for epoch in range(1, 201)}]})
    assert figure
    (axes,) = figure.axes
    (line,) = axes.lines
    assert line.get_marker() == "None"
    assert 3 <= len([tick for tick in axes.get_xticks() if 1 <= tick <= 200]) <= 9
    assert all(tick == round(tick) for tick in axes.get_xticks())
    assert charts.curves({"random": [], "moco": [{}]}) is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
@example([0.0, 0.15625])
def test_axes_hold_all_values_between_few_different_ticks(values: list[float]) -> None:
    values = [round(value, 3) for value in values]
    figure = charts.curves({"moco": [dict(enumerate(values, 1))]})
    assert figure
    axis = figure.axes[0].yaxis
    low, high = axis.get_view_interval()
    assert low <= min(values) and max(values) <= high
    ticks = [tick for tick in axis.get_ticklocs() if low <= tick <= high]
    assert 1 <= len(ticks) <= 6
    labels = axis.get_major_formatter().format_ticks(ticks)
    assert len(set(labels)) == len(labels)
    for label, tick in zip(labels, ticks, strict=True):
        assert float(label.replace("−", "-")) == pytest.approx(tick, abs=1e-5 * max(abs(low), abs(high)))


def _points(runs: list[float], std: float = 0.0, start: float | None = None) -> charts.Points:
    return charts.Points("a", "so", "moco", runs, statistics.mean(runs), std, start)


@pytest.mark.parametrize("runs", [[0.989, 0.9997], [0.0, 0.0], [0.03, 1.0]])
def test_axes_of_shares_never_leave_them(runs: list[float]) -> None:
    figure = charts.points([_points(runs, std=0.1)])
    low, high = figure.axes[0].get_xlim()
    assert 0 <= low <= min(runs) and max(runs) <= high <= 1


def test_points_have_a_whisker_within_the_axis() -> None:
    (axes,) = charts.points([_points([0.4, 0.6], std=0.1, start=0.1), _points([0.99], std=0.05)]).axes
    drawn = [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata())]
    assert drawn[1:6] == [[0.1, 0.5], [0.1], [0.4, 0.6], [0.4, 0.6], [0.5]]
    assert drawn[7:] == [[pytest.approx(0.94), 1.0], [0.99]]


def test_parts_of_an_epoch_stand_one_after_the_other_on_a_common_scale() -> None:
    stack: Any = templates().get_template("macros.html").module
    drawn = str(stack.stack({"data": 1.0, "encoder": 3.0}, 8.0))
    assert re.findall(r"width: ([\d.]+)%", drawn) == ["12.5", "37.5"]
    page = render({"step": step_json()})
    assert [OURS, "38.4 … 41.2 s", "2.00 s", "32.0 s", "6.00 s"] in _rows(page)


# ------------------------------------------------------------------------------------------ strictness


@pytest.mark.parametrize(
    ("name", "keys", "value", "sentence"),
    [
        ("step", ("benchmark",), "loader", "benchmark is 'loader', expected 'step'"),
        ("step", ("config", "queue_len"), None, "config: queue_len is missing"),
        ("step", ("step", "methods"), {}, "step: methods is empty"),
        (
            "step",
            ("step", "methods", "moco", "naive", "peak_memory_mib"),
            "1",
            "naive: peak_memory_mib is '1'",
        ),
        ("step", ("epoch", "settings"), [3], "settings: row 0 is 3, expected dict"),
        ("step", ("epoch", "settings", 0, "rows", OURS, "split", "loss"), None, "split: loss is missing"),
        ("race", ("race", "runners", LIGHTLY), None, "runners: lightly as documented is missing"),
        ("race", ("race", "runners", OUR_RACER, "spread"), 1, "spread is 1, expected dict"),
        ("race", ("race", "runners", OUR_RACER, "runs"), [], "runs is empty"),
        ("race", ("race", "mixmask_knn_gain_over_lightly"), None, "mixmask_knn_gain_over_lightly is missing"),
        ("evidence", ("evidence",), {}, "evidence is empty"),
        ("evidence", ("evidence", "mscn"), {}, "evidence has mscn, expected some of random, moco"),
        ("evidence", ("evidence", "moco", "knn_top1", "std"), None, "knn_top1: std is missing"),
        ("evidence", ("evidence", "moco", "runs", 1, "curve", 2, "rankme"), float("nan"), "rankme is nan"),
        ("evidence", ("config", "epochs"), 1.5, "epochs is 1.5, expected int"),
    ],
)
def test_a_file_of_another_shape_is_refused_by_key(
    results: Path, name: str, keys: tuple[str | int, ...], value: Any, sentence: str
) -> None:
    place = content = FILES[name]()
    for key in keys[:-1]:
        place = place[key]
    if value is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    (results / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        read_results(results)
    assert f"{name}.json" in str(caught.value) and f"make {name}" in str(caught.value)


# ---------------------------------------------------------------------------------------------- README


def test_the_block_has_a_table_and_a_sentence_each(results: Path) -> None:
    text = _block(results)
    lines = text.splitlines()
    assert "| | kNN top-1 | linear top-1 | samples/s |" in lines
    assert "| random encoder | 76.30 ± 0.30 % | 76.80 ± 0.20 % | – |" in lines
    assert "| moco | 77.30 ± 0.30 % | 78.30 ± 0.20 % | 1,801 |" in lines
    race, step, epoch = (line for line in lines if line.startswith("- "))
    assert (
        "ours, MixMask 1,212 samples/s, kNN 81.4 ± 0.4 % (86.0 %), 2.40 × the samples/s of lightly as" in race
    )
    assert "+5.0 points (+4.0)" in race
    assert "70.2 % (75.0 %) before training" in race
    assert (
        "lightly as documented (its own views) 505 samples/s, kNN 76.4 ± 0.4 % (81.0 %); lightly at" in race
    )
    assert "moco 0.50 × and 0.25 ×; mixmask 0.25 × and 0.12 ×" in step and "queue 65,536" in step
    assert "resnet18 at 224 px 1.50 × as fast (1.58 × with BN as published)" in epoch
    assert f"]({PICTURE.name})" in text and "Test Processor <1>, 2 cores, no GPU." in lines


def test_block_and_picture_are_written_once_and_held(results: Path, page_file: Path) -> None:
    drawing = page_file.parents[1] / PICTURE
    assert _report(results, page_file, check=True) == 1
    assert page_file.read_text() == MARKERS and not drawing.exists(), "a check writes nothing"
    assert _report(results, page_file) == 0
    text = page_file.read_text()
    assert text.startswith(f"# Title\n\n{BLOCK.begin}\n## ") and text.endswith(
        f"{BLOCK.end}\n\nlast line ×\n"
    )
    assert _report(results, page_file, check=True) == 0
    assert _report(results, page_file) == 0 and page_file.read_text() == text
    drawing.write_text("another")
    assert _report(results, page_file, check=True) == 1
    assert _report(results, page_file) == 0 and _report(results, page_file, check=True) == 0


def test_a_changed_figure_fails_the_check(results: Path, page_file: Path) -> None:
    _report(results, page_file)
    content = race_json()
    content["race"]["runners"][OUR_RACER]["samples_per_s"] += 100
    (results / "race.json").write_text(json.dumps(content))
    assert _report(results, page_file, check=True) == 1


@pytest.mark.parametrize("name", FILES)
def test_a_quick_runs_figures_stay_out_of_the_readme(
    results: Path, page_file: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / f"{name}.json").write_text(json.dumps(FILES[name]() | {"quick": True}))
    assert _report(results, page_file) == 0
    text = page_file.read_text()
    marks = {"step": "- A training step", "race": "- Race on", "evidence": "| moco |"}
    assert [mark for mark in marks.values() if mark in text] == [
        mark for other, mark in marks.items() if other != name
    ]
    assert f"{name}: figures of a quick run are not for {page_file.parents[1]}" in capsys.readouterr().out
    assert (page_file.parents[1] / PICTURE).exists() == (name != "evidence")
    assert _report(results, page_file, check=True) == 0


def test_without_figures_a_readme_needs_no_markers_but_with_them(results: Path, page_file: Path) -> None:
    page_file.write_text("# Title\n")
    with pytest.raises(ValueError, match=r"must have one line <!-- training figures: begin -->"):
        _report(results, page_file)
    for name in FILES:
        (results / f"{name}.json").write_text(json.dumps(FILES[name]() | {"quick": True}))
    assert _report(results, page_file) == 0 and _report(results, page_file, check=True) == 0
    assert page_file.read_text() == "# Title\n"
    # Where the comments are there, what stands between them without figures is gone.
    page_file.write_text(MARKERS.replace(f"{BLOCK.begin}\n", f"{BLOCK.begin}\nold\n"))
    assert _report(results, page_file, check=True) == 1
    assert _report(results, page_file) == 0 and page_file.read_text() == MARKERS
