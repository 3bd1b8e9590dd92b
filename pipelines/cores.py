"""How many threads this process may use."""

import os

import numba
import torch

# The loader's thread and the thread that trains both enter compiled parallel code; numba's own fallback layer
# would abort the process. Where neither TBB nor OpenMP is installed numba says so by name.
if numba.config.THREADING_LAYER == "default":
    numba.config.THREADING_LAYER = "threadsafe"


def set_numba_threads(num_threads: int) -> None:
    """Let numba's parallel code on this thread use so many threads; torch keeps the number it has.

    On some threading layers the two share a setting.
    """
    torch_threads = torch.get_num_threads()
    numba.set_num_threads(num_threads)
    if torch.get_num_threads() != torch_threads:
        torch.set_num_threads(torch_threads)


def usable_cores(wanted: int = 0) -> int:
    """``wanted`` threads, or for 0 this process's share of the cores it is allowed on.

    Raises:
        ValueError: if more are wanted than there are.
    """
    allowed = len(os.sched_getaffinity(0))
    if wanted > allowed or wanted < 0:
        raise ValueError(f"{wanted} threads are wanted, this process may use 1 … {allowed} (0 takes all)")
    return wanted or max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
