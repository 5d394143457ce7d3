"""The error tree: what a client, a peer or a caller may be told.

    BatonError
    ├── ConfigError            a flag, file or model directory is wrong; names the field
    ├── ModelError             a checkpoint cannot be served; names the config field or tensor
    └── ServeError             a request ended badly; has a code, an HTTP status and a stage
        ├── InvalidRequest     400  the client's fault; `param` names the field
        ├── Unauthorized       401
        ├── NotFound           404
        ├── Overloaded         429  try again after `retry_after_s`
        ├── DeadlineExceeded   504
        ├── TransferFailed     502  KV could not be moved and recomputing was not possible
        ├── WorkerLost         503  the worker that held the request is gone
        ├── Unavailable        503  no worker can take the request
        └── Internal           500  our fault

A `ServeError` crosses process borders as its `to_wire()` form, never as a Python exception.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec


class BatonError(Exception):
    """Root of every error that Baton raises on purpose."""


class ConfigError(BatonError):
    """The configuration cannot be used; the message names the field and what to change."""


class ModelError(BatonError):
    """A checkpoint cannot be served; the message names the field or tensor at fault."""


class WireError(msgspec.Struct, frozen=True):
    """A `ServeError` on its way between processes or to a client.

    code: one of `CODES`; stage: where it happened (`validate`, `queue`, `prefill`, `export`,
    `transfer`, `decode`, `gateway`).
    """

    code: str
    message: str
    stage: str = "gateway"
    param: str | None = None
    retry_after_s: float | None = None


class ServeError(BatonError):
    """A request that ends without its answer."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        stage: str = "gateway",
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.stage = stage
        self.param = param
        self.retry_after_s = retry_after_s

    def to_wire(self) -> WireError:
        return WireError(self.code, self.message, self.stage, self.param, self.retry_after_s)


class InvalidRequest(ServeError):
    code = "invalid_request"
    status = 400


class Unauthorized(ServeError):
    code = "invalid_api_key"
    status = 401


class NotFound(ServeError):
    code = "not_found"
    status = 404


class Overloaded(ServeError):
    code = "overloaded"
    status = 429
    retryable = True


class DeadlineExceeded(ServeError):
    code = "deadline_exceeded"
    status = 504


class TransferFailed(ServeError):
    code = "transfer_failed"
    status = 502
    retryable = True


class WorkerLost(ServeError):
    code = "worker_lost"
    status = 503
    retryable = True


class Unavailable(ServeError):
    code = "unavailable"
    status = 503
    retryable = True


class Internal(ServeError):
    code = "internal_error"


CODES: dict[str, type[ServeError]] = {
    cls.code: cls
    for cls in (
        InvalidRequest,
        Unauthorized,
        NotFound,
        Overloaded,
        DeadlineExceeded,
        TransferFailed,
        WorkerLost,
        Unavailable,
        Internal,
    )
}


def from_wire(wire: WireError) -> ServeError:
    """The exception for a `WireError`; a code that this version does not know is `Internal`."""
    return CODES.get(wire.code, Internal)(
        wire.message, stage=wire.stage, param=wire.param, retry_after_s=wire.retry_after_s
    )
