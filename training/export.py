"""Read and write backbones: our checkpoint, a safetensors file, and the published ``.pth.tar`` layout.

Shape letters: D embedding, K queue.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from training.checkpoint import (
    HASH,
    NO_CHECKSUMS,
    CheckpointError,
    check_hash,
    content_hash,
    hash_tensor,
    read_safely,
)
from training.files import write_atomically

_PUBLISHED_KEYS = {"epoch", "arch", "state_dict", "optimizer"}
_OUR_KEYS = {"step", "model", "meta", "config"}
_TEXTS = {"arch", "method", "trained_on", "recipe"}
_QUEUE_KEYS = {"queue_KD", "queue", "queue_ptr"}


@dataclass(frozen=True)
class BackboneMeta:
    """Description of a backbone in its file; None for values that the file lacks."""

    arch: str | None = None
    """One of `models.encoders.ARCHS`."""
    feature_dim: int | None = None
    """Size of the features."""
    small_stem: bool | None = None
    """Whether the first convolution is 3 × 3 without max-pool."""
    method: str | None = None
    """Training method."""
    trained_on: str | None = None
    """Name of the training set, and number of images."""
    recipe: str | None = None
    """The run's settings, as JSON."""
    crop_px: int | None = None
    """Side of the training views."""
    eval_center_share: float | None = None
    """Side of the evaluation's centre crop over the image's short side."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from pixels in [0, 1]."""
    std: tuple[float, float, float] | None = None
    """Divisor after the mean is subtracted."""

    def as_strings(self) -> dict[str, str]:
        """The fields as strings, which a safetensors file can hold; values other than text are JSON."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in known.items()}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str]) -> "BackboneMeta":
        """The inverse of `as_strings`; unknown keys are ignored. Raises ValueError for invalid JSON."""
        known: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name in strings:
                text = strings[field.name]
                value = text if field.name in _TEXTS else json.loads(text)
                known[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**known)


class Backbone(NamedTuple):
    """An encoder without its head, read from a file."""

    state: dict[str, Tensor]
    """State dict with torchvision's key names, without ``fc``."""
    meta: BackboneMeta


@dataclass(frozen=True)
class ModelParts:
    """A model's state dict in parts; every key is in one. A classifier has only a backbone and a head."""

    backbone: dict[str, Tensor]
    """The (query) encoder without its head, with torchvision's key names."""
    head: dict[str, Tensor]
    """Projection head or classifier; keys start with ``fc.``."""
    key_encoder: dict[str, Tensor]
    """The key encoder with its head, with torchvision's key names."""
    queue: dict[str, Tensor]
    """Queue and pointer."""


def split_state_dict(state_dict: Mapping[str, Tensor]) -> ModelParts:
    """Split the state dict of our models or a published one, with or without the prefix ``module.``.

    Raises:
        CheckpointError: for unknown keys, and without a (query) encoder.
    """
    parts = ModelParts({}, {}, {}, {})
    unknown = []
    for full_key, tensor in state_dict.items():
        key = full_key.removeprefix("module.")
        if key.startswith("encoder."):
            parts.backbone[key.removeprefix("encoder.")] = tensor
        elif key.startswith("fc."):
            parts.head[key] = tensor
        elif key.startswith("encoder_q.fc."):
            parts.head[key.removeprefix("encoder_q.")] = tensor
        elif key.startswith("encoder_q."):
            parts.backbone[key.removeprefix("encoder_q.")] = tensor
        elif key.startswith("encoder_k."):
            parts.key_encoder[key.removeprefix("encoder_k.")] = tensor
        elif key in _QUEUE_KEYS:
            parts.queue[key] = tensor
        else:
            unknown.append(full_key)
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} of {len(state_dict)} keys are unknown, the first are {unknown[:5]}; "
            "a contrastive checkpoint has encoder_q.*, encoder_k.*, queue and queue_ptr, a classifier's has "
            "encoder.* and fc.*"
        )
    if not parts.backbone:
        raise CheckpointError(
            f"there is no encoder_q and no encoder among the keys {list(state_dict)[:5]}; nothing to load"
        )
    return parts


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a backbone's tensors, the same for all file formats; a result names its encoder by it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hash_tensor(digest, tensor)
    return digest.hexdigest()


def save_backbone(path: Path, encoder: nn.Module, meta: BackboneMeta) -> None:
    """Write an encoder without its ``fc`` to a safetensors file, atomically, with torchvision's keys.

    Equal encoders and metas give equal bytes.

    Raises:
        ValueError: if ``meta`` lacks arch or feature_dim.
    """
    missing = [name for name in ("arch", "feature_dim") if getattr(meta, name) is None]
    if missing:
        raise ValueError(f"the backbone's meta lacks {missing}; the encoder cannot be rebuilt without them")
    # safetensors stores row-major memory, so channels_last weights are copied.
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in encoder.state_dict().items()
        if not name.startswith("fc.")
    }
    metadata = meta.as_strings()
    metadata[HASH] = content_hash({"tensors": tensors, "metadata": metadata})
    content = _sort_metadata(safetensors.torch.save(tensors, metadata=metadata))
    write_atomically(path, lambda file: file.write(content))


def _sort_metadata(content: bytes) -> bytes:
    """Sort the metadata of a safetensors file; the library's order differs from process to process."""
    stop = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:stop])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[stop:]


def save_published(
    path: Path, *, epoch: int, arch: str, model: Mapping[str, Tensor], optimizer: Mapping[str, Any]
) -> None:
    """Write our model's state dict in the layout of the published ``.pth.tar`` files, atomically.

    The layout is {epoch, arch, state_dict, optimizer}. Keys have the prefix ``module.``, and the queue has
    the shape (D, K).
    """
    state_dict = {
        f"module.{key}": tensor.detach().cpu() for key, tensor in model.items() if key != "queue_KD"
    }
    state_dict["module.queue"] = model["queue_KD"].detach().cpu().T.contiguous()
    content = {"epoch": epoch, "arch": arch, "state_dict": state_dict, "optimizer": dict(optimizer)}
    write_atomically(path, lambda file: torch.save(content, file))


def load_backbone(path: Path) -> Backbone:
    """Read a backbone in float32, and its description.

    Reads our checkpoints, our safetensors files, and published ``.pth.tar`` files, which name only the
    architecture.

    Raises:
        CheckpointError: for a missing, damaged or unsafe file, an unknown layout, and unknown keys of the
        model.
    """
    state, meta = _read_backbone(path)
    # Files of other projects may be in half precision.
    return Backbone({name: t.float() if t.is_floating_point() else t for name, t in state.items()}, meta)


def _read_backbone(path: Path) -> Backbone:
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    content = read_safely(path)
    keys = set(map(str, content)) if isinstance(content, dict) else set()
    if keys >= _OUR_KEYS:
        return Backbone(split_state_dict(content["model"]).backbone, _parse_meta(path, content["meta"]))
    if keys >= {"arch", "state_dict"} and keys <= _PUBLISHED_KEYS:
        arch = BackboneMeta(arch=str(content["arch"]))
        return Backbone(split_state_dict(content["state_dict"]).backbone, arch)
    found = f"the keys {sorted(keys)[:8]}" if keys else f"a {type(content).__name__}"
    raise CheckpointError(
        f"{path} has an unknown layout: found {found}; expected our checkpoint, a .safetensors backbone, or "
        f"a published checkpoint with {sorted(_PUBLISHED_KEYS)}"
    )


def _parse_meta(path: Path, strings: Mapping[str, str]) -> BackboneMeta:
    try:
        return BackboneMeta.from_strings(strings)
    except ValueError as error:
        raise CheckpointError(
            f"the description of the backbone in {path} is damaged ({error}); export it again"
        ) from error


def _load_safetensors(path: Path) -> Backbone:
    if not path.is_file():
        raise CheckpointError(f"there is no backbone at {path}; check the path")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path} is cut short or not a safetensors file ({error}); export it again"
        ) from error
    expected = metadata.pop(HASH, None)
    check_hash(path, {"tensors": state, "metadata": metadata}, expected, NO_CHECKSUMS)
    return Backbone(state, _parse_meta(path, metadata))
