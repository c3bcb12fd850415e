"""The verifier's settings: flat, frozen, each with its unit and its meaning. `sparkrelay.settings.load` fills them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from sparkrelay.settings import ServiceSettings
from verifier_service.depth_policies import parse_depth_policy


class VerifierSettings(ServiceSettings):
    """The verifier: hosts the target model and checks what drafters propose."""

    model_config = SettingsConfigDict(env_prefix="SPARKRELAY_VERIFIER_")

    listen: str = Field("127.0.0.1:7071", description="Address to serve on; port 0 takes any free one.")
    health_listen: str = Field(
        "127.0.0.1:7171",
        description="Address of the health service; port 0 takes any free one, empty turns it off.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least serious lines to log."
    )
    log_format: Literal["json", "console"] = Field(
        "json", description="json: one object a line; console: text for people."
    )
    port_file: str = Field(
        "",
        description='File to write {"pid", "listen", "health_listen"} to once the service serves; empty for none.',
    )
    exit_with_stdin: bool = Field(False, description="Drain and end when standard input closes.")
    drain_ms: int = Field(
        5000, ge=0, le=3_600_000, description="Time that turns under way have to finish when asked to end."
    )
    insecure: bool = Field(
        False, description="Serve without encryption on an address that other machines can reach."
    )

    model: str = Field(
        "smollm2-135m",
        min_length=1,
        description="The target: a name of the catalogue, a folder, a hub id, or toy, toy:free (no weights, for trying out).",
    )
    context: str = Field(
        "none",
        min_length=1,
        description="The draft whose context rows this verifier makes for drafters: its folder or name, or none.",
    )
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Type to compute in.")
    exact: bool = Field(
        True,
        description="Compute each row so that its logits do not depend on the batch: "
        "the output is plain decoding's, bit for bit.",
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="Threads to compute with; 0 takes one a physical core, within the container's quota.",
    )
    depth_policy: str = Field(
        "auto",
        description="How deep drafts are checked: off, fixed:K with K from 0 to 15, threshold:T, adaptive, algorithm1, or auto.",
    )
    block_wait_ms: int = Field(
        50, ge=0, le=60_000, description="The longest a step waits for a drafter's block; 0 never waits."
    )
    step_token_budget: int = Field(512, ge=16, le=65_536, description="The most rows of one forward pass.")
    state_memory_mib: int = Field(
        0,
        ge=0,
        description="Memory for the sessions' state; 0 takes what is free once the model is loaded, less the margin.",
    )
    memory_margin_mib: int = Field(
        2048,
        ge=0,
        description="Free memory that is left to others when state_memory_mib is 0; never more than half of what is free.",
    )
    max_sessions: int = Field(
        1024,
        ge=1,
        le=1_000_000,
        description="Sessions remembered; beyond it the longest idle is forgotten.",
    )
    max_queued_turns: int = Field(
        256,
        ge=1,
        le=1_000_000,
        description="Turns that may wait for room; beyond it they are refused.",
    )
    leftover_percent: int = Field(
        25,
        ge=0,
        le=100,
        description="How much of the state memory ended sessions may hold until somebody needs it: "
        "a prompt that begins like theirs is not read again.",
    )
    context_limit: int = Field(
        0, ge=0, description="The most tokens of a session; 0 takes the model's own limit."
    )
    verifier_id: str = Field(
        "",
        max_length=128,
        description="Name of this verifier, stable over restarts; empty for host name and port.",
    )

    @field_validator("depth_policy")
    @classmethod
    def _known_policy(cls, value: str) -> str:
        parse_depth_policy(value)
        return value
