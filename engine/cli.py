"""What every program of the house shares on the command line."""

import os
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape

from engine.checkpoint import CheckpointError
from engine.logs import NonFiniteLoss

USER_ERRORS = (ValueError, OSError, ImportError, CheckpointError, NonFiniteLoss)
"""What is a sentence for the user; anything else is a defect of ours and keeps its traceback."""


USER_ERROR, INTERRUPTED = 2, 130
"""Exit codes."""


def run(program: Callable[[], object]) -> None:
    """Run a program; a user's mistake becomes one red sentence on stderr and exit code 2, Ctrl-C code 130.

    With MASKMIX_TRACEBACK=1 in the environment the traceback is shown all the same.
    """
    err = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        program()
    except KeyboardInterrupt:
        err.print("[red]interrupted[/]")
        sys.exit(INTERRUPTED)
    except USER_ERRORS as error:
        if os.environ.get("MASKMIX_TRACEBACK") == "1":
            raise
        err.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(USER_ERROR)


def value_of(argv: Sequence[str], flag: str, default: str) -> str:
    """The value of ``--flag value`` or ``--flag=value`` on a command line, before it is parsed as a whole."""
    for number, word in enumerate(argv):
        if word == flag and number + 1 < len(argv):
            return argv[number + 1]
        if word.startswith(flag + "="):
            return word.removeprefix(flag + "=")
    return default
