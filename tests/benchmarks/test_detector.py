"""The detector benchmark: what it runs, how it summarises, and its table in the docs."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from benchmarks import detector
from benchmarks.detector import STARTS, Detector, main
from benchmarks.run_options import TABLES_PAGE, block_of, table_block

ROOT = Path(__file__).resolve().parents[2]


def test_every_run_is_made_once_and_summarised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins that write the files of our programs, which have tests of their own."""
    ran: list[list[str]] = []

    def run(_console: object, *words: Any) -> None:
        ran.append([str(word) for word in words])
        if words[1] == "detection.convert_to_detectron2":
            words[3].write_bytes(b"")
        elif words[0] == "train_pretrain.py":
            out = words[words.index("--out") + 1]
            safetensors.torch.save_file({"fc.bias": torch.zeros(1)}, out / "backbone.safetensors")
        elif words[1] == "detection.train_net":
            options = dict(zip(words[5::2], words[6::2], strict=True))
            pretrained = bool(options["MODEL.WEIGHTS"])
            rows = [{"iteration": 0, "total_loss": 3.0}]
            rows += [
                {
                    "iteration": number,
                    "bbox/AP": 10.0 * pretrained + options["SEED"],
                    "segm/AP": done / 10 or math.nan,
                }
                for number, done in ((9, 0), (20, 20))
            ]
            (options["OUTPUT_DIR"] / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
            (options["OUTPUT_DIR"] / "result.json").write_text("{}")

    monkeypatch.setattr(detector, "run_python", run)
    config = Detector(
        unlabelled=3,
        epochs=1,
        labelled=2,
        test=2,
        iterations=20,
        eval_every=10,
        seeds=(1, 3),
        out=tmp_path / "runs",
        json=tmp_path / "detector.json",
    )
    page = (ROOT / TABLES_PAGE).read_bytes()
    main(config)
    assert [words[1] for words in ran].count("detection.train_net") == 4
    ran.clear()
    main(config)
    assert [words[1:2] for words in ran] == [
        ["dataset_tools"]
    ]  # the compiled set, which the stand-in did not write
    with pytest.raises(ValueError, match=r"pretrained holds a run of other settings \(epochs was 1, is 2\)"):
        main(dataclasses.replace(config, epochs=2))
    with pytest.raises(ValueError, match="iterations that end with an evaluation"):
        dataclasses.replace(config, eval_every=7)
    result = json.loads((tmp_path / "detector.json").read_text())
    first, last = result["detector"]["pretrained"]["mean"]
    assert first == {
        "iteration": 10,
        "bbox_AP": 12.0,
        "bbox_AP_std": pytest.approx(2**0.5, abs=1e-3),
        "segm_AP": 0.0,
        "segm_AP_std": 0.0,
    }
    assert last["iteration"] == 20 and last["segm_AP"] == 2.0
    assert result["detector"]["random"]["mean"][0]["bbox_AP"] == 2.0 and result["quick"]
    assert (ROOT / TABLES_PAGE).read_bytes() == page
    assert "| 10 | 2.0 ± 1.4 | 12.0 ± 1.4 | 0.0 ± 0.0 | 0.0 ± 0.0 |" in table_block(result)
    assert set(result["detector"]) == set(STARTS)


def test_the_page_shows_the_measured_figures() -> None:
    figures = ROOT / "benchmarks" / "results" / "detector.json"
    expected = table_block(json.loads(figures.read_text())) if figures.is_file() else "\n"
    assert block_of("detector").current(ROOT / TABLES_PAGE) == expected
