"""The one place that touches NIXL's own module, and how its process-wide manners are mended."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import logging.config
import os
from functools import cache
from typing import Any, Final

from baton.errors import ConfigError

PACKAGE: Final = "nixl_cu13"
MEMORY: Final = "DRAM"

# Defaults; an environment that says otherwise wins. What goes wrong comes back as a result and is
# logged by us, and UCX would else take this process's signal handlers to print a stack.
_ENVIRONMENT = {
    "NIXL_LOG_LEVEL": "FATAL",
    "UCX_LOG_LEVEL": "fatal",
    "UCX_HANDLE_ERRORS": "none",
}


def check_installed() -> None:
    """Raises:
    ConfigError: NIXL is not installed.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(
            "the nixl transport needs the package nixl-cu13: install baton-serve[nixl]"
        )


@cache
def nixl() -> Any:
    """NIXL's module, imported once.

    Raises:
        ConfigError: it is not installed or cannot be loaded.
    """
    check_installed()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Its import closes the process's log handlers and sets logging up anew, onto stdout.
    configure, raises = logging.config.dictConfig, logging.raiseExceptions
    try:
        logging.config.dictConfig = lambda _: None  # type: ignore[assignment]
        return importlib.import_module(PACKAGE)
    except ImportError as error:
        raise ConfigError(f"NIXL cannot be loaded: {error}") from error
    finally:
        logging.config.dictConfig = configure
        logging.raiseExceptions = raises


def new_agent(name: str) -> Any:
    """An agent with UCX and without a progress thread (which spins) or a listener thread."""
    module = nixl()
    config = module.nixl_agent_config(
        enable_prog_thread=False, enable_listen_thread=False, backends=["UCX"]
    )
    return module.nixl_agent(name, config)


@cache
def warm_up() -> None:
    """Have NIXL load what the first agent of a process loads, which takes half a second.

    Raises:
        ConfigError: it is not installed, or does not start.
    """
    errors: tuple[type[Exception], ...] = (*agent_errors(), RuntimeError)
    try:
        new_agent("first")
    except errors as error:
        raise ConfigError(f"NIXL does not start: {error}") from error


@cache
def agent_errors() -> tuple[type[Exception], ...]:
    """What NIXL raises; these have no common root but `Exception`."""
    bindings = importlib.import_module(f"{nixl().__name__}._bindings")
    return tuple(
        found
        for name, found in vars(bindings).items()
        if name.endswith("Error") and isinstance(found, type) and issubclass(found, Exception)
    )
