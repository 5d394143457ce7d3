"""The PEM files with which one process speaks TLS, and their loading with words for a bad one."""

from __future__ import annotations

import ssl

import msgspec

from baton.errors import ConfigError


class TlsFiles(msgspec.Struct, frozen=True):
    """Paths of PEM files: the deployment's authority, our certificate chain, and its key.

    section: of the configuration, where the fields stand.
    """

    ca_file: str
    cert_file: str
    key_file: str
    section: str = "fabric"

    def load_into(self, context: ssl.SSLContext) -> None:
        """Trust the authority and show the certificate.

        Raises:
            ConfigError: a file cannot be read or is not what it should be; names the field.
        """
        name = f"{self.section}.tls"
        try:
            context.load_verify_locations(cafile=self.ca_file)
        except OSError as error:
            raise ConfigError(
                f"{name}_ca_file {self.ca_file} cannot be used: {error}; "
                "give the PEM file of the deployment's certificate authority"
            ) from error
        try:
            context.load_cert_chain(self.cert_file, self.key_file, password=_no_password)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{name}_cert_file {self.cert_file} with {name}_key_file {self.key_file} "
                f"cannot be used: {error}; give a PEM certificate chain and its key, not encrypted"
            ) from error


def _no_password() -> str:
    raise ValueError("the key is encrypted")  # else OpenSSL asks at the terminal
