"""Translates flags of the published programs that our parser does not know.

Most flags with another name are aliases in the parser. This module renames the others and their values, and
refuses flags without an equivalent, with a message on what to do instead.

Sources of the flags: MoCo's main_moco.py (arXiv 1911.05722), and its extensions for Un-Mix (arXiv 2003.05438)
and MixMask (arXiv 2210.11456).
"""

import re
from collections.abc import Sequence

RENAMED = {
    "--unmix-prob": "--unmix-global-prob",
    "--beta": "--unmix-beta",
}
"""Published flag → ours, for options of `pipelines`, which defines no aliases."""

RENAMED_VALUES = {("--mask-type", "discrete"): "grid"}
"""(Our flag, published value) → our value."""

_LAUNCHER = (
    "torchrun starts the processes: leave out {flag} and the other launcher flags (--world-size, --rank, "
    "--dist-url, --dist-backend, --multiprocessing-distributed), and replace `python` by `torchrun "
    "--nproc-per-node GPUS`; one GPU needs no launcher"
)
_THREADS = (
    "{flag} set the number of a node's loader processes, and this loader has none: leave it out, all cores "
    "are used; --num-threads sets the decoding threads of each process"
)
_LOG_INTERVAL = "{flag} counted steps: leave it out, --log-every-s sets the seconds between rows"
_RESUME = "--resume takes no path: it continues from the newest checkpoint in the folder of --out"

REFUSED = {
    "--world-size": _LAUNCHER,
    "--rank": _LAUNCHER,
    "--dist-url": _LAUNCHER,
    "--dist-backend": _LAUNCHER,
    "--multiprocessing-distributed": _LAUNCHER,
    "--gpu": "{flag} is unknown: choose a GPU by CUDA_VISIBLE_DEVICES=N in front of the command",
    "--workers": _THREADS,
    "-j": _THREADS,
    "--print-freq": _LOG_INTERVAL,
    "-p": _LOG_INTERVAL,
    "--start-epoch": "{flag} is not needed: leave it out, --resume reads the epoch from the checkpoint",
    "--moco-tm": "{flag} had no effect in the published programs: leave it out, all terms use --moco-t",
    "--debug": "{flag} switched wandb off: leave it out, wandb is not used",
}
"""Flags without an equivalent → what to do instead."""

_CHECKPOINT = re.compile(r"\.(tar|pth|pt|ckpt)$")


def from_published(argv: Sequence[str]) -> list[str]:
    """Translate a command line to the flags of our parser; our own flags are kept.

    Underscores in flags become hyphens.

    Raises:
        ValueError: for a flag in `REFUSED`, and for a path after ``--resume``.
    """
    words: list[str] = []
    for word in argv:
        before = words[-1] if words else ""
        flag, equals, value = _split_word(word)
        if flag in REFUSED:
            raise ValueError(REFUSED[flag].format(flag=flag))
        if (flag == "--resume" and equals) or (before == "--resume" and _CHECKPOINT.search(word)):
            raise ValueError(_RESUME)
        if flag:
            name = RENAMED.get(flag, flag)
            words.append(name + equals + RENAMED_VALUES.get((name, value), value))
        else:
            words.append(RENAMED_VALUES.get((before, word), word))
    return words


def _split_word(word: str) -> tuple[str, str, str]:
    """Split a word into flag (with hyphens), "=" or "", and value; without a flag, it is all value."""
    if word.startswith("--") and len(word) > 2:
        flag, equals, value = word.partition("=")
        return flag.replace("_", "-"), equals, value
    short = re.fullmatch(r"(-[a-z])(=?)(\d*)", word)
    return (short[1], short[2], short[3]) if short else ("", "", word)
