"""TLS between workers: version 1.3, and certificates on both sides.

A deployment has a certificate authority of its own; whoever shows a certificate of it belongs to
the deployment, and nobody else gets past the handshake. Names in certificates are not looked at:
workers come and go at any address, and what one may read is decided by the grant, whose MAC only
the source can make, as what a reader takes for right is decided by the digests of the commit
record. So a member that poses as another can neither read without a grant nor give wrong blocks.
The authority must therefore be the deployment's alone: with a public one, anybody would belong.
"""

from __future__ import annotations

import ssl

from baton.config import TlsFiles

__all__ = ["TlsFiles", "client_context", "server_context"]


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """For the end that is connected to.

    Raises:
        ConfigError: a file cannot be read or is not what it should be; names the field.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # nobody resumes, and an idle connection should stay silent
    return _with_files(context, files)


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """For the end that connects. Raises as `server_context` does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    return _with_files(context, files)


def _with_files(context: ssl.SSLContext, files: TlsFiles) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    files.load_into(context)
    return context
