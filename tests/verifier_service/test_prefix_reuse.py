"""What one session has read is a beginning for others: who gets how much of it, and that nobody can tell from the tokens."""

from __future__ import annotations

import pytest

from sparkrelay.outcomes import Reason
from sparkrelay.protocol import chain_hash
from sparkrelay.sampling import Sampling
from sparkrelay.store import ModelFiles
from tests.verifier_service.driver import Driver, of, turn
from tests.verifier_service.plain_decoder import decode
from verifier_service.events import EndSession, StartTurn, TurnAccepted, TurnOver, TurnRefused
from verifier_service.models import TargetModel
from verifier_service.models.toy import SnapshotToyModel, ToyModel

LIMIT = 4096


def text(length: int, seed: int = 1) -> list[int]:
    """Tokens of the toy, no two texts alike."""
    return [1 + (i * i * 7 + i * seed + i // 5) % 63 for i in range(length)]


def cached(driver: Driver, command: StartTurn) -> int:
    """Runs a turn; how many tokens of its prompt needed not be read."""
    events = driver.run(command)
    [accepted], [over] = of(events, TurnAccepted), of(events, TurnOver)
    assert accepted.cached_token_count == over.cached_token_count, "it was alone: nothing came meanwhile"
    return over.cached_token_count


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, seed=4, repetition_penalty=1.2)])
@pytest.mark.parametrize("ended", [False, True])
def test_a_second_request_that_shares_1024_tokens_reads_only_the_rest(
    ended: bool, sampling: Sampling
) -> None:
    driver = Driver(block_count=400)
    shared = text(1024)
    assert cached(driver, turn("a", "a", [*shared, 5, 6, 7], sampling=sampling)) == 0
    if ended:
        driver.run(EndSession("a"))
    command = turn("b", "b", [*shared, 9, 10, 11], max_tokens=20, sampling=sampling)
    assert cached(driver, command) == 1024
    assert driver.output("b") == decode(ToyModel(), command.append_ids, command, LIMIT)
    assert driver.engine.load().reused_token_count == 1024


def test_the_same_prompt_again_reads_its_last_token_only() -> None:
    driver = Driver()
    prompt = text(40)
    cached(driver, turn("a", "a", prompt))
    assert cached(driver, turn("b", "b", prompt)) == 39
    assert driver.output("b") == driver.output("a")


def test_state_of_a_running_turn_is_a_beginning_too() -> None:
    driver = Driver()
    driver.step(turn("a", "a", text(40), max_tokens=100))
    command = turn("b", "b", text(40) + [9] * 5, max_tokens=30)
    [accepted] = of(driver.step(command), TurnAccepted)
    assert accepted.cached_token_count == 40
    driver.run()
    assert driver.output("b") == decode(ToyModel(), command.append_ids, command, LIMIT)
    assert driver.output("a") == decode(ToyModel(), text(40), turn("a", "a", text(40), max_tokens=100), LIMIT)


def test_generated_tokens_are_a_beginning_like_the_prompt() -> None:
    """The next request of a client without sessions: the whole conversation, and one message more."""
    driver = Driver(leftover_percent=100)
    driver.run(turn("a", "a", text(20), max_tokens=50))
    driver.run(EndSession("a"))
    before = driver.engine.load()
    conversation = text(20) + driver.output("a")
    command = turn("b", "b", [*conversation, 3, 3], max_tokens=9)
    assert cached(driver, command) == 69, "the last token of an answer has no state"
    assert driver.output("b") == decode(ToyModel(), command.append_ids, command, LIMIT)
    after = driver.engine.load()
    assert (before.used_block_count, before.leftover_block_count) == (0, 5)
    assert after.leftover_block_count == 0, "all of it lives on in the new session"


def test_less_than_a_block_is_not_shared() -> None:
    driver = Driver()
    cached(driver, turn("a", "a", text(15) + [60] * 9))
    assert cached(driver, turn("b", "b", text(15) + [61] * 9)) == 0
    cached(driver, turn("c", "c", text(16, seed=2) + [60] * 9))
    assert cached(driver, turn("d", "d", text(16, seed=2) + [61] * 9)) == 16


def test_a_session_that_remembers_enough_itself_does_not_copy() -> None:
    driver = Driver()
    cached(driver, turn("a", "a", text(60), max_tokens=1))
    cached(driver, turn("b", "b", text(50), max_tokens=1))
    count = driver.engine.load().reused_count
    keep_hash = chain_hash(text(50))
    again = turn("b", "b2", text(60)[50:], keep_len=50, keep_hash=keep_hash, max_tokens=1)
    assert cached(driver, again) == 50
    assert driver.engine.load().reused_count == count
    longer = turn("b", "b3", text(90)[20:], keep_len=20, keep_hash=chain_hash(text(20)), max_tokens=1)
    assert cached(driver, longer) == 60
    assert driver.engine.load().reused_count == count + 1


def test_a_crowd_that_comes_at_once_reads_its_system_prompt_once() -> None:
    driver = Driver(block_count=400, step_token_budget=64)
    commands = [turn(f"s{n}", f"t{n}", [*text(200), n, n], max_tokens=9) for n in range(8)]
    events = driver.run(*commands)
    assert {event.cached_token_count for event in of(events, TurnAccepted)} == {0}
    first, *others = [event.cached_token_count for event in of(events, TurnOver)]
    assert first == 0 and min(others) >= 192, (
        "what the first has read by the step in which each of them begins"
    )
    for command in commands:
        assert driver.output(command.turn_id) == decode(ToyModel(), command.append_ids, command, LIMIT)


def test_a_model_that_can_begin_only_at_snapshots_shares_up_to_one() -> None:
    driver = Driver(SnapshotToyModel())
    cached(driver, turn("a", "a", text(45) + [60] * 9))
    command = turn("b", "b", text(45) + [61] * 9, max_tokens=20)
    assert cached(driver, command) == 40
    assert driver.output("b") == decode(ToyModel(), command.append_ids, command, LIMIT)


def test_tenants_never_share() -> None:
    driver = Driver()
    cached(driver, turn("a", "a", text(64), tenant_salt=b"one"))
    assert cached(driver, turn("b", "b", text(64), tenant_salt=b"two")) == 0
    assert cached(driver, turn("c", "c", text(64))) == 0
    assert cached(driver, turn("d", "d", text(64), tenant_salt=b"two")) == 63


def test_a_session_of_another_tenant_is_not_known() -> None:
    driver = Driver()
    driver.run(turn("a", "a", text(20), tenant_salt=b"one"))
    [refused] = of(driver.run(turn("a", "b", text(20), tenant_salt=b"two")), TurnRefused)
    assert (refused.reason, refused.field) == (Reason.SESSION_NOT_FOUND, "session_id")


def test_what_a_rewind_forgets_is_no_beginning_any_more() -> None:
    driver = Driver()
    cached(driver, turn("a", "a", text(64), max_tokens=1))
    keep_hash = chain_hash(text(20))
    driver.run(turn("a", "a2", [60] * 30, keep_len=20, keep_hash=keep_hash, max_tokens=1))
    command = turn("b", "b", text(64), max_tokens=20)
    assert cached(driver, command) == 20
    assert driver.output("b") == decode(ToyModel(), command.append_ids, command, LIMIT)


def test_a_replayed_turn_counts_no_more_of_its_prompt_as_cached_than_it_has() -> None:
    driver = Driver()
    driver.run(turn("a", "a", text(20), max_tokens=30))
    replay = turn("b", "b", text(20) + driver.output("a")[:20], output_start=20, max_tokens=30)
    assert cached(driver, replay) == 20
    assert driver.output("b") == driver.output("a")[20:]


def test_idle_state_serves_until_the_room_is_needed_and_what_is_asked_for_goes_last() -> None:
    driver = Driver(block_count=12)
    for name, seed in (("old", 1), ("new", 2)):
        driver.run(turn(name, name, text(64, seed), max_tokens=1))
    command = turn("b", "b", [*text(64, 1), 9], max_tokens=20)
    assert cached(driver, command) == 64, "the older one was asked for, and so the newer one had to go"
    assert driver.output("b") == decode(ToyModel(), command.append_ids, command, LIMIT)
    assert driver.engine.load().evicted_count == 1
    assert cached(driver, turn("c", "c", [*text(64, 2), 9], max_tokens=1)) == 0


def test_what_ended_sessions_leave_behind_is_bounded_and_the_oldest_goes() -> None:
    driver = Driver(block_count=16, leftover_percent=50)
    for seed in range(6):
        driver.run(turn("s", f"{seed}", text(40, seed), max_tokens=1))
        driver.run(EndSession("s"))
        load = driver.engine.load()
        assert (load.used_block_count, load.session_count) == (0, 0)
        assert load.leftover_block_count == min(3 * (seed + 1), 6)
    assert driver.engine.load().evicted_count == 0
    assert cached(driver, turn("a", "a", text(40, 5), max_tokens=1)) == 39
    assert cached(driver, turn("b", "b", text(40, 0), max_tokens=1)) == 0


def test_nothing_is_left_behind_where_that_is_not_wanted() -> None:
    driver = Driver(leftover_percent=0)
    driver.run(turn("s", "t", text(40)))
    driver.run(EndSession("s"))
    assert driver.engine.load().leftover_block_count == 0
    assert cached(driver, turn("s", "u", text(40))) == 0


def test_leftovers_give_way_to_a_turn_that_needs_all_the_room() -> None:
    driver = Driver(block_count=8, leftover_percent=100)
    driver.run(turn("s", "t", text(100), max_tokens=1))
    driver.run(EndSession("s"))
    assert driver.engine.load().leftover_block_count == 7
    command = turn("b", "b", text(110, 3), max_tokens=10)
    assert cached(driver, command) == 0
    assert driver.output("b") == decode(ToyModel(), command.append_ids, command, LIMIT)


def test_a_preempted_turn_goes_on_from_what_others_still_remember() -> None:
    """Three turns with one system prompt in room for two: who comes back copies it instead of reading it again."""
    driver = Driver(policy="off", block_count=9, step_token_budget=64)
    commands = [turn(name, name, [*text(32), n], max_tokens=60) for n, name in enumerate("abc", start=1)]
    driver.step(commands[0])
    driver.run(*commands[1:])
    load = driver.engine.load()
    assert load.preempted_count > 0 and load.reused_count > 2, "as often as turns opened"
    for command in commands:
        assert driver.output(command.turn_id) == decode(ToyModel(), command.append_ids, command, LIMIT)


@pytest.mark.parametrize("shared", [0, 32])
def test_16_sessions_on_a_quarter_of_the_blocks_they_need_all_finish_undisturbed(shared: int) -> None:
    commands = [
        turn(f"s{n}", f"t{n}", text(shared) + text(48 - shared, n + 2), max_tokens=80, sampling=sampling)
        for n, sampling in enumerate([Sampling(), Sampling(temperature=1.0, seed=8)] * 8)
    ]
    needed = 16 * -(-(48 + 80) // 16)
    undisturbed, pressed = Driver(block_count=needed), Driver(block_count=needed // 4)
    for driver in (undisturbed, pressed):
        driver.run(*commands)  # which recounts everything after each step
    assert undisturbed.engine.load().preempted_count == 0 < pressed.engine.load().preempted_count
    for command in commands:
        assert len(pressed.output(command.turn_id)) == 80
        assert pressed.output(command.turn_id) == undisturbed.output(command.turn_id)


@pytest.mark.parametrize("depth", [1, 100, 5000])
def test_a_rewind_of_any_depth_goes_on_as_if_the_rest_had_never_been(depth: int) -> None:
    limit = 8192
    driver = Driver(ToyModel(context_limit=limit), block_count=1200, leftover_percent=0)
    driver.run(turn("s", "first", text(6000), max_tokens=10))
    ids = text(6000) + driver.output("first")
    keep_len = len(ids) - depth
    command = turn(
        "s", "again", (9, 9, 9), keep_len=keep_len, keep_hash=chain_hash(ids[:keep_len]), max_tokens=12
    )
    assert cached(driver, command) == keep_len
    assert driver.output("again") == decode(ToyModel(), [*ids[:keep_len], 9, 9, 9], command, limit)


@pytest.mark.slow
@pytest.mark.timeout(600)  # two readings of 1,024 tokens by a real model, on however busy a machine
@pytest.mark.usefixtures("one_thread")
def test_the_demo_model_says_the_same_with_a_borrowed_beginning_and_after_going_back(
    demo_model: ModelFiles,
) -> None:
    from verifier_service.models.huggingface import HuggingFaceModel

    model = HuggingFaceModel.load(demo_model.path, model_id="demo")
    shared = [(i * i * 31 + 7 * i) % 40_000 + 100 for i in range(1024)]
    command = turn("b", "b", [*shared, 1200, 1201], max_tokens=8)
    alone = Driver(model, block_count=8, leftover_percent=0)
    assert cached(alone, command) == 0
    alone.run(EndSession("b"))
    driver = Driver(model, block_count=8)
    driver.run(turn("a", "a", [*shared, 504, 505, 506], max_tokens=1))
    assert cached(driver, command) == 1024
    assert driver.output("b") == alone.output("b")
    for each in (alone, driver):
        each.step(EndSession("a"), EndSession("b"))
    rewinds_by_1_and_100(Driver(model, block_count=8, leftover_percent=0))


def rewinds_by_1_and_100(driver: Driver) -> None:
    """What is said after going back equals what a fresh session says after the same tokens."""
    prompt = [(i * i * 17 + i) % 40_000 + 100 for i in range(120)]
    driver.run(turn("s", "first", prompt, max_tokens=8))
    ids = prompt + driver.output("first")
    assert len(ids) == 128
    for depth in (1, 100):
        keep_len = len(ids) - depth
        kept = ids[:keep_len]
        command = turn("s", f"back {depth}", (500, 600), keep_len=keep_len, keep_hash=chain_hash(kept))
        assert cached(driver, command) == min(keep_len, 127), "the anchor has no state"
        driver.run(EndSession("s"))
        assert cached(driver, turn("fresh", f"fresh {depth}", [*kept, 500, 600])) == 0
        assert driver.output(f"fresh {depth}") == driver.output(f"back {depth}")
        driver.run(EndSession("fresh"))
        if depth == 1:
            driver.run(turn("s", "again", prompt, max_tokens=8))
            assert driver.output("again") == ids[120:]


@pytest.fixture(scope="module")
def slabs(tmp_path_factory: pytest.TempPathFactory) -> TargetModel:
    """A tiny model with real keys and values, in blocks of 512 tokens."""
    from transformers import LlamaConfig

    from tests.device.tiny_models import COMMON, save_tiny
    from verifier_service.models.huggingface import HuggingFaceModel

    folder = save_tiny(LlamaConfig(**COMMON), tmp_path_factory.mktemp("models") / "tiny")
    return HuggingFaceModel.load(folder, model_id="tiny", dtype="float32")


def test_16_sessions_share_slabs_that_hold_a_quarter_of_them_and_say_the_same(slabs: TargetModel) -> None:
    shared = text(400)
    commands = [turn(f"s{n}", f"t{n}", shared + text(96, n + 2), max_tokens=24) for n in range(16)]
    outputs = []
    for block_count in (32, 8):
        driver = Driver(slabs, block_count=block_count, leftover_percent=0)
        driver.run(*commands)
        outputs.append([driver.output(command.turn_id) for command in commands])
        load = driver.engine.load()
        driver.step(*(EndSession(command.session_id) for command in commands))
        assert load.reused_count > 0
    assert load.preempted_count > 0
    assert outputs[0] == outputs[1] and len({tuple(output) for output in outputs[0]}) > 1
    for command, output in zip(commands[:2], outputs[0], strict=False):
        alone = Driver(slabs, block_count=2, leftover_percent=0)
        assert cached(alone, command) == 0
        assert alone.output(command.turn_id) == output
        alone.step(EndSession(command.session_id))
