"""Small sets of drawn shapes, and converted weights of untrained encoders."""

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.shapes import write_coco
from detection.convert_to_detectron2 import to_detectron2
from models.encoders import build_encoder
from tests.detection.voc import write_voc
from training.files import write_atomically

CONFIGS = Path(__file__).resolve().parents[2] / "detection" / "configs"


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Names of small sets in both layouts; "coco" has no triangle, "val" no disc."""
    folder = tmp_path_factory.mktemp("shapes")
    coco = write_coco(folder / "coco", 6, 96, seed=0)
    voc = write_voc(folder / "voc", {"test": 4, "trainval": 6, "val": 2}, 96, seed=100)
    return {"coco": f"coco:{coco}:{coco.parent}"} | {
        split: f"voc:{voc}:{split}" for split in ("trainval", "test", "val")
    }


def write_weights(arch: str, path: Path, **about: object) -> nn.Module:
    """Write converted weights of an untrained encoder with random BatchNorm statistics.

    Args:
        arch: architecture of the encoder.
        path: file to write.
        about: further entries of the file.
    """
    torch.manual_seed(0)
    encoder, _ = build_encoder(arch)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
    state, _ = to_detectron2(encoder.state_dict(), arch)
    content = {"model": state, "matching_heuristics": True, **about}
    write_atomically(path, lambda file: torch.save(content, file))
    return encoder.eval()
