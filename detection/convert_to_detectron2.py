"""Turn a pretrained encoder into weights that Detectron2 starts from.

    python -m detection.convert_to_detectron2 runs/mixmask/backbone.safetensors runs/mixmask/detectron2.pth

INPUT is one of our checkpoints or safetensors files, or a published .pth.tar; ResNet-18, -34, -50, -101 or
-152 without the small stem. OUTPUT is .pth, or .pkl as the published converter wrote it. Every tensor gets
its place, or nothing is written. A .pth also says by what mean and standard deviation INPUT's pixels were
normalised, where INPUT does, and detection.train_net holds its config against that. Then
    python -m detection.train_net --config-file detection/configs/coco_R_50_C4_2x.yaml MODEL.WEIGHTS OUTPUT
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from detection.keys import to_detectron2
from training import cli
from training.checkpoint import save_tensors
from training.cli import console
from training.export import BackboneMeta, fingerprint, load_backbone
from training.files import write_atomically


@dataclass(frozen=True)
class Conversion:
    """What to convert into what."""

    input: tyro.conf.Positional[Path]
    """Checkpoint, backbone.safetensors or published .pth.tar."""
    output: tyro.conf.Positional[Path]
    """A .pth or .pkl file for MODEL.WEIGHTS."""


def main(config: Conversion) -> None:
    """Convert; see the top of this file. Raises ValueError for what Detectron2 cannot hold."""
    if config.output.suffix not in (".pth", ".pkl"):
        raise ValueError(
            f"{config.output} ends with neither .pth nor .pkl, by which Detectron2 tells a file's kind"
        )
    backbone = load_backbone(config.input)
    state, depth = to_detectron2(backbone.state, backbone.meta.arch)
    about: dict[str, Any] = {
        "__author__": "maskmix",
        # They put res5 into the backbone or into the heads of a C4 model, wherever the config has it.
        "matching_heuristics": True,
        "encoder_sha256": fingerprint(backbone.state),
        **_pixels(backbone.meta),
    }
    if config.output.suffix == ".pkl":
        arrays = {name: tensor.numpy() for name, tensor in state.items()}
        write_atomically(config.output, lambda file: pickle.dump({"model": arrays, **about}, file))
    else:
        save_tensors(config.output, {"model": state, **about})
    narrow = ", MODEL.RESNETS.RES2_OUT_CHANNELS 64 and the FPN config" if depth < 50 else ""
    console.print(
        f"{config.input}: {len(state)} tensors of a ResNet-{depth} → {config.output}  "
        f"(for MODEL.WEIGHTS, with MODEL.RESNETS.DEPTH {depth}{narrow})"
    )


def _pixels(meta: BackboneMeta) -> dict[str, list[float]]:
    """By what the encoder's pixels, 0 … 255, were normalised; what the file does not say is left out."""
    said = {"pixel_mean": meta.mean, "pixel_std": meta.std}
    return {name: [255 * value for value in values] for name, values in said.items() if values is not None}


if __name__ == "__main__":
    cli.program(Conversion, main, __doc__)
