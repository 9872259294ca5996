"""What a model needs, read from its configuration alone: no weights are loaded."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pear_ray.errors import ConfigError
from pear_ray.train.memory import ModelDims


def model_dims(field: str, path: str) -> ModelDims:
    """The shape of the model in a folder (its config.json is enough) or of a hub name.

    Raises:
        ConfigError: there is no configuration to be read; names the `field`.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first, *_ = str(error).splitlines()
        raise ConfigError(
            f"{field}: read {path!r}; expected a folder with config.json, or a hub name that can be"
            f" reached: {first}"
        ) from error
    text = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelDims(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        queries=text.num_attention_heads * width,
        keys=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * width,
        vocabulary=text.vocab_size,
    )
