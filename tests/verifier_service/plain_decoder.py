"""What every turn must give: the target alone, one token after another, without an engine."""

from __future__ import annotations

from collections.abc import Sequence

from sparkrelay.device.choice import Chooser
from verifier_service.events import StartTurn
from verifier_service.models import TargetModel
from verifier_service.ragged_batch import RaggedBatch, Segment

_OWN_SEQUENCE = -1


def decode(model: TargetModel, prompt: Sequence[int], command: StartTurn, context_limit: int) -> list[int]:
    """The turn's output after `prompt`: the whole of its tokens is read again for each token."""
    ids = list(prompt)
    mask = None
    if command.grammar is not None:
        mask = command.grammar.begin(ids[command.output_start :], command.stop_ids)
    chooser = Chooser(command.sampling, command.stop_ids, ids, command.output_start, mask)
    model.open(_OWN_SEQUENCE)
    model.resize(_OWN_SEQUENCE, range(context_limit))
    read = 0
    while len(ids) < min(command.output_start + command.max_tokens, context_limit):
        logits = model.forward(RaggedBatch.of([Segment(_OWN_SEQUENCE, read, ids[read:], 1)]))
        read = len(ids)
        ids.append(chooser.choose(logits[0]))
        chooser.append(ids[-1])
        if ids[-1] in command.stop_ids:
            break
    model.close(_OWN_SEQUENCE)
    return ids[len(prompt) :]
