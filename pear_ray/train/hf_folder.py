"""Hugging Face folders: write a whole one, and read the tensors of one lazily."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor

from pear_ray.run import atomic_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
