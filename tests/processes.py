"""Programs as a shell starts them, and a function run by two processes of one run as torchrun starts them."""

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
    """A program in the foreground, wherever the tests run; killed if it is still there at the end.

    Shells have SIGINT ignored by what they start in the background, and children inherit that.
    """
    with subprocess.Popen(command, text=True, preexec_fn=_hear_ctrl_c, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def in_two_processes(function: Callable[..., object], *args: Any) -> None:
    """Call ``function`` in both, which find each other over gloo; it and ``args`` must be picklable."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_one_of_two, args=(port, function, args), nprocs=2)


def _one_of_two(rank: int, port: int, function: Callable[..., object], args: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    function(*args)
