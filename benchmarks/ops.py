"""What a training step costs, counted without a GPU: operations, kernels and bytes of every part.

    python -m benchmarks.ops --quick             mixmask alone, eager: seconds
    python -m benchmarks.ops --json FILE         every method, eager and compiled: minutes on one core

Nothing is computed: tensors have shapes and no memory (torch's fake tensors), so the counts are those of the
full size on any machine. A GPU's path is counted: its blocks of the queue, its photometric stage, 16 bits.

*Eager*: every operation that torch hands to a device counts once, views count nothing. An operation's bytes
are its inputs and outputs, each once, although BatchNorm reads its input twice. *Compiled*: the same for the
graphs that torch.compile makes, fused by the rule of `benchmarks.fusion.fuse`, which is the best that a
compiler can do. Neither is a time, and neither has been measured on a GPU yet.

Shape letters: N batch, S side in pixels.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import torch
from functorch.compile import aot_module_simplified, make_boxed_func, min_cut_rematerialization_partition
from packaging.version import Version
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fusion import fuse, num_bytes, tensors_of_tree
from benchmarks.run_options import finish_benchmark, print_table
from models import losses
from models.batch import NUM_MIXTURES, Method
from models.encoders import build_encoder
from models.moco import MoCo
from pipelines import Batch, Mixing, Mixture
from pipelines.augment.draws import NUM_PARAMETERS
from pipelines.augment.mixing import DrawnMixture, blend, draw_mixtures
from pipelines.augment.photometric import augment
from pipelines.randomness import Draw
from pipelines.recipe import Recipe, moco_v2
from training import cli
from training.cli import console
from training.optim import sgd

_DTYPE = torch.bfloat16
CAN_COUNT_COMPILED = Version(torch.__version__) >= Version("2.11")
"""Tried with torch 2.8, which cannot, and 2.11 and 2.14."""
_PARTS = {
    "_embed_keys": "key pass",
    "_embed_queries": "query passes",
    "_update_key_encoder": "key update",
    "_enqueue": "queue",
}
"""Method of MoCo → the part of a step that its operations belong to."""
_FREE = ("prim::device", "aten::promote_types", "aten::empty", "aten::empty_like", "aten::detach")
"""Operations that cost a device nothing, apart from views."""


@dataclass(frozen=True)
class OpsBenchmark:
    """Count a training step's operations and bytes."""

    quick: bool = False
    """mixmask alone, and nothing compiled but the photometric stage."""
    json: Path | None = None
    """File of the figures."""
    methods: tuple[Method, ...] = get_args(Method)
    """What is trained; mixmask is always counted, the first figures are its."""
    arch: str = "resnet50"
    """Encoder."""
    crop_px: int = 224
    """Side of the views."""
    batch_size: int = 256
    """Images per step."""
    queue_len: int = 65536
    """Length of the queue."""
    bn_splits: int = 8
    """Parts of the batch with BatchNorm statistics of their own."""

    def __post_init__(self) -> None:
        if self.batch_size < 2 or self.bn_splits < 2 or self.batch_size % self.bn_splits:
            raise ValueError(
                f"a batch of {self.batch_size} in {self.bn_splits} splits cannot be compared with plain "
                "BatchNorm; take at least 2 splits, and a multiple of them as the batch"
            )


def main(config: OpsBenchmark) -> dict[str, Any]:
    """Count, print a table, write the JSON; returns what was written.

    Raises:
        ValueError: if torch is too old to compile with fake tensors, and ``quick`` is not set.
    """
    if not config.quick and not CAN_COUNT_COMPILED:
        raise ValueError(
            f"torch {torch.__version__} cannot compile with fake tensors, which torch 2.11 can; take a newer "
            "one, or --quick, which counts the eager step"
        )
    methods = [m for m in get_args(Method) if m == "mixmask" or (m in config.methods and not config.quick)]
    counted: dict[str, dict[str, Any]] = {}
    with console.status("") as status:
        for method in methods:
            status.update(f"{method}, eager")
            counted[method] = {"eager": count_step(config, method, config.bn_splits)}
            if not config.quick:
                status.update(f"{method}, compiled")
                counted[method]["compiled"] = count_compiled(config, method)
        status.update("photometric stage")
        photometric = count_photometric(config)
        plain = count_step(config, "mixmask", 1)
    split = counted["mixmask"]["eager"]
    for figures in (plain, *(count for ways in counted.values() for count in ways.values())):
        _add_stage(figures, photometric)
    norm, plain_norm = (figures["parts"]["batchnorm"] for figures in (split, plain))
    given = {name: v for name, v in asdict(config).items() if name not in ("quick", "json", "methods")}
    result = {
        "config": given | {"dtype": str(_DTYPE).removeprefix("torch.")},
        "total_ops": split["total_ops"],
        "total_ops_plain_batchnorm": plain["total_ops"],
        "photometric": photometric,
        "batchnorm": {
            "ops": norm["ops"],
            "plain_ops": plain_norm["ops"],
            "ops_vs_plain": round(norm["ops"] / plain_norm["ops"], 3),
            "bytes_vs_plain": round(norm["bytes"] / plain_norm["bytes"], 3),
        },
        "methods": counted,
    }
    _print(result)
    return finish_benchmark("ops", config.quick, config.json, **result)


def _add_stage(figures: dict[str, Any], photometric: dict[str, Any]) -> None:
    """Add the photometric stage of a step's two views, which is compiled by default."""
    figures["parts"]["photometric"] = {
        "ops": 2 * photometric["kernels"],
        "bytes": 2 * photometric["bytes_per_view"] * photometric["views"],
    }
    for what in ("ops", "bytes"):
        figures[f"total_{what}"] = sum(part[what] for part in figures["parts"].values())


class Counted(TorchDispatchMode):
    """Operations and bytes by part; what runs in the ``with`` block of `part` belongs to it."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._part = "loss"

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count as ``name``."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.name().split(".")[0] not in _FREE:
            name = "batchnorm" if "batch_norm" in func.name() else self._part
            tensors = tensors_of_tree((args, kwargs or {}, out))
            self.ops[name] += 1
            self.bytes[name] += sum(num_bytes(t) for t in {id(t): t for t in tensors}.values())
        return out

    def figures(self) -> dict[str, Any]:
        """Return all parts and their sum."""
        parts = {name: {"ops": self.ops[name], "bytes": self.bytes[name]} for name in sorted(self.ops)}
        return {"total_ops": self.ops.total(), "total_bytes": self.bytes.total(), "parts": parts}


def _fake_step(
    config: OpsBenchmark, method: Method, bn_splits: int, fake: FakeTensorMode
) -> tuple[MoCo, torch.optim.Optimizer, Batch]:
    """Return a model, its optimizer and a batch of the full size, without memory."""
    encoder = functools.partial(build_encoder, config.arch)
    model = MoCo(encoder, method=method, queue_len=config.queue_len, bn_splits=bn_splits)
    model.to(memory_format=torch.channels_last)
    with fake, mock.patch.object(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True):
        model.to_empty(device="cpu")
        num, side = config.batch_size, config.crop_px

        def images() -> Tensor:
            empty = torch.empty(num, 3, side, side, dtype=_DTYPE)
            return empty.contiguous(memory_format=torch.channels_last)

        row_N = torch.empty(num, dtype=torch.int64)
        mixtures = tuple(Mixture(images(), row_N, torch.empty(num)) for _ in range(NUM_MIXTURES[method]))
        batch = Batch(images(), images(), mixtures, row_N, row_N)
        return model, sgd(model.encoder_q, 0.03, 0.9, 1e-4), batch


def _as_on_a_gpu() -> contextlib.AbstractContextManager[Any]:
    """Walk the queue in a GPU's blocks, on any device."""
    rows = losses._rows_of_a_block(torch.device("cuda"))
    return mock.patch.object(losses, "_rows_of_a_block", lambda _: rows)


def _drawn(config: OpsBenchmark, method: Method) -> tuple[DrawnMixture, ...]:
    recipe = Recipe(crop_px=config.crop_px, mixing=Mixing(method=method))
    return draw_mixtures(recipe, Draw(0, 0, np.arange(config.batch_size)))


def count_step(config: OpsBenchmark, method: Method, bn_splits: int) -> dict[str, Any]:
    """Count mixing, forward, backward and optimizer as they run without --compile."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model, optimizer, batch = _fake_step(config, method, bn_splits, fake)
    counted, drawn = Counted(), _drawn(config, method)
    for name, part in _PARTS.items():
        setattr(model, name, counted.part(part)(getattr(model, name)))
    with fake, _as_on_a_gpu(), counted:
        with counted.part("mixing"):
            for one in drawn:
                # Its upload is a copy of each of its tensors.
                blend(batch.query, one.to(torch.clone))
        with torch.autocast("cpu", _DTYPE):
            loss, _ = model(batch)
        with counted.part("backward"):
            loss.backward()
        with counted.part("optimizer"):
            optimizer.step()
    return counted.figures()


def _fused(graphs: Iterable[fx.Graph]) -> dict[str, int]:
    kernels = [kernel for graph in graphs for kernel in fuse(graph)]
    return {"ops": len(kernels), "bytes": sum(kernel.num_bytes for kernel in kernels)}


def count_compiled(config: OpsBenchmark, method: Method) -> dict[str, Any]:
    """Count the same step with --compile: the forward pass is one graph, and so is the backward pass."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model, optimizer, batch = _fake_step(config, method, config.bn_splits, fake)
    graphs: dict[str, list[fx.Graph]] = {"forward": [], "backward": [], "mixing": []}

    def keep(part: str) -> Callable[[fx.GraphModule, Any], Any]:
        def compiler(module: fx.GraphModule, _: Any) -> Any:
            graphs[part].append(module.graph)
            return make_boxed_func(module.forward)

        return compiler

    model.compile(
        fullgraph=True,
        backend=lambda module, inputs: aot_module_simplified(
            module,
            inputs,
            fw_compiler=keep("forward"),
            bw_compiler=keep("backward"),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=core_aten_decompositions(),
        ),
    )
    counted = Counted()
    with fake, _as_on_a_gpu():
        with torch.autocast("cpu", _DTYPE):
            loss, _ = model(batch)
        loss.backward()
        with counted, counted.part("optimizer"):
            optimizer.step()
    for drawn in (one.to(fake.from_tensor) for one in _drawn(config, method)):
        mix = functools.partial(lambda drawn, query: blend(query, drawn).images, drawn)
        graphs["mixing"].append(make_fx(mix)(batch.query).graph)
    return {"parts": {name: _fused(found) for name, found in graphs.items()} | counted.figures()["parts"]}


def count_photometric(config: OpsBenchmark) -> dict[str, Any]:
    """Count the photometric stage of one batch of views, for MoCo v2's recipe."""
    recipe = moco_v2(config.crop_px)
    counted = Counted()

    def stage(crops: Tensor, params_NP: Tensor) -> Tensor:
        return augment(crops, params_NP, recipe, _DTYPE)

    with FakeTensorMode():
        crops = torch.empty(config.batch_size, config.crop_px, config.crop_px, 3, dtype=torch.uint8)
        params_NP = torch.empty(config.batch_size, NUM_PARAMETERS)
        with counted:
            stage(crops, params_NP)
        graph = make_fx(stage, dict(core_aten_decompositions()))(crops, params_NP).graph
    eager, fused = counted.figures(), _fused([graph])
    return {
        "views": config.batch_size,
        "kernels": fused["ops"],
        "bytes_per_view": fused["bytes"] // config.batch_size,
        "eager_ops": eager["total_ops"],
        "eager_bytes_per_view": eager["total_bytes"] // config.batch_size,
    }


def _print(result: dict[str, Any]) -> None:
    config, methods = result["config"], result["methods"]
    mixmask = methods["mixmask"]
    names = dict.fromkeys(part for figures in mixmask.values() for part in figures["parts"])
    rows = {f"mixmask, {name}": {way: mixmask[way]["parts"].get(name) for way in mixmask} for name in names}
    for method, ways in methods.items():
        rows[f"{method}, all"] = {
            way: {"ops": figures["total_ops"], "bytes": figures["total_bytes"]}
            for way, figures in ways.items()
        }
    print_table(
        f"A step of {config['arch']} at {config['crop_px']} px, batch {config['batch_size']}, "
        f"BN in {config['bn_splits']} parts, {config['dtype']}",
        {name: _cells(ways) for name, ways in rows.items()},
    )
    stage, norm = result["photometric"], result["batchnorm"]
    console.print(
        f"photometric stage, a view: {stage['bytes_per_view'] / 1e6:.1f} MB compiled "
        f"({stage['kernels']} kernels a batch), {stage['eager_bytes_per_view'] / 1e6:.1f} MB eager "
        f"({stage['eager_ops']} operations)"
    )
    console.print(
        f"BatchNorm in parts over plain: {norm['ops_vs_plain']:.2f} of the operations, "
        f"{norm['bytes_vs_plain']:.2f} of the bytes"
    )


def _cells(ways: dict[str, dict[str, int] | None]) -> dict[str, str]:
    cells = {}
    for way, count in ways.items():
        cells[f"{way}, operations"] = f"{count['ops']:,}" if count else "–"
        cells[f"{way}, GB"] = f"{count['bytes'] / 1e9:,.1f}" if count else "–"
    return cells


if __name__ == "__main__":
    cli.program(OpsBenchmark, main)
