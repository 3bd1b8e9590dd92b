"""The README's block of loader figures: made of the same JSON as the page, between two comments."""

from benchmarks.marked_block import MarkedBlock
from benchmarks.peers.contract import DECODE_LIMIT
from benchmarks.report.charts import mebibytes, megabytes, number, seconds, times
from benchmarks.report.results import LoaderFigures, Rates, ScaleFigures

BLOCK = MarkedBlock("<!-- loader figures: begin -->", "<!-- loader figures: end -->")
_SET_NAMES = {"reencoded": "re-encoded", "pass_through": "as they are"}


def block(loader: LoaderFigures, scale: ScaleFigures | None) -> str:
    """The block in Markdown, with the line breaks that part it from the comments."""
    paragraphs = [
        "## How fast the loader is",
        _introduction(loader),
        _table(loader),
        "\n".join(f"- {sentence}" for sentence in _sentences(loader, scale)),
        "`make report` draws all figures with their spread, how each loader was set up and how exact its "
        "crops are; `make bench` and `make scale` measure again.",
    ]
    return "\n" + "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def _introduction(loader: LoaderFigures) -> str:
    config, where = loader.config, loader.environment
    sets = ", ".join(f"{_SET_NAMES[name]}: {loader.sets[name]['mean_kb']:.0f} KB" for name in loader.crops)
    machine = where["gpu"] or f"{where['processor']}, {where['cores']} cores, no GPU"
    return (
        f"Samples/s, two {config['crop_px']} px views each, {config['threads']} threads for every loader; "
        f"medians of {config['turns']} interleaved turns on the same photographs ({sets} a picture on "
        "average). "
        f"*Crops* are the two crops alone, *recipe* is MoCo v2's whole augmentation. {machine}."
    )


def _table(loader: LoaderFigures) -> str:
    columns: dict[str, Rates] = {}
    for work, by_set in (("crops", loader.crops), ("recipe", loader.recipe)):
        for name, rates in by_set.items():
            columns[f"{work}, {_SET_NAMES[name]}"] = rates
    names = list(dict.fromkeys(name for rates in columns.values() for name in rates))
    # By the first column that has a figure; the decode limit is no loader and stands last.
    names.sort(key=lambda name: (name == DECODE_LIMIT, -_first(columns, name)))
    lines = ["| | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for name in names:
        cells = [number(rates[name].median) if name in rates else "–" for rates in columns.values()]
        if any(name in rates and rates[name].is_ours for rates in columns.values()):
            name, cells = f"**{name}**", [f"**{cell}**" for cell in cells]
        elif name == DECODE_LIMIT:
            name = f"*{name}: no loader of JPEGs can pass it*"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _first(columns: dict[str, Rates], name: str) -> float:
    return next(rates[name].median for rates in columns.values() if name in rates)


def _sentences(loader: LoaderFigures, scale: ScaleFigures | None) -> list[str]:
    """One sentence for each of the other tables that was measured."""
    sentences = []
    if loader.raw:
        stored = {
            name: f", {megabytes(rate.bytes)}" if rate.bytes else "" for name, rate in loader.raw.items()
        }
        sentences.append(f"Raw tier: {_list(loader.raw, 'samples/s', stored)}.")
    if len(loader.scaling) > 1:
        sentences.append(
            "Crops by threads: "
            + ", ".join(f"{name}: {number(rate.median)}" for name, rate in loader.scaling.items())
            + " samples/s."
        )
    if loader.convert:
        sentences.append(f"Conversion: {_list(loader.convert, 'pictures/s', {})}.")
    if loader.photometric:
        sentences.append(f"Photometric stage on the CPU: {_list(loader.photometric, 'views/s', {})}.")
    if scale and scale.counts:
        sentences.append(_scale_sentence(scale))
    return sentences


def _list(rates: Rates, unit: str, notes: dict[str, str]) -> str:
    return "; ".join(
        f"{name} {number(rate.median)} {unit}{notes.get(name, '')}" for name, rate in rates.items()
    )


def _scale_sentence(scale: ScaleFigures) -> str:
    """The largest set, over the smallest where there are two."""
    smallest, largest = min(scale.counts), max(scale.counts)
    at = scale.counts[largest]
    sentence = (
        f"A set of {largest:,} pictures opens in {seconds(at['open_s'].median)}, is shuffled in "
        f"{seconds(at['shuffle_s'].median)}, resumes in mid-epoch with its first batch after "
        f"{seconds(at['resume_s'].median)} and takes {mebibytes(at['private_memory_mib'].median)} of memory"
    )
    if smallest == largest:
        return f"{sentence}."
    than = scale.counts[smallest]
    compared = [
        f"{word} {times(at[name].median / than[name].median)}"
        for word, name in (("opening", "open_s"), ("resuming", "resume_s"), ("memory", "private_memory_mib"))
        if than[name].median > 0
    ]
    return f"{sentence}; over one of {smallest:,}: {', '.join(compared)}."
