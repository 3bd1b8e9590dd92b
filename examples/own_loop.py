"""SimCLR in one page: a training loop of your own that takes only the loader from this project.

    python -m examples.own_loop data/photographs.beton

A second run continues where the first one stopped, also in the middle of an epoch, because the loader's
position is saved with the model. Shape letters: N batch, D embedding.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
import tyro
from torch import Tensor

from pipelines import Recipe, build_loader


def nt_xent(a_ND: Tensor, b_ND: Tensor, temperature: float = 0.5) -> Tensor:
    """SimCLR's loss (arXiv 2002.05709, equation 1): each view must find the other view of its image."""
    z_2ND = F.normalize(torch.cat([a_ND, b_ND]))
    logits = (z_2ND @ z_2ND.T / temperature).fill_diagonal_(-torch.inf)
    other_view = torch.arange(len(z_2ND), device=logits.device).roll(len(a_ND))
    return F.cross_entropy(logits, other_view)


def train_simclr(
    data: tyro.conf.Positional[Path],
    out: Path = Path("runs/own_loop.pt"),
    steps: int = 1000,
    batch_size: int = 64,
    crop_px: int = 96,
) -> None:
    """Train a ResNet-18; save a checkpoint after each epoch and after the last step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader = build_loader(data, Recipe(crop_px=crop_px), batch_size=batch_size, device=device)
    model = torchvision.models.resnet18(num_classes=128).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    step = 0
    if out.exists():
        state = torch.load(out, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["loader"])
        step = state["step"]

    while step < steps:
        loader.set_epoch(step // len(loader))  # in a resumed epoch the loader keeps its position
        for batch in loader:
            loss = nt_xent(model(batch.query), model(batch.key))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step == steps:
                break
        print(f"step {step}: loss {loss.item():.3f}")  # noqa: T201
        out.parent.mkdir(parents=True, exist_ok=True)
        parts = {"model": model, "optimizer": optimizer, "loader": loader}
        torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, out)


if __name__ == "__main__":
    tyro.cli(train_simclr)
