"""What every program of the house shares on the command line."""

import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro
from rich.console import Console
from rich.markup import escape

from training import failure
from training.checkpoint import CheckpointError
from training.distributed import ProcessLost
from training.logs import NonFiniteLoss

USER_ERRORS = (ValueError, OSError, ImportError, CheckpointError, NonFiniteLoss, ProcessLost)
"""What is a sentence for the user; anything else is a defect of ours and keeps its traceback."""
OLDEST_TORCH = 2, 8
"""As in pyproject.toml."""
USER_ERROR, PROCESS_LOST, INTERRUPTED = 2, 3, 130
"""Exit codes."""
console = Console(highlight=False, soft_wrap=True)
"""Standard output of every program."""
_Config = TypeVar("_Config")


def program(config: type[_Config], main: Callable[[_Config], object], description: str | None = None) -> None:
    """Parse the command line as ``config``, call ``main`` with it, and exit with its exit code.

    Errors of the user are reported as by :func:`run`.

    Args:
        config: a dataclass; its fields are the options and their docstrings the help.
        main: an ``int`` that it returns is the exit code.
        description: the first lines of ``--help``; by default the docstring of ``config``.
    """
    run(lambda: main(tyro.cli(config, args=sys.argv[1:], description=description)))


def run(program: Callable[[], object]) -> None:
    """Run a program; a user's mistake becomes one red sentence on stderr and exit code 2, Ctrl-C code 130.

    Where several processes make a run, what befalls all of a machine is told once, what befalls one with its
    rank; one that has lost the others ends with code 3. With MASKMIX_TRACEBACK=1 in the environment the
    traceback is shown all the same.
    """
    with failure.ending_at_once():
        try:
            check_torch()
            status = program()
            if isinstance(status, int) and status:
                sys.exit(status)
        except KeyboardInterrupt:
            _tell("[red]{}[/]", "interrupted")
            sys.exit(INTERRUPTED)
        except SystemExit as end:
            if end.code:
                failure.to_tell("the program ended, see above", failure.USAGE)
            raise
        except USER_ERRORS as error:
            if os.environ.get("MASKMIX_TRACEBACK") == "1":
                raise
            lost = isinstance(error, ProcessLost)
            _tell("[bold red]error:[/] {}", str(error), failure.LOST if lost else "")
            sys.exit(PROCESS_LOST if lost else USER_ERROR)


def check_torch() -> None:
    """Raise ImportError where the installed torch is too old. Looks at its version alone, without it."""
    version = importlib.metadata.version("torch")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(
            f"torch {version} is too old, at least {oldest} is needed; pip install 'torch>={oldest}'"
        )


def _tell(form: str, sentence: str, kind: str = "") -> None:
    told = failure.to_tell(sentence, kind)
    if told is not None:
        err = Console(stderr=True, highlight=False, soft_wrap=True)
        err.print(form.format(escape(told)))


def value_of(argv: Sequence[str], flag: str, default: str) -> str:
    """The value of ``--flag value`` or ``--flag=value`` on a command line, before it is parsed as a whole."""
    for number, word in enumerate(argv):
        if word == flag and number + 1 < len(argv):
            return argv[number + 1]
        if word.startswith(flag + "="):
            return word.removeprefix(flag + "=")
    return default
