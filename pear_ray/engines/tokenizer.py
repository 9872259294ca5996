"""Hugging Face tokenizers, and what a conversation is as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pear_ray.config import BadInput
from pear_ray.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a folder or hub name.

    Raises:
        BadInput: there is none, or it has no chat template or no end-of-sequence token.
    """
    # Its import takes long enough for engines, asked for before, to start beside it.
    from transformers import AutoTokenizer

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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
