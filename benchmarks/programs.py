"""Our own programs, run as a user runs them, and the sample sets they work on."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.sets.manifest import Manifest
from training.files import write_json

FASHION_PICTURES = 60_000
"""Training images of Fashion-MNIST; the test set has a sixth of them."""


def run_python(console: Console, *words: object) -> None:
    """Run a program with this interpreter, showing its command line and its output.

    Raises:
        ValueError: if it fails; its own message says why.
    """
    command = [sys.executable, *map(str, words)]
    console.print(f"[dim]$ python {' '.join(command[1:])}[/]")
    code = subprocess.run(command, check=False).returncode
    if code:
        raise ValueError(f"the step above ended with code {code}; follow its message, then run this again")


def output_of(*words: object, timeout_s: float | None = None) -> str:
    """Run a program with this interpreter; returns what it printed, or raises ValueError if it fails."""
    program = f"`python {' '.join(map(str, words))}`"
    try:
        done = subprocess.run(
            [sys.executable, *map(str, words)], check=False, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{program} has not ended after {timeout_s} s") from error
    if done.returncode:
        raise ValueError(f"{program} ended with code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return "name was 1, is 2; …" for the values that differ."""
    return "; ".join(
        f"{name} was {before.get(name)}, is {now.get(name)}"
        for name in {**now, **before}
        if before.get(name) != now.get(name)
    )


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write down the settings of a run in ``folder``.

    Raises:
        ValueError: if an earlier start with other settings left something there.
    """
    path = folder / "settings.json"
    now = json.loads(json.dumps(settings))
    known = json.loads(path.read_text()) if path.is_file() else now
    differing = differences(known, now)
    reason = f"holds a run of other settings ({differing})" if differing else ""
    if not path.is_file() and folder.is_dir() and any(folder.iterdir()):
        reason = f"does not say what it holds, in {path.name}"
    if reason:
        raise ValueError(f"{folder} {reason}; take another --out, or remove it")
    write_json(path, now)


def probe(console: Console, train: Path, test: Path, folder: Path, seed: int = 0) -> dict[str, float]:
    """Run the fast probe of ``folder``/backbone.safetensors; its results are left in the folder too."""
    run_python(
        console,
        *("train_lincls.py", train, "--val", test, "--pretrained", folder / "backbone.safetensors"),
        *("--cached", "--cached-lr", 1, "--cached-wd", 0, "--epochs", 30, "--seed", seed, "--out", folder),
    )
    probed: dict[str, float] = json.loads((folder / "cached.json").read_text())
    return probed


def has_compiled(path: Path, count: int | None) -> bool:
    """Return whether a compiled set of ``count`` images is there; None stands for any number."""
    manifest = Manifest.read(path) if path.is_file() else None
    return manifest is not None and count in (None, manifest.count)


def fashion_sets(console: Console, folder: Path, count: int | None = None) -> tuple[Path, Path]:
    """Return Fashion-MNIST's training and test set in ``folder``, compiled there if they are missing.

    ``count`` is the number of training images; None takes what is there, or makes the whole sets.
    """
    train, test = (folder / f"fashion-mnist-{split}.beton" for split in ("train", "test"))
    if not (has_compiled(train, count) and has_compiled(test, count and count // 6)):
        limit = ("--limit", count or FASHION_PICTURES)
        command = ("-m", "dataset_tools", "fashion-mnist", folder, *limit)
        run_python(console, *command, "--download-to", folder, "--overwrite")
    return train, test
