"""Memory that one step after the other uses again.

A large block freshly given by the allocator costs a page fault for every 4 KiB when it is first written; on a step of 32 sessions
that was four times the arithmetic. So what is large and short-lived is written into a buffer that stays.
"""

from __future__ import annotations

import math

import torch


class Workspace:
    """Named buffers that only grow. What is in them is valid until the name is used again; one thread uses a workspace."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self._dtype = dtype
        self._buffers: dict[str, torch.Tensor] = {}

    def together(self, name: str, views: list[torch.Tensor]) -> torch.Tensor:
        """Tensors of one shape [1, ...], copied beside each other: [n, ...]. A single one is returned as it lies."""
        if len(views) == 1:
            return views[0]
        shape = (len(views), *views[0].shape[1:])
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = torch.zeros(size, dtype=self._dtype, device=self.device)
        return torch.cat(views, out=buffer[:size].view(shape))
