"""Hugging Face models: a policy over packs, and small new models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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

from pear_ray.algorithms.logprobs import predicted_logprobs
from pear_ray.config import Pretrain
from pear_ray.engines import attention
from pear_ray.records import TrainingBatch

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}"
    "{% if not loop.last %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ' }}{% endif %}"
)


class PackedPolicy(nn.Module):
    """A causal language model whose forward pass takes a pack of sequences and gives the
    log-probability and entropy of chosen tokens."""

    def __init__(self, language_model: PreTrainedModel, num_logits_chunks: int) -> None:
        super().__init__()
        self.language_model = language_model
        self.num_logits_chunks = num_logits_chunks

    def forward(
        self,
        token_ids_T: Tensor,
        position_ids_T: Tensor,
        unfold: Tensor,
        fold: Tensor,
        predicted: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs (with gradient) and entropies of the tokens at `predicted`, float32 [n]."""
        hidden = self.language_model.base_model(
            input_ids=token_ids_T[None],
            position_ids=position_ids_T[None],
            use_cache=False,
            unfold=unfold,
            fold=fold,
        ).last_hidden_state[0]
        head = self.language_model.get_output_embeddings()
        return predicted_logprobs(hidden, head, token_ids_T, predicted, self.num_logits_chunks)


def policy_inputs(batch: TrainingBatch, device: torch.device) -> dict[str, Tensor]:
    """Arguments of `PackedPolicy` for the trainable tokens of a micro-batch."""
    unfold, fold = attention.unfolding(batch.sequence_ids_T)
    inputs = {
        "token_ids_T": torch.from_numpy(batch.token_ids_T),
        "position_ids_T": torch.from_numpy(batch.position_ids_T),
        "unfold": unfold,
        "fold": fold,
        "predicted": torch.from_numpy(np.flatnonzero(batch.trainable_T)),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def load_policy(
    path: str, dtype: str, num_logits_chunks: int, device_map: str | None = None
) -> PackedPolicy:
    """The model of a Hugging Face folder or hub name, from safetensors only."""
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        attn_implementation=attention.NAME,
        use_safetensors=True,
        trust_remote_code=False,
        device_map=device_map,
    )
    return PackedPolicy(model, num_logits_chunks)


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
