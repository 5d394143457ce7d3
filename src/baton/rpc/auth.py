"""The deployment secret: who may join the control plane.

The supervisor writes 32 random bytes to `<runtime-dir>/secret`, which only its user can read; a
deployment of several hosts has a file of its own for it. What crosses the wire is a token derived
from it, in the metadata of every call.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from baton.errors import ConfigError

SECRET_BYTES: Final = 32
METADATA_KEY: Final = "baton-token"


def create_secret(runtime_dir: Path) -> bytes:
    """Write a new secret to `<runtime_dir>/secret` (mode 0600) and return it.

    Raises:
        FileExistsError: there is one already.
    """
    secret = secrets.token_bytes(SECRET_BYTES)
    descriptor = os.open(runtime_dir / "secret", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
    return secret


def read_secret(runtime_dir: Path, secret_file: str | None = None) -> bytes:
    """The secret of the deployment: that of `runtime_dir`, or what `secret_file` holds.

    Raises:
        ConfigError: there is none, others can read it, or it is not a secret.
    """
    path = runtime_dir / "secret" if secret_file is None else Path(secret_file)
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            secret = file.read(SECRET_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the secret {path}: {error.strerror}") from None
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"the secret {path} is open to other users: chmod 600 it")
    if len(secret) != SECRET_BYTES:
        raise ConfigError(
            f"the secret {path} must have {SECRET_BYTES} bytes: write "
            f"some with head -c {SECRET_BYTES} /dev/urandom"
        )
    return secret


def token(secret: bytes) -> str:
    """What a caller sends in place of the secret: 64 hex digits."""
    return hmac.new(secret, b"baton rpc token 1", hashlib.sha256).hexdigest()


def credentials(secret: bytes) -> tuple[tuple[str, str], ...]:
    """The metadata that a caller adds to every call."""
    return ((METADATA_KEY, token(secret)),)


def is_authorized(secret: bytes, metadata: Iterable[tuple[str, str | bytes]] | None) -> bool:
    """Whether a call's metadata hold the token of `secret`; compared in constant time."""
    for key, value in metadata or ():
        if key == METADATA_KEY and isinstance(value, str):
            return hmac.compare_digest(value.encode(), token(secret).encode())
    return False
