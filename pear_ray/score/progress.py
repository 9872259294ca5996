"""How far scoring is."""

from __future__ import annotations

import logging
import time

import ray.data

from pear_ray.metrics import Tracker
from pear_ray.run import RunDir
from pear_ray.score.shards import Shard

log = logging.getLogger(__name__)

SECONDS_PER_REPORT = 10.0


class Progress:
    """Says how far scoring is: rates since the first part was done, and the time left."""

    def __init__(
        self, run: RunDir, tracker: Tracker, parts: list[Shard], num_rejected: int
    ) -> None:
        self._run, self._tracker, self._num_rejected = run, tracker, num_rejected
        self._num_parts = len(parts)
        self._tokens_left = sum(part.num_tokens for part in parts)
        self._done = self._num_rows = self._num_tokens = self._tokens_passed = 0
        self._processes: dict[str, str] = {}
        self._started: float | None = None
        self._reported = self._latest = 0.0

    def follow(self, scored: ray.data.Dataset) -> None:
        """Wait for every part, and tell of it."""
        for result in scored.iter_rows():
            self._note_restart(result["actor"], result["process"])
            self._done += 1
            self._tokens_left -= result["part_tokens"]
            if self._started is None:
                self._started = self._latest = result["ended"]
            else:
                # Results reach this process in bursts.
                self._latest = max(self._latest, result["ended"])
                self._num_rows += result["num_rows"]
                self._num_tokens += result["num_tokens"]
                self._tokens_passed += result["part_tokens"]
            is_late = time.monotonic() - self._reported > SECONDS_PER_REPORT
            if is_late or self._done == self._num_parts:
                self._reported = time.monotonic()
                self._report(self._latest - self._started)

    def _note_restart(self, actor: str, process: str) -> None:
        before = self._processes.setdefault(actor, process)
        if before != process:
            self._processes[actor] = process
            text = f"the engine of process {before} died; {process} took its place"
            self._run.event("score", "restarted", text)

    def _report(self, seconds: float) -> None:
        rates: dict[str, float] = {}
        if seconds > 0 and self._tokens_passed:
            rates = {
                "rows_per_second": self._num_rows / seconds,
                "tokens_per_second": self._num_tokens / seconds,
                "seconds_left": self._tokens_left * seconds / self._tokens_passed,
            }
        self._tracker.log(
            self._done, parts=self._num_parts, rejected_rows=self._num_rejected, **rates
        )
        log.info(
            "score: %d of %d parts%s",
            self._done,
            self._num_parts,
            ", {rows_per_second:.0f} rows/s, {tokens_per_second:.0f} tokens/s,"
            " {seconds_left:.0f} s left".format(**rates)
            if rates
            else "",
            extra={"step": self._done},
        )
