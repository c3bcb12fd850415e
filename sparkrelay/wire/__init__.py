"""Frames to protobuf and back. Whatever comes in is checked for shape here; what a frame means is checked by
`sparkrelay.protocol`.

Decoding raises `Refusal` and nothing else; encoding a frame of ours cannot fail but for a bug.
"""

from sparkrelay.wire.commits import Commit, commits
from sparkrelay.wire.feed import feed_request, feed_request_pb, feed_response, feed_response_pb
from sparkrelay.wire.speculate import drafter_frame, drafter_frame_pb, verifier_frame, verifier_frame_pb
from sparkrelay.wire.unreadable import RefuseUnreadable, Unreadable, readable
from sparkrelay.wire.values import (
    fingerprint,
    fingerprint_pb,
    response_format,
    response_format_pb,
    sampling,
    sampling_pb,
    tensor,
    tensor_pb,
)

__all__ = [
    "Commit",
    "RefuseUnreadable",
    "Unreadable",
    "commits",
    "drafter_frame",
    "drafter_frame_pb",
    "feed_request",
    "feed_request_pb",
    "feed_response",
    "feed_response_pb",
    "fingerprint",
    "fingerprint_pb",
    "readable",
    "response_format",
    "response_format_pb",
    "sampling",
    "sampling_pb",
    "tensor",
    "tensor_pb",
    "verifier_frame",
    "verifier_frame_pb",
]
