"""Certificate authorities of a deployment and certificates of it, made on the spot with openssl."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from baton.config import TlsFiles

_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"


def make_certificate(
    directory: Path, name: str, roles: Sequence[str] = (), *, authority: str | None = None
) -> TlsFiles:
    """A certificate, valid for two days, for `roles`, and a new authority that signed it.

    name: of both. authority: the name of an earlier one that signs this certificate instead.

    Raises:
        FileNotFoundError: there is no openssl command.
    """
    signer = authority or name
    ca, ca_key = directory / f"{signer}-ca.pem", directory / f"{signer}-ca-key.pem"
    cert, key, ask = (directory / f"{name}{end}.pem" for end in ("", "-key", "-ask"))
    extensions = directory / f"{name}.cnf"
    names = ",".join(f"DNS:{role}" for role in roles)
    extensions.write_text(f"subjectAltName={names}\n" if names else "")
    commands = [
        f"req -x509 {_KEY} -days 2 -subj /CN={name} -keyout {ca_key} -out {ca}",
        f"req -new {_KEY} -subj /CN={name}-worker -keyout {key} -out {ask}",
        f"x509 -req -in {ask} -CA {ca} -CAkey {ca_key} -CAcreateserial -days 2 -out {cert} "
        f"-extfile {extensions}",
    ]
    for command in commands[1:] if authority else commands:
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
    return TlsFiles(str(ca), str(cert), str(key))
