"""Models that a learner would compute wrong are refused by field and value."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from pear_ray.config import Job
from pear_ray.errors import ConfigError
from pear_ray.train.hf_folder import check_supported

PLAIN = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
WINDOWS = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True}
SHARED = {"num_workers": 4, "sequence_parallel": 4}
# (fields of config.json, keys of [learner], the refused field, its value)
UNSUPPORTED: dict[str, tuple[dict[str, Any], dict[str, Any], str, Any]] = {
    "capped logits": (
        {"model_type": "gemma2", "final_logit_softcapping": 30.0, "attn_logit_softcapping": None},
        {},
        "final_logit_softcapping",
        30.0,
    ),
    "capped attention": (
        {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": None},
        {},
        "attn_logit_softcapping",
        50.0,
    ),
    "scaled logits": ({"model_type": "granite", "logits_scaling": 8.0}, {}, "logits_scaling", 8.0),
    "states": (
        {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
        {},
        "layer_types",
        ["linear_attention"],
    ),
    "a window": ({**WINDOWS, "sliding_window": 15}, {}, "sliding_window", 15),
    "a window, float32 on a GPU": ({**WINDOWS, "sliding_window": 15}, {"use_gpu": True}, "sliding_window", 15),
    "heads": ({}, SHARED, "num_key_value_heads", 2),
    "positions": (
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        SHARED,
        "rope_type",
        "dynamic",
    ),
}
SUPPORTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "a window as long as any sequence": ({**WINDOWS, "sliding_window": 16}, {}),
    "positions that one rank sees": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        {},
    ),
    "heads for each": ({"num_key_value_heads": 4}, SHARED),
}


def job_of(path: str, learner: dict[str, Any]) -> Job:
    return Job.model_validate(
        {
            "run": {"dir": "run"},
            "model": {"path": path, "dtype": "float32"},
            "generator": {"max_new_tokens": 8, "max_model_len": 16},
            "tasks": [{"name": "countdown"}],
            "learner": learner,
        }
    )


@pytest.mark.parametrize(("model", "learner", "field", "value"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_models_are_refused(tmp_path, model, learner, field, value):
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | model))
    expected = rf"^{re.escape(f'{tmp_path}: config.json: {field}: expected ')}.*, got "
    with pytest.raises(ConfigError, match=expected + re.escape(str(value)) + "$"):
        check_supported(job_of(str(tmp_path), learner), str(tmp_path))


@pytest.mark.parametrize(("model", "learner"), SUPPORTED.values(), ids=SUPPORTED)
def test_supported_models_are_accepted(tmp_path, model, learner):
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | model))
    check_supported(job_of(str(tmp_path), learner), str(tmp_path))
