"""API keys: who may use the gateway, and as which tenant.

The file holds no key, only SHA-256 hashes, one a line in hexadecimal, optionally followed by the
name of the tenant; `#` starts a comment. Keys are long random strings, so a plain hash is enough.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path

from baton.errors import ConfigError

_LINE = re.compile(r"([0-9a-fA-F]{64})(?:\s+([A-Za-z0-9_.-]{1,64}))?\Z")


class ApiKeys:
    """The set of accepted keys.

    `hashes` maps SHA-256 digests to tenant names.
    """

    def __init__(self, hashes: dict[bytes, str]) -> None:
        self._hashes = dict(hashes)

    @classmethod
    def from_file(cls, path: str | Path) -> ApiKeys:
        """Raises:
        ConfigError: the file cannot be read, holds no hash, or a line is not one.
        """
        try:
            lines = Path(path).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"gateway.api_keys_file: cannot read {path}: {error}") from error
        hashes: dict[bytes, str] = {}
        for number, line in enumerate(lines, 1):
            text = line.split("#", 1)[0].strip()
            if not text:
                continue
            match = _LINE.match(text)
            if match is None:
                # The line itself is not shown: it may hold a key by mistake.
                raise ConfigError(
                    f"gateway.api_keys_file: line {number} of {path} is not a SHA-256 hash in"
                    " hexadecimal with an optional tenant name; make one with:"
                    " printf %s KEY | sha256sum"
                )
            digest = bytes.fromhex(match[1])
            hashes[digest] = match[2] or match[1][:16].lower()
        if not hashes:
            raise ConfigError(
                f"gateway.api_keys_file: {path} holds no hash; nobody could use the gateway"
            )
        return cls(hashes)

    def tenant(self, authorization: bytes | None) -> str | None:
        """The tenant of an `Authorization: Bearer KEY` header; None: not accepted.

        Every stored hash is compared, each in constant time.
        """
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        digest = hashlib.sha256(key.strip()).digest()
        found: str | None = None
        for known, tenant in self._hashes.items():
            if hmac.compare_digest(known, digest):
                found = tenant
        return found
