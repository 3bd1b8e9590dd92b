"""The page of figures and the blocks: true to the JSON, self-contained, strict about its shape."""

import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.peers.contract import DECODE_LIMIT
from benchmarks.report.__main__ import README, RESULTS, ReportConfig, main
from benchmarks.report.blocks import BLOCKS, PAGE, figure_blocks, update
from benchmarks.report.charts import Bar, bars
from benchmarks.report.formats import number, seconds
from benchmarks.report.page import render, templates
from benchmarks.report.results import Figures, read_figures, read_results
from benchmarks.scale import MEASURES

ROOT = Path(__file__).resolve().parents[2]
BLOCK = BLOCKS["loader figures"]
RESULTS_HERE = ROOT / RESULTS
_IN_README = ("loader", "step", "evidence")

# These figures are made up for the tests.
_ENVIRONMENT = {
    "processor": "Test Processor <1>",
    "cpu_flags": {"avx2": True, "avx512": False},
    "cores": 2,
    "memory_gib": 23.5,
    "gpu": None,
    "python": "3.11.7",
    "system": "Linux 0",
    "versions": {"torch": "2.0", "ffcv": None},
}


def _rate(median: float, **more: Any) -> dict[str, Any]:
    turns = [0.96 * median, median, 1.03 * median]
    return {"median": median, "low": turns[0], "high": turns[2], "turns": turns, **more}


def _crops(ours: float) -> dict[str, Any]:
    exact = {"antialiased": True, "mean_error": 0.02, "max_error": 1.0}
    coarse = {"antialiased": False, "mean_error": 4.5, "max_error": 120.0}
    none = {"antialiased": None, "mean_error": None, "max_error": None, "error_reason": "it makes no views"}
    return {
        "ours": _rate(ours, configured="pipelines.build_loader", **exact),
        "ffcv, a decode per view": _rate(640, configured="stock loader", **exact),
        "DALI CPU, decode once and crop twice": _rate(612, configured="fn.random_resized_crop", **exact),
        "torchvision + PIL": _rate(321, configured="ImageFolder & DataLoader <processes>", **exact),
        "SPDL, FFmpeg filters": _rate(98.7, configured="one filter graph", **coarse),
        DECODE_LIMIT: _rate(2900, configured="simplejpeg", **none),
    }


def _recipe(ours: float) -> dict[str, Any]:
    return {
        "ours": _rate(ours, configured="pipelines.build_loader"),
        "torchvision + PIL": _rate(133, configured="blur is PIL's, as published"),
    }


def loader_json() -> dict[str, Any]:
    """Made-up figures in the shape that the loader benchmark writes."""
    facts = {"pictures": 2000, "mean_kb": 54.3, "how": "encoded anew at quality 90"}
    return {
        "benchmark": "loader",
        "quick": False,
        "config": {"threads": 2, "batch_size": 64, "crop_px": 224, "turns": 3, "seconds": 4.0},
        "environment": _ENVIRONMENT,
        "sets": {
            "reencoded": facts,
            "pass_through": {**facts, "mean_kb": 108.9, "how": "bytes passed through"},
            "yuv420": {**facts, "bytes": 262_000_000},
            "ffcv_raw": {**facts, "bytes": 524_000_000},
        },
        "left_out": {"recipe": {"ffcv, a decode per view": "it has no hue operator"}},
        "tables": {
            "reencoded": {"crops": _crops(1711), "recipe": _recipe(444)},
            "pass_through": {"crops": _crops(777), "recipe": _recipe(333)},
            "raw": {
                "ours, yuv420": _rate(4321, bytes=262_000_000),
                "ffcv, raw RGB": _rate(1234, bytes=524_000_000),
            },
            "scaling": {"1": _rate(888), "2": _rate(1711)},
            "convert": {
                "ours": _rate(1500, configured="bytes pass through"),
                "ffcv DatasetWriter": _rate(150, configured="encodes anew"),
            },
            "photometric": {"ours, fused numba kernel": _rate(900), "torch.compile": _rate(1200)},
        },
        "stages": {"entropy decode": 400.0, "resample": 300.0, "photometric": 300.0},
        "crops": {"vs_ffcv_decode_per_view": 2.67, "vs_dali_cpu": None, "fraction_of_decode_limit": 0.59},
        "recipe": {"vs_torchvision_pil": 3.34},
        "raw_tier": {"vs_ffcv_raw": 3.5, "bytes_vs_ffcv_raw": 0.5},
        "scaling": {"threads_2_over_1": 1.93},
        "convert": {"vs_ffcv_writer": 10.0},
        "photometric": {"vs_compiled_torch": 0.75},
    }


def half_hour_json() -> dict[str, Any]:
    """Made-up figures in the shape that the half hour writes: some rows, and two that are missing."""
    step = {"unit": "samples/s", "step_ms": 80.0, "peak_mib": 20480.0, "cpu_share": 0.03}
    kernel = {"name": "conv<fprop>", "ms": 1.5, "percent": 12.5}
    parts: dict[str, dict[str, Any]] = {
        "check": {"tests/test_a.py": {"passed": 3, "failed": 1, "skipped": 0, "failures": ["test_<it>"]}},
        "ceilings": {"device copy": _rate(4200, unit="GB/s"), "matrix product": _rate(790, unit="TFLOP/s")},
        "step": {
            "both, plain BN, graph": _rate(3200, **step),
            "both, published, bf16": _rate(1600, **step),
            "profile of both": {"step_ms": 80.0, "gpu_idle_percent": 4.25, "kernels": [kernel]},
        },
        "dali": {"stock DALI": {"reason": "left out: DALI is not installed"}},
    }
    expected = {part: list(rows) for part, rows in parts.items()}
    expected["step"].append("both, plain BN, compiled")
    config = {"device": "cuda", "arch": "resnet50", "crop_px": 224, "batch_size": 256, "queue_len": 65536}
    gpu = {"gpu": "Test GPU", "gpu_memory_gib": 80.0, "cuda": "13.0", "driver": "999.1"}
    return {
        "benchmark": "half_hour",
        "quick": False,
        "config": config,
        "environment": {**_ENVIRONMENT, **gpu},
        "images": {"how": "encoded anew", "read_from": "a folder"},
        "expected": expected,
        "parts": parts,
    }


def scale_json() -> dict[str, Any]:
    """Made-up figures in the shape that the scale benchmark writes."""

    def figures(size: float) -> dict[str, Any]:
        return {name: _rate(size if name == "open_s" else 0.25) for name in MEASURES} | {
            "index_mib": 60 * size
        }

    return {
        "benchmark": "scale",
        "config": {"threads": 2, "batch_size": 64, "crop_px": 224, "repeats": 3, "payloads": 400},
        "environment": _ENVIRONMENT,
        "counts": {"10000000": figures(0.8), "1281167": figures(0.1)},
        "ratios": {name: 8.0 if name == "open_s" else 1.0 for name in MEASURES} | {"index_mib": 7.8},
    }


def demo_json() -> dict[str, Any]:
    """Made-up figures in the shape of the demo's summary."""
    accuracies = {"knn_top1_random": 0.761, "knn_top1_mixmask": 0.812}
    linear = {"linear_top1_random": 0.763, "linear_top1_mixmask": 0.848}
    rest = {"data_wait_fraction": 0.029, "knn_k": 200, "seconds": 400.0, "environment": _ENVIRONMENT}
    return accuracies | linear | rest


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "loader.json").write_text(json.dumps(loader_json()))
    (folder / "scale.json").write_text(json.dumps(scale_json()))
    (folder / "summary.json").write_text(json.dumps(demo_json()))
    return folder


@pytest.fixture
def pages(tmp_path: Path) -> tuple[Path, Path]:
    """README.md and docs/benchmarks.md with the comments of their blocks."""
    readme, page = tmp_path / "README.md", tmp_path / PAGE
    page.parent.mkdir()
    for file, block in ((readme, BLOCKS["figures"]), (page, BLOCK)):
        file.write_text(f"# Title\n\n{block.begin}\nold\n{block.end}\n\nlast line ×\n")
    return readme, page


class _Page(HTMLParser):
    """Cells, text and addresses of a page, and whether its elements are closed in order."""

    _VOID = ("meta",)

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.places: list[tuple[str, float]] = []
        self.feed(page)
        self.close()
        assert self.open == [], "elements that are never closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.addresses += [values[key] or "" for key in ("src", "href") if key in values]
        self.ids += [values["id"] or ""] if "id" in values else []
        for name, share in re.findall(r"(width|left): ([\d.-]+)%", values.get("style") or ""):
            self.places.append((name, float(share)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self._VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.rows and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data


def _render(results: Path) -> str:
    return render(read_results(results, results))


def _render_only(**figures: Figures) -> str:
    return render(figures)


# ------------------------------------------------------------------------------------------------ page


def test_every_rate_stands_in_a_table_with_its_spread(results: Path) -> None:
    page = _Page(_render(results))
    tables = loader_json()["tables"]
    for work in (
        *(tables[name][work] for name in ("reencoded", "pass_through") for work in ("crops", "recipe")),
        *(tables[name] for name in ("raw", "scaling", "convert", "photometric")),
    ):
        for name, rate in work.items():
            spread = f"{number(rate['low'])} … {number(rate['high'])}"
            row = [name, number(rate["median"]), spread]
            assert row in [cells[:3] for cells in page.rows], row


def test_the_half_hours_figures_stand_with_what_is_missing_by_name(results: Path) -> None:
    (results / "half_hour.json").write_text(json.dumps(half_hour_json()))
    assert main(ReportConfig(results=results, demo=results, out=results / "page.html")) == 0
    text = (results / "page.html").read_text()
    rows = _Page(text).rows
    assert ["both, plain BN, graph", "80.0", "2.00 ×", "–", "3%", "20,480 MiB"] in rows, "twice the published"
    assert ["both, published, bf16", "80.0", "1.00 ×", "–", "3%", "20,480 MiB"] in rows
    assert ["profile of both", "80.0", "–", "4.2 %", "–", "–"] in rows
    assert [
        "tests/test_a.py",
        "3",
        "1",
        "0",
    ] in rows
    assert "Failed in tests/test_a.py: test_&lt;it&gt;." in text
    assert ["conv<fprop>", "1.500", "12.5 %"] in rows
    assert rows[rows.index(["", "GB/s", "lowest … highest"]) + 1][:2] == ["device copy", "4,200"]
    assert rows[rows.index(["", "TFLOP/s", "lowest … highest"]) + 1][:2] == ["matrix product", "790"]
    assert "Test GPU, 80.0 GiB" in text
    assert "(no time was left): both, plain BN, compiled." in text
    assert "(left out: DALI is not installed): stock DALI." in text
    assert "A rehearsal." not in text and "not measured yet" not in text
    alone = _render_only(half_hour=half_hour_json())
    assert set(_Page(alone).ids) == {"gpu", "machine"}


def test_without_a_half_hour_the_page_says_so(results: Path) -> None:
    text = _render(results)
    assert "The GPU path is not measured yet." in text and "make half-hour" in text
    assert "A rehearsal." in _render_only(half_hour={**half_hour_json(), "quick": True})


def test_our_other_ways_stand_as_ours_with_ratios_of_their_own() -> None:
    content = loader_json()
    crops = content["tables"]["reencoded"]["crops"]
    crops["ours, DALI decodes"] = {**crops["ours"], **_rate(1500)}
    content["dali_backend"] = {"crops_vs_dali_cpu": 2.45, "recipe_vs_dali_cpu": None}
    assert all(bar.ours == ("ours" in bar.name) for bar in bars(crops))
    text = _render_only(loader=content)
    assert "two crops: ours with DALI over stock DALI, the faster of two ways" in text and "2.45 ×" in text
    assert "Not measured: whole recipe: ours with DALI over stock DALI." in text
    assert (
        "| **ours, DALI decodes** | **1,500** | **–** | **–** | **–** |"
        in figure_blocks({"loader": content})["loader figures"]
    )


@pytest.mark.parametrize(
    ("keys", "value", "sentence"),
    [
        (("benchmark",), "gpu", "benchmark is 'gpu', expected 'half_hour'"),
        (("config", "queue_len"), "long", "config: queue_len is 'long', expected int"),
        (("parts", "ceilings", "device copy", "low"), "much", "device copy: low is 'much', expected float"),
        (("parts", "step"), 1, "step is 1, expected dict"),
        (("expected", "step"), {}, "step is {}, expected list"),
    ],
)
def test_a_half_hours_file_of_another_shape_is_refused_by_key(
    tmp_path: Path, keys: tuple[str, ...], value: Any, sentence: str
) -> None:
    place = content = half_hour_json()
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (tmp_path / "half_hour.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        read_figures(tmp_path / "half_hour.json", "half_hour")
    assert "make half-hour" in str(caught.value)


def test_losses_and_what_is_missing_are_printed(results: Path) -> None:
    page = _render(results)
    assert "0.75 ×" in page, "slower than torch.compile"
    assert "Not measured: DALI on the CPU" in page
    assert "Without ffcv, a decode per view: it has no hue operator." in page
    rows = {row[0]: row for row in _Page(page).rows if len(row) == 4}
    assert rows["SPDL, FFmpeg filters"][1:4] == ["no", "4.50", "120"]
    assert rows[DECODE_LIMIT][1:4] == ["–", "–", "–"]


def test_the_page_needs_no_network_and_its_links_lead_somewhere(results: Path) -> None:
    text = _render(results)
    page = _Page(text)
    assert page.addresses and all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert not re.search(r"url\(|@import|<script|<link|<img", text)
    assert all(0 <= place <= 100 for _, place in page.places) and len(page.places) > 30


def test_names_from_files_are_escaped(results: Path) -> None:
    page = _render(results)
    assert "Test Processor &lt;1&gt;" in page
    assert "ImageFolder &amp; DataLoader &lt;processes&gt;" in page


def test_the_page_is_drawn_from_any_of_the_files_alone(results: Path) -> None:
    found = read_results(results, results)
    assert set(found) == {"loader", "scale", "demo"}
    for name, figures in found.items():
        page = _Page(render({name: figures}))
        assert {address[1:] for address in page.addresses} <= set(page.ids)


def test_parts_that_were_not_measured_leave_no_empty_sections() -> None:
    content = loader_json()
    content["tables"] = {"reencoded": {"crops": _crops(1711)}}
    content |= {"stages": {}, "quick": True}
    for name in ("recipe", "raw_tier", "scaling", "convert", "photometric"):
        del content[name]
    text = _render_only(loader=content)
    page = _Page(text)
    assert set(page.ids) == {"ratios", "crops", "peers", "gpu", "machine"}
    assert {address[1:] for address in page.addresses} == set(page.ids)
    assert "A quick run." in text


def test_sizes_of_sets_stand_in_rising_order(results: Path) -> None:
    page = _render(results)
    assert "of 1,281,167 and 10,000,000 images with an index of 6.0 MiB and 48.0 MiB: 7.80 ×" in page
    assert "<h3>Open<span>8.00 ×</span></h3>" in page
    first, second = [row for row in _Page(page).rows if row[0] in ("1,281,167", "10,000,000")][:2]
    assert first == ["1,281,167", "100 ms", "96.0 ms … 103 ms"]
    assert second == ["10,000,000", "800 ms", "768 ms … 824 ms"]


# ---------------------------------------------------------------------------------------------- charts


_RATES = {
    name: dict(zip(("median", "low", "high"), values, strict=True))
    for name, values in {
        "slow": (25.0, 20.0, 30.0),
        "ours": (100.0, 80.0, 110.0),
        DECODE_LIMIT: (200.0, 190.0, 205.0),
    }.items()
}


def _macro(name: str, *args: Any, **options: Any) -> list[tuple[str, float]]:
    """The widths and places that a macro gives to parts of bars."""
    macros: Any = templates().get_template("macros.html").module
    return _Page(str(getattr(macros, name)(*args, **options))).places


def test_bars_are_to_scale_and_the_limit_is_a_line() -> None:
    drawn = bars(_RATES)
    assert [(bar.name, bar.ours) for bar in drawn] == [(DECODE_LIMIT, False), ("ours", True), ("slow", False)]
    places = [place for _, place in _macro("bars", drawn, "loader", "samples/s", line=200.0)]
    # Of each bar: its median, where the whisker starts and how long it is, the line.
    limit, ours, slow = places[:4], places[4:8], places[8:]
    assert ours[0] / slow[0] == pytest.approx(4, abs=2e-3)
    assert (ours[1] + ours[2]) / ours[1] == pytest.approx(110 / 80, abs=1e-3)
    assert limit[3] == ours[3] == slow[3] and ours[3] / ours[0] == pytest.approx(2, abs=1e-3)
    assert 95 < 205 / 200 * ours[3] <= 100, "the greatest value nearly fills the width"


def test_values_without_turns_have_no_whisker_and_keep_their_order() -> None:
    drawn = bars({"a": 1.0, "b": 2.0}, ours=True)
    assert drawn == [Bar("a", "1.00", "", *3 * [1.0], ours=True), Bar("b", "2.00", "", *3 * [2.0], ours=True)]
    assert [name for name, _ in _macro("bars", drawn, "", "ratio")] == ["width", "width"]


def test_stages_fill_the_bar() -> None:
    assert _macro("stack", {"a": 100.0, "b": 300.0}, 400.0) == [("width", 25), ("width", 75)]
    page = _render_only(loader=loader_json() | {"stages": {"a": 100.0, "b": 300.0}})
    assert [row[2] for row in _Page(page).rows if row[0] in ("a", "b")] == ["25 %", "75 %"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.6, "1,235"),
        (99.96, "100"),
        (99.94, "99.9"),
        (10, "10.0"),
        (9.876, "9.88"),
        (0.01234, "0.0123"),
    ],
)
def test_numbers_have_three_figures(value: float, text: str) -> None:
    assert number(value) == text


@given(st.floats(1e-9, 1e9))
def test_numbers_are_close_to_what_they_print(value: float) -> None:
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=0.0051)


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.5, "2.50 s"), (0.25, "250 ms"), (0.00025, "250 µs"), (0.9999, "1.00 s"), (0, "0 µs")],
)
def test_times_have_the_unit_a_person_would_choose(value: float, text: str) -> None:
    assert seconds(value) == text


# ------------------------------------------------------------------------------------------ strictness


@pytest.mark.parametrize(
    ("keys", "value", "sentence"),
    [
        (("benchmark",), None, "loader.json: benchmark is missing"),
        (("benchmark",), "scale", "benchmark is 'scale', expected 'loader'"),
        (("tables",), None, "tables is missing"),
        (("tables",), {}, "tables: reencoded or pass_through is missing"),
        (("quick",), "no", "quick is 'no', expected bool"),
        (("config", "threads"), True, "config: threads is True, expected int"),
        (("sets", "reencoded"), None, "sets: reencoded is missing"),
        (("tables", "reencoded", "crops", "ours", "median"), None, "crops: ours: median is missing"),
        (("tables", "raw", "ours, yuv420"), 3, "raw: ours, yuv420 is 3, expected dict"),
        (("environment", "gpu"), None, "environment: gpu is missing"),
        (("stages", "resample"), "slow", "stages: resample is 'slow', expected float"),
    ],
)
def test_a_file_of_another_shape_is_refused_by_key(
    results: Path, keys: tuple[str, ...], value: Any, sentence: str
) -> None:
    content = copy.deepcopy(loader_json())
    place = content
    for key in keys[:-1]:
        place = place[key]
    if value is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    (results / "loader.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        read_results(results)
    assert "make bench" in str(caught.value)


def test_figures_of_the_older_program_are_refused(results: Path) -> None:
    old = {"work": "two views", "rates": {"ours (ffcv)": _rate(350)}, "environment": _ENVIRONMENT}
    (results / "loader.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"older program .*measure again: make bench"):
        main(ReportConfig(results=results, demo=results, out=results / "page.html"))
    assert not (results / "page.html").exists()


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_what_is_no_json_object_is_refused(results: Path, text: str) -> None:
    (results / "scale.json").write_text(text)
    with pytest.raises(ValueError, match=r"scale\.json .*make scale"):
        read_results(results)


def test_a_missing_measure_is_refused(results: Path) -> None:
    content = scale_json()
    del content["counts"]["1281167"]["resume_s"]
    (results / "scale.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="1281167: resume_s is missing"):
        read_results(results)


def test_no_figures_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no figures in .*make bench"):
        main(ReportConfig(results=tmp_path, demo=tmp_path, out=tmp_path / "page.html"))


# ---------------------------------------------------------------------------------------------- README


def test_the_block_holds_the_medians_of_all_peers(results: Path) -> None:
    text = figure_blocks(read_results(results))["loader figures"]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    assert rows[0] == [
        "",
        "crops, re-encoded",
        "crops, as they are",
        "recipe, re-encoded",
        "recipe, as they are",
    ]
    assert rows[2] == ["**ours**", "**1,711**", "**777**", "**444**", "**333**"]
    assert rows[3] == ["ffcv, a decode per view", "640", "640", "–", "–"]
    assert rows[-1][0].startswith(f"*{DECODE_LIMIT}") and rows[-1][1:] == ["2,900", "2,900", "–", "–"]
    assert len(rows) == 2 + len(_crops(1))
    assert "ours, fused numba kernel 900 views/s; torch.compile 1,200 views/s" in text, "a loss like a win"
    assert "1: 888, 2: 1,711" in text and "262 MB" in text and "DatasetWriter 150 images/s" in text
    assert "10,000,000 images opens in 800 ms" in text and "opening 8.00 ×" in text


def test_the_readme_holds_three_figures(results: Path) -> None:
    table = figure_blocks(read_results(RESULTS_HERE))["figures"].strip().splitlines()
    assert len(table) == 7 and [line[:2] for line in table[:5]] == ["| ", "|-", "| ", "| ", "| "]
    loader, step, evidence = (json.loads((RESULTS_HERE / f"{name}.json").read_text()) for name in _IN_README)
    assert table[2].endswith(f"**{loader['recipe']['vs_torchvision_v2']:.2f} ×** |")
    assert table[3].endswith(f"**{step['epoch']['speedup']:.2f} ×** |")
    methods = evidence["evidence"]
    gain = methods["mixmask"]["linear_top1"]["mean"] - methods["random"]["linear_top1"]["mean"]
    assert table[4].endswith(f"**{100 * gain:+.1f} points** |") and str(PAGE) in table[6]


def test_only_the_block_is_rewritten_and_only_once(results: Path, pages: tuple[Path, Path]) -> None:
    readme = pages[0]
    config = ReportConfig(results=results, demo=results, out=results / "page.html", readme=readme)
    check = ReportConfig(results=results, readme=readme, check=True)
    assert main(check) == 1
    for file in pages:
        assert file.read_text().count("old") == 1 and not config.out.exists(), "a check writes nothing"
    assert main(config) == 0
    texts = [file.read_text() for file in pages]
    assert texts[1].startswith(f"# Title\n\n{BLOCK.begin}\n## ")
    assert texts[1].endswith(f"{BLOCK.end}\n\nlast line ×\n")
    assert texts[0].startswith(f"# Title\n\n{BLOCKS['figures'].begin}\n| ")
    assert not any("old" in text.split("begin -->")[1].split("\n") for text in texts)
    assert main(check) == 0
    assert main(config) == 0 and [file.read_text() for file in pages] == texts


def test_a_changed_figure_fails_the_check(results: Path, pages: tuple[Path, Path]) -> None:
    main(ReportConfig(results=results, demo=results, out=results / "page.html", readme=pages[0]))
    content = loader_json()
    content["tables"]["pass_through"]["recipe"]["torchvision + PIL"]["median"] += 1
    (results / "loader.json").write_text(json.dumps(content))
    assert main(ReportConfig(results=results, readme=pages[0], check=True)) == 1


def test_a_quick_run_stays_out_of_the_pages(results: Path, pages: tuple[Path, Path]) -> None:
    (results / "loader.json").write_text(json.dumps({**loader_json(), "quick": True}))
    before = [file.read_text() for file in pages]
    assert main(ReportConfig(results=results, demo=results, out=results / "page.html", readme=pages[0])) == 0
    assert [file.read_text() for file in pages] == before
    assert main(ReportConfig(results=results, readme=pages[0], check=True)) == 1


@pytest.mark.parametrize(
    "text", ["", BLOCK.begin, f"{BLOCK.end}{BLOCK.begin}", 2 * (BLOCK.begin + BLOCK.end)]
)
def test_a_page_without_the_two_comments_is_refused(
    results: Path, pages: tuple[Path, Path], text: str
) -> None:
    pages[1].write_text(text)
    with pytest.raises(ValueError, match="must have one line"):
        main(ReportConfig(results=results, demo=results, out=results / "page.html", readme=pages[0]))
    assert pages[1].read_text() == text


def test_figures_from_elsewhere_leave_the_readme_alone(results: Path, tmp_path: Path) -> None:
    before = [(ROOT / file).read_bytes() for file in (README, PAGE)]
    command = [
        "-m",
        "benchmarks.report",
        "--results",
        results,
        "--demo",
        results,
        "--out",
        tmp_path / "page.html",
    ]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, timeout=120, capture_output=True)
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert [(ROOT / file).read_bytes() for file in (README, PAGE)] == before


def test_the_pages_hold_the_committed_figures() -> None:
    """README.md, docs/benchmarks.md and docs/evidence.svg are what `make report` makes of the JSON files."""
    results = read_results(RESULTS_HERE)
    assert {"loader", "step", "race", "evidence"} <= set(results)
    assert not [name for name, figures in results.items() if figures.get("quick")]
    changed = update(ROOT / README, results, check=True)
    assert changed == [], "run `make report` and commit what it wrote"
