"""How many threads this process may use."""

import os


def usable_cores(wanted: int = 0) -> int:
    """``wanted`` threads, or for 0 this process's share of the cores it is allowed on.

    Raises:
        ValueError: if more are wanted than there are.
    """
    allowed = len(os.sched_getaffinity(0))
    if wanted > allowed or wanted < 0:
        raise ValueError(f"{wanted} threads are wanted, this process may use 1 … {allowed} (0 takes all)")
    return wanted or max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
