"""The loaders that ours is compared with, each configured as its own documentation says it is fastest."""

import importlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from benchmarks.peers.contract import Peer

PeerName = Literal["ours-dali", "torchvision-pil", "torchvision-v2", "ffcv", "dali", "spdl", "decode"]
ALL_PEERS: tuple[PeerName, ...] = get_args(PeerName)
GPUPeerName = Literal["ours", "dali", "torchvision"]
ALL_GPU_PEERS: tuple[GPUPeerName, ...] = get_args(GPUPeerName)
# Name → module of this package, its list of peers, and the extra of pyproject.toml with its package.
_PEERS: dict[PeerName, tuple[str, str, str]] = {
    "ours-dali": ("ours", "DALI_PEERS", "dali"),
    "torchvision-pil": ("with_torchvision", "PIL_PEERS", "bench"),
    "torchvision-v2": ("with_torchvision", "V2_PEERS", "bench"),
    "ffcv": ("with_ffcv", "PEERS", "ffcv"),
    "dali": ("with_dali", "PEERS", "dali"),
    "spdl": ("with_spdl", "PEERS", "bench"),
    "decode": ("decode_limit", "PEERS", "bench"),
}


def load_peers(names: Sequence[PeerName]) -> list[Peer]:
    """Return the peers of these names, in this order. A name may stand for several ways to use a library.

    Raises:
        ImportError: if a peer's package is missing; the message says how to install it.
    """
    return [peer for name in names for peer in _load(name, *_PEERS[name])]


def load_gpu_peers(names: Sequence[GPUPeerName], device: torch.device) -> list[Peer]:
    """Like :func:`load_peers`, for peers that leave their batches on a GPU."""
    modules = {"ours": "ours", "dali": "with_dali", "torchvision": "with_torchvision"}
    return [peer for name in names for peer in _load(name, modules[name], "gpu_peers", "dali")(device)]


def _load(name: str, module: str, attribute: str, extra: str) -> Any:
    try:
        if module == "ours":  # our loader imports DALI only when it is opened
            importlib.import_module("nvidia.dali")
        return getattr(importlib.import_module(f"benchmarks.peers.{module}"), attribute)
    except ImportError as error:
        raise ImportError(
            f"the peer {name} needs a package that is missing ({error}); `make setup`, or `pip install "
            f"'.[{extra}]' --constraint constraints.txt`, installs it, or leave the peer out with --peers"
        ) from error
