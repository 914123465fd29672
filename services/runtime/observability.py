"""Logs and metrics, set up once per process."""

import logging
import sys

import prometheus_client
import structlog

from services.runtime.config import ConfigError, LogSettings

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def configure_logging(service: str, settings: LogSettings) -> None:
    """Send structured logs to stderr. Raises ConfigError for an unknown level or format."""
    if settings.level not in _LEVELS:
        raise ConfigError(f"log.level: {settings.level!r} is not one of {', '.join(_LEVELS)}")
    if settings.format not in ("console", "json"):
        raise ConfigError(f"log.format: {settings.format!r} is not one of console, json")
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.StackInfoRenderer(),
    ]
    if settings.format == "json":
        processors.append(structlog.processors.dict_tracebacks)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[settings.level]),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    logging.basicConfig(level=_LEVELS["warning"], stream=sys.stderr)


def serve_metrics(port: int) -> None:
    """Expose the default Prometheus registry on a loopback port; 0 exposes nothing."""
    if port:
        prometheus_client.start_http_server(port, addr="127.0.0.1")
