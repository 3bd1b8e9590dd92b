"""Make and check compiled sets: convert, index, photographs, fashion-mnist, verify, stats, preview."""

import errno
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

import tyro

from dataset_tools import check_commands, commands
from dataset_tools.terminal import error_console, print_line
from training.cli import INTERRUPTED, USER_ERROR, check_torch

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


def main(args: Sequence[str] | None = None) -> int:
    """Run a sub-command and return the exit code.

    An error of the user is printed as one sentence on stderr, and the exit code is 2. Ctrl-C and SIGTERM
    remove temporary files, and the exit code is 130.

    Args:
        args: the sub-command and its options; by default those of the command line.
    """
    command: commands.Command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="python -m dataset_tools", description=__doc__, args=args
    )
    former_handler = signal.signal(signal.SIGTERM, _interrupt)
    try:
        check_torch()
        return command.run()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        disk_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "; the output does not fit, free some space or choose another place" if disk_full else ""
        print_line(f"error: {error}{hint}", out=error_console, style="red")
        return USER_ERROR
    except KeyboardInterrupt as interrupt:
        hint = str(interrupt) or "nothing was left behind"
        print_line(f"interrupted; {hint}", out=error_console, style="red")
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, former_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 – the signature of a handler
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
