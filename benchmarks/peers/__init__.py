"""The loaders that ours is measured against, each as its own documentation says it is fastest."""

import importlib
from collections.abc import Sequence
from typing import Literal, get_args

from benchmarks.peers.contract import Peer

PeerName = Literal["torchvision-pil", "torchvision-v2", "ffcv", "dali", "spdl", "decode"]
ALL_PEERS: tuple[PeerName, ...] = get_args(PeerName)

# What the command line calls them: the module and the list in it, the package, the command that installs it.
_BENCH = "`make setup`, or by hand `pip install '.[bench]' --constraint constraints.txt`"
_FROM: dict[PeerName, tuple[str, str, str, str]] = {
    "torchvision-pil": ("with_torchvision", "PIL_PEERS", "torchvision", _BENCH),
    "torchvision-v2": ("with_torchvision", "V2_PEERS", "torchvision", _BENCH),
    "ffcv": ("with_ffcv", "PEERS", "ffcv", "`make setup`"),
    "dali": ("with_dali", "PEERS", "nvidia-dali-cuda130", _BENCH),
    "spdl": ("with_spdl", "PEERS", "spdl", _BENCH),
    "decode": ("decode_limit", "PEERS", "simplejpeg", _BENCH),
}


def load_peers(names: Sequence[PeerName]) -> list[Peer]:
    """The peers of these names, in this order; some names stand for two ways of the same library.

    Raises:
        ImportError: if a peer's package is missing; the message tells how to install it.
    """
    found: list[Peer] = []
    for name in names:
        module, peers, package, mend = _FROM[name]
        try:
            found += getattr(importlib.import_module(f"benchmarks.peers.{module}"), peers)
        except ImportError as error:
            raise ImportError(
                f"the peer {name} needs the package {package} ({error}); {mend} installs it, "
                "or leave the peer out with --peers"
            ) from error
    return found
