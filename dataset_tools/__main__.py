"""Make and check compiled sets: convert, index, photographs, fashion-mnist, verify, stats, preview."""

import errno
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

import tyro
from rich.console import Console

from dataset_tools import check_commands, commands
from dataset_tools.saying import line
from training.cli import check_torch

COMMANDS: dict[str, Callable[..., commands.Command]] = {
    "convert": commands.Convert,
    "index": check_commands.Index,
    "photographs": commands.Photographs,
    "fashion-mnist": commands.FashionMnist,
    "verify": check_commands.Verify,
    "stats": check_commands.ShowStats,
    "preview": check_commands.Preview,
}
"""Every sub-command by name."""
USER_ERROR, INTERRUPTED = 2, 130


def main(args: Sequence[str] | None = None) -> int:
    """Run the sub-command that ``args`` (default: the command line) name; return the exit code.

    What a user can mend is one sentence on stderr and exit code 2; Ctrl-C and SIGTERM clean up and give 130.
    """
    command: commands.Command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="python -m dataset_tools", description=__doc__, args=args
    )
    err = Console(stderr=True)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        check_torch()
        return command.run(Console(), err)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        mend = "; the output does not fit, make room where it goes or choose another place" if full else ""
        line(err, f"error: {error}{mend}", style="red")
        return USER_ERROR
    except KeyboardInterrupt as interrupt:
        err.print(f"interrupted; {str(interrupt) or 'nothing was left behind'}", style="red")
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 – the shape that signal asks for
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
