"""Certificate authorities of a deployment and certificates of it, made on the spot with openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

from baton.fabric.tls import TlsFiles

_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"


def make_certificate(directory: Path, name: str) -> TlsFiles:
    """A new authority, and a certificate that it signed, valid for two days; `name` is both.

    Raises:
        FileNotFoundError: there is no openssl command.
    """
    ca, ca_key = directory / f"{name}-ca.pem", directory / f"{name}-ca-key.pem"
    cert, key, ask = (directory / f"{name}{end}.pem" for end in ("", "-key", "-ask"))
    for command in (
        f"req -x509 {_KEY} -days 2 -subj /CN={name} -keyout {ca_key} -out {ca}",
        f"req -new {_KEY} -subj /CN={name}-worker -keyout {key} -out {ask}",
        f"x509 -req -in {ask} -CA {ca} -CAkey {ca_key} -CAcreateserial -days 2 -out {cert}",
    ):
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
    return TlsFiles(str(ca), str(cert), str(key))
