r"""Train a detector several times with different seeds, and report mean and standard deviation.

    python -m detection.repeat --runs 5 --config-file detection/configs/pascal_voc_R_50_C4_24k.yaml \
        MODEL.WEIGHTS runs/mixmask/detectron2.pth OUTPUT_DIR runs/voc

All arguments except --runs are those of detection.train_net, which trains in OUTPUT_DIR/run-0, run-1 and so
on. A run with a result.json is not repeated; an interrupted run continues from its last checkpoint. More runs
may be added later with the same arguments and weights, which OUTPUT_DIR/settings.json records.
"""

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
from training.files import file_sha256, write_json


def main(argv: list[str]) -> dict[str, Any]:
    """Train the missing runs, and summarise all of them.

    Returns:
        What was written to OUTPUT_DIR/result.json.

    Raises:
        ValueError: if --runs or OUTPUT_DIR is missing, the folder holds runs with other arguments or weights,
            a run fails, or one has no AP.
    """
    runs, rest, out = _split_arguments(argv)
    _keep_settings(out, rest)
    results = []
    for number in range(runs):
        folder = out / f"run-{number}"
        if not (folder / "result.json").is_file():
            console.print(f"[bold]run {number + 1} of {runs}[/]")
            arguments = ["-m", "detection.train_net", "--resume", *rest]
            arguments += ["SEED", str(number + 1), "OUTPUT_DIR", str(folder)]
            code = subprocess.run([sys.executable, *arguments], check=False).returncode
            if code:
                raise ValueError(
                    f"run {number} ended with code {code}; correct the error above and run this again"
                )
        results.append(json.loads((folder / "result.json").read_text()))
    about = {name: results[0][name] for name in ("encoder_sha256", "config") if name in results[0]}
    summary = {**about, "runs": results, "figures": summarise([result["figures"] for result in results])}
    path = out / "result.json"
    write_json(path, summary)
    for task, names in summary["figures"].items():
        line = "  ".join(f"{name} {row['mean']:.2f} ± {row['std']:.2f}" for name, row in names.items())
        console.print(f"{task}, {runs} runs: {line}")
    console.print(f"→ {path}")
    return summary


def summarise(figures: list[dict[str, dict[str, float | None]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard deviation over runs, by task and by AP, AP50 and AP75.

    The standard deviation of a single run is 0. Raises ValueError if a run has null for one of them.
    """
    return {
        task: {name: _mean_and_std(task, name, figures) for name in ("AP", "AP50", "AP75")}
        for task in figures[0]
    }


def _mean_and_std(
    task: str, name: str, figures: list[dict[str, dict[str, float | None]]]
) -> dict[str, float]:
    values: list[float] = []
    for number, run in enumerate(figures):
        value = run.get(task, {}).get(name)
        if value is None:
            raise ValueError(
                f"run {number} has no {name} of {task}, its result.json holds null; see its log.txt, "
                "correct the cause, delete its folder and run this again"
            )
        values.append(value)
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def _keep_settings(out: Path, arguments: list[str]) -> None:
    """Write settings.json. Raises ValueError if the folder holds runs with other settings."""
    config = _file_argument(arguments, "--config-file")
    weights = _file_argument(arguments, "MODEL.WEIGHTS")
    settings: dict[str, Any] = {
        "words": arguments,
        "weights_sha256": weights and file_sha256(weights),
        "config_sha256": [file_sha256(path) for path in config_files(config)] if config else [],
    }
    path = out / "settings.json"
    before = json.loads(path.read_text()) if path.is_file() else settings | {"words": []}
    differing = []
    if before["words"] != arguments:
        differing.append(f"the arguments were {shlex.join(before['words'])!r}, now {shlex.join(arguments)!r}")
    if before["weights_sha256"] != settings["weights_sha256"]:
        differing.append("the file of MODEL.WEIGHTS has changed")
    if before["config_sha256"] != settings["config_sha256"]:
        differing.append("the config's file has changed")
    # If the former arguments were refused, they have started no run, and may be corrected.
    started = any(out.glob("run-*/last_checkpoint")) or any(out.glob("run-*/result.json"))
    if started and differing:
        raise ValueError(
            f"{out} holds runs of other settings: {'; '.join(differing)}; use another OUTPUT_DIR"
        )
    write_json(path, settings)


def _file_argument(arguments: list[str], name: str) -> Path | None:
    """The file given for an option; None if there is no such local file."""
    given = [value for word, value in pairwise(arguments) if word == name]
    return Path(given[-1]) if given and Path(given[-1]).is_file() else None


def _split_arguments(argv: list[str]) -> tuple[int, list[str], Path]:
    """The number of runs, the arguments of every run, and the folder that holds all runs."""
    rest = list(argv)
    found: dict[str, str] = {}
    for flag in ("--runs", "OUTPUT_DIR"):
        if flag not in rest[:-1]:
            raise ValueError(f"{flag} is not given; see the top of detection/repeat.py")
        place = rest.index(flag)
        found[flag] = rest[place + 1]
        del rest[place : place + 2]
    if not found["--runs"].isdecimal() or int(found["--runs"]) < 1:
        raise ValueError(f"--runs is {found['--runs']}; give a number of at least 1")
    return int(found["--runs"]), rest, Path(found["OUTPUT_DIR"])


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
