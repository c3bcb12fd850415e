"""What the drafter asks of a draft model, and the kinds there are.

A model sees committed ids and says what may follow them. It never sees a stream, a verifier or a verdict: how good its last block
was it can read off the ids of the next request. Whatever it keeps for a session is a cache under the session's key; it may be
dropped at any time and is rebuilt from the ids.

Adding a kind is one file with a function `load(options)` and one line in KINDS.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

from drafter_service.context_rows import ContextRows
from sparkrelay.frames import Block, Fingerprint
from sparkrelay.sampling import Sampling

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "adversarial": "drafter_service.models.adversarial",
        "causal_lm": "drafter_service.models.causal_lm",
        "cycle": "drafter_service.models.cycle",
        "dflash": "drafter_service.models.dspark.drafter",
        "dspark": "drafter_service.models.dspark.drafter",
        "mtp": "drafter_service.models.mtp.drafter",
        "ngram": "drafter_service.models.ngram",
        "random": "drafter_service.models.random_tokens",
    }
)


@dataclass(frozen=True, slots=True)
class TurnRules:
    """How the target chooses in a turn, so that a model can choose alike.

    output_start   index in the session's ids where the turn's output began (for penalties)
    stop_ids       ids that end the turn: nothing needs to be drafted behind one
    noise_version  of the coupled noise
    """

    turn_id: str
    sampling: Sampling
    output_start: int
    stop_ids: frozenset[int]
    noise_version: int


class DraftRequest(NamedTuple):
    """One session that wants a block. A tuple, because hundreds are made in a step.

    session_key  names the model's cache of the session; never used for another session
    ids          the committed ids, at least one. The session's own list: read it during the call, never keep it
    cut_count    how often these ids were cut; while it stays the same, the ids of an earlier request are a prefix of these
    token_limit  the most draft tokens wanted, at least 1
    turn         the rules of the turn
    rows         context rows of the ids before the last one, for a model whose fingerprint asks for rows; theirs as the ids are
    """

    session_key: int
    ids: Sequence[int]
    cut_count: int
    token_limit: int
    turn: TurnRules
    rows: ContextRows | None = None


class DraftedBlock(NamedTuple):
    """What a model proposes: ids, and for each P(it matches given that all before it match), 0 to 1. May be empty."""

    token_ids: Sequence[int]
    confidences: Sequence[float]


NOTHING = DraftedBlock((), ())


class DraftModel(Protocol):
    """A draft model. One thread calls it."""

    @property
    def fingerprint(self) -> Fingerprint:
        """What it needs of a verifier; `proposal_kind` is the name of its kind, `block_size` the most tokens it drafts."""

    @property
    def vocab_size(self) -> int:
        """Ids at or above it cannot be read; 0 if any id can."""

    def draft(self, requests: Sequence[DraftRequest]) -> Sequence[DraftedBlock | None]:
        """A block a request, in their order, of at most `token_limit` ids. An empty one: nothing to say here.

        None: still reading this session's ids, ask again at once. A model answers so to bound the time of one call.
        """

    def forget(self, session_key: int) -> None:
        """The session is over or was cut off: drops its cache, if there is one."""


Tamper = Callable[[Sequence[Block]], Sequence[Block]]
"""Rewrites the blocks that a link is about to send; only a kind that lies on purpose, for tests, has one."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A draft model, and its lies on the wire if that is what it is for."""

    model: DraftModel
    tamper: Tamper | None = None


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What a kind may need; each takes its own part of it. Meanings and limits stand in `drafter_service.settings`."""

    block_size: int
    model: str = ""
    target: str = ""
    dtype: str = "bfloat16"
    exact: bool = True
    threads: int = 1
    state_memory_mib: int = 1024
    ngram_min: int = 1
    ngram_max: int = 4
    seed: int = 0


class CannotLoad(Exception):
    """A kind cannot be had with these options. The message says which setting, and what to set instead."""


def load_model(kind: str, options: ModelOptions) -> LoadedModel:
    """Loads a kind of KINDS; what it imports (torch, say) is imported only now. CannotLoad tells why not."""
    if kind not in KINDS:
        raise CannotLoad(f"kind: there is no {kind!r}; choose one of {', '.join(sorted(KINDS))}")
    loaded: LoadedModel = importlib.import_module(KINDS[kind]).load(options)
    return loaded
