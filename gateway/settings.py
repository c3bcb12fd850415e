"""The gateway's settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import SettingsConfigDict

from sparkrelay.settings import ServiceSettings


class GatewaySettings(ServiceSettings):
    """The gateway: takes text, keeps sessions, and places turns on verifiers."""

    model_config = SettingsConfigDict(env_prefix="SPARKRELAY_GATEWAY_")

    listen: str = Field("127.0.0.1:7070", description="Address for clients. Port 0 takes any free one.")
    health_listen: str = Field(
        "127.0.0.1:7170",
        description="Address of the health service. Port 0 takes any free one; empty is off.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least important lines to log: debug, info, warning or error."
    )
    log_format: Literal["json", "console"] = Field(
        "json", description="One JSON object a line, or text for people."
    )
    port_file: str = Field(
        "", description="File to write the real ports to once they are open; empty for none."
    )
    exit_with_stdin: bool = Field(False, description="Drain and end when stdin closes.")
    drain_ms: int = Field(
        5000, ge=0, le=3_600_000, description="Time that turns get to end when the service is told to end."
    )
    insecure: bool = Field(False, description="Allow an unencrypted port that other machines can reach.")

    verifiers: str = Field(
        "127.0.0.1:7071", description="Addresses of the verifiers, separated by commas.", min_length=1
    )
    tokenizer: str = Field(
        "",
        description="Folder with tokenizer.json, or what the model store knows; empty finds it by the name of the "
        "verifier's model.",
    )
    max_turns: int = Field(256, ge=1, le=100_000, description="Turns under way at once; more are refused.")
    max_sessions: int = Field(
        1024, ge=1, le=1_000_000, description="Sessions kept; beyond it, the longest idle one is ended."
    )
    session_idle_limit_ms: int = Field(
        1_800_000, ge=1, le=604_800_000, description="A session is ended after so long without a turn."
    )
    default_max_tokens: int = Field(
        1024, ge=1, description="Output tokens of a turn that does not say how many."
    )
    prompt_limit_chars: int = Field(
        1_000_000, ge=1, description="Characters of text or messages in one turn."
    )
    overload_retry_ms: int = Field(
        500, ge=1, description="After how long a caller who was refused may try again."
    )
    recent_turns: int = Field(256, ge=1, le=100_000, description="Turns remembered with their rounds.")
    turn_rounds: int = Field(4096, ge=1, description="Rounds remembered of one turn: its first ones.")
    watcher_rounds: int = Field(
        1024, ge=1, description="Rounds that wait for a slow watcher; what comes then is skipped and counted."
    )
    prefix_salt_secret: SecretStr = Field(
        SecretStr(""),
        description="Keeps what was read for one tenant from being reused for another, or by a gateway with another secret; "
        "gateways with the same one share. Give it by SPARKRELAY_GATEWAY_PREFIX_SALT_SECRET, not on a command line.",
    )
    resume_keep_ms: int = Field(
        120_000,
        ge=1,
        le=3_600_000,
        description="A turn that was asked for with linger_ms can be resumed for so long after its end.",
    )
    resume_limit_mib: int = Field(
        64,
        ge=1,
        le=1_000_000,
        description="Memory for what turns may be resumed from; beyond it, the oldest goes.",
    )
    journal: str = Field(
        "memory",
        description="Where turns that may be resumed are kept: memory, or sqlite:PATH, which outlives this process.",
    )
    journal_required: bool = Field(
        False, description="Refuse turns that may be resumed while the journal's file cannot be written."
    )
    connect_timeout_ms: int = Field(3000, ge=1, description="Time for a verifier's first answer.")
    silence_limit_ms: int = Field(
        5000, ge=1, description="A verifier without a load report for so long is lost."
    )
    backoff_min_ms: int = Field(
        100, ge=1, description="Pause before the first new attempt to reach a lost verifier."
    )
    backoff_max_ms: int = Field(3000, ge=1, description="The longest pause between attempts.")

    @field_validator("journal")
    @classmethod
    def _check_journal(cls, value: str) -> str:
        if value != "memory" and not value.removeprefix("sqlite:"):
            raise ValueError("names no file; write memory or sqlite:PATH")
        if value != "memory" and not value.startswith("sqlite:"):
            raise ValueError(f"{value!r} is unknown; write memory or sqlite:PATH")
        return value

    @property
    def journal_path(self) -> str:
        """Of the SQLite file; empty for memory."""
        return "" if self.journal == "memory" else self.journal.removeprefix("sqlite:")

    @field_validator("verifiers")
    @classmethod
    def _check_verifiers(cls, value: str) -> str:
        addresses = [address.strip() for address in value.split(",")]
        for address in addresses:
            host, _, port = address.rpartition(":")
            if not host or not port.isdecimal():
                raise ValueError(f"{address!r} is no address; write host:port, separated by commas")
        if len(set(addresses)) != len(addresses):
            raise ValueError("names an address twice")
        return ",".join(addresses)

    @property
    def verifier_addresses(self) -> tuple[str, ...]:
        return tuple(self.verifiers.split(","))
