"""Output in the shape that was asked for is valid, and token for token that of plain decoding with the same masks.

200 random schemas and regular expressions; the judges (jsonschema, `re`) are not what made the masks.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from sparkrelay.outcomes import FinishReason, Reason
from sparkrelay.protocol import chain_hash
from sparkrelay.response_format import FormatKind
from sparkrelay.sampling import Sampling
from tests.verifier_service.driver import Driver, block, member, of, turn
from tests.verifier_service.plain_decoder import decode
from tests.verifier_service.random_formats import random_format
from tests.verifier_service.text_toy import (
    OTHER_STOP,
    STOP,
    TOKENS,
    VOCAB_SIZE,
    decode_text,
    encode,
    grammar,
    text_toy,
)
from verifier_service.events import Committed, ForkSession, StartTurn, TurnOver, TurnRefused

FORMATS = 200
PARTS = 4
EACH = FORMATS // PARTS
MAX_TOKENS = 400
STOPS = frozenset({STOP, OTHER_STOP})
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0.8, seed=5),
    Sampling(repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2),
    Sampling(temperature=1.4, top_k=40, top_p=0.95, min_p=0.01, seed=6),
    Sampling(temperature=1.0, min_tokens=12, logit_bias=((encode("a")[0], 2.0), (STOP, 1.5)), seed=7),
)

Draft = Callable[[list[int], list[int], random.Random], Sequence[int]]


def ngram(committed: list[int], right: list[int], rng: random.Random) -> Sequence[int]:
    """What followed the last token where it occurred before."""
    before = [i for i, token_id in enumerate(committed[:-1]) if token_id == committed[-1]]
    return committed[before[-1] + 1 :][:6] if before else []


def guess(committed: list[int], right: list[int], rng: random.Random) -> Sequence[int]:
    """Whatever: ids that stand for nothing and stop ids too."""
    return [rng.randrange(VOCAB_SIZE) for _ in range(4)]


def lie(committed: list[int], right: list[int], rng: random.Random) -> Sequence[int]:
    """Right up to a lie: the most state that a rejection can leave wrong."""
    length = rng.randint(0, 5)
    wrong = rng.choice([STOP, rng.randrange(2, VOCAB_SIZE)])
    return [*right[:length], wrong, *right[length + 1 : length + 3]]


def stop_early(committed: list[int], right: list[int], rng: random.Random) -> Sequence[int]:
    """Right, cut, and ended: the stop id counts only where the text is complete."""
    return [*right[: rng.randint(0, 7)], STOP]


DRAFTERS: tuple[Draft, ...] = (ngram, guess, lie, stop_early)


def speculate(
    command: StartTurn, expected: list[int], draft: Draft, seed: int
) -> tuple[Driver, Counter[str]]:
    """Runs a turn with a drafter that answers at once; what its rounds add up to."""
    driver, rng, counts = Driver(text_toy(), "fixed:15", block_wait_us=0), random.Random(seed), Counter[str]()
    events = driver.step(command, member("a", 1))
    while not of(events, TurnOver) and not of(events, TurnRefused):
        output = driver.output("t")
        committed = [*command.append_ids, *output]
        token_ids = draft(committed, expected[len(output) :], rng) if output else ()
        events = driver.step(*([block(1, len(committed), token_ids)] if token_ids else []))
    for done in driver.rounds("t"):
        assert done.round is not None
        counts["drafted"] += done.round.drafted_count
        counts["accepted"] += done.round.accepted_count
        counts["rejected"] += done.round.depth - done.round.accepted_count
    return driver, counts


@pytest.mark.parametrize("part", range(PARTS))
def test_the_output_is_valid_and_that_of_plain_decoding(part: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(part * EACH, (part + 1) * EACH):
        asked = random_format(seed)
        sampling = SAMPLINGS[seed % len(SAMPLINGS)]
        command = turn(
            "a",
            "t",
            encode('say "name": [12, true] and an é '),
            sampling=sampling,
            max_tokens=MAX_TOKENS,
            stop_ids=STOPS,
            grammar=grammar(asked.kind, asked.text),
        )
        expected = decode(text_toy(), command.append_ids, command, 4096)
        draft = DRAFTERS[seed // 2 % len(DRAFTERS)]
        driver, seen = speculate(command, expected, draft, seed)
        where = f"seed {seed}: {asked.text}"
        assert driver.output("t") == expected, where
        (over,) = of(driver.events, TurnOver)
        assert over.finish_reason == FinishReason.STOP, f"{where} gives {decode_text(expected)!r}"
        assert asked.meets(decode_text(expected)), f"{where} gives {decode_text(expected)!r}"
        counts += seen
        counts[f"{asked.kind.name} {'greedy' if sampling.greedy else 'sampled'} {draft.__name__}"] += 1
        counts["texts"] += bool(decode_text(expected))
    for what in ("drafted", "accepted", "rejected"):
        assert counts[what] > 50, f"{what}: {counts}"
    kinds = [f"{kind} {how}" for kind in ("JSON_SCHEMA", "REGEX") for how in ("greedy", "sampled")]
    assert all(any(name.startswith(kind) for name in counts) for kind in kinds), counts
    assert counts["texts"] > EACH // 2


PROMPT = encode("x = ")
NAME = grammar(FormatKind.REGEX, "(an|ab){2,9}")


def name_turn(turn_id: str, **options: Any) -> StartTurn:
    """A turn that writes a name, with noise so that names differ."""
    options = {"append_ids": PROMPT, "sampling": Sampling(temperature=1.0, seed=3), **options}
    return turn("a", turn_id, max_tokens=64, stop_ids=STOPS, grammar=NAME, **options)


def plain(command: StartTurn, prompt: Sequence[int]) -> list[int]:
    return decode(text_toy(), prompt, command, 4096)


def test_a_complete_text_ends_the_turn_although_min_tokens_asks_for_more() -> None:
    driver = Driver(text_toy())
    only = grammar(FormatKind.REGEX, "true")
    driver.run(
        turn("a", "t", PROMPT, stop_ids=STOPS, grammar=only, sampling=Sampling(min_tokens=8), max_tokens=20)
    )
    assert decode_text(driver.output("t")) == "true"
    assert driver.output("t")[-1] in STOPS and len(driver.output("t")) < 8


def test_min_tokens_holds_as_long_as_the_grammar_has_another_way() -> None:
    asked = Sampling(min_tokens=6, logit_bias=((STOP, 1000.0),))
    for sampling, least in ((asked, 6), (replace(asked, min_tokens=0), 1)):
        driver = Driver(text_toy())
        letters = grammar(FormatKind.REGEX, "[a-f]{1,30}")
        driver.run(turn("a", "t", PROMPT, stop_ids=STOPS, grammar=letters, sampling=sampling, max_tokens=60))
        assert len(driver.output("t")) == least + 1, "the stop id wins as soon as it may"


def test_a_stop_id_is_chosen_only_where_the_text_is_complete() -> None:
    eager = Sampling(logit_bias=((OTHER_STOP, 1000.0),))
    driver = Driver(text_toy())
    driver.run(turn("a", "t", PROMPT, stop_ids=STOPS, grammar=NAME, sampling=eager, max_tokens=60))
    text = decode_text(driver.output("t"))
    assert driver.output("t")[-1] == OTHER_STOP and len(text) == 4, "at the first moment, and no sooner"


def test_a_dead_end_ends_the_turn_with_its_reason_after_the_tokens_before_it() -> None:
    driver = Driver(text_toy())
    no_letter = grammar(FormatKind.REGEX, "(true|null)ß")  # which no token of this model spells
    events = driver.run(turn("a", "t", PROMPT, stop_ids=STOPS, grammar=no_letter, max_tokens=20))
    (refused,) = of(events, TurnRefused)
    assert refused.reason == Reason.GRAMMAR_REFUSED
    assert "response_format" in refused.message
    assert decode_text(driver.output("t")) in ("true", "null")
    assert not driver.engine.load().active_turn_count


def test_a_text_that_never_ends_ends_at_a_limit() -> None:
    endless = turn("a", "t", PROMPT, stop_ids=STOPS, max_tokens=30)
    driver = Driver(text_toy())
    driver.run(replace(endless, grammar=grammar(FormatKind.LARK_GRAMMAR, 'start: ("a"|"b") start')))
    (over,) = of(driver.events, TurnOver)
    assert over.finish_reason == FinishReason.LENGTH and len(driver.output("t")) == 30
    driver = Driver(text_toy())
    driver.run(replace(endless, grammar=grammar(FormatKind.LARK_GRAMMAR, 'start: "a" start')))
    (refused,) = of(driver.events, TurnRefused)
    assert refused.reason == Reason.GRAMMAR_REFUSED and "limit" in refused.message


def test_a_replayed_turn_goes_on_where_its_output_stands() -> None:
    command = name_turn("whole")
    whole = plain(command, PROMPT)
    assert len(whole) > 3
    for cut in range(1, len(whole)):
        driver = Driver(text_toy())
        driver.run(name_turn("t", append_ids=[*PROMPT, *whole[:cut]], output_start=len(PROMPT)))
        assert driver.output("t") == whole[cut:]


def test_a_replay_of_what_the_format_does_not_allow_is_refused() -> None:
    driver = Driver(text_toy())
    events = driver.run(name_turn("t", append_ids=[*PROMPT, *encode("anno")], output_start=len(PROMPT)))
    (refused,) = of(events, TurnRefused)
    assert refused.reason == Reason.GRAMMAR_REFUSED and "replay" in refused.message
    assert not driver.output("t")


def test_a_turn_after_a_rewind_and_a_fork_begin_their_texts_anew() -> None:
    driver = Driver(text_toy())
    driver.run(name_turn("one"))
    ids = [*PROMPT, *driver.output("one")]
    fork_len = len(ids) - 1
    driver.run(ForkSession("a", "b", fork_len))
    keep = len(PROMPT) + 1
    rest = encode(" y = ")
    rewound = name_turn("two", append_ids=rest, keep_len=keep, keep_hash=chain_hash(ids[:keep]))
    forked = name_turn("three", append_ids=rest, keep_len=fork_len, keep_hash=chain_hash(ids[:fork_len]))
    driver.run(rewound, replace(forked, session_id="b"))
    assert driver.output("two") == plain(rewound, [*ids[:keep], *rest])
    assert driver.output("three") == plain(forked, [*ids[:fork_len], *rest])
    for turn_id in ("one", "two", "three"):
        assert re.fullmatch("(an|ab){2,9}", decode_text(driver.output(turn_id)))


def test_sessions_that_are_preempted_keep_their_place_in_the_text() -> None:
    """Memory for one and a half of three sessions; each has its own grammar."""
    driver = Driver(text_toy(), block_count=9, step_token_budget=16)
    commands = [
        turn(
            session,
            session,
            encode(f"write {session} "),
            sampling=Sampling(temperature=1.0, seed=number),
            max_tokens=90,
            stop_ids=STOPS,
            grammar=grammar(FormatKind.REGEX, pattern),
        )
        for number, (session, pattern) in enumerate(
            {"a": "[a-f]{60}", "b": "[0-9]{60}", "c": "(é|-){60}"}.items()
        )
    ]
    driver.run(*commands)
    assert driver.engine.load().preempted_count > 0
    for command in commands:
        assert driver.output(command.turn_id) == plain(command, command.append_ids)
    assert len(of(driver.events, TurnOver)) == 3


def test_one_turn_with_a_format_changes_no_token_of_the_others() -> None:
    alone = turn(
        "b", "free", encode("free text"), max_tokens=40, stop_ids=STOPS, sampling=Sampling(temperature=1.0)
    )
    driver = Driver(text_toy())
    driver.run(name_turn("t"), alone)
    assert driver.output("free") == plain(alone, alone.append_ids)
    assert driver.output("t") == plain(name_turn("t"), PROMPT)


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    driver = Driver(text_toy())
    driver.run(name_turn("t", logprob_count=1))
    best = [reported.top[0][0] for event in of(driver.events, Committed) for reported in event.logprobs]
    assert len(best) == len(driver.output("t")) > 4
    assert any(
        set(TOKENS[token_id].decode(errors="ignore")) - set("abn") for token_id in best if token_id > 1
    )
