"""The drafter's settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from sparkrelay.settings import ServiceSettings


class DrafterSettings(ServiceSettings):
    """The drafter: dials its verifiers and drafts tokens for the sessions that they invite it to."""

    model_config = SettingsConfigDict(env_prefix="SPARKRELAY_DRAFTER_")

    listen: str = Field(
        "127.0.0.1:7072",
        description="Address for people and tools; no work comes in here. Port 0 takes any free one.",
    )
    health_listen: str = Field(
        "127.0.0.1:7172",
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
        5000, ge=0, le=3_600_000, description="Time to leave all sessions when the service is told to end."
    )
    insecure: bool = Field(False, description="Allow an unencrypted port that other machines can reach.")

    verifiers: str = Field(
        "127.0.0.1:7071", description="Addresses of the verifiers to dial, separated by commas.", min_length=1
    )
    drafter_id: str = Field(
        "", max_length=128, description="Name of this drafter, the same after a restart; empty is host-port."
    )
    kind: Literal["ngram", "dspark", "dflash", "mtp", "causal_lm", "cycle", "random", "adversarial"] = Field(
        "ngram",
        description="What drafts: ngram (prompt lookup, no weights), dspark, dflash or mtp (trained for one target, see "
        "`sparkrelay train`), causal_lm (a small model with the target's tokenizer), "
        "cycle (for benchmarks), random, adversarial (for tests).",
    )
    model: str = Field(
        "",
        description="For causal_lm: a model of the catalogue, a folder or a hub id. For dspark, dflash, mtp: the draft's folder.",
    )
    target: str = Field(
        "",
        description="For dspark, dflash and mtp: the target, as the verifier has it; the draft shares its vocabulary.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="For kinds with weights: their type."
    )
    exact: bool = Field(
        True,
        description="For causal_lm: pad as exact mode does, so that the target as its own draft model is always right.",
    )
    block_size: int = Field(7, ge=1, le=15, description="The most draft tokens in a block.")
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="Threads of the draft model; 0: one on up to 4 cores, else a quarter of them.",
    )
    state_memory_mib: int = Field(
        1024, ge=1, description="For kinds with weights: memory for the sessions' keys and values."
    )
    ngram_min: int = Field(1, ge=1, le=16, description="For ngram: the shortest match that is looked up.")
    ngram_max: int = Field(4, ge=1, le=16, description="For ngram: the longest match that is looked up.")
    seed: int = Field(0, ge=0, description="For random and adversarial: decides what they say.")
    max_sessions: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Sessions drafted for at once, of all verifiers; more invites are declined. 0: as many as they allow.",
    )
    kept_sessions: int = Field(
        1024, ge=0, description="Sessions remembered after they were left; the oldest go first."
    )
    kept_tokens: int = Field(
        262_144,
        ge=0,
        description="Tokens of all remembered sessions together; an ngram index of them takes 0.6 KiB a token.",
    )
    backoff_min_ms: int = Field(
        100, ge=1, description="Pause before a lost verifier is dialled again the first time."
    )
    backoff_max_ms: int = Field(
        3000, ge=1, description="The longest pause between attempts; a refusal waits so long at once."
    )
    welcome_timeout_ms: int = Field(5000, ge=1, description="From dialling a verifier to its welcome.")

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

    @model_validator(mode="after")
    def _check_together(self) -> DrafterSettings:
        if self.ngram_min > self.ngram_max:
            raise ValueError(f"ngram_min {self.ngram_min} is above ngram_max {self.ngram_max}")
        if self.backoff_min_ms > self.backoff_max_ms:
            raise ValueError(
                f"backoff_min_ms {self.backoff_min_ms} is above backoff_max_ms {self.backoff_max_ms}"
            )
        if self.kind in ("dspark", "dflash", "mtp") and not (self.model and self.target):
            raise ValueError(
                f"model, target: the kind {self.kind} needs both: the draft's folder and its target"
            )
        if self.kind == "causal_lm" and not self.model:
            raise ValueError(
                "model: the kind causal_lm needs one; name a catalogue model, a folder or a hub id"
            )
        return self

    @property
    def verifier_addresses(self) -> tuple[str, ...]:
        return tuple(self.verifiers.split(","))
