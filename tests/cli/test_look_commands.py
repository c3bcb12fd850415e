"""What `workers`, `sessions` and `turns` say of values, and what every command has in common."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from sparkrelay import cli
from sparkrelay.cli import chat, output, sessions, turns, workers
from sparkrelay.cli.times import age, milliseconds
from sparkrelay.client.errors import InvalidRequest, Overloaded
from sparkrelay.client.results import Drafter, Model, RoundTotals, SessionInfo, Timing, Turn, Usage, Worker
from sparkrelay.outcomes import FieldViolation
from tests.cli.chat_fakes import generation, report

LIST = Path(cli.__file__).parent


def plain(markup: str) -> str:
    """As a terminal without colours shows it."""
    console = Console(file=io.StringIO(), width=200)
    console.print(markup, soft_wrap=True)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def worker(state: str = "ready", depth: str = "auto", *drafters: Drafter) -> Worker:
    return Worker("h:7071", state, "", 0, "v", "a[b]", True, "", depth, 2, 1, 0, 21_300, drafters)


def drafter(state: str, message: str = "") -> Drafter:
    return Drafter("drafter-1", state, message, "ngram", 1, 420, 3600, 60, 50, 20)


def test_a_worker_shows_state_load_round_trip_and_acceptance() -> None:
    text = plain(workers.worker_text(worker("ready", "auto", drafter("connected"))))
    for words in ("h:7071  ready", "a[b], exact", "2 sessions, 1 active, 0 queued, step 21.3 ms"):
        assert words in text
    assert "RTT 0.42 ms" in text and "20 of 50 checked were right (40%)" in text
    assert "plain decoding" not in text


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (worker("ready", "off"), "depth policy is off"),
        (worker("ready"), "--verifiers h:7071"),
        (
            worker("ready", "auto", drafter("refused", "vocab_size [5]")),
            "drafter-1 is refused (vocab_size [5])",
        ),
        (worker("draining", "auto", drafter("lost")), "drafter-1 is lost"),
    ],
)
def test_plain_decoding_is_never_silent(seen: Worker, words: str) -> None:
    assert f"plain decoding: {workers.why_plain(seen)}" in plain(workers.worker_text(seen))
    assert words in workers.why_plain(seen)
    model = Model("a[b]", 1, 1, True, 1, 0, True)
    assert "plain decoding" in chat.introduction(model, [seen], "h:7070")


def test_a_verifier_that_decodes_nothing_is_not_called_plain() -> None:
    assert workers.why_plain(worker("lost")) == ""
    assert workers.why_plain(worker("ready", "auto", drafter("connected"))) == ""


def test_a_turn_shows_its_rounds_and_what_they_came_to() -> None:
    turn = Turn(
        "turn-1", "", "session-1", "tiny", "stop", "END", Usage(12, 5, 3), Timing(900, 1_500_000),
        RoundTotals(2, 8, 8, 6), (report(0), report(1, 4, 4)), 100.0,
    )  # fmt: skip
    text = turns.turn_text(turn)
    assert "at 'END'" in text and "12 read (5 of them kept), 3 written" in text
    assert "2 rounds of 4.00 tokens, 6 of 8 drafted right" in text
    assert len(text.split("\n\n")[1].splitlines()) == 3
    assert "90 s ago" not in plain(turns.row(turn, 190.0)) and "2 min ago" in plain(turns.row(turn, 190.0))
    assert turns.drafting(RoundTotals(3, 0, 0, 0)) == "3 rounds, nothing drafted"


def test_a_session_shows_what_is_known_of_it() -> None:
    session = SessionInfo("session-1", "tiny", 40, 1, True, "", "", 0.0)
    assert "busy  1 turn, 40 tokens, tiny, 2 h old" in plain(sessions.row(session, 7200.0))
    assert "the next turn reads all of it" in sessions.session_text(session)


def test_durations_are_short() -> None:
    assert [age(each) for each in (-5, 0, 59, 60, 7200, 200_000)] == [
        "0 s",
        "0 s",
        "59 s",
        "1 min",
        "2 h",
        "2 d",
    ]
    assert [milliseconds(each) for each in (0, 420, 21_300)] == ["0.00 ms", "0.42 ms", "21.3 ms"]


def test_an_error_says_what_field_limit_next_step_and_turn() -> None:
    violation = FieldViolation("sampling.top_p", "is 7; send a number above 0 and at most 1")
    error = InvalidRequest(
        "The request cannot be served.", reason="INVALID_FIELD", turn_id="turn-1", violations=(violation,)
    )
    text = output.explain(error)
    for words in ("error: The request", "sampling.top_p: is 7", "at most 1", "turn turn-1", "INVALID_FIELD"):
        assert words in text
    said_already = InvalidRequest(f"{violation.field}: {violation.message}.", violations=(violation,))
    assert output.explain(said_already).count("at most 1") == 1
    full = Overloaded("The queues are full.", reason="OVERLOADED", retry_after=0.5)
    assert "again in 0.5 s" in output.explain(full)


def test_colours_are_for_terminals_that_want_them() -> None:
    assert output.has_colours({"TERM": "xterm"}, is_terminal=True)
    assert not output.has_colours({"TERM": "xterm"}, is_terminal=False)
    assert not output.has_colours({"TERM": "xterm", "NO_COLOR": "1"}, is_terminal=True)
    assert not output.has_colours({"TERM": "dumb"}, is_terminal=True)


def test_a_turn_without_a_drafter_says_why_in_its_summary() -> None:
    from sparkrelay.cli.generate import summary

    assert "no drafter: none is connected" in summary(generation("x", reason="none is connected"))
    assert "2 of 4 drafted accepted" in summary(generation("x", (report(),)))


@pytest.mark.parametrize(
    ("models", "wanted", "words"),
    [
        ([], "", "No model is served"),
        ([Model("a", 1, 1, True, 1, 1, True)], "b", "there is a"),
        ([Model(name, 1, 1, True, 1, 1, True) for name in "ab"], "", "--model: a, b"),
        ([Model("a", 1, 1, False, 1, 1, True)], "", "generate --raw"),
    ],
)
def test_a_chat_without_a_fitting_model_says_what_to_do(
    models: list[Model], wanted: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit):
        chat.choose_model(models, wanted)
    assert words in capsys.readouterr().err


def test_every_file_that_registers_a_command_is_in_the_list() -> None:
    found = {file.stem for file in LIST.glob("*.py") if "\ndef register(" in file.read_text()}
    assert found == set(cli.COMMANDS)


@pytest.mark.parametrize(
    "words",
    [["chat"], ["generate"], ["doctor"], ["up"], ["demo"]]
    + [["sessions", each] for each in ("list", "show", "end")]
    + [["turns", each] for each in ("list", "show")]
    + [["workers", each] for each in ("list", "drain")]
    + [["models", each] for each in ("list", "pull", "rm", "verify")],
)
@pytest.mark.parametrize("columns", [60, 100])
def test_the_help_of_every_command_fits_and_ends_in_examples(
    words: list[str], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    result = CliRunner().invoke(cli.build_app(), [*words, "--help"])
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= columns
    _, found, examples = result.output.partition("Examples")
    assert found and f"sparkrelay {' '.join(words)}" in examples
    assert "\x1b" not in result.output


def test_the_help_needs_neither_grpc_nor_torch() -> None:
    program = (
        "import sys; sys.argv = ['sparkrelay', '--help']\n"
        "from sparkrelay.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'grpc', 'google.protobuf', 'torch', 'numpy', 'transformers', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "doctor" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("shell", "words"), [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete --")]
)
def test_each_shell_gets_its_completion_script(
    shell: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = CliRunner().invoke(
        cli.build_app(), [], prog_name="sparkrelay", env={"_SPARKRELAY_COMPLETE": f"source_{shell}"}
    )
    assert result.exit_code == 0
    assert words in result.output and "_SPARKRELAY_COMPLETE" in result.output


def test_commands_are_completed() -> None:
    asked = {"_SPARKRELAY_COMPLETE": "complete_bash", "COMP_WORDS": "sparkrelay se", "COMP_CWORD": "1"}
    result = CliRunner().invoke(cli.build_app(), [], prog_name="sparkrelay", env=asked)
    assert result.output.split() == ["sessions"]


@pytest.mark.parametrize(
    "words", [["sessions", "end"], ["generate", "a", "--prompt", "b"], ["turns", "show"], ["nope"]]
)
def test_wrong_usage_ends_with_code_2(words: list[str]) -> None:
    assert CliRunner().invoke(cli.build_app(), words).exit_code == 2


@pytest.mark.parametrize(
    "words", [["chat"], ["generate", "x"], ["sessions", "list"], ["turns", "list"], ["workers", "list"]]
)
def test_without_a_stack_every_client_command_says_what_to_start(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARKRELAY_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("SPARKRELAY_GATEWAY", "")
    result = CliRunner().invoke(cli.build_app(), words)
    assert result.exit_code == 1 and "sparkrelay up" in result.stderr and not result.stdout


def test_what_is_piped_in_must_be_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(cli.build_app(), ["generate"], input=b"\xff\xfe")
    assert result.exit_code == 2 and "UTF-8" in result.stderr
    assert CliRunner().invoke(cli.build_app(), ["generate", "-"], input="").exit_code == 2
