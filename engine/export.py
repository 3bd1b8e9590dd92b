"""Backbones in and out: our checkpoint, a safetensors file, and the published ``.pth.tar`` layout.

Shape letters: D embedding, K queue.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from engine.checkpoint import CheckpointError, read_safely, write_atomically

_PUBLISHED_KEYS = {"epoch", "arch", "state_dict", "optimizer"}
_OUR_KEYS = {"step", "model", "meta", "config"}
_QUEUE_KEYS = {"queue_KD", "queue", "queue_ptr"}


@dataclass(frozen=True)
class ModelParts:
    """A contrastive model's state dict, every key in exactly one part."""

    backbone: dict[str, Tensor]
    """The query encoder without its head, by torchvision's key names."""
    head: dict[str, Tensor]
    """The query encoder's projection head, keys beginning with ``fc.``."""
    key_encoder: dict[str, Tensor]
    """The key encoder with its head, by torchvision's key names."""
    queue: dict[str, Tensor]
    """Queue and pointer."""


def split_state_dict(state_dict: Mapping[str, Tensor]) -> ModelParts:
    """Sort the keys of our or of a published model, with or without the prefix ``module.``.

    Raises CheckpointError naming the keys that belong nowhere, or if there is no query encoder.
    """
    parts = ModelParts({}, {}, {}, {})
    unknown = []
    for full_key, tensor in state_dict.items():
        key = full_key.removeprefix("module.")
        if key.startswith("encoder_q.fc."):
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
            "a contrastive checkpoint has encoder_q.*, encoder_k.*, queue and queue_ptr"
        )
    if not parts.backbone:
        raise CheckpointError(f"there is no encoder_q among the keys {list(state_dict)[:5]}; nothing to load")
    return parts


def save_backbone(path: Path, encoder: nn.Module, meta: Mapping[str, str]) -> None:
    """Write an encoder without its ``fc`` to a safetensors file, atomically.

    Keys are torchvision's. ``meta`` says at least arch and feature_dim, and what else a reader must know:
    method, small_stem, crop_px, mean, std. Raises ValueError without arch or feature_dim.
    """
    missing = {"arch", "feature_dim"} - set(meta)
    if missing:
        raise ValueError(f"the backbone's meta lacks {sorted(missing)}; without them nobody can rebuild it")
    # safetensors stores dense row-major memory, so channels_last weights are laid out anew.
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in encoder.state_dict().items()
        if not name.startswith("fc.")
    }
    content = safetensors.torch.save(tensors, metadata=dict(meta))
    write_atomically(path, lambda file: file.write(content))


def save_published(
    path: Path, *, epoch: int, arch: str, model: Mapping[str, Tensor], optimizer: Mapping[str, Any]
) -> None:
    """Write our model's state dict in the layout of the published ``.pth.tar`` files, atomically.

    {epoch, arch, state_dict, optimizer}; keys get the prefix ``module.``, the queue its shape there, (D, K).
    """
    state_dict = {
        f"module.{key}": tensor.detach().cpu() for key, tensor in model.items() if key != "queue_KD"
    }
    state_dict["module.queue"] = model["queue_KD"].detach().cpu().T.contiguous()
    content = {"epoch": epoch, "arch": arch, "state_dict": state_dict, "optimizer": dict(optimizer)}
    write_atomically(path, lambda file: torch.save(content, file))


def load_backbone(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The backbone in ``path`` by torchvision's key names without ``fc``, and what the file says of it.

    Reads our checkpoints, our safetensors files and published ``.pth.tar`` files (whose meta is arch alone).
    Raises CheckpointError for a missing, damaged or unsafe file, for an unknown layout (listing its keys) and
    for keys of the model that belong nowhere.
    """
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    content = read_safely(path)
    keys = set(map(str, content)) if isinstance(content, dict) else set()
    if keys >= _OUR_KEYS:
        return split_state_dict(content["model"]).backbone, content["meta"]
    if keys >= {"arch", "state_dict"} and keys <= _PUBLISHED_KEYS:
        return split_state_dict(content["state_dict"]).backbone, {"arch": str(content["arch"])}
    found = f"the keys {sorted(keys)[:8]}" if keys else f"a {type(content).__name__}"
    raise CheckpointError(
        f"{path} has an unknown layout: found {found}; expected our checkpoint, a .safetensors backbone, or "
        f"a published checkpoint with {sorted(_PUBLISHED_KEYS)}"
    )


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise CheckpointError(f"there is no backbone at {path}; check the path")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path} is cut short or no safetensors file ({error}); export it again"
        ) from error
