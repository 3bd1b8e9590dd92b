"""A function run by two processes of one run, as torchrun would start them."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp


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
