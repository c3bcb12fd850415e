"""What can go wrong in the model store: each error says what happened and what to do next."""

from __future__ import annotations


class StoreError(Exception):
    """A model cannot be served from the store. `message` says why, `next_step` what the reader can do about it."""

    def __init__(self, message: str, next_step: str) -> None:
        super().__init__(f"{message} {next_step}")
        self.message = message
        self.next_step = next_step


class UnknownModel(StoreError):
    """The name is no catalogue name, no folder with a model and no hub id."""


class NotPulled(StoreError):
    """The catalogue has the model, this machine has not."""


class DownloadFailed(StoreError):
    """The package index or the hub did not deliver the model."""


class WrongChecksum(StoreError):
    """What was downloaded, or what lies in the store, is not what the catalogue or the manifest pins."""


class MissingPackage(StoreError):
    """The work needs a Python package of an extra that is not installed."""


class UnsupportedFile(StoreError):
    """A GGUF file that this converter does not understand."""
