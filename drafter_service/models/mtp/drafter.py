"""The kind `mtp`: one token a round, from the target's last layer. The baseline that everything else is measured against."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from drafter_service.models import (
    NOTHING,
    CannotLoad,
    DraftedBlock,
    DraftRequest,
    LoadedModel,
    ModelOptions,
)
from drafter_service.models.dspark.cached import ContextCache
from drafter_service.models.dspark.checkpoint import load_mtp, read_config, target_vocabulary
from drafter_service.models.dspark.config import UnusableCheckpoint
from drafter_service.models.mtp.network import MtpNetwork, NewRows, advance
from drafter_service.models.row_sessions import RowSession, RowSessions, has_rows
from sparkrelay.device.packed_linear import pack_linears
from sparkrelay.frames import ContextKind, Fingerprint
from sparkrelay.noise import NOISE_VERSION, NoCandidate
from sparkrelay.store import StoreError, resolve

READ_ROWS = 512
"""New rows of one session in a call; a longer prompt takes several, so that it does not hold up everybody's blocks."""


class MtpModel:
    """See the module. Its context rows are the target's last layer's output, as it is.

    tokenizer_hash  of the target it was trained for
    """

    def __init__(self, network: MtpNetwork, tokenizer_hash: str, state_limit_bytes: int) -> None:
        config = network.config
        self._network = network
        self._dtype = network.norm.weight.dtype
        self._sessions = RowSessions(lambda: ContextCache(config, 1, self._dtype), state_limit_bytes)
        self.vocab_size = config.vocab_size
        last = config.num_target_layers - 1
        self.fingerprint = Fingerprint(
            tokenizer_hash=tokenizer_hash,
            vocab_size=config.vocab_size,
            tap_layers=(last,),
            block_size=1,
            context_kind=ContextKind.ROWS,
            context_width=config.hidden_size,
            context_hash=identity_hash(last),
            noise_versions=(NOISE_VERSION,),
            proposal_kind="mtp",
        )

    @torch.inference_mode()
    def draft(self, requests: Sequence[DraftRequest]) -> list[DraftedBlock | None]:
        new: dict[int, NewRows] = {}
        sessions: dict[int, RowSession] = {}
        for request in requests:
            if has_rows(request) and len(request.ids) > 1:
                session = sessions[request.session_key] = self._sessions.of(request.session_key)
                rows = self._new_rows(request, session)
                if rows is not None:
                    new[request.session_key] = rows
        hidden = dict(zip(new, advance(self._network, list(new.values())), strict=True)) if new else {}
        answers: list[DraftedBlock | None] = []
        for request in requests:
            key = request.session_key
            if key not in sessions or key not in hidden:
                answers.append(NOTHING)
                continue
            sessions[key].entered(request.ids, lead=1)
            is_whole = sessions[key].cache.length == len(request.ids) - 1
            answers.append(self._choose(request, sessions[key], hidden[key]) if is_whole else None)
        self._sessions.evict(set(sessions))
        return answers

    def forget(self, session_key: int) -> None:
        self._sessions.forget(session_key)

    def _new_rows(self, request: DraftRequest, session: RowSession) -> NewRows | None:
        """The next run of rows that the session has got, as far as READ_ROWS goes; None if its last row does not exist.

        A position's row enters together with the id behind it. Positions without rows are left out.
        """
        assert request.rows is not None, "asked before"
        session.begin(request, lead=1)
        # The last row is entered anew even if it is here: its hidden state is what the token is drafted from.
        start = min(session.cache.length, len(request.ids) - 2)
        spans = list(request.rows.spans(start, min(len(request.ids) - 1, start + READ_ROWS)))
        if not spans:
            return None
        first = spans[0]
        session.cache.truncate(first.start)
        session.cache.leave_out(first.start)
        rows = torch.from_numpy(first.rows.copy()).view(torch.bfloat16).to(self._dtype)
        ids = request.ids[first.start + 1 : first.start + 1 + len(rows)]
        return NewRows(session.cache, rows, torch.tensor(ids))

    def _choose(self, request: DraftRequest, session: RowSession, hidden: torch.Tensor) -> DraftedBlock:
        chooser = session.chooser
        assert chooser is not None, "begun before"
        row = self._network.base_logits(hidden[None])[0].float().numpy()
        try:
            token_id, probability = chooser.choose_with_probability(row)
        except NoCandidate:
            return NOTHING
        return DraftedBlock((token_id,), (probability,))


def identity_hash(layer: int) -> str:
    """Names the rows that are a layer's output without any projector."""
    return hashlib.sha256(f"the output of layer {layer}".encode()).hexdigest()


def load(options: ModelOptions) -> LoadedModel:
    """Loads the MTP-1 in the folder `model`, with the vocabulary of `target`. CannotLoad tells why not."""
    if not options.model or not options.target:
        raise CannotLoad(
            "model, target: mtp needs both: the draft's own folder, and the target that it drafts for"
        )
    torch.set_num_threads(options.threads)
    try:
        folder = resolve(options.model).path
        dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
        network = load_mtp(folder, dtype, target_vocabulary(resolve(options.target).path))
        about: dict[str, Any] = read_config(folder).get("target", {})
    except (StoreError, UnusableCheckpoint, OSError) as error:
        raise CannotLoad(f"model: {error}") from error
    pack_linears(network)
    limit_bytes = options.state_memory_mib * 2**20
    return LoadedModel(MtpModel(network, str(about.get("tokenizer_hash", "")), limit_bytes))
