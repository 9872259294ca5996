"""Progress of scoring: rates since the first shard, and the time left."""

from __future__ import annotations

import logging
import time

import ray.data

from pear_ray.metrics import Tracker
from pear_ray.run import RunDir
from pear_ray.score.scorer import ShardResult
from pear_ray.score.shards import Shard

log = logging.getLogger(__name__)

SECONDS_PER_REPORT = 10.0


class Progress:
    """Logs progress and engine restarts while shards are scored."""

    def __init__(self, run: RunDir, tracker: Tracker, shards: list[Shard], num_rejected: int) -> None:
        self._run = run
        self._tracker = tracker
        self._num_rejected = num_rejected
        self._num_shards = len(shards)
        self._tokens_left = sum(shard.num_tokens for shard in shards)
        self._num_done = 0
        # After the first shard, whose time includes the start of an engine.
        self._num_rows = 0
        self._num_tokens = 0
        self._shard_tokens = 0
        self._first_ended: float | None = None
        self._last_ended = 0.0
        self._last_report = 0.0
        self._processes: dict[str, str] = {}

    def follow(self, results: ray.data.Dataset) -> None:
        """Wait for all shards of a dataset of `ShardResult`."""
        for row in results.iter_rows():
            result = ShardResult(**row)
            self._check_restart(result)
            self._num_done += 1
            self._tokens_left -= result.shard_tokens
            if self._first_ended is None:
                self._first_ended = self._last_ended = result.ended
            else:
                # The engines' clock: results reach this process in bursts.
                self._last_ended = max(self._last_ended, result.ended)
                self._num_rows += result.num_rows
                self._num_tokens += result.num_tokens
                self._shard_tokens += result.shard_tokens
            is_due = time.monotonic() - self._last_report > SECONDS_PER_REPORT
            if is_due or self._num_done == self._num_shards:
                self._last_report = time.monotonic()
                self._report(self._last_ended - self._first_ended)

    def _check_restart(self, result: ShardResult) -> None:
        previous = self._processes.setdefault(result.actor, result.process)
        if previous != result.process:
            self._processes[result.actor] = result.process
            text = f"engine process {previous} died and was replaced by {result.process}"
            self._run.event("score", "restarted", text)

    def _report(self, seconds: float) -> None:
        rates: dict[str, float] = {}
        text = f"score: {self._num_done} of {self._num_shards} shards"
        if seconds > 0 and self._shard_tokens:
            rates = {
                "rows_per_second": self._num_rows / seconds,
                "tokens_per_second": self._num_tokens / seconds,
                "seconds_left": self._tokens_left * seconds / self._shard_tokens,
            }
            text += (
                f", {rates['rows_per_second']:.0f} rows/s,"
                f" {rates['tokens_per_second']:.0f} tokens/s, {rates['seconds_left']:.0f} s left"
            )
        self._tracker.log(self._num_done, parts=self._num_shards, rejected_rows=self._num_rejected, **rates)
        log.info(text, extra={"step": self._num_done})
