"""Train a detector several times with other seeds, and tell mean and spread.

    python -m detection.repeat --runs 5 --config-file detection/configs/pascal_voc_R_50_C4_24k.yaml \\
        MODEL.WEIGHTS runs/mixmask/detectron2.pth OUTPUT_DIR runs/voc

All words but --runs are those of detection.train_net, which makes the runs in OUTPUT_DIR/run-0 and on. A run
that has its result.json is not made again; one that was stopped goes on from its last checkpoint. Runs may be
added later, with the same words and weights: OUTPUT_DIR/settings.json says which they were.
"""

import hashlib
import json
import shlex
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from detection.foreign_files import config_files
from training import cli
from training.cli import console
from training.files import write_json


def main(argv: list[str]) -> dict[str, Any]:
    """Make the runs that are missing; returns what is written to OUTPUT_DIR/result.json.

    Raises ValueError for a command line without a number of runs or a folder, for a folder with runs of
    other words or weights, if a run fails, and if one has no AP.
    """
    runs, rest, out = _split(argv)
    _keep_settings(out, rest)
    results = []
    for seed in range(runs):
        folder = out / f"run-{seed}"
        if not (folder / "result.json").is_file():
            console.print(f"[bold]run {seed + 1} of {runs}[/]")
            words = ["-m", "detection.train_net", "--resume", *rest]
            words += ["SEED", str(seed + 1), "OUTPUT_DIR", str(folder)]
            code = subprocess.run([sys.executable, *words], check=False).returncode
            if code:
                raise ValueError(f"run {seed} ended with code {code}; mend what it says and run this again")
        results.append(json.loads((folder / "result.json").read_text()))
    own = {name: results[0][name] for name in ("encoder_sha256", "config") if name in results[0]}
    summary = {**own, "runs": results, "figures": summarised([result["figures"] for result in results])}
    path = out / "result.json"
    write_json(path, summary)
    for task, names in summary["figures"].items():
        told = "  ".join(f"{name} {row['mean']:.2f} ± {row['std']:.2f}" for name, row in names.items())
        console.print(f"{task}, {runs} runs: {told}")
    console.print(f"→ {path}")
    return summary


def summarised(figures: list[dict[str, dict[str, float | None]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Task → AP, AP50, AP75 → mean and standard deviation over runs (0 for a single one).

    Raises ValueError where a run has null for one of them.
    """
    return {
        task: {name: _spread(task, name, figures) for name in ("AP", "AP50", "AP75")} for task in figures[0]
    }


def _spread(task: str, name: str, figures: list[dict[str, dict[str, float | None]]]) -> dict[str, float]:
    values: list[float] = []
    for number, run in enumerate(figures):
        value = run.get(task, {}).get(name)
        if value is None:
            raise ValueError(
                f"run {number} has no {name} of {task}, null stands in its result.json; see its log.txt, "
                "mend what it says, delete its folder and run this again"
            )
        values.append(value)
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def _keep_settings(out: Path, words: list[str]) -> None:
    """Write what makes the runs of a folder, or raise ValueError if those begun there were made otherwise."""
    config = _value(words, "--config-file")
    settings: dict[str, Any] = {
        "words": words,
        "weights_sha256": _sha256(_value(words, "MODEL.WEIGHTS")),
        "config_sha256": [_sha256(path) for path in config_files(config)] if config else [],
    }
    path = out / "settings.json"
    before = json.loads(path.read_text()) if path.is_file() else settings | {"words": []}
    differing = []
    if before["words"] != words:
        differing.append(f"the words were {shlex.join(before['words'])!r}, now {shlex.join(words)!r}")
    if before["weights_sha256"] != settings["weights_sha256"]:
        differing.append("the file of MODEL.WEIGHTS is another")
    if before["config_sha256"] != settings["config_sha256"]:
        differing.append("the config's file has changed")
    # A command line that was refused has begun nothing and may be mended.
    begun = any(out.glob("run-*/last_checkpoint")) or any(out.glob("run-*/result.json"))
    if begun and differing:
        raise ValueError(
            f"{out} holds runs of other settings: {'; '.join(differing)}; take another OUTPUT_DIR"
        )
    write_json(path, settings)


def _value(words: list[str], name: str) -> Path | None:
    """The file that a word names, None where it is no file of this machine."""
    given = [value for word, value in pairwise(words) if word == name]
    return Path(given[-1]) if given and Path(given[-1]).is_file() else None


def _sha256(path: Path | None) -> str | None:
    if path is None:
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split(argv: list[str]) -> tuple[int, list[str], Path]:
    """Number of runs, the words for each, and the folder of all."""
    rest = list(argv)
    found: dict[str, str] = {}
    for flag in ("--runs", "OUTPUT_DIR"):
        if flag not in rest[:-1]:
            raise ValueError(f"{flag} is not given; see the top of detection/repeat.py")
        place = rest.index(flag)
        found[flag] = rest[place + 1]
        del rest[place : place + 2]
    if not found["--runs"].isdecimal() or int(found["--runs"]) < 1:
        raise ValueError(f"--runs is {found['--runs']}; give a number from 1")
    return int(found["--runs"]), rest, Path(found["OUTPUT_DIR"])


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
