"""What a model must be for a learner to compute it right. Others are refused before anything
starts: told by a rank, it would be a failure that Ray Train repeats."""

from __future__ import annotations

from typing import Any

from pear_ray.config import Job
from pear_ray.errors import ConfigError

# What some architectures do to logits, and the value that does nothing.
TRANSFORMED_LOGITS = {
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "logits_scaling": 1,
    "logit_scale": 1,
    "lm_head_multiplier": 1,
}
# Others mix tokens by states or chunks, which know nothing of where a sequence begins in a pack.
ATTENTION = {"full_attention", "sliding_attention"}
# Rotations that depend on the largest position, which a rank that holds a stretch does not see.
ROTATIONS_BY_LENGTH = {"dynamic", "longrope"}


def check_supported(job: Job, path: str) -> None:
    """Look at a model's configuration, as the learner of this job will use it.

    Raises:
        ConfigError: the field, what was read and what was expected.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    refuse_other_than_plain(path, config)
    learner, longest = job.learner, job.generator.max_model_len
    window = getattr(config, "sliding_window", None)
    is_windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    has_kernel = learner.use_gpu and job.model.dtype == "bfloat16"
    if is_windowed and window is not None and window < longest and not has_kernel:
        refuse(
            path,
            "sliding_window",
            window,
            f"at least generator.max_model_len, {longest}, or bfloat16 on GPUs",
        )
    if (num_ranks := learner.sequence_parallel) == 1:
        return
    for name in ("num_attention_heads", "num_key_value_heads"):
        if (number := getattr(config, name, None) or num_ranks) % num_ranks:
            refuse(path, name, number, f"a multiple of learner.sequence_parallel, {num_ranks}")
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rotation in ROTATIONS_BY_LENGTH:
        refuse(path, "rope_type", rotation, "another with learner.sequence_parallel above 1")


def refuse_other_than_plain(path: str, config: Any) -> None:
    """Raises:
    ConfigError: logits that are not simply the product with the output head, or layers that are not
        causal attention.
    """
    for name, harmless in TRANSFORMED_LOGITS.items():
        if (read := getattr(config, name, harmless)) != harmless:
            refuse(path, name, read, f"a model whose logits are used as they are ({harmless})")
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION
    if others:
        refuse(path, "layer_types", sorted(others), f"only {' or '.join(sorted(ATTENTION))}")


def refuse(path: str, field: str, read: Any, expected: str) -> None:
    """Say what is wrong with a model."""
    raise ConfigError(f"{path}: config.json: {field}: read {read}; expected {expected}")
