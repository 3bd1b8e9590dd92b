"""A training step: one graph under the compiler, one CUDA graph on a GPU, a bounded queue of steps."""

import functools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.sgd import sgd as update_by_sgd

from models import losses
from models.batch import Batch, Mixture, tensors_of
from models.encoders import build_encoder
from models.moco import MoCo
from training import step as step_module
from training.evaluate import Features, knn_top1
from training.optim import scale_lr, sgd
from training.precision import Precision, settings_of_training
from training.step import WARM_UP_STEPS, TrainStep

CPU = torch.device("cpu")


def _batch(step: int, device: torch.device = CPU, num: int = 8, side: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(step)

    def images() -> Tensor:
        drawn = torch.randn(num, 3, side, side, generator=generator)
        return drawn.contiguous(memory_format=torch.channels_last).to(device)

    row_N = torch.arange(num, device=device)
    mixtures = tuple(
        Mixture(images(), row_N.flip(0), torch.rand(num, generator=generator).to(device)) for _ in range(2)
    )
    return Batch(images(), images(), mixtures, row_N, torch.full_like(row_N, -1))


def _parts(device: torch.device = CPU) -> tuple[MoCo, torch.optim.Optimizer]:
    torch.manual_seed(0)
    encoder = functools.partial(build_encoder, "resnet10w16")
    model = MoCo(encoder, method="both", queue_len=20, dim=16, bn_splits=4).to(device)
    model.to(memory_format=torch.channels_last).train()
    return model, sgd(model.encoder_q, 0.05, 0.9, 1e-4)


def _update(optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> None:
    """The computation of the optimizer's step.

    torch cannot trace the step itself, because of its hooks, its profiler and the fused kernel.
    """
    (group,) = optimizer.param_groups
    momentum_buffers = [optimizer.state[parameter]["momentum_buffer"] for parameter in group["params"]]
    names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
    update_by_sgd(
        group["params"], gradients, momentum_buffers, foreach=True, **{name: group[name] for name in names}
    )


def test_the_whole_step_has_no_graph_break() -> None:
    """Encoders, loss, key update, queue and optimizer; a new learning rate needs no new graph."""
    # Older versions of torch cannot trace a gradient; they have one graph before it and one after it.
    backward_too = hasattr(torch._dynamo.config, "trace_autograd_ops")
    graphs = []

    def count(module: torch.fx.GraphModule, _: object) -> object:
        graphs.append(module)
        return module.forward

    compiled = functools.partial(torch.compile, fullgraph=True, backend=count)
    plain_model, plain_optimizer = _parts()
    model, optimizer = _parts()
    plain = TrainStep(plain_model, plain_optimizer, Precision.choose("fp32", CPU))
    trained = list(model.encoder_q.parameters())

    def whole(batch: Batch) -> dict[str, Tensor]:
        loss, metrics = model(batch)
        gradients = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            _update(optimizer, list(gradients))
        return metrics

    forward, update = compiled(model), compiled(functools.partial(_update, optimizer))

    def two_graphs(batch: Batch) -> dict[str, Tensor]:
        loss, metrics = forward(batch)
        with torch.no_grad():
            update(list(torch.autograd.grad(loss, trained)))
        return metrics

    step = compiled(whole) if backward_too else two_graphs
    for number in range(3):
        for one in (plain_optimizer, optimizer):
            scale_lr(one, 1 / (number + 1))
        expected = plain(_batch(number))
        with torch._dynamo.config.patch(trace_autograd_ops=True) if backward_too else nullcontext():
            torch.testing.assert_close(step(_batch(number)), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.state_dict(), plain_model.state_dict(), rtol=1e-3, atol=1e-4)
    assert len(graphs) == (1 if backward_too else 2)


class _Event:
    """A device event that is done when it is waited for."""

    def __init__(self, waited: list["_Event"], *, blocking: bool) -> None:
        assert blocking, "the host must sleep while it waits"
        self._waited = waited

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        self._waited.append(self)


def test_the_host_is_at_most_two_steps_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[_Event] = []
    waited: list[_Event] = []

    def event(*, blocking: bool) -> _Event:
        made.append(_Event(waited, blocking=blocking))
        return made[-1]

    monkeypatch.setattr(step_module.torch.cuda, "Event", event)
    module = nn.Linear(2, 1)
    precision = Precision("fp32", torch.device("cuda"), torch.amp.GradScaler("cpu", enabled=False))
    step = TrainStep(lambda x: (module(x).sum(), {}), sgd(module, 0.1, 0.0, 0.0), precision)
    monkeypatch.setattr(Precision, "autocast", lambda self: torch.autocast("cpu", enabled=False))
    for number in range(5):
        step(torch.ones(3, 2))
        assert waited == made[: max(0, number - 1)]


def test_a_graph_that_cannot_be_captured_is_refused() -> None:
    model, optimizer = _parts()
    with pytest.raises(ValueError, match="--cuda-graph needs a GPU, this run computes on cpu; leave it out"):
        TrainStep(model, optimizer, Precision.choose("fp32", CPU), tensors_of=tensors_of)
    gpu, scaler = torch.device("cuda"), torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(ValueError, match="fp16's loss scaling; use --precision bf16 or fp32"):
        step_module.check_graph(Precision("fp16", gpu, scaler), 1)
    with pytest.raises(ValueError, match="this run has 8; use --compile"):
        step_module.check_graph(Precision("bf16", gpu, scaler), 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_captured_step_trains_like_the_eager_one(compiled: bool) -> None:
    device = torch.device("cuda", 0)
    precision = Precision.choose("fp32", device)
    kept = []
    with settings_of_training():
        for tensors in (None, tensors_of):
            model, optimizer = _parts(device)
            if compiled and tensors:
                model.compile_for_training()
            step = TrainStep(model, optimizer, precision, tensors_of=tensors)
            seen = []
            for number in range(WARM_UP_STEPS + 4):
                scale_lr(optimizer, 1 / (number + 1))
                seen.append(step(_batch(number, device)))
            kept.append(([{k: v.item() for k, v in metrics.items()} for metrics in seen], model.state_dict()))
    for plain, captured in zip(*(metrics for metrics, _ in kept), strict=True):
        assert plain == pytest.approx(captured, rel=2e-3, abs=1e-3)
    torch.testing.assert_close(*(state for _, state in kept), rtol=5e-3, atol=1e-3)


def test_settings_of_training_are_restored() -> None:
    def settings() -> tuple[object, ...]:
        cudnn = torch.backends.cudnn
        return (torch.get_float32_matmul_precision(), cudnn.benchmark, cudnn.allow_tf32, cudnn.enabled)

    before = settings()
    with pytest.raises(KeyError), settings_of_training():
        assert settings() == ("highest", True, False, True)
        raise KeyError
    assert settings() == before


def test_logits_and_knn_are_float32_under_any_matmul_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """With "high", products on a GPU may be TF32; the caller's setting is restored afterwards."""
    seen = []

    def look(*arguments: object, **options: object) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return real(*arguments, **options)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        real = torch.maximum
        monkeypatch.setattr(torch, "maximum", look)
        losses.negative_logsumexp(torch.randn(4, 8), torch.randn(9, 8), 0.2)
        real = F.normalize
        monkeypatch.setattr(F, "normalize", look)
        knn_top1(Features(torch.randn(9, 4), torch.arange(9) % 3), k=2)
        assert seen == ["highest", "highest"]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
