"""Training's section, its block in the README and its picture: true to the JSON, strict about its shape."""

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
from benchmarks.report import curves, training_block
from benchmarks.report.__main__ import README, RESULTS, Report, _drawn, _is_current, main
from benchmarks.report.page import picture, render
from benchmarks.report.training import read_evidence, read_training
from benchmarks.report.training_page import stacked

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = training_block.BLOCK.begin, training_block.BLOCK.end
MARKERS = f"# Title\n\n{BEGIN}\n{END}\n\nlast line ×\n"

# Made up for these tests, all of them: nobody measured these figures.
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
def readme_file(tmp_path: Path) -> Path:
    file = tmp_path / "README.md"
    file.write_text(MARKERS)
    return file


def _report(results: Path, readme_file: Path, *, check: bool = False) -> int:
    return main(
        Report(
            results=results,
            demo=results,
            out=results / "page.html",
            readme=readme_file,
            check=check,
        )
    )


def _drawing(page: str) -> ElementTree.Element:
    """The page's body as XML, which holds elements closed in order and attributes in quotes."""
    body = re.sub(r"<!doctype html>|<meta[^>]*>", "", page)
    return ElementTree.fromstring(body)


def _rows(page: str) -> list[list[str]]:
    return [["".join(cell.itertext()) for cell in row] for row in _drawing(page).iter("tr")]


# ------------------------------------------------------------------------------------------------ page


def test_every_figure_stands_in_a_table(results: Path) -> None:
    rows = _rows(render(None, None, None, None, read_training(results)))
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
    page = render(None, None, None, None, read_training(results))
    elements = list(_drawing(page).iter())
    links = {element.get("href") for element in elements} - {None}
    assert links == {"#gpu", "#step", "#epoch", "#race", "#evidence", "#machine"}
    assert links == {f"#{element.get('id')}" for element in elements if element.get("id")}
    assert not re.search(r"url\(|@import|<script|<link|<img|\bsrc=", page)
    assert "so &amp; &lt;so&gt;" in page and "A quick run." not in page


@pytest.mark.parametrize("name", FILES)
def test_the_page_is_drawn_from_any_of_the_files_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.json").write_text(json.dumps(FILES[name]() | {"quick": True}))
    page = render(None, None, None, None, read_training(tmp_path))
    ids = {element.get("id") for element in _drawing(page).iter()} - {None}
    assert ids == {name, "gpu", "machine"} | ({"epoch"} if name == "step" else set())
    assert "A quick run." in page and f"<code>make {name}</code>" in page


def test_one_seed_and_no_training_leave_no_spread_and_no_curves(tmp_path: Path) -> None:
    evidence = evidence_json(num_seeds=1)
    evidence["evidence"] = {RANDOM: evidence["evidence"][RANDOM]}
    step = step_json()
    del step["epoch"]
    for name, content in (("evidence", evidence), ("race", race_json(1)), ("step", step)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    training = read_training(tmp_path)
    page = render(None, None, None, None, training)
    assert [RANDOM, "76.00 %", "77.00 %", "–", "1"] in _rows(page)
    assert "polyline" not in page and 'id="epoch"' not in page and 'class="std"' not in page
    assert training.evidence and picture(training.evidence) is None
    block = training_block.block(training)
    assert training_block.PICTURE not in block and "one seed" in block
    assert "epoch beside" not in block and "±" not in block


def test_the_picture_stands_alone_with_every_trained_method_in_its_legend(results: Path) -> None:
    evidence = read_evidence(results / "evidence.json")
    drawn = picture(evidence)
    assert drawn
    root = ElementTree.fromstring(drawn)
    texts = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text in (RANDOM, *METHODS)] == list(METHODS)
    assert {"1", "2", "3", "4", "epoch"} <= set(texts)
    assert not re.search(r"url\(|@import|<script|href|var\(", drawn)
    lines = list(root.iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == len(METHODS) * (3 + 1)


def test_every_method_has_a_colour_of_its_own() -> None:
    assert set(curves.COLOURS) == {RANDOM, *METHODS}
    for shade in ("light", "dark"):
        assert len({getattr(colour, shade) for colour in curves.COLOURS.values()}) == len(curves.COLOURS)


# -------------------------------------------------------------------------------------------- geometry


def test_curves_stand_where_their_values_are() -> None:
    drawn = curves.plot(
        "kNN", {"moco": [{1: 70.0, 2: 75.0, 3: 80.0}, {1: 72.0, 2: 75.0, 3: 78.0}], "random": []}
    )
    assert drawn and [tick.text for tick in drawn.x.ticks] == ["1", "2", "3"]
    assert [(tick.pct, tick.text) for tick in drawn.y.ticks] == [
        (pytest.approx(25.0 * number), f"{70 + 2.5 * number:.1f}") for number in range(5)
    ]
    (line,) = drawn.lines
    assert line.runs == ("0.00,100.00 50.00,50.00 100.00,0.00", "0.00,80.00 50.00,50.00 100.00,20.00")
    assert line.mean == "0.00,90.00 50.00,50.00 100.00,10.00"
    assert line.dots == ((0, pytest.approx(90)), (50, pytest.approx(50)), (100, pytest.approx(10)))


def test_long_curves_have_no_dots_and_few_ticks() -> None:
    drawn = curves.plot("loss", {"moco": [{epoch: 1 / epoch for epoch in range(1, 201)}]})
    assert drawn and drawn.lines[0].dots == () and drawn.lines[0].runs == ()
    assert [tick.text for tick in drawn.x.ticks] == ["1", "50", "100", "150", "200"]
    assert curves.plot("nothing", {"random": [], "moco": [{}]}) is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5), st.integers(3, 8))
@example([0.0, 0.15625], 8)
def test_axes_hold_all_values_between_round_ticks(values: list[float], most_ticks: int) -> None:
    values = [round(value, 3) for value in values]
    axis = curves.axis(values, most_ticks)
    assert all(-1e-6 <= axis.pct(value) <= 100 + 1e-6 for value in values)
    assert 2 <= len(axis.ticks) <= most_ticks
    assert axis.ticks[0].pct == 0 and axis.ticks[-1].pct == 100
    assert len({tick.text for tick in axis.ticks}) == len(axis.ticks)
    for tick in axis.ticks:
        there = axis.low + tick.pct / 100 * (axis.high - axis.low)
        assert float(tick.text.replace(",", "")) == pytest.approx(there, abs=1e-5 * (axis.high - axis.low))


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([98.9, 99.97], ["98.5 %", "99.0 %", "99.5 %", "100.0 %"]),
        ([0.0, 0.0], ["0.0 %", "0.5 %", "1.0 %"]),
        ([3.0, 103.0], ["0 %", "50 %", "100 %"]),
    ],
)
def test_axes_of_shares_never_leave_them(values: list[float], texts: list[str]) -> None:
    assert [tick.text for tick in curves.axis(values, 5, " %", within=(0, 100)).ticks] == texts


def test_points_have_a_whisker_within_the_axis() -> None:
    along = curves.axis([0.0, 100.0], 3)
    row = curves.row("a", "so", [40.0, 60.0], 50.0, 10.0, along, "of-ours", start=10.0)
    assert (row.dots, row.mean_pct, row.low_pct, row.high_pct, row.from_pct) == ((40, 60), 50, 40, 60, 10)
    assert curves.row("a", "so", [99.0], 99.0, 5.0, along, "").high_pct == 100


def test_parts_of_an_epoch_stand_one_after_the_other_on_a_common_scale() -> None:
    parts = stacked({"data": 1.0, "encoder": 3.0}, longest=8.0)
    assert [(part.start_pct, part.width_pct, part.text) for part in parts] == [
        (0, 12.5, "1.00 s"),
        (12.5, 37.5, "3.00 s"),
    ]


# ------------------------------------------------------------------------------------------ strictness


@pytest.mark.parametrize(
    ("name", "keys", "value", "sentence"),
    [
        ("step", ("benchmark",), "loader", "benchmark is 'loader', expected 'step'"),
        ("step", ("config", "queue_len"), None, "config: queue_len is missing"),
        ("step", ("step", "methods"), {}, "there is no method"),
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
        ("evidence", ("evidence",), {}, "figures of no method"),
        ("evidence", ("evidence", "mscn"), {}, "figures of mscn, expected some of random, moco"),
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
        read_training(results)
    assert f"{name}.json" in str(caught.value) and f"make {name}" in str(caught.value)


# ---------------------------------------------------------------------------------------------- README


def test_the_block_has_a_table_and_a_sentence_each(results: Path) -> None:
    text = training_block.block(read_training(results))
    lines = text.splitlines()
    assert "| | kNN top-1 | linear top-1 | samples/s |" in lines
    assert "| random encoder | 76.30 ± 0.30 % | 76.80 ± 0.20 % | – |" in lines
    assert "| moco | 77.30 ± 0.30 % | 78.30 ± 0.20 % | 1,801 |" in lines
    race, step, epoch = (line for line in lines if line.startswith("- "))
    assert (
        "ours, MixMask 1,212 samples/s, kNN 81.4 ± 0.4 % (86.0 %), 2.40 × the samples/s of lightly as" in race
    )
    assert "+5.0 points (+4.0)" in race
    assert "from 70.2 % (75.0 %)" in race
    assert (
        "lightly as documented (its own views) 505 samples/s, kNN 76.4 ± 0.4 % (81.0 %); lightly at" in race
    )
    assert "moco 0.50 × and 0.25 ×; mixmask 0.25 × and 0.12 ×" in step and "queue 65,536" in step
    assert "resnet18 at 224 px 1.50 × as fast (1.58 × with BN as published)" in epoch
    assert f"]({training_block.PICTURE})" in text and "Test Processor <1>, 2 cores, no GPU." in lines


def test_block_and_picture_are_written_once_and_held(results: Path, readme_file: Path) -> None:
    drawing = readme_file.parent / training_block.PICTURE
    assert _report(results, readme_file, check=True) == 1
    assert readme_file.read_text() == MARKERS and not drawing.exists(), "a check writes nothing"
    assert _report(results, readme_file) == 0
    text = readme_file.read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n## ") and text.endswith(f"{END}\n\nlast line ×\n")
    assert _report(results, readme_file, check=True) == 0
    assert _report(results, readme_file) == 0 and readme_file.read_text() == text
    drawing.write_text("another")
    assert _report(results, readme_file, check=True) == 1
    assert _report(results, readme_file) == 0 and _report(results, readme_file, check=True) == 0


def test_a_changed_figure_fails_the_check(results: Path, readme_file: Path) -> None:
    _report(results, readme_file)
    content = race_json()
    content["race"]["runners"][OUR_RACER]["samples_per_s"] += 100
    (results / "race.json").write_text(json.dumps(content))
    assert _report(results, readme_file, check=True) == 1


@pytest.mark.parametrize("name", FILES)
def test_a_quick_runs_figures_stay_out_of_the_readme(
    results: Path, readme_file: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / f"{name}.json").write_text(json.dumps(FILES[name]() | {"quick": True}))
    assert _report(results, readme_file) == 0
    text = readme_file.read_text()
    marks = {"step": "- A training step", "race": "- Race on", "evidence": "| moco |"}
    assert [mark for mark in marks.values() if mark in text] == [
        mark for other, mark in marks.items() if other != name
    ]
    assert f"{name}: a quick run's figures are not for {readme_file}" in capsys.readouterr().out
    assert (readme_file.parent / training_block.PICTURE).exists() == (name != "evidence")
    assert _report(results, readme_file, check=True) == 0


def test_without_figures_a_readme_needs_no_markers_but_with_them(results: Path, readme_file: Path) -> None:
    readme_file.write_text("# Title\n")
    with pytest.raises(ValueError, match=r"must have one line <!-- training figures: begin -->"):
        _report(results, readme_file)
    for name in FILES:
        (results / f"{name}.json").write_text(json.dumps(FILES[name]() | {"quick": True}))
    assert _report(results, readme_file) == 0 and _report(results, readme_file, check=True) == 0
    assert readme_file.read_text() == "# Title\n"
    # Where the comments are there, what stands between them without figures is gone.
    readme_file.write_text(MARKERS.replace(f"{BEGIN}\n", f"{BEGIN}\nold\n"))
    assert _report(results, readme_file, check=True) == 1
    assert _report(results, readme_file) == 0 and readme_file.read_text() == MARKERS


def test_the_readme_holds_the_committed_figures() -> None:
    """README.md's block and picture are what `make report` makes of benchmarks/results/."""
    training = read_training(ROOT / RESULTS)
    assert not [name for name, figures in vars(training).items() if figures and figures.quick]
    block = training_block.block(training)
    assert _is_current(ROOT / README, block, _drawn(training)), "run `make report` and commit what it wrote"
