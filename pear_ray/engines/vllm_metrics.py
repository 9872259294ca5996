"""Engine metrics at Ray's Prometheus endpoint. vLLM's own exporter requires Ray Serve."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge

from pear_ray.metrics import METRIC_HELP

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

# Engines of small models run a hundred steps a second.
SECONDS_BETWEEN_REPORTS = 1.0
COUNTERS = ("prompt_tokens", "generation_tokens", "preemptions")


class EngineStatistics:
    """Replaces vLLM's logger manager: exports the latest state, and sums over steps."""

    def __init__(self) -> None:
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        for name, text in METRIC_HELP["engine"].items():
            if name in COUNTERS:
                self._counters[name] = Counter(f"pear_ray_engine_{name}", text)
            else:
                self._gauges[name] = Gauge(f"pear_ray_engine_{name}", text)
        self._sums = dict.fromkeys(COUNTERS, 0)
        self._reported_at = 0.0

    def record(self, scheduler_stats: SchedulerStats, iteration_stats: IterationStats | None, **_: object) -> None:
        """Add one step; called by vLLM. Exports once a second, and when the engine goes idle."""
        if iteration_stats is not None:
            self._sums["prompt_tokens"] += iteration_stats.num_prompt_tokens
            self._sums["generation_tokens"] += iteration_stats.num_generation_tokens
            self._sums["preemptions"] += iteration_stats.num_preempted_reqs
        running, waiting = scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs
        is_idle = not running and not waiting
        if not is_idle and time.monotonic() < self._reported_at + SECONDS_BETWEEN_REPORTS:
            return
        self._reported_at = time.monotonic()
        self._gauges["num_requests_running"].set(running)
        self._gauges["num_requests_waiting"].set(waiting)
        self._gauges["kv_cache_usage"].set(scheduler_stats.kv_cache_usage)
        for name, total in self._sums.items():
            if total:
                self._counters[name].inc(total)
        self._sums = dict.fromkeys(COUNTERS, 0)

    def log(self) -> None:
        """Do nothing; called by vLLM to print a log line."""
