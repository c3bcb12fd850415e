"""Who may speak with whom: versions and fingerprints."""

from __future__ import annotations

from sparkrelay.frames import ContextKind, Fingerprint, Hello
from sparkrelay.outcomes import FieldViolation, Reason
from sparkrelay.protocol.decisions import Greeted, RemoteProtocolError

PROTOCOL_MIN = 1
PROTOCOL_MAX = 1
BLOCK_LIMIT = 15  # the most draft tokens of a block
NAME_LIMIT = 128  # characters of a drafter's name, a session id, a turn id


def negotiate(
    hello: Hello,
    verifier: Fingerprint,
    versions: tuple[int, int] = (PROTOCOL_MIN, PROTOCOL_MAX),
    block_limit: int = BLOCK_LIMIT,
) -> Greeted:
    """Finds the version to speak and checks that the drafter fits.

    A field of the drafter's fingerprint that is empty or 0 fits every verifier. Taps, width and projector matter
    only to a drafter
    that reads context rows. Raises RemoteProtocolError: INVALID_FIELD, PROTOCOL_VERSION, or FINGERPRINT_MISMATCH
    that names each field.
    """
    for name, value in (("drafter_id", hello.drafter_id), ("incarnation", hello.incarnation)):
        if not 1 <= len(value) <= NAME_LIMIT:
            raise _refused(
                Reason.INVALID_FIELD, [(name, f"has {len(value)} characters; send 1 to {NAME_LIMIT}")]
            )
    version = min(hello.protocol_max, versions[1])
    if version < max(hello.protocol_min, versions[0]) or hello.protocol_min > hello.protocol_max:
        spoken = f"the verifier speaks {versions[0]} to {versions[1]}, the drafter {hello.protocol_min} to {hello.protocol_max}"
        raise RemoteProtocolError(
            Reason.PROTOCOL_VERSION, f"no protocol version in common: {spoken}; update the older one"
        )
    differing = _differences(hello.fingerprint, verifier, block_limit)
    if differing:
        raise _refused(Reason.FINGERPRINT_MISMATCH, differing, "; give the drafter what the verifier has")
    return Greeted(hello, version, hello.fingerprint.block_size or block_limit)


def _differences(drafter: Fingerprint, verifier: Fingerprint, block_limit: int) -> list[tuple[str, str]]:
    names = ["target_id", "tokenizer_hash", "vocab_size"]
    if drafter.context_kind is ContextKind.ROWS:
        names += ["context_kind", "tap_layers", "context_width", "context_hash"]
    found = [
        (name, f"the drafter has {mine!r}, the verifier {theirs!r}")
        for name in names
        if (mine := getattr(drafter, name)) and mine != (theirs := getattr(verifier, name))
    ]
    if not 0 <= drafter.block_size <= block_limit:
        found.append(
            ("block_size", f"the drafter has {drafter.block_size}, the verifier takes 1 to {block_limit}")
        )
    if drafter.noise_versions and not set(drafter.noise_versions) & set(verifier.noise_versions):
        found.append(
            (
                "noise_versions",
                f"the drafter has {list(drafter.noise_versions)}, the verifier {list(verifier.noise_versions)}",
            )
        )
    return found


def _refused(reason: Reason, fields: list[tuple[str, str]], next_step: str = "") -> RemoteProtocolError:
    message = "; ".join(f"{name}: {what}" for name, what in fields) + next_step
    return RemoteProtocolError(
        reason, message, violations=tuple(FieldViolation(name, what) for name, what in fields)
    )
