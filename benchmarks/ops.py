"""What a training step costs, counted without a GPU: operations, kernels and bytes of every part.

    python -m benchmarks.ops --json FILE     every method, eager and compiled: minutes on one core

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
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import torch
from functorch.compile import aot_module_simplified, make_boxed_func, min_cut_rematerialization_partition
from packaging.version import Version
from torch import fx
from torch._decomp import core_aten_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fusion import fuse, num_bytes, tensors_of_tree
from benchmarks.published import mixed_with_reverse
from benchmarks.run_options import finish_benchmark, print_table
from models import losses
from models.batch import NUM_MIXTURES, Method
from models.encoders import build_encoder
from models.moco import MoCo
from pipelines import Batch, Mixing
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
_PARTS = {"_embed_keys": "key pass", "_embed_queries": "query passes"}
_PARTS |= {"_update_key_encoder": "key update", "_enqueue": "queue"}
"""Method of MoCo → the part of a step that its operations belong to."""
_FREE = ("prim::device", "aten::promote_types", "aten::empty", "aten::empty_like", "aten::detach")
"""Operations that cost a device nothing, apart from views."""
Parts = dict[str, dict[str, int]]
"""Part of a step → its operations (``ops``) and ``bytes``."""


@dataclass(frozen=True)
class OpsBenchmark:
    """Count a training step's operations and bytes."""

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
    """Count, print a table, write the JSON; raises ValueError if torch cannot compile with fake tensors."""
    if not CAN_COUNT_COMPILED:
        raise ValueError(
            f"torch {torch.__version__} cannot compile with fake tensors, which torch 2.11 can; take a newer "
            "one"
        )
    methods = [method for method in get_args(Method) if method in {"mixmask", *config.methods}]
    counted: dict[str, dict[str, Any]] = {}
    with console.status("photometric stage") as status:
        stage = count_photometric(config)
        plain = _with_stage(count_step(config, "mixmask", 1), stage)
        for method in methods:
            status.update(method)
            ways = {"eager": count_step(config, method, config.bn_splits)}
            ways["compiled"] = count_compiled(config, method)
            counted[method] = {way: _with_stage(parts, stage) for way, parts in ways.items()}
    split = counted["mixmask"]["eager"]
    norm, plain_norm = (figures["parts"]["batchnorm"] for figures in (split, plain))
    given = {name: value for name, value in asdict(config).items() if name not in ("json", "methods")}
    result = {
        "config": given | {"dtype": str(_DTYPE).removeprefix("torch.")},
        "total_ops": split["total_ops"],
        "total_ops_plain_batchnorm": plain["total_ops"],
        "photometric": stage,
        "batchnorm": {
            "ops": norm["ops"],
            "plain_ops": plain_norm["ops"],
            "ops_vs_plain": round(norm["ops"] / plain_norm["ops"], 3),
            "bytes_vs_plain": round(norm["bytes"] / plain_norm["bytes"], 3),
        },
        "methods": counted,
    }
    _print(result)
    return finish_benchmark("ops", False, config.json, **result)


def _with_stage(parts: Parts, stage: dict[str, int]) -> dict[str, Any]:
    """The parts with the photometric stage of two views, which is compiled by default, and their totals."""
    two_views = {"ops": 2 * stage["kernels"], "bytes": 2 * stage["bytes_per_view"] * stage["views"]}
    parts = parts | {"photometric": two_views}
    return {f"total_{what}": total(parts, what) for what in ("ops", "bytes")} | {"parts": parts}


def total(parts: Parts, what: str) -> int:
    """All operations or bytes."""
    return sum(part[what] for part in parts.values())


class Counted(TorchDispatchMode):
    """Operations and bytes by part; what runs in the ``with`` block of `part` belongs to it."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: Parts = defaultdict(lambda: {"ops": 0, "bytes": 0})
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
            part = self.parts["batchnorm" if "batch_norm" in func.name() else self._part]
            tensors = {id(tensor): tensor for tensor in tensors_of_tree((args, kwargs or {}, out))}
            part["ops"] += 1
            part["bytes"] += sum(map(num_bytes, tensors.values()))
        return out


def _fake_step(
    config: OpsBenchmark, method: Method, bn_splits: int
) -> tuple[FakeTensorMode, MoCo, torch.optim.Optimizer, Batch]:
    """Return a model, its optimizer and a batch of the full size, without memory."""
    encoder = functools.partial(build_encoder, config.arch)
    model = MoCo(encoder, method=method, queue_len=config.queue_len, bn_splits=bn_splits)
    model.to(memory_format=torch.channels_last)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, mock.patch.object(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True):
        model.to_empty(device="cpu")
        shape = config.batch_size, 3, config.crop_px, config.crop_px
        query, key, *mixed = (
            torch.empty(shape, dtype=_DTYPE).contiguous(memory_format=torch.channels_last)
            for _ in range(2 + NUM_MIXTURES[method])
        )
        batch = mixed_with_reverse(query, key, mixed)
        return fake, model, sgd(model.encoder_q, 0.03, 0.9, 1e-4), batch


def _as_on_a_gpu() -> contextlib.AbstractContextManager[Any]:
    """Walk the queue in a GPU's blocks, on any device."""
    rows = losses._rows_of_a_block(torch.device("cuda"))
    return mock.patch.object(losses, "_rows_of_a_block", lambda _: rows)


def _drawn(config: OpsBenchmark, method: Method) -> tuple[DrawnMixture, ...]:
    recipe = Recipe(crop_px=config.crop_px, mixing=Mixing(method=method))
    return draw_mixtures(recipe, Draw(0, 0, np.arange(config.batch_size)))


def count_step(config: OpsBenchmark, method: Method, bn_splits: int) -> Parts:
    """Count mixing, forward, backward and optimizer as they run without --compile."""
    fake, model, optimizer, batch = _fake_step(config, method, bn_splits)
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
    return dict(counted.parts)


def _fused(graphs: Iterable[fx.Graph]) -> dict[str, int]:
    kernels = [kernel for graph in graphs for kernel in fuse(graph)]
    return {"ops": len(kernels), "bytes": sum(kernel.num_bytes for kernel in kernels)}


def count_compiled(config: OpsBenchmark, method: Method) -> Parts:
    """Count the same step with --compile: the forward pass is one graph, and so is the backward pass."""
    fake, model, optimizer, batch = _fake_step(config, method, config.bn_splits)
    graphs: dict[str, list[fx.Graph]] = {"forward": [], "backward": [], "mixing": []}

    def keep(part: str, module: fx.GraphModule, _: Any) -> Any:
        graphs[part].append(module.graph)
        return make_boxed_func(module.forward)

    compiler = functools.partial(
        aot_module_simplified,
        fw_compiler=functools.partial(keep, "forward"),
        bw_compiler=functools.partial(keep, "backward"),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=core_aten_decompositions(),
    )
    model.compile(fullgraph=True, backend=compiler)
    counted = Counted()
    with fake, _as_on_a_gpu():
        with torch.autocast("cpu", _DTYPE):
            loss, _ = model(batch)
        loss.backward()
        with counted, counted.part("optimizer"):
            optimizer.step()
    for drawn in _drawn(config, method):
        mix = functools.partial(lambda drawn, query: blend(query, drawn).images, drawn.to(fake.from_tensor))
        graphs["mixing"].append(make_fx(mix)(batch.query).graph)
    return {name: _fused(found) for name, found in graphs.items()} | counted.parts


def count_photometric(config: OpsBenchmark) -> dict[str, int]:
    """Count the photometric stage of one batch of views, for MoCo v2's recipe."""
    num, side = config.batch_size, config.crop_px
    stage = functools.partial(augment, recipe=moco_v2(side), dtype=_DTYPE)
    counted = Counted()
    with FakeTensorMode():
        inputs = torch.empty(num, side, side, 3, dtype=torch.uint8), torch.empty(num, NUM_PARAMETERS)
        with counted:
            stage(*inputs)
        fused = _fused([make_fx(stage, dict(core_aten_decompositions()))(*inputs).graph])
    return {
        "views": num,
        "kernels": fused["ops"],
        "bytes_per_view": fused["bytes"] // num,
        "eager_ops": total(counted.parts, "ops"),
        "eager_bytes_per_view": total(counted.parts, "bytes") // num,
    }


def _print(result: dict[str, Any]) -> None:
    config, methods = result["config"], result["methods"]
    rows = {}
    for method, ways in methods.items():
        names = dict.fromkeys(part for figures in ways.values() for part in figures["parts"])
        for name in [*names, "all"] if method == "mixmask" else ["all"]:
            rows[f"{method}, {name}"] = cells = dict[str, str]()
            for way, figures in ways.items():
                total = {what: figures[f"total_{what}"] for what in ("ops", "bytes")}
                part = total if name == "all" else figures["parts"].get(name)
                cells[f"{way}, operations"] = f"{part['ops']:,}" if part else "–"
                cells[f"{way}, GB"] = f"{part['bytes'] / 1e9:,.1f}" if part else "–"
    print_table(
        f"A step of {config['arch']} at {config['crop_px']} px, batch {config['batch_size']}, "
        f"BN in {config['bn_splits']} parts, {config['dtype']}",
        rows,
    )
    stage, norm = result["photometric"], result["batchnorm"]
    console.print(
        f"photometric stage, a view: {stage['bytes_per_view'] / 1e6:.1f} MB compiled "
        f"({stage['kernels']} kernels a batch), {stage['eager_bytes_per_view'] / 1e6:.1f} MB eager "
        f"({stage['eager_ops']} operations)\n"
        f"BatchNorm in parts over plain: {norm['ops_vs_plain']:.2f} of the operations, "
        f"{norm['bytes_vs_plain']:.2f} of the bytes"
    )


if __name__ == "__main__":
    cli.program(OpsBenchmark, main)
