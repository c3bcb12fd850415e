"""Linear layers with weights packed for the CPU: 1.4 to 5 times as fast as `F.linear` on the few rows of a step.

In bfloat16 the bits are those of `F.linear`: oneDNN reorders a plain weight on every call and reads a packed one as it lies. In
float32 `F.linear` is MKL's, so the sums run in another order: equal within rounding, and as independent of the row count.
Layers that multiply the same rows (query, key and value; gate and up) become one product, which saves a millisecond and more of a
small model's step. The operators are torch's own but not public, so their presence and their results are checked before a layer
is replaced; a layer that fails keeps its plain form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch.nn.functional import linear

from sparkrelay.device.step_profile import Stopwatch

PACK_ROWS: Final = 16
"""The row count that the packing is told to expect; any value gives the same bits."""
CHECKED_ROWS: Final = (4, 16)
TOLERANCE: Final = {torch.bfloat16: 0.0, torch.float32: 1e-5}
"""How far a packed layer's results may be from the plain one's, as a share of the largest; the dtypes that can be packed."""
SAME_INPUT: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of sibling layers that are given the same rows. Where they are not, the product is repeated and stays right."""


class SharedProduct:
    """The product of some rows with several layers' weights: the first layer that is asked computes it for all."""

    def __init__(self, layers: Sequence[torch.nn.Linear], stopwatch: Stopwatch) -> None:
        """Layers of equal in_features that all have a bias or all have none."""
        self._stopwatch = stopwatch
        weights: list[torch.Tensor] = [layer.weight for layer in layers]
        biases: list[torch.Tensor | None] = [layer.bias for layer in layers]
        present = [bias for bias in biases if bias is not None]
        self.in_features = layers[0].in_features
        self.sizes = [layer.out_features for layer in layers]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), PACK_ROWS)
        self._bias = torch.cat(present) if present else None
        self._rows: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}

    def part(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        """[..., sizes[number]]. Each part of a product is handed out once, so that nothing stale or large is kept."""
        if rows is not self._rows or number not in self._parts:
            self._rows = rows
            self._parts = dict(enumerate(self.rows(rows).split_with_sizes(self.sizes, dim=-1)))
        part = self._parts.pop(number)
        if not self._parts:
            self._rows = None
        return part

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The whole product, [..., sum of sizes]: the layers' results beside each other."""
        if rows.numel() == 0:
            return rows.new_empty(*rows.shape[:-1], sum(self.sizes))
        begun = self._stopwatch.clock_ns()
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
            rows, self._weight, self._bias, "none", [], ""
        )
        self._stopwatch.linear_ns += self._stopwatch.clock_ns() - begun
        return product


class PackedLinear(torch.nn.Module):
    """A drop-in for `nn.Linear` in inference; the plain weight is gone. One thread uses the layers of one product."""

    def __init__(self, product: SharedProduct, number: int) -> None:
        super().__init__()
        self.in_features = product.in_features
        self.out_features = product.sizes[number]
        self.product = product
        self.number = number

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]"""
        return self.product.part(self.number, rows)


def pack_linears(model: torch.nn.Module, stopwatch: Stopwatch | None = None) -> int:
    """Replaces the model's linear layers on the CPU where packing keeps their results. Returns how many it replaced."""
    stopwatch = stopwatch or Stopwatch()
    verdicts: dict[tuple[int, tuple[int, ...], bool], bool] = {}
    replaced = 0
    for parent in list(model.modules()):
        for names in list(_together(parent)):
            layers = [parent.get_submodule(name) for name in names]
            packed = _pack(
                [layer for layer in layers if isinstance(layer, torch.nn.Linear)], stopwatch, verdicts
            )
            for name, layer in zip(names, packed, strict=False):
                setattr(parent, name, layer)
            replaced += len(packed)
    return replaced


def _together(parent: torch.nn.Module) -> Iterator[tuple[str, ...]]:
    """Names of the parent's own layers that can be packed, those that share a product together."""
    left = {name: child for name, child in parent.named_children() if _packable(child)}
    for group in SAME_INPUT:
        names = tuple(name for name in group if name in left)
        if len({(left[name].in_features, left[name].bias is None) for name in names}) == 1:
            yield names
            left = {name: child for name, child in left.items() if name not in names}
    yield from ((name,) for name in left)


def _packable(layer: torch.nn.Module) -> bool:
    return (
        type(layer) is torch.nn.Linear
        and layer.weight.dtype in TOLERANCE
        and layer.weight.device.type == "cpu"
    )


def _pack(
    layers: list[torch.nn.Linear],
    stopwatch: Stopwatch,
    verdicts: dict[tuple[int, tuple[int, ...], bool], bool],
) -> list[PackedLinear]:
    """The layers' replacements; empty where this CPU has no such kernels or they are wrong (asked once a shape)."""
    shape = (layers[0].in_features, tuple(layer.out_features for layer in layers), layers[0].bias is not None)
    if not verdicts.get(shape, True):
        return []
    try:
        product = SharedProduct(layers, stopwatch)
        packed = [PackedLinear(product, number) for number in range(len(layers))]
        if shape not in verdicts:
            verdicts[shape] = all(_agree(plain, layer) for plain, layer in zip(layers, packed, strict=True))
    except (AttributeError, RuntimeError):  # this torch build, or this CPU, has no such operators
        verdicts[shape] = False
    return packed if verdicts[shape] else []


def _agree(plain: torch.nn.Linear, packed: PackedLinear) -> bool:
    """Whether the packed layer gives what the plain one gives: bit for bit in bfloat16, within rounding in float32."""
    generator = torch.Generator().manual_seed(0)
    for row_count in CHECKED_ROWS:
        rows = torch.randn(row_count, plain.in_features, generator=generator).to(plain.weight.dtype)
        expected = linear(rows, plain.weight, plain.bias)
        if (packed(rows) - expected).abs().max() > TOLERANCE[rows.dtype] * expected.abs().max():
            return False
    return True
