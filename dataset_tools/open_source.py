"""The source of pictures that a path stands for."""

from collections.abc import Callable
from pathlib import Path

from dataset_tools.shard_set import unfinished
from dataset_tools.shard_source import ShardSource
from dataset_tools.sources import FolderSource, Source
from dataset_tools.tar_source import TarSource
from pipelines.sets.shards import index_hint, is_shard_set

_PACKED = (".tar", ".tgz", ".gz", ".bz2", ".tbz2", ".xz", ".txz", ".zst")


def open_source(
    path: str | Path,
    *,
    labelled: bool = True,
    labels_file: str | Path | None = None,
    accept_truncated: bool = False,
    progress: Callable[[], None] | None = None,
) -> Source:
    """Open a folder of pictures, a tar of pictures or of tars, or a set of shards.

    ``labelled`` off takes the pictures of a folder or a tar as one unlabelled set; ``labels_file`` is for
    tars, see TarSource; ``accept_truncated`` takes of a damaged tar, or set of shards, what can be read.
    ``progress`` is called once a picture of a tar and once a shard.
    Raises ValueError, with the mend, for anything else, and what the source's class raises.
    """
    path = Path(path)
    if labels_file is not None and not path.is_file():
        raise ValueError(f"the labels in {labels_file} are for a tar of pictures, {path} is none")
    if path.is_file():
        if path.suffix.lower() not in _PACKED:
            raise ValueError(
                f"the source {path} is a file, but no .tar; give a folder of pictures, a tar of them or a "
                "set of shards"
            )
        return TarSource(
            path,
            labelled=labelled,
            labels_file=labels_file,
            accept_truncated=accept_truncated,
            progress=progress,
        )
    if is_shard_set(path):
        if not labelled:
            raise ValueError(f"{path} is a set of shards, whose labels cannot be left out")
        return ShardSource(path, accept_truncated=accept_truncated, progress=progress)
    if accept_truncated:
        raise ValueError(f"--accept-truncated is for damaged tars, {path} is no tar and no set of shards")
    if path.is_dir():
        if sentence := unfinished(path):
            raise ValueError(sentence)
        if (tar := next(path.glob("*.tar"), None)) and not any(entry.is_dir() for entry in path.iterdir()):
            raise ValueError(f"{path} holds tars (such as {tar.name}) without an index; {index_hint(path)}")
    return FolderSource(path, labelled=labelled)
