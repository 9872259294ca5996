"""Hugging Face models and tokenizers, and what a conversation is as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from pear_ray.algorithms.logprobs import predicted_logprobs
from pear_ray.config import BadInput, Pretrain
from pear_ray.engines import attention
from pear_ray.records import Message

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
        # Under ZeRO-3 every use of the head is a collective: all ranks need equally many of them,
        # however few tokens a rank has.
        chunks = [
            predicted_logprobs(hidden, head, token_ids_T, positions, max(1, len(positions)))
            for positions in predicted.tensor_split(self.num_logits_chunks)
        ]
        logprobs, entropies = zip(*chunks, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)


def load_policy(path: str, dtype: str, num_logits_chunks: int) -> PackedPolicy:
    """The model of a Hugging Face folder or hub name, from safetensors only."""
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        attn_implementation=attention.NAME,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return PackedPolicy(model, num_logits_chunks)


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a folder or hub name.

    Raises:
        BadInput: there is none, or it has no chat template or no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"model.path: {path}: no tokenizer can be loaded; expected one: {error}"
        ) from error
    if tokenizer.chat_template is None:
        raise BadInput(f"model.path: {path}: the tokenizer has no chat template; expected one")
    if tokenizer.eos_token_id is None:
        raise BadInput(
            f"model.path: {path}: the tokenizer has no end-of-sequence token; expected one"
        )
    return tokenizer


def same_architecture(one: str, other: str) -> bool:
    """Whether an engine that serves `one` can load the weights in the folder `other`."""

    def shape(path: str) -> dict[str, Any]:
        config = json.loads((Path(path) / "config.json").read_text())
        incidental = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
        return {key: value for key, value in config.items() if key not in incidental}

    return Path(one).is_dir() and Path(other).is_dir() and shape(one) == shape(other)


def digests(tokenizer: Tokenizer) -> tuple[str, str]:
    """Fingerprints of the vocabulary and of the chat template: equal ids mean equal tokens only
    where these agree."""
    words = json.dumps(sorted(tokenizer.get_vocab().items()))
    return _digest(words), _digest(str(tokenizer.chat_template))


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant is to speak."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def conversation_ids(
    tokenizer: Tokenizer, messages: Sequence[Message]
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the last answer, up to and with its end-of-sequence token.

    Raises:
        ValueError: the template writes the prompt differently once the answer follows, or the
            answer is empty.
    """
    prompt = prompt_ids(tokenizer, messages[:-1])
    text = tokenizer.apply_chat_template(list(messages), tokenize=False)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    if whole[: len(prompt)] != prompt:
        raise ValueError(
            "the chat template does not keep the prompt's tokens when the answer follows"
        )
    response = whole[len(prompt) :]
    ends = [i for i, token in enumerate(response) if token == tokenizer.eos_token_id]
    if ends:
        response = response[: ends[-1] + 1]
    if not response or response == [tokenizer.eos_token_id]:
        raise ValueError("the assistant's answer is empty")
    return prompt, response


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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
