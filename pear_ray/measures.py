"""Every number that stages tell of their steps, and engines of themselves, and what it means: the
help text of its Prometheus metric, `pear_ray_STAGE_NAME` or `pear_ray_engine_NAME`. Units are in
names; what has none is a count or a ratio. What `cooperate` shares with `rl` has rl's name, so that
panels and alerts are one for both; the tag `stage` tells them apart.
"""

from __future__ import annotations

_LEARNING = {
    "loss": "Loss that the optimiser step minimised, as the objective defines it",
    "entropy": "Mean entropy of the next token's distribution, nats per token",
    "grad_norm": "Norm of the gradient before it is clipped",
    "learning_rate": "Learning rate of the optimiser step",
    "num_tokens": "Tokens that the step learned from, all ranks",
    "effective_sample_size": "Effective sample size of the token weights, share of the tokens",
}

_ROLLOUTS = {
    "reward_mean": "Mean reward of the step's answers",
    "pass_rate": "Share of the step's answers that are right",
    "groups_without_signal_share": "Share of the groups whose answers all earned the same",
    "first_problem": "Number of the step's first problem",
    "next_problem": "Number of the first problem that no step has learned from",
    "problems_dropped": "Problems that were replaced since they carry no signal or do not fit",
    "response_tokens_mean": "Mean length of an answer, tokens",
    "truncated_share": "Share of the answers that were cut at the longest length allowed",
    "staleness_max": "Age of the oldest token's weights, learner steps",
    "staleness_mean": "Mean age of the weights that wrote a token, learner steps",
    "pause_seconds": "Longest pause of an engine to take over weights, seconds",
    "fetch_seconds": "Longest fetch of weights until they are ready, seconds; generation goes on",
    "generator_idle_seconds": "Seconds that an engine had nothing to do, mean over engines",
    "rollout_seconds": "Seconds between the rollouts of the last step and of this one",
    "generators": "Engines that stand or start",
    "ratio_mean": "Mean ratio of the policy to the policy that sampled",
    "clipped_share": "Share of the tokens whose ratio is clipped",
    "mismatch_mean": "Mean difference of learner's and engine's log-probs, nats per token",
    "mismatch_kl": "KL divergence of the learner's policy and the engine's, nats per token",
    "truncated_weight_share": "Share of the tokens whose correction is truncated",
    "reference_kl": "KL divergence to the policy that RL starts from, nats per token",
    "probe_gap_max": "Largest difference of learner and engine on the probe, nats",
    "wait_seconds": "Seconds that the learners waited for rollouts",
    "learn_seconds": "Seconds that the learners learned",
    "publish_seconds": "Seconds that publishing weights took",
    "published_mib_per_rank": "Weights published by a rank, MiB",
    "step_seconds": "Seconds of the whole step",
    "evaluated_version": "Weights version of the newest evaluation",
    "pass_at_1": "Held-out pass@1 of the newest evaluation",
    "pass_at_1_low": "Its 95 % interval's lower end",
    "pass_at_1_high": "Its 95 % interval's upper end",
    "evaluated_tokens_mean": "Mean length of the evaluated answers, tokens",
    "evaluated_truncated_share": "Share of the evaluated answers that were cut",
}

MEASURES: dict[str, dict[str, str]] = {
    "engine": {
        "requests_running": "Requests that a vLLM engine works on",
        "requests_waiting": "Requests that wait in a vLLM engine",
        "cache_used_share": "Share of a vLLM engine's key-value cache in use",
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
        "mean_weight": "Mean importance weight of the tokens",
        "log_ratio_mean": "Mean log-ratio of policy and behaviour policy, nats per token",
        "log_ratio_spread": "Standard deviation of the log-ratio, nats per token",
        "share_at_lower_clip": "Share of the tokens whose log-ratio is at the lower clip",
        "share_at_upper_clip": "Share of the tokens whose log-ratio is at the upper clip",
        "share_at_weight_floor": "Share of the tokens with the smallest weight allowed",
        "share_at_weight_ceiling": "Share of the tokens with the largest weight allowed",
    },
    "rl": _LEARNING | _ROLLOUTS,
    "cooperate": _LEARNING
    | _ROLLOUTS
    | {
        "rl_share": "Share of the rollouts in the loss of the step",
        "rollout_loss": "Loss of the rollouts alone, as rl's objective defines it",
        "trace_loss": "Loss of the traces alone, as sft's objective defines it, nats per token",
        "trace_nll": "Negative log-likelihood of the traces without weights, nats per token",
        "trace_tokens": "Tokens of traces that the step learned from, all ranks",
        "trace_mean_weight": "Mean importance weight of the traces' tokens",
        "trace_effective_sample_size": (
            "Effective sample size of the traces' token weights, share of their tokens"
        ),
        "trace_grad_norm": "Norm of the gradient of a step on traces alone, before it is clipped",
        "cooperative_gain": (
            "RL's objective of BRIDGE's policy less that of its shadow, on the same rollouts"
        ),
        "shadow_loss": "Loss of the rollouts that BRIDGE's shadow minimised",
        "shadow_grad_norm": "Norm of the gradient of BRIDGE's shadow before it is clipped",
        "guided_share": "Share of TRAPO's answers that went on from the beginning of a trace",
        "held_share": "Share of the parameters that MIFO's step on traces left as they were",
    },
}


def metric(stage: str, name: str) -> str:
    """Name of a number's Prometheus metric."""
    is_shared = stage == "cooperate" and name in MEASURES["rl"]
    return f"pear_ray_{'rl' if is_shared else stage}_{name}"
