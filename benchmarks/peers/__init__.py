"""The loaders that ours is measured against, each as its own documentation says it is fastest."""

import importlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch

from benchmarks.peers.contract import Peer

PeerName = Literal["ours-dali", "torchvision-pil", "torchvision-v2", "ffcv", "dali", "spdl", "decode"]
ALL_PEERS: tuple[PeerName, ...] = get_args(PeerName)
GPUPeerName = Literal["ours", "dali", "torchvision"]
ALL_GPU_PEERS: tuple[GPUPeerName, ...] = get_args(GPUPeerName)


class _Source(NamedTuple):
    """Where peers come from."""

    module: str
    """Module of this package, …"""
    peers: str
    """… and the list in it, or the function of a device that gives one."""
    package: str
    """What must be installed, …"""
    mend: str
    """… and what installs it."""
    also: str = ""
    """A module that the peers' own one does not import before they are opened."""


_BENCH = "`make setup`, or by hand `pip install '.[bench]' --constraint constraints.txt`"
_DALI, _MEND_DALI = "nvidia-dali-cuda130", _BENCH.replace("bench", "dali")
_FROM: dict[PeerName, _Source] = {
    "ours-dali": _Source("ours", "DALI_PEERS", _DALI, _MEND_DALI, also="nvidia.dali"),
    "torchvision-pil": _Source("with_torchvision", "PIL_PEERS", "torchvision", _BENCH),
    "torchvision-v2": _Source("with_torchvision", "V2_PEERS", "torchvision", _BENCH),
    "ffcv": _Source("with_ffcv", "PEERS", "ffcv", "`make setup`"),
    "dali": _Source("with_dali", "PEERS", _DALI, _MEND_DALI),
    "spdl": _Source("with_spdl", "PEERS", "spdl", _BENCH),
    "decode": _Source("decode_limit", "PEERS", "simplejpeg", _BENCH),
}
_GPU_FROM: dict[GPUPeerName, _Source] = {
    "ours": _Source("ours", "gpu_peers", _DALI, _MEND_DALI, also="nvidia.dali"),
    "dali": _Source("with_dali", "gpu_peers", _DALI, _MEND_DALI),
    "torchvision": _Source("with_nvjpeg", "gpu_peers", "torchvision", _BENCH),
}


def load_peers(names: Sequence[PeerName]) -> list[Peer]:
    """The peers of these names, in this order; some names stand for several ways of the same library.

    Raises:
        ImportError: if a peer's package is missing; the message tells how to install it.
    """
    return [peer for name in names for peer in _load(name, _FROM[name])]


def load_gpu_peers(names: Sequence[GPUPeerName], device: torch.device) -> list[Peer]:
    """Like :func:`load_peers`, of those that leave their batches on a GPU."""
    return [peer for name in names for peer in _load(name, _GPU_FROM[name])(device)]


def _load(name: str, source: _Source) -> Any:
    """What stands under ``source.peers``."""
    try:
        if source.also:
            importlib.import_module(source.also)
        peers = getattr(importlib.import_module(f"benchmarks.peers.{source.module}"), source.peers)
    except ImportError as error:
        raise ImportError(
            f"the peer {name} needs the package {source.package} ({error}); {source.mend} installs it, "
            "or leave the peer out with --peers"
        ) from error
    return peers
