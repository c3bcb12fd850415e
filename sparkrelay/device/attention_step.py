"""Attention of one forward over a flat ragged batch: its plan, made once, and what each layer does with it.

Why a row's bits do not depend on its neighbours (exact mode; measured, and checked at start by `numerics`):
  rows   the query heads that share a key head are folded into rows and the rows padded to a multiple (the last one repeated),
         because matrix kernels compute small or odd row counts in another order
  keys   every key range starts and ends at an absolute multiple of KEY_MULTIPLE; what lies in it but is not visible is masked,
         and a masked key adds an exact zero
So sequences of different lengths share a call, with the keys of the longest: neighbours in an arena, as long as what that wastes
is less than another call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from sparkrelay.device.flat_attention import AttentionCall
from sparkrelay.device.flat_batch import FlatEntry
from sparkrelay.device.product_attention import KEY_MULTIPLE, attend
from sparkrelay.device.row_fold import Fold, fold_maps, folded_rows
from sparkrelay.device.slab_arena import LayerSpans, SlabArena
from sparkrelay.device.slab_layout import KVLayout, LayerPlace, round_up
from sparkrelay.device.step_profile import Stopwatch

SEGMENT_ROWS: Final = 64
"""Positions of one sequence that a product takes; a prompt's earlier rows are then not multiplied with its later keys."""
WASTED_KEYS: Final = 1024
"""Keys that sequences of one call may be given beyond their own, all together: about what another call costs."""


@dataclass(frozen=True, slots=True)
class _Write:
    """The rows of the batch that go into one arena.

    rows    int64 [R], or None where they are simply the first R
    places  by kind, int64 [R * kv_heads]: where they go in the arena's rows
    """

    arena: SlabArena
    rows: torch.Tensor | None
    row_count: int
    places: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring rows of one sequence that are attended to together: `row_count` from position `start` on.

    first_row  the place of the first one in the flat batch
    rows       folded rows, padding included
    keys       positions that are read, from and to a multiple
    """

    arena: SlabArena
    slot: int
    start: int
    row_count: int
    first_row: int
    rows: int
    keys: range


@dataclass(frozen=True, slots=True)
class _Group:
    """Segments of one call.

    count    segments, n; rows: folded rows of each
    mask     what is added to the logits, float32 [n, 1, rows, keys], 0 or -inf
    members  int64 [n, rows]: which head of its group a folded row belongs to
    spans    by layer: the keys and values, [n * kv_heads, keys, dim]
    """

    count: int
    rows: int
    first_key: int
    mask: torch.Tensor
    members: torch.Tensor
    spans: LayerSpans


@dataclass(frozen=True, slots=True)
class _LayerPlan:
    """What layers of one kind, window and number of query heads have in common in this step.

    gather   int64: which of the flat [T * query_heads] rows come, group by group, as [n, kv_heads, rows]
    scatter  int64 [T * query_heads]: where each row's result is in what the groups give, in that order
    """

    gather: torch.Tensor
    scatter: torch.Tensor
    groups: tuple[_Group, ...]


class AttentionStep:
    """The plan of one forward: see the module."""

    def __init__(
        self,
        layout: KVLayout,
        entries: Sequence[FlatEntry],
        padded_row_count: int,
        row_multiple: int,
        value_keys: int,
        device: torch.device,
        stopwatch: Stopwatch,
    ) -> None:
        """padded_row_count: the forward's rows, those behind the entries' being padding whose output nobody reads.

        row_multiple and value_keys: what exactness takes on this machine; see `numerics`.
        """
        self._layout = layout
        self._entries = entries
        self._padded_row_count = padded_row_count
        self._row_multiple = row_multiple
        self._value_keys = value_keys
        self._device = device
        self._stopwatch = stopwatch
        for entry in entries:
            entry.state.reserve(entry.end)
        self._first_rows: list[int] = np.cumsum([0, *(entry.row_count for entry in entries)]).tolist()
        self._writes = self._make_writes()
        self._plans: dict[tuple[int, int, int | None], _LayerPlan] = {}

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """See `AttentionPlan`."""
        query, key, value = (rows[0].transpose(0, 1) for rows in (call.query, call.key, call.value))
        output = self.attend_rows(
            call.layer, query, key, value, scaling=call.scaling, softcap=call.softcap, sinks=call.sinks
        )
        return output.unsqueeze(0)

    def attend_rows(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [T, query_heads, key_dim], key and value [T, kv_heads, dim] -> [T, query_heads, value_dim].

        Writes the rows' keys and values first, so that rows see each other.
        """
        begun = self._stopwatch.clock_ns()
        place = self._layout.places[layer]
        if place.writes:
            for write in self._writes:
                _write(write, write.arena.key_rows[place.kind][place.index], place.kind, key)
                _write(write, write.arena.value_rows[place.kind][place.index], place.kind, value)
        row_count, query_heads, key_dim = query.shape
        plan = self._plan(query_heads, place)
        folded = query.reshape(row_count * query_heads, key_dim).index_select(0, plan.gather)
        outputs, first = [], 0
        for group in plan.groups:
            keys, values = group.spans[place.index]
            last = first + len(keys) * group.rows
            outputs.append(
                attend(
                    folded[first:last].view(len(keys), group.rows, key_dim),
                    keys,
                    values,
                    group.mask,
                    group.first_key,
                    self._value_keys,
                    scaling=scaling,
                    softcap=softcap,
                    sinks=None if sinks is None else _folded_sinks(sinks, group, len(keys)),
                ).view(last - first, -1)
            )
            first = last
        flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        output = flat.index_select(0, plan.scatter).view(row_count, query_heads, -1)
        self._stopwatch.attention_ns += self._stopwatch.clock_ns() - begun
        return output

    def _make_writes(self) -> tuple[_Write, ...]:
        by_arena: dict[int, list[int]] = {}
        for number, entry in enumerate(self._entries):
            by_arena.setdefault(id(_arena(entry)), []).append(number)
        return tuple(self._make_write(numbers) for numbers in by_arena.values())

    def _make_write(self, numbers: list[int]) -> _Write:
        entries = [self._entries[number] for number in numbers]
        arena = _arena(entries[0])
        slots = np.repeat([entry.state.slot for entry in entries], [entry.row_count for entry in entries])
        positions = np.concatenate([np.arange(entry.start, entry.end) for entry in entries])
        places = []
        for kind in self._layout.kinds:
            heads = slots[:, None] * kind.kv_heads + np.arange(kind.kv_heads)[None, :]
            places.append(self._to_device((heads * arena.capacity + positions[:, None]).reshape(-1)))
        rows = None
        if len(entries) < len(self._entries):
            firsts = [self._first_rows[number] for number in numbers]
            rows = self._to_device(
                np.concatenate(
                    [np.arange(first, first + e.row_count) for first, e in zip(firsts, entries, strict=True)]
                )
            )
        return _Write(arena, rows, len(positions), tuple(places))

    def _plan(self, query_heads: int, place: LayerPlace) -> _LayerPlan:
        name = (query_heads, place.kind, place.window)
        plan = self._plans.get(name)
        if plan is None:
            plan = self._plans[name] = self._make_plan(query_heads, place)
        return plan

    def _make_plan(self, query_heads: int, place: LayerPlace) -> _LayerPlan:
        kv_heads = self._layout.kinds[place.kind].kv_heads
        group = query_heads // kv_heads
        segments = segments_of(self._entries, self._first_rows, group, self._row_multiple, place.window)
        scatter = np.zeros((self._padded_row_count, query_heads), dtype=np.int64)
        gathers: list[NDArray[np.int64]] = []
        groups = []
        place_of_segment = 0
        for together in groups_of(segments):
            for segment in together:
                maps = fold_maps(Fold(query_heads, kv_heads, segment.row_count, segment.rows))
                gathers.append(segment.first_row * query_heads + maps.gather)
                rows = slice(segment.first_row, segment.first_row + segment.row_count)
                scatter[rows] = place_of_segment + maps.scatter
                place_of_segment += segment.rows * kv_heads
            groups.append(self._make_group(together, group, place))
        return _LayerPlan(
            self._to_device(np.concatenate(gathers)), self._to_device(scatter.reshape(-1)), tuple(groups)
        )

    def _make_group(self, segments: list[Segment], group: int, place: LayerPlace) -> _Group:
        keys = _union(segments)
        maps = [fold_maps(Fold(group, 1, segment.row_count, segment.rows)) for segment in segments]
        positions = np.stack(
            [segment.start + each.offsets for segment, each in zip(segments, maps, strict=True)]
        )
        hidden = ~visible_keys(positions, keys, place.window)
        mask = np.where(hidden, np.float32(-np.inf), np.float32(0.0))
        slots = range(segments[0].slot, segments[-1].slot + 1)
        return _Group(
            count=len(segments),
            rows=segments[0].rows,
            first_key=keys.start,
            mask=torch.from_numpy(mask).to(self._device).unsqueeze(1),
            members=self._to_device(np.stack([each.members for each in maps])),
            spans=segments[0].arena.span(place.kind, slots, keys),
        )

    def _to_device(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(numbers).to(self._device)


def segments_of(
    entries: Sequence[FlatEntry],
    first_rows: Sequence[int],
    group: int,
    row_multiple: int,
    window: int | None,
) -> Iterator[Segment]:
    """The entries' rows in pieces of at most SEGMENT_ROWS positions."""
    for entry, first_row in zip(entries, first_rows, strict=False):
        arena = _arena(entry)
        for start in range(entry.start, entry.end, SEGMENT_ROWS):
            row_count = min(SEGMENT_ROWS, entry.end - start)
            rows = folded_rows(group, row_count, row_multiple)
            keys = key_range(start, start + row_count, window)
            yield Segment(
                arena, entry.state.slot, start, row_count, first_row + start - entry.start, rows, keys
            )


def groups_of(segments: Iterator[Segment]) -> Iterator[list[Segment]]:
    """Segments that one call serves: neighbours in one arena with equally many rows, of not too different lengths."""
    together: list[Segment] = []
    for segment in sorted(segments, key=lambda each: (id(each.arena), each.rows, each.slot, each.start)):
        if together and not _fits(together, segment):
            yield together
            together = []
        together.append(segment)
    if together:
        yield together


def _fits(together: list[Segment], segment: Segment) -> bool:
    last = together[-1]
    if segment.arena is not last.arena or segment.rows != last.rows or segment.slot != last.slot + 1:
        return False
    everybody = [*together, segment]
    own = sum(len(each.keys) for each in everybody)
    return len(everybody) * len(_union(everybody)) - own <= WASTED_KEYS


def _union(segments: list[Segment]) -> range:
    return range(min(each.keys.start for each in segments), max(each.keys.stop for each in segments))


def key_range(start: int, end: int, window: int | None) -> range:
    """The positions that rows at start .. end - 1 are given, from and to absolute multiples."""
    first_visible = 0 if window is None else max(0, start - window + 1)
    return range(first_visible // KEY_MULTIPLE * KEY_MULTIPLE, round_up(end, KEY_MULTIPLE))


def visible_keys(positions: NDArray[np.int64], keys: range, window: int | None) -> NDArray[np.bool_]:
    """[..., keys]: whether a row at `positions` [...] sees a key: not later than itself, and one of the last `window`."""
    rows, key_positions = positions[..., None], np.arange(keys.start, keys.stop)
    visible: NDArray[np.bool_] = key_positions <= rows
    return visible if window is None else visible & (key_positions > rows - window)


def _arena(entry: FlatEntry) -> SlabArena:
    arena = entry.state.arena
    assert arena is not None, "a sequence with rows has no room"
    return arena


def _write(write: _Write, destination: torch.Tensor, kind: int, source: torch.Tensor) -> None:
    """source [T, kv_heads, dim] -> the arena's rows."""
    rows = source[: write.row_count] if write.rows is None else source.index_select(0, write.rows)
    destination.index_copy_(0, write.places[kind], rows.reshape(-1, source.shape[2]))


def _folded_sinks(sinks: torch.Tensor, group: _Group, head_count: int) -> torch.Tensor:
    """sinks [query_heads] -> [n, kv_heads, rows]"""
    by_group = sinks.view(head_count // group.count, -1)
    return by_group[:, group.members].transpose(0, 1)
