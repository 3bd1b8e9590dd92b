"""The kernels that an ideal compiler makes of a graph, and the bytes they move."""

import functools
import math
import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

_POINTWISE = (
    *("_to_copy", "cat", "copy", "full", "full_like", "arange", "scalar_tensor", "index", "lerp", "fill"),
)
"""Operations without the tag that a compiler makes part of a kernel."""
_REDUCTIONS = ("sum", "mean", "amax", "amin", "var_mean", "var", "linalg_vector_norm", "cumsum", "any", "max")


def tensors_of_tree(tree: Any) -> list[Tensor]:
    """Return the tensors in nested containers."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def num_bytes(tensor: Tensor) -> int:
    """Return how much of a tensor lies in memory: expanded dimensions count once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return int(math.prod(size for size, stride in sizes if stride)) * tensor.element_size()


def _node_bytes(node: fx.Node) -> int:
    return sum(map(num_bytes, tensors_of_tree(node.meta.get("val"))))


def _origin(node: fx.Node) -> fx.Node:
    """Return the node that owns the memory of a view."""
    while node.op == "call_function":
        whole = node.all_input_nodes[0] if node.target is operator.getitem else node
        if not getattr(whole.target, "is_view", False):
            break
        node = whole.all_input_nodes[0]
    return node


def _kind(node: fx.Node) -> str:
    """Return input, pointwise, reduction or opaque; one of several results is of its operation's kind."""
    if node.op != "call_function":
        return "input"
    if node.target is operator.getitem:
        return _kind(node.all_input_nodes[0])
    target: Any = node.target
    name = target.name().removeprefix("aten::").split(".")[0]
    if torch.Tag.pointwise in target.tags or name in _POINTWISE:
        return "pointwise"
    return "reduction" if name in _REDUCTIONS else "opaque"


@dataclass
class Kernel:
    """What is computed at once: the values that it reads from memory and writes to it."""

    reads: dict[fx.Node, int]  # and how many bytes of each
    writes: set[fx.Node]

    @property
    def num_bytes(self) -> int:
        """How much it reads and writes."""
        read = sum(num for node, num in self.reads.items() if node not in self.writes)
        return read + sum(map(_node_bytes, self.writes))

    def join(self, other: "Kernel") -> "Kernel":
        """Return both as one."""
        num = {n: max(self.reads.get(n, 0), other.reads.get(n, 0)) for n in self.reads | other.reads}
        return Kernel(num, self.writes | other.writes)


def fuse(graph: fx.Graph) -> list[Kernel]:
    """List the kernels that the best possible fusion leaves of a graph.

    - Matrix products, convolutions, scatters and sorts are kernels of their own. They read and write memory.
    - Results of reductions, and of the graph, are written to memory.
    - Everything else is pointwise. It is computed where it is used, and again in every kernel that uses it.
    - Pointwise operations and reductions share a kernel if one uses the other's result or both read the same
      tensor. They do not if another kernel must finish between them.

    Args:
        graph: of ATen operations, with a fake tensor in each node's ``meta["val"]``.
    """
    nodes = [node for node in graph.nodes if node.op != "output" and _origin(node) is node]
    read = [node for node in nodes if _kind(node) == "opaque"] + list(graph.find_nodes(op="output"))
    stored = {_origin(source) for node in read for source in node.all_input_nodes}
    stored |= {node for node in nodes if _kind(node) != "pointwise"}
    level: dict[fx.Node, int] = {}
    kernels: dict[int, list[Kernel]] = defaultdict(list)
    alone = []
    for node in (node for node in nodes if node in stored):
        if node.target is operator.getitem:
            level[node] = level[node.all_input_nodes[0]]
            continue
        reads = _read_from_memory(node, stored) if node.op == "call_function" else {}
        level[node] = max((level[n] + (_kind(n) in ("reduction", "opaque")) for n in reads), default=0)
        kernel = Kernel(reads, {node})
        if _kind(node) == "opaque":
            alone.append(kernel)
        elif node.op == "call_function":
            here = kernels[level[node]]
            near = [one for one in here if reads.keys() & (one.reads.keys() | one.writes)]
            kernels[level[node]] = [one for one in here if one not in near]
            kernels[level[node]].append(functools.reduce(Kernel.join, near, kernel))
    return [*alone, *(kernel for level_kernels in kernels.values() for kernel in level_kernels)]


def _read_from_memory(node: fx.Node, stored: set[fx.Node]) -> dict[fx.Node, int]:
    """Return the stored values that a node needs, directly or through values that are computed again."""
    found: dict[fx.Node, int] = {}
    ahead, seen = list(node.all_input_nodes), set[fx.Node]()
    while ahead:
        view = ahead.pop()
        if view in seen:
            continue
        seen.add(view)
        source = _origin(view)
        if source in stored:
            found[source] = min(_node_bytes(source), found.get(source, 0) + _node_bytes(view))
        else:
            ahead += source.all_input_nodes
    return found
