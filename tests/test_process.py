"""Settings of a process: log lines as text and as JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from pear_ray.process import LOG_CONTEXT, configure_logging


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, restored afterwards."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:], logger.level = handlers, level
    LOG_CONTEXT.update(run=None, stage=None)


def test_json_lines_name_run_stage_and_step(root, capsys):
    configure_logging("json")
    LOG_CONTEXT.update(run="/runs/a", stage="rl")
    logging.getLogger("pear_ray.x").info("pass rate %.1f", 0.5, extra={"step": 3})
    logging.getLogger("elsewhere").warning("without a step")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.pop("asctime") and second.pop("asctime")
    context = {"run": "/runs/a", "stage": "rl"}
    assert first == context | {
        "levelname": "INFO", "name": "pear_ray.x", "message": "pass rate 0.5", "step": 3,
    }  # fmt: skip
    assert second == context | {
        "levelname": "WARNING", "name": "elsewhere", "message": "without a step", "step": None,
    }  # fmt: skip


def test_an_error_keeps_its_traceback_in_one_json_line(root, capsys):
    configure_logging("json")
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("pear_ray.x").exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: why" in json.loads(line)["exc_info"]


def test_text_lines_have_only_the_format_given(root, capsys):
    configure_logging("text", "%(asctime)s %(message)s", datefmt="noon")
    LOG_CONTEXT.update(run="/runs/a", stage="rl")
    logging.getLogger("pear_ray.x").info("pass rate %.1f", 0.5, extra={"step": 3})
    assert capsys.readouterr().err == "noon pass rate 0.5\n"
