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

_DALI = "nvidia-dali-cuda130"
_INSTALL = {
    "ffcv": "`make setup`",
    _DALI: "`make setup`, or `pip install '.[dali]' --constraint constraints.txt`,",
}
_INSTALL_BENCH = "`make setup`, or `pip install '.[bench]' --constraint constraints.txt`,"
# Name → module of this package, its list of peers, and the package that must be installed.
_PEERS: dict[PeerName, tuple[str, str, str]] = {
    "ours-dali": ("ours", "DALI_PEERS", _DALI),
    "torchvision-pil": ("with_torchvision", "PIL_PEERS", "torchvision"),
    "torchvision-v2": ("with_torchvision", "V2_PEERS", "torchvision"),
    "ffcv": ("with_ffcv", "PEERS", "ffcv"),
    "dali": ("with_dali", "PEERS", _DALI),
    "spdl": ("with_spdl", "PEERS", "spdl"),
    "decode": ("decode_limit", "PEERS", "simplejpeg"),
}
_GPU_PEERS: dict[GPUPeerName, tuple[str, str, str]] = {
    "ours": ("ours", "gpu_peers", _DALI),
    "dali": ("with_dali", "gpu_peers", _DALI),
    "torchvision": ("with_torchvision", "gpu_peers", "torchvision"),
}


def load_peers(names: Sequence[PeerName]) -> list[Peer]:
    """Return the peers of these names, in this order. A name may stand for several ways to use a library.

    Raises:
        ImportError: if a peer's package is missing; the message says how to install it.
    """
    return [peer for name in names for peer in _load(name, *_PEERS[name])]


def load_gpu_peers(names: Sequence[GPUPeerName], device: torch.device) -> list[Peer]:
    """Like :func:`load_peers`, for peers that leave their batches on a GPU."""
    return [peer for name in names for peer in _load(name, *_GPU_PEERS[name])(device)]


def _load(name: str, module: str, attribute: str, package: str) -> Any:
    try:
        if package == _DALI:  # our loader imports DALI only when it is opened
            importlib.import_module("nvidia.dali")
        return getattr(importlib.import_module(f"benchmarks.peers.{module}"), attribute)
    except ImportError as error:
        raise ImportError(
            f"the peer {name} needs the package {package} ({error}); {_INSTALL.get(package, _INSTALL_BENCH)} "
            "installs it, or leave the peer out with --peers"
        ) from error
