"""What a vLLM engine says of itself, at Ray's Prometheus endpoint.

vLLM can do this too, but only where all of Ray Serve is installed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge

from pear_ray.metrics import METRIC_HELP

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

# Engines of small models make a hundred steps a second.
SECONDS_BETWEEN_REPORTS = 1.0
COUNTERS = ("prompt_tokens", "generation_tokens", "preemptions")


class EngineStatistics:
    """Takes the place of vLLM's logger of statistics: the latest state, and sums over steps."""

    def __init__(self) -> None:
        texts = METRIC_HELP["engine"]
        self._counters = {
            name: Counter(f"pear_ray_engine_{name}", text)
            for name, text in texts.items()
            if name in COUNTERS
        }
        self._gauges = {
            name: Gauge(f"pear_ray_engine_{name}", text)
            for name, text in texts.items()
            if name not in COUNTERS
        }
        self._sums = dict.fromkeys(COUNTERS, 0)
        self._reported = 0.0

    def record(
        self,
        scheduler_stats: SchedulerStats,
        iteration_stats: IterationStats | None,
        **_: object,
    ) -> None:
        """Called by vLLM after each step."""
        if iteration_stats is not None:
            self._sums["prompt_tokens"] += iteration_stats.num_prompt_tokens
            self._sums["generation_tokens"] += iteration_stats.num_generation_tokens
            self._sums["preemptions"] += iteration_stats.num_preempted_reqs
        running, waiting = scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs
        is_idle = not running and not waiting
        if not is_idle and time.monotonic() < self._reported + SECONDS_BETWEEN_REPORTS:
            return
        self._reported = time.monotonic()
        self._gauges["num_requests_running"].set(running)
        self._gauges["num_requests_waiting"].set(waiting)
        self._gauges["kv_cache_usage"].set(scheduler_stats.kv_cache_usage)
        for name, value in self._sums.items():
            if value:
                self._counters[name].inc(value)
        self._sums = dict.fromkeys(COUNTERS, 0)

    def log(self) -> None:
        """Called by vLLM now and then; there is nothing to print."""
