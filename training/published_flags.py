"""Flags of the published programs that the parser cannot take as they are.

Flags that only have another name here are aliases in the parser. What is left: values with another name, and
flags that have no equivalent, which are refused with a sentence on what to do instead.

Sources of the flags: MoCo's main_moco.py (arXiv 1911.05722), the same program as Un-Mix (arXiv 2003.05438)
and MixMask (arXiv 2210.11456) extended it.
"""

import re
from collections.abc import Sequence

RENAMED = {
    "--unmix-prob": "--unmix-global-prob",
    "--beta": "--unmix-beta",
}
"""Flags whose options belong to rooms that know of no command line."""

RENAMED_VALUES = {("--mask-type", "discrete"): "grid"}
"""(Our flag, published value) → our value."""

_LAUNCHER = (
    "torchrun starts the processes here: leave out {flag} and the other launcher flags (--world-size, "
    "--rank, --dist-url, --dist-backend, --multiprocessing-distributed) and put `torchrun --nproc-per-node "
    "GPUS` in python's place; one GPU needs no launcher"
)
_THREADS = (
    "{flag} counted a node's loader processes, of which there are none here: leave it out, every core is "
    "used; --num-threads sets the decoding threads of each process"
)
_BY_THE_CLOCK = "{flag} counted steps: the log is written by the clock here, every --log-every-s seconds"
_RESUME = "--resume takes no path here: it continues from the newest checkpoint in the folder --out names"

GONE = {
    "--world-size": _LAUNCHER,
    "--rank": _LAUNCHER,
    "--dist-url": _LAUNCHER,
    "--dist-backend": _LAUNCHER,
    "--multiprocessing-distributed": _LAUNCHER,
    "--gpu": "{flag} is not known here: choose a GPU by CUDA_VISIBLE_DEVICES=N in front of the command",
    "--workers": _THREADS,
    "-j": _THREADS,
    "--print-freq": _BY_THE_CLOCK,
    "-p": _BY_THE_CLOCK,
    "--start-epoch": "{flag} is not needed: the newest checkpoint tells --resume its step",
    "--moco-tm": "{flag} was never used by the published programs: leave it out; all terms take --moco-t",
    "--debug": "{flag} switched wandb off, which is not used here: leave it out",
}
"""Flags without an equivalent, and what to do instead."""

_CHECKPOINT = re.compile(r"\.(tar|pth|pt|ckpt)$")


def from_published(argv: Sequence[str]) -> list[str]:
    """A command line, as given or as published, in flags that the parser knows; what is ours stays as it is.

    Hyphens and underscores in flags mean the same. Raises ValueError for a flag in `GONE`, and for a path
    after ``--resume``.
    """
    words: list[str] = []
    for word in argv:
        before = words[-1] if words else ""
        flag, equals, value = _split(word)
        if flag in GONE:
            raise ValueError(GONE[flag].format(flag=flag))
        if (flag == "--resume" and equals) or (before == "--resume" and _CHECKPOINT.search(word)):
            raise ValueError(_RESUME)
        if flag:
            name = RENAMED.get(flag, flag)
            words.append(name + equals + RENAMED_VALUES.get((name, value), value))
        else:
            words.append(RENAMED_VALUES.get((before, word), word))
    return words


def _split(word: str) -> tuple[str, str, str]:
    """Flag with hyphens, "=" or nothing, value; no flag for words that are none."""
    if word.startswith("--") and len(word) > 2:
        flag, equals, value = word.partition("=")
        return flag.replace("_", "-"), equals, value
    short = re.fullmatch(r"(-[a-z])(=?)(\d*)", word)
    return (short[1], short[2], short[3]) if short else ("", "", word)
