"""Certificates for tests, made by openssl: a CA with a server's and a client's, and another CA."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.requirements import requires

NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


@dataclass(frozen=True, slots=True)
class Certificates:
    """Paths of PEM files."""

    ca: str
    cert: str
    key: str
    other_ca: str


def make_certificates(folder: Path) -> Certificates:
    """For localhost and 127.0.0.1, good for a day; the certificate serves for both ends."""
    openssl = str(requires("openssl"))

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True, timeout=60)

    for name in ("ca", "other"):
        run(
            "req",
            "-x509",
            *NEW_KEY,
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.pem",
            "-days",
            "1",
            "-subj",
            f"/CN={name}",
        )
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    run("req", "-new", *NEW_KEY, "-keyout", "own.key", "-out", "own.csr", "-subj", "/CN=own")
    signed_by = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
    run("x509", "-req", "-in", "own.csr", *signed_by, "-days", "1", "-out", "own.pem", "-extfile", "names")
    return Certificates(*(str(folder / name) for name in ("ca.pem", "own.pem", "own.key", "other.pem")))
