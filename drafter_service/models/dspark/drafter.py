"""The kinds `dspark` and `dflash`: blocks for all sessions in one parallel pass, and a sequential pass over the few slots."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from drafter_service.calibration import Calibration, UnusableCalibration, load_calibration
from drafter_service.models import (
    NOTHING,
    CannotLoad,
    DraftedBlock,
    DraftRequest,
    LoadedModel,
    ModelOptions,
)
from drafter_service.models.dspark.cached import NewContext, append_rows, draft_hidden, new_cache
from drafter_service.models.dspark.checkpoint import load_draft, read_config, target_vocabulary
from drafter_service.models.dspark.config import UnusableCheckpoint
from drafter_service.models.dspark.network import DSparkNetwork
from drafter_service.models.dspark.sequential import Growing, grow
from drafter_service.models.row_sessions import RowSession, RowSessions, has_rows
from sparkrelay.device.packed_linear import pack_linears
from sparkrelay.frames import ContextKind, Fingerprint
from sparkrelay.noise import NOISE_VERSION
from sparkrelay.store import StoreError, resolve

READ_ROWS = 512
"""Context rows of one call beyond which sessions wait for the next: a long prompt must not hold up everybody's blocks."""
FEW_ROWS = 32
"""A session with at most so many new rows is in the middle of a turn and never waits."""


class BlockModel:
    """See the module.

    calibration     of the confidences
    tokenizer_hash  of the target it was trained for
    context_hash    of its projector
    """

    def __init__(
        self,
        network: DSparkNetwork,
        calibration: Calibration,
        tokenizer_hash: str,
        block_size: int,
        state_limit_bytes: int,
        context_hash: str,
    ) -> None:
        config = network.config
        self._network = network
        self._calibration = calibration
        self._sessions = RowSessions(lambda: new_cache(network), state_limit_bytes)
        self._dtype = network.hidden_norm.weight.dtype
        self.vocab_size = config.vocab_size
        self.fingerprint = Fingerprint(
            tokenizer_hash=tokenizer_hash,
            vocab_size=config.vocab_size,
            tap_layers=config.target_layer_ids,
            block_size=min(block_size, config.block_size),
            context_kind=ContextKind.ROWS,
            context_width=config.hidden_size,
            context_hash=context_hash,
            noise_versions=(NOISE_VERSION,),
            proposal_kind="dspark" if config.markov_rank else "dflash",
        )

    @torch.inference_mode()
    def draft(self, requests: Sequence[DraftRequest]) -> list[DraftedBlock | None]:
        sessions = {
            request.session_key: self._sessions.of(request.session_key)
            for request in requests
            if has_rows(request)
        }
        blocks: dict[int, Growing] = {}
        answers: list[DraftedBlock | None] = []
        whole = self._read(requests, sessions)
        ready = [request for request in requests if request.session_key in whole]
        if ready:
            hidden = draft_hidden(
                self._network,
                [sessions[request.session_key].cache for request in ready],
                torch.tensor([request.ids[-1] for request in ready]),
                torch.tensor([len(request.ids) - 1 for request in ready]),
            )
            blocks = {request.session_key: self._growing(request, sessions) for request in ready}
            grow(self._network, hidden, list(blocks.values()))
        for request in requests:
            if request.session_key not in sessions:
                answers.append(NOTHING)
            elif request.session_key in blocks:
                answers.append(self._finish(request, sessions, blocks[request.session_key]))
            else:
                answers.append(None)
        self._sessions.evict(set(sessions))
        return answers

    def forget(self, session_key: int) -> None:
        self._sessions.forget(session_key)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _read(self, requests: Sequence[DraftRequest], sessions: dict[int, RowSession]) -> set[int]:
        """Enters the rows that sessions have got, as far as READ_ROWS goes. The keys of those that have all of theirs."""
        left = READ_ROWS
        whole: set[int] = set()
        new: list[NewContext] = []
        ends: dict[int, int] = {}
        for request in requests:
            session = sessions.get(request.session_key)
            if session is None or request.rows is None:
                continue
            session.begin(request)
            end = len(request.ids) - 1
            start = session.cache.length
            stop = end
            if end - start > FEW_ROWS:
                stop = min(end, start + left)
                left -= stop - start
            ends[request.session_key] = stop
            for span in request.rows.spans(start, stop):
                rows = torch.from_numpy(span.rows.copy()).view(torch.bfloat16).to(self._dtype)
                new.append(NewContext(session.cache, rows, span.start))
            if stop == end:
                whole.add(request.session_key)
        for part in _one_a_session(new):
            append_rows(self._network, part)
        for request in requests:
            session = sessions.get(request.session_key)
            if session is not None:
                session.cache.leave_out(ends[request.session_key])
                session.entered(request.ids)
        return whole

    def _growing(self, request: DraftRequest, sessions: dict[int, RowSession]) -> Growing:
        chooser = sessions[request.session_key].chooser
        assert chooser is not None, "begun before"
        limit = min(request.token_limit, self.fingerprint.block_size)
        return Growing(chooser, request.ids[-1], limit, request.turn.stop_ids)

    def _finish(self, request: DraftRequest, sessions: dict[int, RowSession], block: Growing) -> DraftedBlock:
        chooser = sessions[request.session_key].chooser
        assert chooser is not None, "begun before"
        chooser.truncate(len(request.ids))
        if self._network.confidence_head is None:
            return DraftedBlock(block.token_ids, block.probabilities)
        greedy = request.turn.sampling.greedy
        return DraftedBlock(block.token_ids, self._calibration.confidences(block.confidence_logits, greedy))


def _one_a_session(new: Sequence[NewContext]) -> list[list[NewContext]]:
    """The runs in passes of at most one a session: a cache takes its runs in order."""
    passes: list[list[NewContext]] = []
    depth: dict[int, int] = {}
    for part in new:
        number = depth.get(id(part.cache), 0)
        depth[id(part.cache)] = number + 1
        if number == len(passes):
            passes.append([])
        passes[number].append(part)
    return passes


def projector_hash(network: DSparkNetwork) -> str:
    """sha256 of what makes context rows: the taps, `fc` and `hidden_norm`, as bfloat16 words. A verifier's must be equal."""
    digest = hashlib.sha256(repr(list(network.config.target_layer_ids)).encode())
    for weight in (network.fc.weight, network.hidden_norm.weight):
        digest.update(weight.detach().to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def load(options: ModelOptions) -> LoadedModel:
    """Loads the draft in the folder `model`, with the vocabulary of `target`. CannotLoad tells why not."""
    if not options.model or not options.target:
        raise CannotLoad(
            "model, target: a trained draft needs both: its own folder, and the target that it drafts for"
        )
    torch.set_num_threads(options.threads)
    try:
        folder = resolve(options.model).path
        dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
        network = load_draft(folder, dtype, target_vocabulary(resolve(options.target).path))
        about: dict[str, Any] = read_config(folder).get("target", {})
        calibration = load_calibration(folder)
    except (StoreError, UnusableCheckpoint, UnusableCalibration, OSError) as error:
        raise CannotLoad(f"model: {error}") from error
    context_hash = projector_hash(network)  # before packing: packed weights cannot be read back
    pack_linears(network)
    model = BlockModel(
        network,
        calibration,
        str(about.get("tokenizer_hash", "")),
        options.block_size,
        options.state_memory_mib * 2**20,
        context_hash,
    )
    return LoadedModel(model)
