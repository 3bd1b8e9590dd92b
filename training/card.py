"""The model card of an exported backbone: description, training, figures, how to load it.

    python -m training.card runs/mixmask/backbone.safetensors --results runs/lincls/result.json

The card is written as MODEL_CARD.md to the folder of the backbone. Its content comes from files: the
backbone's description of itself, the log of its training, and the JSON files of evaluations. A result file
names its encoder by the hash of its tensors.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import tyro

from training import cli
from training.checkpoint import flat
from training.cli import console
from training.export import BackboneMeta, fingerprint, load_backbone
from training.files import write_atomically

_FIGURE_NAMES = {
    "knn_top1": "kNN top-1",
    "knn_leave_one_out_top1": "kNN top-1, leave-one-out on the training set",
    "linear_top1": "linear top-1",
    "linear_top5": "linear top-5",
    "top1": "fine-tuned top-1",
    "best_top1": "fine-tuned top-1, best epoch",
}
"""Keys of shares in a result, and their names on the card."""
RESULT_FILES = ("result.json", "cached.json", "knn.json")
"""Names of the files that evaluations write."""


@dataclass(frozen=True)
class Card:
    """Write a model card."""

    backbone: tyro.conf.Positional[Path]
    """backbone.safetensors of a finished run."""
    results: tuple[Path, ...] = ()
    """Result files of the backbone's evaluations; by default all in its folder and the folders below."""


def main(config: Card) -> Path:
    """Write the card; returns its path.

    Raises:
        CheckpointError: for a backbone that cannot be read.
        ValueError: for a backbone without a description, and for results of an unknown kind.
    """
    if config.backbone.suffix != ".safetensors":
        raise ValueError(
            f"{config.backbone} is not an exported backbone; give the run's backbone.safetensors"
        )
    state, meta = load_backbone(config.backbone)
    if meta.arch is None or meta.feature_dim is None:
        raise ValueError(
            f"{config.backbone} does not name its architecture; give a backbone that train_pretrain.py or "
            "train_finetune.py exported"
        )
    folder = config.backbone.parent
    encoder_sha256 = fingerprint(state)
    results = [
        path
        for path in _result_files(config)
        if _belongs_to(path, encoder_sha256, given=bool(config.results))
    ]
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # it is Markdown
    ).get_template("card.md")
    text = template.render(
        meta=meta,
        file=config.backbone.name,
        recipe=_recipe(meta),
        pretraining=_pretraining_figures(folder / "metrics.jsonl"),
        figures=[line for path in results for line in _figures(path, encoder_sha256)],
    )
    card = folder / "MODEL_CARD.md"
    write_atomically(card, lambda file: file.write(text.encode()))
    console.print(f"{card}: {meta.arch}, {len(results)} results")
    return card


def _result_files(config: Card) -> list[Path]:
    if config.results:
        return list(config.results)
    folder = config.backbone.parent
    found = sorted(path for path in folder.rglob("*.json") if path.name in RESULT_FILES)
    # Repeated runs are left out: their mean and spread are in the folder above.
    return [path for path in found if path.parent == folder or not path.parent.name.startswith("run-")]


def _belongs_to(path: Path, encoder_sha256: str, *, given: bool) -> bool:
    """Whether a result is of the backbone with this hash. Raises ValueError if not, but it was ``given``."""
    try:
        result = _read_result(path)
    except ValueError:
        if given:
            raise
        return False
    encoders = {result.get("encoder_sha256"), result.get("exported_sha256")}
    if given and encoder_sha256 not in encoders:
        raise ValueError(f"{path} is of another backbone, or does not name one; leave it out")
    return encoder_sha256 in encoders


def _read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a result ({error}); leave it out") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path} holds a {type(result).__name__}, not a result; leave it out")
    return result


def _recipe(meta: BackboneMeta) -> dict[str, Any]:
    """The options of the run and their values; see `flat`."""
    return flat(json.loads(meta.recipe)) if meta.recipe else {}


def _pretraining_figures(log: Path) -> dict[str, Any]:
    """The last measurements and the median rate in a pretraining's log; empty without a log."""
    if not log.is_file():
        return {}
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    evaluated = [row for row in rows if row["kind"] == "eval"]
    found: dict[str, Any] = {}
    if steps:
        rates = sorted(row["samples_per_s"] for row in steps)
        found |= {"steps": steps[-1]["step"] + 1, "samples_per_s": rates[len(rates) // 2]}
    if evaluated:
        found |= {name: evaluated[-1][name] for name in ("knn_top1", "rankme") if name in evaluated[-1]}
    return found


def _figures(path: Path, encoder_sha256: str) -> Iterable[tuple[str, str]]:
    """The figures of one result: name and value, as text."""
    result = _read_result(path)
    if result.get("exported_sha256") == encoder_sha256:
        result.pop("top1", None)  # of the last epoch, but the best epoch was exported
    known = False
    protocol = f" ({result['protocol']})" if "protocol" in result else ""
    for key, name in _FIGURE_NAMES.items():
        if key in result:
            known = True
            labels = f", {result['labelled_pictures']:,} labels" if "labelled_pictures" in result else ""
            yield f"{name}{protocol if 'linear' in key else ''}{labels}", f"{100 * result[key]:.2f} %"
    runs = f"{len(result['runs'])} runs" if "runs" in result else None
    origin = ", ".join(filter(None, (result.get("config"), runs)))
    for task, figures in result.get("figures", {}).items():
        for name in ("AP", "AP50", "AP75"):
            known = True
            value = figures[name]
            if value is None:  # the result was NaN
                continue
            text = f"{value['mean']:.2f} ± {value['std']:.2f}" if isinstance(value, dict) else f"{value:.2f}"
            yield f"{task} {name}, {origin}", text
    if not known:
        raise ValueError(
            f"{path} has none of the known figures: {', '.join(_FIGURE_NAMES)}, figures; leave it out"
        )


if __name__ == "__main__":
    cli.program(Card, main, __doc__)
