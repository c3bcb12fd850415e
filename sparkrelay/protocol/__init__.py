"""The Speculate conversation as one pure state machine: no I/O, no clock, no gRPC. Both servicers speak through it.

    side.receive(frame) -> decisions     what the peer said, and what we must do about it
    side.send(frame)                     before we say something: raises if the rules forbid it (our bug)

The steps of the conversation stand in verifier_service.proto. The rules that are written only here, because they need both sides:

* Both sides keep the same `Membership` per session and apply the same functions to the same frames (`membership`): the
  verifier's view is the drafter's view of a moment later.
* A block is in flight from its sending until a verdict names it, or commits tokens that contradict or spend it, or
  the turn ends. The verifier
  knows every token the drafter knows, so a block that is in flight in its view is in flight in the drafter's: a
  second one is a fault.
  base_len of the blocks of one turn only grows, so (handle, base_len) names a block within its turn.
* Late blocks of an ended turn: after `turn_ended` the verifier sends a `ping`, and the drafter answers in order. Blocks that come
  before that pong belong to the ended turn and are ignored, even if their base_len and ids would fit the next turn.
* Context may overtake Speculate or fall behind it. `DrafterSide` delivers it after the turn it belongs to has
  started, in order of
  position. `rewound` is never sent while context of that membership is on its way (the verifier ends the membership instead).
"""

from sparkrelay.protocol.decisions import (
    AnswerPong,
    BlocksAccepted,
    ContextArrived,
    DrafterDecision,
    EndMembership,
    Greeted,
    Ignored,
    Invited,
    InviteDeclined,
    JoinAsked,
    JoinRefused,
    LocalProtocolError,
    MemberJoined,
    MemberLeft,
    MembershipOver,
    PongReceived,
    RefuseJoin,
    RemoteProtocolError,
    SessionRewound,
    SessionTurnEnded,
    SessionTurnStarted,
    VerdictsArrived,
    VerifierDecision,
    VerifierDraining,
    Welcomed,
)
from sparkrelay.protocol.drafter_side import DrafterSide
from sparkrelay.protocol.handshake import BLOCK_LIMIT, NAME_LIMIT, PROTOCOL_MAX, PROTOCOL_MIN, negotiate
from sparkrelay.protocol.keepalive import PING_EVERY_S, SILENCE_LIMIT_S, Keepalive
from sparkrelay.protocol.membership import Membership, Phase
from sparkrelay.protocol.tokens import CHAIN_BLOCK, HASH_BYTES, ChainHash, chain_hash, match_block
from sparkrelay.protocol.verifier_side import SESSION_LIMIT, VerifierSide

__all__ = [
    "BLOCK_LIMIT",
    "CHAIN_BLOCK",
    "HASH_BYTES",
    "NAME_LIMIT",
    "PING_EVERY_S",
    "PROTOCOL_MAX",
    "PROTOCOL_MIN",
    "SESSION_LIMIT",
    "SILENCE_LIMIT_S",
    "AnswerPong",
    "BlocksAccepted",
    "ChainHash",
    "ContextArrived",
    "DrafterDecision",
    "DrafterSide",
    "EndMembership",
    "Greeted",
    "Ignored",
    "InviteDeclined",
    "Invited",
    "JoinAsked",
    "JoinRefused",
    "Keepalive",
    "LocalProtocolError",
    "MemberJoined",
    "MemberLeft",
    "Membership",
    "MembershipOver",
    "Phase",
    "PongReceived",
    "RefuseJoin",
    "RemoteProtocolError",
    "SessionRewound",
    "SessionTurnEnded",
    "SessionTurnStarted",
    "VerdictsArrived",
    "VerifierDecision",
    "VerifierDraining",
    "VerifierSide",
    "Welcomed",
    "chain_hash",
    "match_block",
    "negotiate",
]
