"""Checkpoints: the whole state of a run in one file, written atomically.

A file holds only tensors and plain data and is read with ``weights_only=True``, so reading a foreign file
cannot run code. It also holds a hash of its content, because torch does not notice damaged bytes.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training import failure
from training.files import write_atomically

log = logging.getLogger(__name__)

NO_CHECKSUMS = "it is not checked for damage, because its format has no checksums"
"""Warning for a file without a hash in a format without checksums."""
HASH = "sha256"
"""Key of a file's hash of the rest of its content, see `content_hash`."""
_NAME = re.compile(r"checkpoint_(\d{9})\.pt")


class CheckpointError(Exception):
    """A checkpoint is missing, damaged, unsafe or of another run."""


@dataclass
class TrainState:
    """Everything that a run needs to continue as if it had never stopped.

    The learning rate is a function of ``step``, and the queue is part of ``model``. The randomness of views
    is addressed by (seed, epoch, index), so all ranks resume from the state of one.
    """

    step: int
    """Optimizer steps done."""
    epoch: int
    """Epoch of the next step."""
    model: dict[str, Any]
    """State dict of the model, without DDP's prefix."""
    optimizer: dict[str, Any]
    """State dict of the optimizer."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State dict of the gradient scaler; empty unless fp16."""
    loader: dict[str, Any] = field(default_factory=dict)
    """The loader's position."""
    generators: dict[str, Tensor] = field(default_factory=dict)
    """Result of `generator_states`."""
    config: dict[str, Any] = field(default_factory=dict)
    """The run's settings as JSON values; a resumed run must have the same."""
    meta: dict[str, str] = field(default_factory=dict)
    """Description of the backbone: arch, feature_dim, small_stem, mean, std, …"""


_FIELDS = [f.name for f in dataclasses.fields(TrainState)]


def generator_states() -> dict[str, Tensor]:
    """The states of torch's default generators: "cpu", and "cuda" (this process's GPU) if there is one."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: Mapping[str, Tensor]) -> None:
    """Restore the default generators; a GPU's state is ignored on a machine without one."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """The path of the checkpoint after ``step`` steps."""
    return run_dir / f"checkpoint_{step:09d}.pt"


def _checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in run_dir.glob("checkpoint_*.pt") if _NAME.fullmatch(path.name))


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run; None if there is none."""
    return next(reversed(_checkpoints(run_dir)), None)


def checkpoint_to_resume(run_dir: Path, resume: bool) -> Path | None:
    """The newest checkpoint of a run; None if there is none, so that the run starts anew.

    Raises:
        ValueError: if ``resume`` is not set and the folder holds a checkpoint.
    """
    found = latest(run_dir)
    if found and not resume:
        raise ValueError(
            f"{run_dir} already holds a run; add --resume to continue it, or choose another --out"
        )
    return found


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints, and the temporary files of interrupted writes."""
    if keep < 1:
        raise ValueError(f"keep is {keep}; keep at least 1 checkpoint, or the run cannot be resumed")
    for path in (*_checkpoints(run_dir)[:-keep], *run_dir.glob(".checkpoint_*.pt.partial")):
        path.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: TrainState) -> None:
    """Write a state atomically.

    Raises:
        TypeError: for values that `load_checkpoint` would refuse; nothing is written then.
    """
    content = {name: getattr(state, name) for name in _FIELDS}
    for where, kind in _values_not_plain(content, ""):
        raise TypeError(
            f"{where} is a {kind}; a checkpoint holds only tensors, numbers, strings, lists and dicts"
        )
    try:
        json.dumps(state.config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the config cannot be written as JSON ({error}); use plain finite values") from error
    save_tensors(path, content)


def save_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors, plain data and their hash by ``torch.save``, atomically."""
    write_atomically(path, lambda file: torch.save({**content, HASH: content_hash(content)}, file))


def content_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of the keys, types, shapes and values of tensors and plain data, in any order of keys."""
    digest = hashlib.sha256()
    _hash_into(digest, content, "")
    return digest.hexdigest()


def _hash_into(digest: "hashlib._Hash", value: object, where: str) -> None:
    if isinstance(value, Mapping):
        digest.update(f"{where} holds {len(value)}\n".encode())
        for key in sorted(value, key=repr):
            _hash_into(digest, value[key], f"{where}/{key!r}")
    elif isinstance(value, (list, tuple)):
        digest.update(f"{where} has {len(value)}\n".encode())
        for number, item in enumerate(value):
            _hash_into(digest, item, f"{where}/{number}")
    elif isinstance(value, Tensor):
        digest.update(f"{where} {value.dtype} {tuple(value.shape)}\n".encode())
        hash_tensor(digest, value)
    else:
        digest.update(f"{where} {type(value).__name__} {value!r}\n".encode())


def hash_tensor(digest: "hashlib._Hash", tensor: Tensor) -> None:
    """Add a tensor's values in row-major order, whatever its memory format."""
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def check_hash(path: Path, content: Mapping[str, Any], expected: object, warning: str) -> None:
    """Raise CheckpointError if the content of a file does not have the hash that the file records.

    Args:
        path: of the file, for messages.
        content: without the hash.
        expected: the recorded hash. A file without one (None) is accepted with a warning.
        warning: what was checked instead of the hash, if anything.
    """
    if expected is None:
        _warn_unchecked(path, warning)
    elif expected != content_hash(content):
        raise CheckpointError(
            f"{path} does not match its hash: it is damaged, or was changed after it was written; delete it "
            "and use another copy, or an older checkpoint"
        )


@functools.cache
def _warn_unchecked(path: Path, warning: str) -> None:
    """Warn about a file once; the cache ignores further calls."""
    if failure.is_first_on_machine():
        log.warning("%s carries no hash of its content: %s", path, warning)


def _values_not_plain(value: object, where: str) -> Iterator[tuple[str, str]]:
    """The places and types of values that ``weights_only=True`` would not read."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _values_not_plain(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _values_not_plain(item, f"{where}[{number}]")
    elif value is not None and type(value) not in (bool, int, float, str) and not isinstance(value, Tensor):
        yield where, type(value).__name__


def read_safely(path: Path) -> Any:
    """Read what ``torch.save`` wrote, to the CPU, with ``weights_only=True``.

    Raises:
        CheckpointError: if the file is missing, damaged, cut short, or holds objects that could run code.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}; check the path")
    try:
        warning = _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise _damaged(path, "not written by torch.save") from error
        raise CheckpointError(
            f"{path} holds {refused.group(1)}, which could run code when opened, so it was not loaded; "
            "use a file of tensors and plain data, or convert this one if you trust it"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise _damaged(path, str(error).split(". ")[0] or "it ends too early") from error
    if isinstance(content, dict):
        expected = content.pop(HASH, None)
        check_hash(path, content, expected, warning)
    return content


def _check_archive(path: Path) -> str:
    """Compare the members of a torch archive with their checksums, which torch ignores.

    Returns:
        What was checked, for the warning of `check_hash`.

    Raises:
        ValueError: for a damaged member.
    """
    if not zipfile.is_zipfile(path):
        return NO_CHECKSUMS
    with zipfile.ZipFile(path) as archive:
        if (member := archive.testzip()) is not None:
            raise ValueError(f"{member} does not match its checksum, or has none")
    return "only the archive's checksums are checked"


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is cut short or not a checkpoint ({reason}); delete it and use an older one"
    )


def load_checkpoint(
    path: Path, config: Mapping[str, Any] | None = None, *, may_differ: Collection[str] = ()
) -> TrainState:
    """Load a state to the CPU.

    Args:
        path: of the checkpoint.
        config: settings that the state must have been written with; None for any.
        may_differ: keys of ``config`` that need not be the same.

    Raises:
        CheckpointError: for a missing, damaged, unsafe or foreign file, and for a config that differs, naming
            every key with both values.
    """
    content = read_safely(path)
    if not isinstance(content, dict) or set(content) != set(_FIELDS):
        keys = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} is not a checkpoint of this project: expected {_FIELDS}, found {keys}")
    state = TrainState(**content)
    then, now = ({k: v for k, v in c.items() if k not in may_differ} for c in (state.config, config or {}))
    if config is not None and (differences := _config_differences(then, now)):
        raise CheckpointError(
            f"{path} was written by a run with another configuration ({'; '.join(differences)}); "
            "resume with the same values, or start in a new folder"
        )
    return state


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config with its groups flattened: the keys of a group become ``group.key``."""
    plain: dict[str, Any] = {}
    for key, value in config.items():
        plain |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return plain


def _config_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One entry for each key that differs; tuples equal lists, as in JSON."""
    old, new = (flat(json.loads(json.dumps(config))) for config in (then, now))
    return [
        f"{key}: {old.get(key, 'absent')!r} then, {new.get(key, 'absent')!r} now"
        for key in sorted(old | new)
        if key not in old or key not in new or old[key] != new[key]
    ]
