"""Hugging Face folders: check whether a learner can compute the model, write a whole folder, read tensors lazily."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor

from pear_ray.config import Job
from pear_ray.errors import ConfigError
from pear_ray.run import atomic_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    """Raise ConfigError if this job's learner cannot compute the model exactly. Runs on the driver: an error inside a
    rank would make Ray Train retry."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    check_architecture(path, config)
    window = getattr(config, "sliding_window", None)
    has_window = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    has_kernel = job.learner.use_gpu and job.model.dtype == "bfloat16"
    if has_window and window is not None and window < job.generator.max_model_len and not has_kernel:
        expected = f"at least generator.max_model_len, {job.generator.max_model_len}, or bfloat16 on GPUs"
        raise unsupported(path, "sliding_window", expected, window)
    num_ranks = job.learner.sequence_parallel
    if num_ranks == 1:
        return
    for field in ("num_attention_heads", "num_key_value_heads"):
        num_heads = getattr(config, field, None) or num_ranks
        if num_heads % num_ranks:
            raise unsupported(path, field, f"a multiple of learner.sequence_parallel, {num_ranks}", num_heads)
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope_type in LENGTH_DEPENDENT_ROPE:
        raise unsupported(path, "rope_type", "another type with learner.sequence_parallel above 1", rope_type)


def check_architecture(path: str, config: Any) -> None:
    """Raise ConfigError if logits are not a plain product with the output head or a layer is not causal attention."""
    for field, identity in LOGIT_TRANSFORMS.items():
        value = getattr(config, field, identity)
        if value != identity:
            raise unsupported(path, field, f"{identity} (untransformed logits)", value)
    others = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYERS
    if others:
        raise unsupported(path, "layer_types", f"only {' or '.join(sorted(SUPPORTED_LAYERS))}", sorted(others))


def unsupported(path: str, field: str, expected: str, value: Any) -> ConfigError:
    """Return the error for one field of a model's config.json."""
    return ConfigError(f"{path}: config.json: {field}: expected {expected}, got {value}")


def write_hf_folder(model: PreTrainedModel, state: Mapping[str, Tensor], folder: Path, tokenizer_path: str) -> None:
    """Write config, safetensors and tokenizer as transformers and vLLM load them; atomic."""
    from transformers import AutoTokenizer

    with atomic_folder(folder) as partial:
        model.save_pretrained(partial, state_dict=dict(state))
        AutoTokenizer.from_pretrained(tokenizer_path).save_pretrained(partial)


def open_tensors(folder: Path) -> dict[str, Any]:
    """Map each tensor name to its open file: `files[name].get_tensor(name)`. Files are memory-mapped, not read."""
    files: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file: Any = safe_open(str(path), framework="pt")
        files |= dict.fromkeys(file.keys(), file)
    return files
