"""Parts of messages: limits, tensors, sampling, fingerprints."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sparkrelay.frames import ContextKind, Fingerprint
from sparkrelay.outcomes import FinishReason, Reason, Refusal, field_refusal
from sparkrelay.response_format import FormatKind, ResponseFormat
from sparkrelay.sampling import MAX_LOGIT_BIASES, InvalidField, Sampling
from sparkrelay.v1 import generation_pb2, tensor_pb2, verifier_service_pb2

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ENTRY_LIMIT = 4096  # entries of one columnar frame
TEXT_LIMIT = 1024  # characters of a text for people
ID_LIMIT = 128  # characters of a name or id
BYTES_LIMIT = 64  # of a token or hash
TAP_LIMIT = 256
NOISE_VERSION_LIMIT = 64
STOP_ID_LIMIT = 1024  # the request's and the model's own together
CONTEXT_ID_LIMIT = 65_536  # ids of one context frame
DIMENSION_LIMIT = 8
EXTENT_LIMIT = 2**40  # elements that a shape may stand for, not counting zeros
TRACEPARENT_BYTES = 25

_DATA_TYPES: dict[str, tensor_pb2.DataType.ValueType] = {
    "float32": tensor_pb2.DATA_TYPE_FLOAT32,
    "float16": tensor_pb2.DATA_TYPE_FLOAT16,
    "uint16": tensor_pb2.DATA_TYPE_BFLOAT16,
    "int32": tensor_pb2.DATA_TYPE_INT32,
    "int64": tensor_pb2.DATA_TYPE_INT64,
    "uint8": tensor_pb2.DATA_TYPE_UINT8,
}
_NUMPY_NAMES = {data_type: name for name, data_type in _DATA_TYPES.items()}


def invalid(field: str, message: str) -> Refusal:
    """The refusal of a field that cannot be read."""
    return field_refusal(field, message)


def too_large(field: str, size: int, limit: int) -> Refusal:
    """The refusal of a field with more than it may have."""
    return field_refusal(field, f"has {size}; send at most {limit}", Reason.TOO_LARGE)


def within(field: str, value: Any, limit: int) -> Any:
    """The sized value, if it is not larger than the limit."""
    if len(value) > limit:
        raise too_large(field, len(value), limit)
    return value


def reason(number: int) -> Reason:
    """A reason by number; one that a newer peer knows and we do not is UNSPECIFIED."""
    try:
        return Reason(number)
    except ValueError:
        return Reason.UNSPECIFIED


def finish_reason(number: int) -> FinishReason:
    """As `reason`, for the end of a turn."""
    try:
        return FinishReason(number)
    except ValueError:
        return FinishReason.UNSPECIFIED


# ---- tensors ----------------------------------------------------------------------------------------------------------------


def tensor(pb: tensor_pb2.Tensor) -> npt.NDArray[Any]:
    """The array of a message: read-only, little-endian, sizes checked before the data is looked at. bfloat16 comes
    as uint16 words."""
    import numpy as np

    name = _NUMPY_NAMES.get(pb.data_type)
    if name is None:
        raise invalid("data_type", f"{pb.data_type} is not a type that can be read")
    shape = tuple(within("shape", pb.shape, DIMENSION_LIMIT))
    if any(extent < 0 for extent in shape):
        raise invalid("shape", f"{list(shape)} has a negative extent")
    dtype: np.dtype[Any] = np.dtype(name).newbyteorder("<")
    expected = math.prod(shape) * dtype.itemsize
    if expected != len(pb.data):
        raise invalid("data", f"has {len(pb.data)} bytes; shape {list(shape)} of {name} needs {expected}")
    if math.prod(max(extent, 1) for extent in shape) > EXTENT_LIMIT:
        raise invalid("shape", f"{list(shape)} is larger than {EXTENT_LIMIT} elements")  # an empty one, too
    return np.frombuffer(pb.data, dtype=dtype).reshape(shape)


def tensor_pb(array: npt.NDArray[Any]) -> tensor_pb2.Tensor:
    """The message of an array. uint16 arrays are taken for bfloat16 words."""
    import numpy as np

    data_type = _DATA_TYPES[array.dtype.name]
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return tensor_pb2.Tensor(data_type=data_type, shape=array.shape, data=little.tobytes())


# ---- sampling ---------------------------------------------------------------------------------------------------------------


def sampling(pb: generation_pb2.Sampling) -> Sampling:
    """The plain value. Ranges are the business of `Sampling.check`, which knows the vocabulary."""
    within("sampling.logit_bias", pb.logit_bias, MAX_LOGIT_BIASES)
    return Sampling(
        temperature=pb.temperature,
        top_k=pb.top_k,
        top_p=pb.top_p if pb.HasField("top_p") else 1.0,
        min_p=pb.min_p,
        repetition_penalty=pb.repetition_penalty if pb.HasField("repetition_penalty") else 1.0,
        presence_penalty=pb.presence_penalty,
        frequency_penalty=pb.frequency_penalty,
        logit_bias=tuple(sorted(pb.logit_bias.items())),
        min_tokens=pb.min_token_count,
        seed=pb.seed,
    )


def sampling_pb(value: Sampling) -> generation_pb2.Sampling:
    """The message; its seed is always set."""
    return generation_pb2.Sampling(
        temperature=value.temperature,
        top_k=value.top_k,
        top_p=value.top_p,
        min_p=value.min_p,
        repetition_penalty=value.repetition_penalty,
        presence_penalty=value.presence_penalty,
        frequency_penalty=value.frequency_penalty,
        logit_bias=dict(value.logit_bias),
        min_token_count=value.min_tokens,
        seed=value.seed,
    )


# ---- response formats ---------------------------------------------------------------------------------------------------------


def response_format(pb: generation_pb2.ResponseFormat) -> ResponseFormat:
    """The plain value, not empty and within its limit."""
    kind = pb.WhichOneof("constraint")
    if kind is None:
        raise invalid("response_format", "has no constraint; send json_schema, regex or lark_grammar")
    value = ResponseFormat(FormatKind(kind), getattr(pb, kind))
    try:
        value.check()
    except InvalidField as error:
        raise invalid(error.field, error.message) from None
    return value


def response_format_pb(value: ResponseFormat) -> generation_pb2.ResponseFormat:
    return generation_pb2.ResponseFormat(**{value.kind.value: value.text})


# ---- fingerprints -----------------------------------------------------------------------------------------------------------


def fingerprint(pb: verifier_service_pb2.Fingerprint) -> Fingerprint:
    """The plain value; a context kind that is not known here is refused."""
    try:
        context_kind = ContextKind(pb.context_kind)
    except ValueError:
        raise invalid("fingerprint.context_kind", f"{pb.context_kind} is not known to this version") from None
    return Fingerprint(
        target_id=within("fingerprint.target_id", pb.target_id, TEXT_LIMIT),
        tokenizer_hash=within("fingerprint.tokenizer_hash", pb.tokenizer_hash, ID_LIMIT),
        vocab_size=pb.vocab_size,
        tap_layers=tuple(within("fingerprint.tap_layers", pb.tap_layers, TAP_LIMIT)),
        block_size=pb.block_size,
        context_kind=context_kind,
        context_width=pb.context_width,
        context_hash=within("fingerprint.context_hash", pb.context_hash, ID_LIMIT),
        noise_versions=tuple(within("fingerprint.noise_versions", pb.noise_versions, NOISE_VERSION_LIMIT)),
        proposal_kind=within("fingerprint.proposal_kind", pb.proposal_kind, ID_LIMIT),
    )


def fingerprint_pb(value: Fingerprint) -> verifier_service_pb2.Fingerprint:
    return verifier_service_pb2.Fingerprint(
        target_id=value.target_id,
        tokenizer_hash=value.tokenizer_hash,
        vocab_size=value.vocab_size,
        tap_layers=value.tap_layers,
        block_size=value.block_size,
        context_kind=verifier_service_pb2.Fingerprint.ContextKind.ValueType(value.context_kind),
        context_width=value.context_width,
        context_hash=value.context_hash,
        noise_versions=value.noise_versions,
        proposal_kind=value.proposal_kind,
    )
