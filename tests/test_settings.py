"""Settings: file, environment and flags in their order, errors that name the field and where the value came from."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field, ValidationError
from pydantic_settings import SettingsConfigDict

from sparkrelay.settings import InvalidSettings, ServiceSettings, load, read


class Lamp(ServiceSettings):
    """Lights a room."""

    model_config = SettingsConfigDict(env_prefix="SPARKRELAY_LAMP_")

    colour: str = Field("white", description="What it looks like.")
    warm_up_ms: int = Field(100, ge=0, description="Time to full light.")
    dimmed: bool = Field(False, description="Half the light.")


def test_a_setting_given_nowhere_has_its_default() -> None:
    assert read(Lamp, [], {}) == Lamp()


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "lamp.toml"
    file.write_text('colour = "file"\nwarm_up_ms = 1\ndimmed = true\n')
    environ = {"SPARKRELAY_LAMP_COLOUR": "environment", "SPARKRELAY_LAMP_WARM_UP_MS": "2"}
    found = read(Lamp, ["--config", str(file), "--warm-up-ms", "3"], environ)
    assert found == Lamp(colour="environment", warm_up_ms=3, dimmed=True)


def test_a_flag_can_be_turned_off_again(tmp_path: Path) -> None:
    assert read(Lamp, ["--dimmed"], {}).dimmed is True
    assert read(Lamp, ["--no-dimmed"], {"SPARKRELAY_LAMP_DIMMED": "true"}).dimmed is False


def test_a_value_may_be_empty_or_look_like_a_flag_value() -> None:
    assert read(Lamp, ["--colour", ""], {}).colour == ""
    assert read(Lamp, ["--colour=--red"], {}).colour == "--red"


@pytest.mark.parametrize(
    ("argv", "environ", "words"),
    [
        (["--warm-up-ms", "soon"], {}, ["warm_up_ms", "command line", "'soon'"]),
        (
            [],
            {"SPARKRELAY_LAMP_WARM_UP_MS": "-1"},
            ["warm_up_ms", "environment", "greater than or equal to 0"],
        ),
        (["--config", "no-such-file.toml"], {}, ["config", "no-such-file.toml"]),
    ],
)
def test_a_wrong_value_is_named_with_its_origin(
    argv: list[str], environ: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(InvalidSettings) as error:
        read(Lamp, argv, environ)
    for word in words:
        assert word in str(error.value)


def test_a_misspelt_name_in_a_file_is_refused_and_a_strangers_variable_is_not(tmp_path: Path) -> None:
    file = tmp_path / "lamp.toml"
    file.write_text('color = "red"\n')
    with pytest.raises(InvalidSettings, match="color: there is no such setting"):
        read(Lamp, ["--config", str(file)], {})
    assert read(Lamp, [], {"SPARKRELAY_LAMP_SERVICE_HOST": "10.0.0.1"}) == Lamp()


def test_a_broken_file_is_refused_with_the_place(tmp_path: Path) -> None:
    file = tmp_path / "lamp.toml"
    file.write_text("colour = \n")
    with pytest.raises(InvalidSettings, match="line 1"):
        read(Lamp, ["--config", str(file)], {})


def test_help_teaches_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load(Lamp, ["--help"], prog="lamp", environ={})
    text = capsys.readouterr().out
    assert end.value.code == 0
    for word in ("Lights a room.", "--warm-up-ms", "Time to full light. (default: 100)", "SPARKRELAY_LAMP_"):
        assert word in text


def test_a_mistake_ends_the_process_with_2_and_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load(Lamp, ["--warm-up-ms", "x"], prog="lamp", environ={})
    assert end.value.code == 2
    assert "lamp: error: warm_up_ms:" in capsys.readouterr().err


def test_settings_made_in_code_ignore_the_environment_and_cannot_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPARKRELAY_LAMP_COLOUR", "red")
    lamp = Lamp()
    assert lamp.colour == "white"
    with pytest.raises(ValidationError):
        lamp.colour = "blue"  # type: ignore[misc]
