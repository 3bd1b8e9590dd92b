"""How every program of the project starts: command line, error messages, exit codes."""

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
"""Errors that are shown as one message; any other error is a bug of this project and keeps its traceback."""
OLDEST_TORCH = 2, 8
"""The oldest version that works, as in pyproject.toml."""
USER_ERROR, PROCESS_LOST, INTERRUPTED = 2, 3, 130
"""Exit codes."""
console = Console(highlight=False, soft_wrap=True)
"""Standard output of every program."""
_Config = TypeVar("_Config")


def program(
    config: type[_Config],
    main: Callable[[_Config], object],
    description: str | None = None,
    parse: Callable[[list[str]], _Config] | None = None,
) -> None:
    """Parse the command line as ``config``, call ``main`` with it, and exit with its exit code.

    Errors are reported as by `run`.

    Args:
        config: a dataclass; its fields are the options and their docstrings the help.
        main: returns the exit code; anything but an ``int`` is 0.
        description: the first lines of ``--help``; by default the docstring of ``config``.
        parse: makes the config from the arguments; by default `parse_args`.
    """
    parse = parse or (lambda args: parse_args(config, args, description))
    run(lambda: main(parse(sys.argv[1:])))


def parse_args(
    config: type[_Config], args: Sequence[str], description: str | None, default: _Config | None = None
) -> _Config:
    """Parse arguments as ``config``; if a machine runs several processes, only the first prints.

    Args:
        config: see `program`.
        args: the command line without the program's name.
        description: see `program`.
        default: values of the options that are not given; by default those of the dataclass.

    Raises:
        SystemExit: after ``--help``, and after the message for arguments that cannot be parsed.
    """
    first = failure.is_first_on_machine()
    if default is None:
        return tyro.cli(config, args=args, description=description, console_outputs=first)
    return tyro.cli(config, args=args, description=description, default=default, console_outputs=first)


def run(program: Callable[[], object]) -> None:
    """Call a program and exit with its exit code; report a user's error as one message on stderr.

    Exit codes: `USER_ERROR` for an error of the user, `INTERRUPTED` for Ctrl-C, `PROCESS_LOST` for a process
    that has lost the others. With several processes, `training.failure` decides which one prints. With
    MASKMIX_TRACEBACK=1 in the environment, errors keep their traceback.

    Args:
        program: returns the exit code; anything but an ``int`` is 0.
    """
    with failure.exit_on_failure():
        try:
            check_torch()
            status = program()
            if isinstance(status, int) and status:
                sys.exit(status)
        except KeyboardInterrupt:
            _print_error("[red]{}[/]", "interrupted")
            sys.exit(INTERRUPTED)
        except SystemExit as end:
            if end.code:
                failure.report("the program ended, see above", failure.USAGE)
            raise
        except USER_ERRORS as error:
            if os.environ.get("MASKMIX_TRACEBACK") == "1":
                raise
            lost = isinstance(error, ProcessLost)
            _print_error("[bold red]error:[/] {}", str(error), failure.LOST if lost else "")
            sys.exit(PROCESS_LOST if lost else USER_ERROR)


def check_torch() -> None:
    """Raise ImportError if the installed torch is too old; reads its version without importing it."""
    version = importlib.metadata.version("torch")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(
            f"torch {version} is too old, at least {oldest} is needed; pip install 'torch>={oldest}'"
        )


def _print_error(template: str, message: str, kind: str = "") -> None:
    if (line := failure.report(message, kind)) is not None:
        stderr = Console(stderr=True, highlight=False, soft_wrap=True)
        stderr.print(template.format(escape(line)))


def value_of(argv: Sequence[str], flag: str, default: str) -> str:
    """The value of ``--flag value`` or ``--flag=value``, before the command line is parsed."""
    for number, word in enumerate(argv):
        if word == flag and number + 1 < len(argv):
            return argv[number + 1]
        if word.startswith(flag + "="):
            return word.removeprefix(flag + "=")
    return default
