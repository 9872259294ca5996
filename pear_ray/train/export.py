"""Hugging Face folders: config, safetensors and the tokenizer they were trained with."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel


def write_folder(
    model: PreTrainedModel, state: Mapping[str, Tensor], folder: Path, tokenizer_path: str
) -> None:
    """Write a model that transformers and vLLM load. The folder appears whole or not at all."""
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, state_dict=dict(state))
    AutoTokenizer.from_pretrained(tokenizer_path).save_pretrained(aside)
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
