"""The loaders that ours is measured against, each as its own documentation says it is fastest."""

import importlib
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from benchmarks.peers.contract import Peer

PeerName = Literal["ours-dali", "torchvision-pil", "torchvision-v2", "ffcv", "dali", "spdl", "decode"]
ALL_PEERS: tuple[PeerName, ...] = get_args(PeerName)


class _Source(NamedTuple):
    """Where peers come from."""

    module: str
    """Module of this package, …"""
    peers: str
    """… and the list in it."""
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


def load_peers(names: Sequence[PeerName]) -> list[Peer]:
    """The peers of these names, in this order; some names stand for several ways of the same library.

    Raises:
        ImportError: if a peer's package is missing; the message tells how to install it.
    """
    return [peer for name in names for peer in _load(name, _FROM[name])]


def _load(name: str, source: _Source) -> list[Peer]:
    try:
        if source.also:
            importlib.import_module(source.also)
        peers: list[Peer] = getattr(
            importlib.import_module(f"benchmarks.peers.{source.module}"), source.peers
        )
    except ImportError as error:
        raise ImportError(
            f"the peer {name} needs the package {source.package} ({error}); {source.mend} installs it, "
            "or leave the peer out with --peers"
        ) from error
    return peers
