"""Where numbers go: metrics.jsonl always, Ray's Prometheus endpoint, TensorBoard or W&B if asked.

Only stages write here. A number that is not finite is written as null.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Self

from ray.util import metrics as prometheus

from pear_ray.config import Tracking
from pear_ray.run import atomic_write

TAGS = ("run", "stage")
EVENTS = "Lines of events.jsonl: deaths, restarts, resumes, engines that come and go"

_LEARNING = {
    "loss": "Loss that the optimizer step minimized, as the objective defines it",
    "entropy": "Mean entropy of the next token's distribution, nats per token",
    "grad_norm": "Norm of the gradient before it is clipped",
    "learning_rate": "Learning rate of the optimizer step",
    "num_tokens": "Tokens that the step learned from, all ranks",
    "effective_sample_size": "Effective sample size of the token weights, share of the tokens",
}

_ROLLOUTS = {
    "reward_mean": "Mean reward of the step's answers",
    "pass_rate": "Share of the step's answers that are right",
    "frac_reward_zero_std": "Share of the groups whose answers all earned the same",
    "first_problem": "Number of the step's first problem",
    "next_problem": "Number of the first problem that no step has learned from",
    "problems_dropped": "Problems that were replaced since they carry no signal or do not fit",
    "completions_mean_length": "Mean length of an answer, tokens",
    "completions_clipped_ratio": "Share of the answers that were cut at the longest length allowed",
    "staleness_max": "Age of the oldest token's weights, learner steps",
    "staleness_mean": "Mean age of the weights that wrote a token, learner steps",
    "pause_seconds": "Longest pause of an engine to take over weights, seconds",
    "fetch_seconds": "Longest fetch of weights until they are ready, seconds; generation goes on",
    "engine_idle_seconds": "Seconds that an engine had nothing to do, mean over engines",
    "rollout_seconds": "Seconds between the rollouts of the last step and of this one",
    "num_engines": "Engines that run or start",
    "ratio_mean": "Mean ratio of the policy to the policy that sampled",
    "clip_frac": "Share of the tokens whose ratio is clipped",
    "logprob_diff_mean": "Mean difference of learner's and engine's log-probs, nats per token",
    "mismatch_kl": "KL divergence of the learner's policy and the engine's, nats per token",
    "is_clip_frac": "Share of the tokens whose correction is truncated",
    "reference_kl": "KL divergence to the policy that RL starts from, nats per token",
    "logprob_parity_max": "Largest difference of learner and engine on the probe, nats",
    "wait_seconds": "Seconds that the learners waited for rollouts",
    "train_seconds": "Seconds that the learners learned",
    "publish_seconds": "Seconds that publishing weights took",
    "published_mib_per_rank": "Weights published by a rank, MiB",
    "step_seconds": "Seconds of the whole step",
    "eval_version": "Weights version of the newest evaluation",
    "pass_at_1": "Held-out pass@1 of the newest evaluation",
    "pass_at_1_low": "Its 95 % interval's lower end",
    "pass_at_1_high": "Its 95 % interval's upper end",
    "eval_tokens_mean": "Mean length of the evaluated answers, tokens",
    "eval_clipped_ratio": "Share of the evaluated answers that were cut",
}

METRIC_HELP: dict[str, dict[str, str]] = {
    "engine": {
        "num_requests_running": "Requests that a vLLM engine works on",
        "num_requests_waiting": "Requests that wait in a vLLM engine",
        "kv_cache_usage": "Share of a vLLM engine's key-value cache in use",
        "prompt_tokens": "Tokens of prompts and of given answers that a vLLM engine has read",
        "generation_tokens": "Tokens that a vLLM engine has generated",
        "preemptions": "Requests that a vLLM engine has put back for want of cache",
    },
    "sample": {
        "examples": "Right answers that were kept of the latest source",
        "attempts": "Answers that the latest source was sampled for",
    },
    "score": {
        "parts": "Parts of the corpus that this attempt scores",
        "rejected_rows": "Rows of the corpus that cannot be used",
        "rows_per_second": "Rows scored per second since the first part was done",
        "tokens_per_second": "Tokens scored per second since the first part was done",
        "seconds_left": "Seconds until the corpus is scored, at the rate so far",
    },
    "sft": _LEARNING
    | {
        "nll": "Negative log-likelihood without weights, nats per token",
        "heldout_loss": "Negative log-likelihood of held-out rows, nats per token",
        "lowest_heldout_loss": "Lowest held-out loss so far, nats per token",
        "weight_mean": "Mean importance weight of the tokens",
        "log_ratio_mean": "Mean log-ratio of policy and behavior policy, nats per token",
        "log_ratio_std": "Standard deviation of the log-ratio, nats per token",
        "clip_frac_low": "Share of the tokens whose log-ratio is at the lower clip",
        "clip_frac_high": "Share of the tokens whose log-ratio is at the upper clip",
        "weight_frac_at_floor": "Share of the tokens with the smallest weight allowed",
        "weight_frac_at_ceiling": "Share of the tokens with the largest weight allowed",
    },
    "rl": _LEARNING | _ROLLOUTS,
    "cooperate": _LEARNING
    | _ROLLOUTS
    | {
        "rl_weight": "Share of the rollouts in the loss of the step",
        "rl_loss": "Loss of the rollouts alone, as rl's objective defines it",
        "sft_loss": "Loss of the traces alone, as sft's objective defines it, nats per token",
        "sft_nll": "Negative log-likelihood of the traces without weights, nats per token",
        "sft_tokens": "Tokens of traces that the step learned from, all ranks",
        "sft_weight_mean": "Mean importance weight of the traces' tokens",
        "sft_effective_sample_size": (
            "Effective sample size of the traces' token weights, share of their tokens"
        ),
        "sft_grad_norm": "Norm of the gradient of a step on traces alone, before it is clipped",
        "cooperative_gain": (
            "RL's objective of BRIDGE's policy less that of its shadow, on the same rollouts"
        ),
        "shadow_loss": "Loss of the rollouts that BRIDGE's shadow minimized",
        "shadow_grad_norm": "Norm of the gradient of BRIDGE's shadow before it is clipped",
        "prefix_frac": "Share of TRAPO's answers that went on from the beginning of a trace",
        "frozen_frac": "Share of the parameters that MIFO's step on traces left as they were",
    },
}


def metric(stage: str, name: str) -> str:
    """Name of a number's Prometheus metric."""
    is_shared = stage == "cooperate" and name in METRIC_HELP["rl"]
    return f"pear_ray_{'rl' if is_shared else stage}_{name}"


class Tracker:
    """Numbers of one stage of one run, by step."""

    def __init__(self, folder: Path, stage: str, settings: Tracking) -> None:
        self._path = folder / "metrics.jsonl"
        self._stage = stage
        self._tags = {"run": str(folder), "stage": stage}
        self._step = prometheus.Gauge("pear_ray_step", "Latest step of the stage", TAGS)
        self._step_time = prometheus.Gauge(
            "pear_ray_step_time_seconds", "When the latest step of the stage ended, Unix time", TAGS
        )
        self._gauges = {
            name: prometheus.Gauge(metric(stage, name), text, TAGS)
            for name, text in METRIC_HELP[stage].items()
        }
        self._tensorboard: Any = None
        self._wandb: Any = None
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard" / stage))
        if settings.wandb_project:
            import wandb

            self._wandb = wandb.init(
                project=settings.wandb_project, name=f"{folder.name}-{stage}", dir=str(folder)
            )

    def rewind(self, step: int) -> Self:
        """Forget this stage's numbers from `step` on: an attempt that did not last wrote them."""
        if self._path.exists():
            rows = [
                row
                for row in read_metrics(self._path.parent)
                if row["stage"] != self._stage or row["step"] < step
            ]
            with atomic_write(self._path) as partial:
                partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self

    def log(self, step: int, **numbers: Any) -> None:
        """Write one step. Values are numbers, strings, or lists and dicts of numbers.

        Raises:
            KeyError: `METRIC_HELP` does not say what a number means.
        """
        now = round(time.time(), 3)
        row = {"stage": self._stage, "step": step, "time": now, **numbers}
        with self._path.open("a") as file:
            file.write(json.dumps(finite(row)) + "\n")
        scalars = {k: float(v) for k, v in numbers.items() if isinstance(v, int | float)}
        self._step.set(step, self._tags)
        self._step_time.set(now, self._tags)
        for name, value in scalars.items():
            self._gauges[name].set(value, self._tags)
            if self._tensorboard is not None:
                self._tensorboard.add_scalar(f"{self._stage}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{self._stage}/{k}": v for k, v in scalars.items()}, step=step)

    def close(self) -> None:
        """Hand over what is still buffered."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(run_dir: Path, stage: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, or those of one stage; empty if there is no file.

    A last line without a newline was torn by a kill and is skipped.
    """
    path = run_dir / "metrics.jsonl"
    whole, _, _ = path.read_text().rpartition("\n") if path.exists() else ("", "", "")
    rows = map(json.loads, whole.splitlines())
    return [row for row in rows if stage in (None, row["stage"])]


def count_event(run: str, stage: str, kind: str) -> None:
    """Count what happened out of the ordinary, and say when it last did: alerts ask for the second,
    since a counter that appears has not risen."""
    tags = {"run": run, "stage": stage, "kind": kind}
    prometheus.Counter("pear_ray_events", EVENTS, tuple(tags)).inc(tags=tags)
    latest = prometheus.Gauge(
        "pear_ray_event_time_seconds", "When such an event last happened, Unix time", tuple(tags)
    )
    latest.set(time.time(), tags)


def finite(value: Any) -> Any:
    """The same JSON document with null in place of what JSON cannot say."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
