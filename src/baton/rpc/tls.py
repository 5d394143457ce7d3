"""TLS between gateways and workers: certificates of the deployment's authority on both sides.

A certificate says what its holder may be, not where it is: `baton-gateway`, `baton-worker`, or
both, as DNS names. Who calls expects the name of the other role, and who is called asks for it, so
that a worker's key opens no worker, and a gateway's cannot pose as one. Which deployment it is says
the authority, which must therefore be the deployment's alone; the secret is asked for as well.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, Final

import grpc

from baton.config import TlsFiles

GATEWAY: Final = "baton-gateway"
WORKER: Final = "baton-worker"


class RpcTls:
    """What a process shows and trusts; its files are read once, here.

    Raises:
        ConfigError: a file cannot be read or is not what it should be; names the field.
    """

    def __init__(self, files: TlsFiles) -> None:
        files.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # gRPC would tell much later
        self._ca, self._cert, self._key = (
            Path(path).read_bytes() for path in (files.ca_file, files.cert_file, files.key_file)
        )

    def listening(self) -> grpc.ServerCredentials:
        """For the end that is called: nobody gets past the handshake without a certificate."""
        return grpc.ssl_server_credentials(
            [(self._key, self._cert)], self._ca, require_client_auth=True
        )

    def calling(self) -> grpc.ChannelCredentials:
        """For the end that calls."""
        return grpc.ssl_channel_credentials(self._ca, self._key, self._cert)


def may_be(role: str, context: Any) -> bool:
    """Whether the certificate of the caller behind a grpc context has this name."""
    names = context.auth_context().get("x509_subject_alternative_name", ())
    return role.encode() in names
