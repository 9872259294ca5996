"""Hugging Face models: a policy over packs, and small new models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pear_ray.config import Pretrain
from pear_ray.errors import ConfigError
from pear_ray.losses.logprobs import predicted_logprobs
from pear_ray.records import TrainingBatch
from pear_ray.train import attention
from pear_ray.train.supported import refuse_other_than_plain

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}"
    "{% if not loop.last %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ' }}{% endif %}"
)


class LogprobHead(nn.Module):
    """Takes the place of a model's output head and gives log-probs instead of logits, in one use:
    under ZeRO-3 the weight is gathered once in each pass."""

    def __init__(self, head: nn.Linear, logits_mib: float) -> None:
        super().__init__()
        self.weight = head.weight
        self.logits_mib = logits_mib

    def forward(
        self, hidden_T: Tensor, token_ids: Tensor, predicted: Tensor, top_k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `logprobs.predicted_logprobs` returns."""
        weight, mib = self.weight, self.logits_mib
        found = predicted_logprobs(
            hidden_T, weight, token_ids, predicted, logits_mib=mib, top_k=top_k
        )
        return found.logprobs, found.entropies, found.top_masses


class PackedPolicy(nn.Module):
    """A causal language model whose forward pass takes a pack of sequences and gives the
    log-probabilities of chosen tokens."""

    def __init__(self, language_model: PreTrainedModel, logits_mib: float) -> None:
        super().__init__()
        self.language_model = language_model
        head = language_model.get_output_embeddings()
        language_model.set_output_embeddings(LogprobHead(head, logits_mib))

    def forward(
        self,
        packed_ids_T: Tensor,
        position_ids_T: Tensor,
        token_ids: Tensor,
        predicted: Tensor,
        top_k: int = 0,
        **layout: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs [n, m] (with gradient), entropies [n] and masses of the `top_k` likeliest
        tokens [n], float32, of the m `token_ids` at each of the n positions `predicted`. `layout`
        tells the attention where sequences begin."""
        hidden = self.language_model.base_model(
            input_ids=packed_ids_T[None],
            position_ids=position_ids_T[None],
            use_cache=False,
            **layout,
        ).last_hidden_state[0]
        head = self.language_model.get_output_embeddings()
        return head(hidden, token_ids, predicted, top_k)


def policy_inputs(batch: TrainingBatch, device: torch.device) -> dict[str, Any]:
    """Arguments of `PackedPolicy` for the trainable tokens of a micro-batch: their own log-probs
    first, then those of the teacher's likeliest tokens where there are any."""
    predicted = np.flatnonzero(batch.trainable_T)
    token_ids = batch.token_ids_T[predicted, None]
    if batch.teacher_ids_T is not None:
        token_ids = np.concatenate([token_ids, batch.teacher_ids_T[predicted]], axis=1)
    inputs = {
        "packed_ids_T": batch.token_ids_T,
        "position_ids_T": batch.position_ids_T,
        "token_ids": token_ids,
        "predicted": predicted,
    }
    tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
    return tensors | attention.layout(batch.sequence_ids_T, device)


def load_policy(
    path: str, dtype: str, logits_mib: float = 512.0, device_map: str | None = None
) -> PackedPolicy:
    """The model of a Hugging Face folder or hub name, from safetensors only.

    Raises:
        ConfigError: its logits are not simply the product with its output head, or it is not all
            attention.
    """
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        attn_implementation=attention.best(dtype),
        use_safetensors=True,
        trust_remote_code=False,
        device_map=device_map,
    )
    refuse_other_than_plain(path, model.config.get_text_config())
    if model._is_stateful:
        raise ConfigError(
            f"{path}: the model keeps a state from token to token; expected attention"
        )
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ConfigError(f"{path}: the output head has a bias; expected one without")
    return PackedPolicy(model, logits_mib)


def write_new_model(folder: Path, settings: Pretrain, vocabulary: Sequence[str]) -> None:
    """A Qwen3 with random weights and a word-level tokenizer over `vocabulary`."""
    specials = ["<pad>", "<eos>", "<unk>"]
    words = {word: number for number, word in enumerate([*specials, *vocabulary])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    # Padded to a multiple of 64, as matrix kernels like it.
    vocab_size = -(-len(words) // 64) * 64
    torch.manual_seed(settings.seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            num_key_value_heads=settings.num_heads,
            head_dim=64,
            max_position_embeddings=4096,
            tie_word_embeddings=settings.tie_word_embeddings,
            initializer_range=settings.initializer_range,
            pad_token_id=words["<pad>"],
            eos_token_id=words["<eos>"],
            bos_token_id=None,
        )
    )
    model.generation_config.eos_token_id = words["<eos>"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
