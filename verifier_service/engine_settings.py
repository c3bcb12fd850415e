"""The limits that an engine is given: plain numbers, checked once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Limits of an engine.

    block_count        state blocks of the model's block_tokens that all sessions share
    step_token_budget  rows of one forward
    block_wait_us      how long a step may wait for a drafter; 0 never waits
    max_sessions       sessions remembered, idle ones included; beyond it the longest idle one is forgotten
    max_queued_turns   turns that may wait for room; beyond it they are refused
    context_limit      the most tokens of a session; 0: the model's limit
    retry_after_ms     what a refused caller is told to wait
    leftover_percent   of the blocks, how many the state of ended sessions may hold until somebody needs them: the next
                       prompt that begins like theirs is not read again
    """

    block_count: int
    step_token_budget: int = 512
    block_wait_us: int = 50_000
    max_sessions: int = 1024
    max_queued_turns: int = 256
    context_limit: int = 0
    retry_after_ms: int = 500
    leftover_percent: int = 25

    def __post_init__(self) -> None:
        for name in ("block_count", "max_sessions", "max_queued_turns", "retry_after_ms"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: is {getattr(self, name)}; must be at least 1")
        for name in ("block_wait_us", "context_limit"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: is {getattr(self, name)}; must not be negative")
        if not 0 <= self.leftover_percent <= 100:
            raise ValueError(f"leftover_percent: is {self.leftover_percent}; must be from 0 to 100")
        if self.step_token_budget < 16:
            budget = self.step_token_budget
            raise ValueError(f"step_token_budget: is {budget}; must be at least 16, a block and its anchor")
