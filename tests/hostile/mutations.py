"""Valid messages spoilt: bytes flipped, cut, repeated, spliced with others, numbers blown up. The same seed spoils alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

# Varints that break things: -1, the largest of 32 and 64 bits, one that never ends; then lengths that lie; then halves of UTF-8.
NASTY = (
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\xff\xff\xff\xff\x07",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x80" * 11,
    b"\x00",
    b"\xed\xa0\x80",
    b"\xc3",
    b"\x00\x00\xc0\x7f",  # a float that is not a number
    b"\x00\x00\x80\xff",  # minus infinity
)


def mutated(messages: Sequence[bytes], seed: int) -> Iterator[bytes]:
    """Without end. Now and then a message stays whole, so that what follows finds something to spoil."""
    random = Random(seed)
    while True:
        data = bytearray(random.choice(messages))
        for _ in range(random.choice((0, 1, 1, 1, 2, 4))):
            _spoil(data, messages, random)
        yield bytes(data)


def _spoil(data: bytearray, messages: Sequence[bytes], random: Random) -> None:
    place = random.randint(0, len(data))
    match random.randrange(7):
        case 0 if data:
            data[place % len(data)] ^= 1 << random.randrange(8)
        case 1 if data:
            data[place % len(data)] = random.randrange(256)
        case 2:
            del data[place:]
        case 3:
            other = random.choice(messages)
            data[place:] = other[random.randint(0, len(other)) :]
        case 4:
            data[place:place] = random.choice(NASTY)
        case 5:
            nasty = random.choice(NASTY)
            data[place : place + len(nasty)] = nasty
        case _:
            data += random.choice(messages)  # in protobuf the later field wins, and lists grow
