"""Generate's request: raw message in, checked command out. What needs the session's state is checked by the engine."""

from __future__ import annotations

from dataclasses import dataclass

from sparkrelay.outcomes import Reason, Refusal, field_refusal
from sparkrelay.response_format import ResponseFormat
from sparkrelay.sampling import MAX_STOP_IDS, PROTO_NAMES, InvalidField
from sparkrelay.v1 import generation_pb2
from sparkrelay.v1 import verifier_service_pb2 as pb2
from sparkrelay.wire import response_format, sampling
from verifier_service.events import SpeculationRequest, StartTurn
from verifier_service.models import ModelInfo

ID_LIMIT = 128
DRAFTER_LIMIT = 16
LOGPROB_LIMIT = 20
MAX_DEPTH = 15
NOISE_VERSION = 1
HASH_LIMIT = 64
SALT_LIMIT = 64


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """A request that can be handed to the engine, once its response format is compiled.

    drafter_ids  whom to invite, in order; none if no draft will be checked
    """

    command: StartTurn
    drafter_ids: tuple[str, ...]
    response_format: ResponseFormat | None = None


def turn_request(
    request: pb2.VerifierServiceGenerateRequest, info: ModelInfo, received_us: int
) -> TurnRequest:
    """Checks everything that needs no session. Raises Refusal(INVALID_FIELD) naming the first field at fault."""
    check_id("session_id", request.session_id)
    check_id("turn_id", request.turn_id)
    _check_tokens(request, info)
    _check_stop(request.stop, info)
    if request.noise_version not in (0, NOISE_VERSION):
        raise invalid(
            "noise_version", f"is {request.noise_version}; send {NOISE_VERSION}, or 0 for the newest"
        )
    if len(request.drafter_ids) > DRAFTER_LIMIT:
        raise invalid("drafter_ids", f"has {len(request.drafter_ids)} names; send at most {DRAFTER_LIMIT}")
    if len(request.prefix_salt) > SALT_LIMIT:
        raise invalid("prefix_salt", f"has {len(request.prefix_salt)} bytes; send at most {SALT_LIMIT}")
    logprob_count = request.logprob_count if request.HasField("logprob_count") else None
    if logprob_count is not None and not 0 <= logprob_count <= LOGPROB_LIMIT:
        raise invalid(
            "logprob_count",
            f"is {logprob_count}; send 0 to {LOGPROB_LIMIT}, or nothing for no log-probabilities",
        )
    speculation = _speculation(request.speculation)
    chosen = sampling(request.sampling)
    try:
        chosen.check(info.vocab_size)
    except InvalidField as error:
        raise invalid(f"sampling.{PROTO_NAMES.get(error.field, error.field)}", error.message) from None
    if not chosen.greedy and not request.sampling.HasField("seed"):
        raise invalid(
            "sampling.seed", "is absent; with a temperature above 0 the caller draws it: send 64 random bits"
        )
    stop_ids = set(request.stop.stop_token_ids)
    if not request.stop.ignore_default_stop_ids:
        stop_ids |= set(info.default_stop_ids)
    command = StartTurn(
        session_id=request.session_id,
        turn_id=request.turn_id,
        keep_len=request.keep_len,
        keep_hash=request.keep_hash,
        append_ids=tuple(request.append_token_ids),
        output_start=request.output_start,
        sampling=chosen,
        max_tokens=request.stop.max_token_count,
        stop_ids=frozenset(stop_ids),
        speculation=speculation,
        logprob_count=logprob_count,
        received_us=received_us,
        tenant_salt=request.prefix_salt,
    )
    drafter_ids = () if speculation.fixed_depth == 0 else tuple(request.drafter_ids)
    return TurnRequest(command, drafter_ids, _response_format(request, command.stop_ids))


def check_session_id(session_id: str) -> None:
    """Raises Refusal(INVALID_FIELD)."""
    check_id("session_id", session_id)


def check_prefix_hash(field: str, value: bytes) -> None:
    """Raises Refusal(INVALID_FIELD) for more bytes than a chain hash can have."""
    if len(value) > HASH_LIMIT:
        raise invalid(field, f"has {len(value)} bytes; send a chain hash of 16")


def check_id(field: str, value: str) -> None:
    """Raises Refusal(INVALID_FIELD) for an id that is empty or too long."""
    if not 1 <= len(value) <= ID_LIMIT:
        raise invalid(field, f"has {len(value)} characters; send 1 to {ID_LIMIT}")


def _check_tokens(request: pb2.VerifierServiceGenerateRequest, info: ModelInfo) -> None:
    ids, length = request.append_token_ids, request.keep_len + len(request.append_token_ids)
    if request.keep_len < 0:
        raise invalid("keep_len", f"is {request.keep_len}; send 0 or more")
    check_prefix_hash("keep_hash", request.keep_hash)
    if length == 0:
        raise invalid("append_token_ids", "is empty and nothing is kept; send at least one token")
    if length >= info.context_limit:
        message = f"gives a session of {length} tokens; send at most {info.context_limit - 1}, which leave room for an answer"
        raise field_refusal("append_token_ids", message, Reason.CONTEXT_EXCEEDED)
    if ids and not 0 <= min(ids) <= max(ids) < info.vocab_size:
        found = next(token for token in ids if not 0 <= token < info.vocab_size)
        raise invalid(
            "append_token_ids", f"has id {found}; send ids of the vocabulary, 0 to {info.vocab_size - 1}"
        )
    if not 0 <= request.output_start <= length:
        raise invalid("output_start", f"is {request.output_start}; send an index from 0 to {length}")


def _check_stop(stop: generation_pb2.StopConditions, info: ModelInfo) -> None:
    if stop.max_token_count < 1:
        raise invalid("stop.max_token_count", f"is {stop.max_token_count}; send 1 or more")
    if len(stop.stop_token_ids) > MAX_STOP_IDS:
        raise invalid(
            "stop.stop_token_ids", f"has {len(stop.stop_token_ids)} ids; send at most {MAX_STOP_IDS}"
        )
    if any(not 0 <= token < info.vocab_size for token in stop.stop_token_ids):
        raise invalid(
            "stop.stop_token_ids", f"has an id outside of the vocabulary; send ids 0 to {info.vocab_size - 1}"
        )
    if stop.stop_strings:
        raise invalid(
            "stop.stop_strings",
            "is not served by a verifier, which knows no text: the gateway looks for them; send stop_token_ids",
        )


def _response_format(
    request: pb2.VerifierServiceGenerateRequest, stop_ids: frozenset[int]
) -> ResponseFormat | None:
    if not request.HasField("response_format"):
        return None
    if not stop_ids:
        message = "needs an id that ends the turn once the text is complete; send stop.stop_token_ids"
        raise invalid("response_format", message)
    return response_format(request.response_format)


def _speculation(pb: generation_pb2.Speculation) -> SpeculationRequest:
    if pb.mode == generation_pb2.Speculation.MODE_OFF:
        return SpeculationRequest(fixed_depth=0)
    if pb.mode == generation_pb2.Speculation.MODE_FIXED:
        if not 0 <= pb.fixed_depth <= MAX_DEPTH:
            raise invalid("speculation.fixed_depth", f"is {pb.fixed_depth}; send 0 to {MAX_DEPTH}")
        return SpeculationRequest(fixed_depth=pb.fixed_depth)
    if pb.mode not in (generation_pb2.Speculation.MODE_UNSPECIFIED, generation_pb2.Speculation.MODE_AUTO):
        raise invalid("speculation.mode", f"is {pb.mode}; send MODE_AUTO, MODE_OFF or MODE_FIXED")
    return SpeculationRequest()


def invalid(field: str, message: str) -> Refusal:
    """A field that cannot be served, and why."""
    return field_refusal(field, message)
