"""Start programs like a shell, and functions in two processes like torchrun."""

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.multiprocessing as mp


@contextlib.contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a program as in the foreground; kill it at the end if it still runs.

    Shells let background jobs ignore SIGINT, and their children inherit that, so it is reset here.
    """
    with subprocess.Popen(command, text=True, preexec_fn=_reset_ctrl_c, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def _reset_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def in_two_processes(function: Callable[..., object], *args: Any) -> None:
    """Call ``function(*args)``, both picklable, in two processes of one run over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_one_of_two, args=(port, function, args), nprocs=2)


def _one_of_two(rank: int, port: int, function: Callable[..., object], args: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    function(*args)
