"""The README's block of training figures: made of the same JSON as the page, between two comments."""

from pathlib import Path

from benchmarks.evidence import RANDOM
from benchmarks.marked_block import MarkedBlock
from benchmarks.race import LIGHTLY, LIGHTLY_AT_BEST
from benchmarks.report.charts import number, times
from benchmarks.report.training import EvidenceFigures, RaceFigures, StepFigures, TrainingFigures
from benchmarks.report.training_page import PROBE_TITLES, knn_plot, percent, samples_per_s

BLOCK = MarkedBlock("<!-- training figures: begin -->", "<!-- training figures: end -->")
PICTURE = "docs/evidence.svg"
"""Where the README's picture of the evidence is, from the README's folder."""
EMPTY = "\n"


def is_in(page: Path) -> bool:
    """Whether a page has one of the block's comments, so that it should have both."""
    content = page.read_text(encoding="utf-8")
    return BLOCK.begin in content or BLOCK.end in content


def block(training: TrainingFigures) -> str:
    """The block in Markdown, with the line breaks that part it from the comments; EMPTY without figures."""
    training = training.full()
    if not list(training):
        return EMPTY
    sentences = [
        *([_race_sentence(training.race)] if training.race else []),
        *(_step_sentences(training.step) if training.step else []),
    ]
    paragraphs = [
        "## What training costs and gives",
        *(_evidence_paragraphs(training.evidence) if training.evidence else []),
        "\n".join(f"- {sentence}" for sentence in sentences),
        _machines(training),
        "`make report` draws all figures with their spread; `make evidence`, `make race` and `make step` "
        "measure again.",
    ]
    return "\n" + "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def _evidence_paragraphs(evidence: EvidenceFigures) -> list[str]:
    """What was done, the table, the curves."""
    config = evidence.config
    runs = {found.num_runs for found in evidence.methods.values()}
    several = f"mean ± standard deviation over {_range(runs)} seeds" if max(runs) > 1 else "one seed"
    lines = ["| | " + " | ".join((*PROBE_TITLES.values(), "samples/s")) + " |", "|---|---:|---:|---:|"]
    for name, found in evidence.methods.items():
        probes = (found.probes[probe] for probe in PROBE_TITLES)
        cells = [*(percent(probe.mean, probe.std, found.num_runs) for probe in probes), samples_per_s(found)]
        lines.append(f"| {'random encoder' if name == RANDOM else name} | " + " | ".join(cells) + " |")
    return [
        f"Fashion-MNIST, {config['pictures']:,} pictures, {config['epochs']} epochs of every method with the "
        "same encoder, head, queue and schedule, then the encoder frozen and probed; "
        f"{several}. Mixing methods embed more views of each picture.",
        "\n".join(lines),
        f"![kNN top-1 during training, by epoch and method]({PICTURE})" if knn_plot(evidence) else "",
    ]


def _range(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} … {high}"


def _race_sentence(race: RaceFigures) -> str:
    def after(name: str) -> str:
        racer = race.racers[name]
        spread = f" ± {100 * racer.spread['knn_after']:.1f}" if racer.spread else ""
        knn = f"{100 * racer.mean['knn_after']:.1f}{spread} % ({100 * racer.mean['knn_whole_after']:.1f} %)"
        return f"{number(racer.mean['samples_per_s'])} samples/s, kNN {knn}"

    ours = "; ".join(
        f"{name} {after(name)}, {times(race.speed[name])} the samples/s of lightly as documented "
        f"({times(race.speed_at_best[name])} at its best) and {race.gain[name]:+.1f} points "
        f"({race.gain_at_best[name]:+.1f})"
        for name in race.speed
    )
    seeds = len(race.racers[LIGHTLY].rates)
    start = race.racers[LIGHTLY_AT_BEST].mean  # as documented it sees other pixels
    bank = race.config["knn"]["bank"]
    several = f", {seeds} seeds" if seeds > 1 else ""
    before = f"{100 * start['knn_before']:.1f} % ({100 * start['knn_whole_before']:.1f} %)"
    ways = {LIGHTLY: "its own views", LIGHTLY_AT_BEST: "our views, cores divided by trials"}
    peers = "; ".join(f"{name} ({way}) {after(name)}" for name, way in ways.items())
    return (
        f"Race on Fashion-MNIST, {number(race.config['seconds'])} s of training each{several}, kNN among "
        f"{bank:,} training pictures (in brackets: all of them), from {before}: {ours}; beside {peers}."
    )


def _step_sentences(step: StepFigures) -> list[str]:
    """A sentence for the step and, where they were measured, one for the epochs."""
    config = step.config
    methods = "; ".join(
        f"{name} {times(row.time_vs_naive)} and {times(row.peak_memory_vs_naive)}"
        for name, row in step.methods.items()
    )
    sentences = [
        "A training step but its encoders, over the published formulation in time and in peak memory (batch "
        f"{config['batch_size']}, queue {config['queue_len']:,}; less is better): {methods}."
    ]
    if step.epochs:
        settings = "; ".join(
            f"{epoch.arch} at {epoch.crop_px} px {times(epoch.speedup)} as fast "
            f"({times(epoch.speedup_one_bn)} with BN as published)"
            for epoch in step.epochs
        )
        sentences.append(
            f"A whole MixMask epoch beside the published recipe written the plain way: {settings}."
        )
    return sentences


def _machines(training: TrainingFigures) -> str:
    """What was measured on: one sentence where it was all on one machine."""
    machines = dict.fromkeys(
        where["gpu"] or f"{where['processor']}, {where['cores']} cores, no GPU"
        for where in (figures.environment for figures in training)
    )
    return f"{'; '.join(machines)}."
