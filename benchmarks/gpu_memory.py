"""How much of a GPU's memory a loader takes: each is asked by itself, in a process of its own."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from typing import Any, cast

import torch

from benchmarks.peers import GPUPeerName, load_gpu_peers
from benchmarks.peers.contract import Job, WorkName, works

_BATCHES = 16
"""So many fill every queue and let every pool grow to its size."""
_MIB = 2**20


def measure(
    sources: Sequence[GPUPeerName], peer: str, work: WorkName, job: Job, device: torch.device
) -> dict[str, float]:
    """Open a peer in a fresh process, ask it for some batches, look at the GPU.

    Args:
        sources: where the peer comes from, as for :func:`benchmarks.peers.load_gpu_peers`.
        peer: its name.
        work: which of its works.
        job: what it is asked to do.
        device: the GPU.

    Returns:
        ``torch_mib``, the greatest amount that torch's tensors took, and ``gpu_mib``, by how much the GPU's
        free memory fell at most: torch's cache and all of DALI's and nvJPEG's memory is in it, what CUDA
        takes for any process is not. Who else uses the GPU meanwhile falsifies it.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, tuple(sources), peer, work, job, device).result()


def _measure(
    sources: tuple[GPUPeerName, ...], name: str, work: WorkName, job: Job, device: torch.device
) -> dict[str, float]:
    peer = next(peer for peer in load_gpu_peers(sources, device) if peer.name == name)
    asked = cast(Any, works(work, [peer])[name])
    least = before = torch.cuda.mem_get_info(device)[0]
    torch.cuda.reset_peak_memory_stats(device)
    batches = asked.open(job)
    with closing(batches):
        for _ in range(_BATCHES):
            next(batches)
            least = min(least, torch.cuda.mem_get_info(device)[0])
        torch.cuda.synchronize(device)
        least = min(least, torch.cuda.mem_get_info(device)[0])
    return {
        "torch_mib": round(torch.cuda.max_memory_allocated(device) / _MIB, 1),
        "gpu_mib": round((before - least) / _MIB, 1),
    }
