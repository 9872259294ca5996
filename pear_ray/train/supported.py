"""Model support check, run on the driver: an error inside a rank would make Ray Train retry."""

from __future__ import annotations

from typing import Any

from pear_ray.config import Job
from pear_ray.errors import ConfigError

# Settings by which some architectures transform logits, and the value that leaves them alone.
LOGIT_TRANSFORMS = {
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "logits_scaling": 1,
    "logit_scale": 1,
    "lm_head_multiplier": 1,
}
# Other layer types (linear attention, chunks) would mix the sequences of a pack.
SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}
# Rotations that depend on the largest position, unknown to a rank that holds a slice of a pack.
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def check_supported(job: Job, path: str) -> None:
    """Raise ConfigError if this job's learner cannot compute the model exactly."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    check_architecture(path, config)
    longest = job.generator.max_model_len
    window = getattr(config, "sliding_window", None)
    has_window = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    has_kernel = job.learner.use_gpu and job.model.dtype == "bfloat16"
    if has_window and window is not None and window < longest and not has_kernel:
        expected = f"at least generator.max_model_len, {longest}, or bfloat16 on GPUs"
        raise unsupported(path, "sliding_window", expected, window)
    num_ranks = job.learner.sequence_parallel
    if num_ranks == 1:
        return
    for field in ("num_attention_heads", "num_key_value_heads"):
        num_heads = getattr(config, field, None) or num_ranks
        if num_heads % num_ranks:
            expected = f"a multiple of learner.sequence_parallel, {num_ranks}"
            raise unsupported(path, field, expected, num_heads)
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope_type in LENGTH_DEPENDENT_ROPE:
        expected = "another type with learner.sequence_parallel above 1"
        raise unsupported(path, "rope_type", expected, rope_type)


def check_architecture(path: str, config: Any) -> None:
    """Raise ConfigError if logits are not a plain product with the output head, or if a layer is
    not causal attention."""
    for field, identity in LOGIT_TRANSFORMS.items():
        value = getattr(config, field, identity)
        if value != identity:
            raise unsupported(path, field, f"{identity} (untransformed logits)", value)
    others = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYERS
    if others:
        expected = f"only {' or '.join(sorted(SUPPORTED_LAYERS))}"
        raise unsupported(path, "layer_types", expected, sorted(others))


def unsupported(path: str, field: str, expected: str, value: Any) -> ConfigError:
    """Return the error for one field of a model's config.json."""
    return ConfigError(f"{path}: config.json: {field}: expected {expected}, got {value}")
