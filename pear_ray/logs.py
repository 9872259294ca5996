"""Log lines: text for people, or JSON objects with run, stage and step for log collectors."""

from __future__ import annotations

import logging
from typing import Any, Literal

from pythonjsonlogger.json import JsonFormatter

TEXT_FORMAT = "%(message)s"
JSON_FIELDS = "%(asctime)s %(levelname)s %(name)s %(message)s %(run)s %(stage)s %(step)s"


class LogContext(logging.Filter):
    """Run and stage of this process, added to every log record."""

    def __init__(self) -> None:
        super().__init__()
        self.run: str | None = None
        self.stage: str | None = None

    def set(self, run: str | None, stage: str | None) -> None:
        """Set run and stage of the records to come."""
        self.run = run
        self.stage = stage

    def filter(self, record: logging.LogRecord) -> bool:
        """Add run, stage and step (`extra={"step": step}`) to a record."""
        record.run = self.run
        record.stage = self.stage
        record.step = getattr(record, "step", None)
        return True


LOG_CONTEXT = LogContext()


def configure_logging(form: Literal["text", "json"], text_format: str = TEXT_FORMAT, **options: Any) -> None:
    """Send this process's log lines to stderr, in the form of `tracking.logs`; `options` go to logging.Formatter for
    text."""
    handler = logging.StreamHandler()
    handler.addFilter(LOG_CONTEXT)
    handler.setFormatter(JsonFormatter(JSON_FIELDS) if form == "json" else logging.Formatter(text_format, **options))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
