"""The example trains, and a resumed run ends with the bits of an uninterrupted one."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from examples.own_loop import nt_xent, train_simclr


def test_loss_is_cross_entropy_over_all_other_views() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 8)
    views = [*a, *b]
    losses = []
    for i, view in enumerate(views):
        similarity = torch.stack([F.cosine_similarity(view, other, dim=0) for other in views]) / 0.5
        others = [j for j in range(6) if j != i]
        losses.append(similarity[others].logsumexp(0) - similarity[(i + 3) % 6])
    torch.testing.assert_close(nt_xent(a, b), torch.stack(losses).mean())


def test_a_resumed_run_equals_an_uninterrupted_one(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forty images in batches of 16 are two steps per epoch, so the first part ends in mid-epoch."""
    options = {"batch_size": 16, "crop_px": 32}
    torch.manual_seed(0)
    train_simclr(beton, tmp_path / "whole.pt", steps=5, **options)
    torch.manual_seed(0)
    train_simclr(beton, tmp_path / "parts.pt", steps=3, **options)
    train_simclr(beton, tmp_path / "parts.pt", steps=5, **options)
    whole, resumed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["step"] == resumed["step"] == 5
    assert whole["loader"] == resumed["loader"]
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 2: loss ") and lines[2] == lines[-1] != lines[0]
