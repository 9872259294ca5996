"""Log lines: words for people, or one JSON object per line that says to which run, stage and step
it belongs, for those who collect the logs of many jobs.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

from pythonjsonlogger.json import JsonFormatter

WORDS = "%(message)s"
FIELDS = "%(asctime)s %(levelname)s %(name)s %(message)s %(run)s %(stage)s %(step)s"


class LogContext(logging.Filter):
    """What this process works on; every record carries it."""

    def __init__(self) -> None:
        super().__init__()
        self.run: str | None = None
        self.stage: str | None = None

    def set(self, run: str | None, stage: str | None) -> None:
        """Say what the process works on from now on."""
        self.run, self.stage = run, stage

    def filter(self, record: logging.LogRecord) -> bool:
        """Add run, stage, and the step where the line is of one (`extra={"step": step}`)."""
        record.run, record.stage = self.run, self.stage
        record.step = getattr(record, "step", None)
        return True


LOG_CONTEXT = LogContext()


def configure_logging(form: Literal["text", "json"], words: str = WORDS, **clock: Any) -> None:
    """Send this process's log lines to its standard error, as `tracking.logs` wants them; `words`
    and `clock` are the format of those for people."""
    handler = logging.StreamHandler()
    handler.addFilter(LOG_CONTEXT)
    handler.setFormatter(
        JsonFormatter(FIELDS) if form == "json" else logging.Formatter(words, **clock)
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
