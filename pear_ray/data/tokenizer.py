"""Hugging Face tokenizers, and what a conversation is as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from pear_ray.errors import ConfigError
from pear_ray.records import Message, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def load_tokenizer(path: str, field: str = "model.path") -> Tokenizer:
    """The tokenizer of a folder or hub name, which `field` of the job gives.

    Raises:
        ConfigError: there is none, or it has no chat template or no end-of-sequence token.
    """
    # Its import takes long enough for engines, asked for before, to start beside it.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{field}: {path}: no tokenizer can be loaded; expected one: {error}"
        ) from error
    if tokenizer.chat_template is None:
        raise ConfigError(f"{field}: {path}: the tokenizer has no chat template; expected one")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{field}: {path}: the tokenizer has no end-of-sequence token; expected one"
        )
    return tokenizer


def tokenizer_digests(tokenizer: Tokenizer) -> tuple[str, str]:
    """Fingerprints of the vocabulary and of the chat template: equal ids mean equal tokens only
    where these agree."""
    words = json.dumps(sorted(tokenizer.get_vocab().items()))
    return _digest(words), _digest(str(tokenizer.chat_template))


def encode_problems(
    path: str, problems: Sequence[Problem], max_model_len: int
) -> list[tuple[int, ...]]:
    """Token ids of each problem's prompt, with the tokenizer in `path`.

    Raises:
        ConfigError: a prompt leaves no room for an answer.
    """
    tokenizer = load_tokenizer(path)
    prompts = encode_prompts(tokenizer, [problem.messages for problem in problems])
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) >= max_model_len:
            raise ConfigError(
                f"held-out problem {problem.problem_id}: its prompt has {len(prompt)} tokens;"
                f" expected fewer than generator.max_model_len {max_model_len}"
            )
    return prompts


def encode_prompts(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]]
) -> list[tuple[int, ...]]:
    """Token ids of many conversations, of each up to where the assistant is to speak. Together, as
    the tokenizer takes longer to be called than to read a prompt."""
    if not conversations:
        return []
    texts = tokenizer.apply_chat_template(
        [list(messages) for messages in conversations], tokenize=False, add_generation_prompt=True
    )
    return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant is to speak."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decode_completion(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """An answer as its judge reads it."""
    return str(tokenizer.decode(token_ids, skip_special_tokens=True)).strip()


@dataclass(frozen=True)
class Conversation:
    """Token ids up to the first answer, and from there on; `trainable` marks the answers' tokens
    among the latter, each up to and with its end-of-sequence token."""

    prompt_ids: list[int]
    response_ids: list[int]
    trainable: list[bool]


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> Conversation:
    """A conversation whose last message is the assistant's, as the model saw and wrote it.

    Raises:
        ValueError: the template refuses the conversation, or writes what stands before an answer
            differently once more follows; or an answer is empty.
    """
    try:
        whole = _ids(tokenizer, messages)
        answers = [
            _answer(tokenizer, messages, number, whole)
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
    # An expression in a template may fail as Python's own do.
    except (TemplateError, TypeError) as error:
        raise ValueError(f"messages: the chat template refuses them: {error}") from error
    first, last = answers[0][0], answers[-1][1]
    trainable = [False] * len(whole)
    for start, end in answers:
        trainable[start:end] = [True] * (end - start)
    return Conversation(whole[:first], whole[first:last], trainable[first:last])


def _answer(
    tokenizer: Tokenizer, messages: Sequence[Message], number: int, whole: list[int]
) -> tuple[int, int]:
    """Where message `number` starts and ends in the ids of the whole conversation."""
    before = encode_prompt(tokenizer, messages[:number])
    is_last = number == len(messages) - 1
    until = whole if is_last else _ids(tokenizer, messages[: number + 1])
    if whole[: len(before)] != before or whole[: len(until)] != until:
        raise ValueError(
            f"messages.{number}: the chat template does not keep the tokens before and of this"
            " answer when more follows; expected the ids that its author saw and wrote"
        )
    end = len(until)
    while end > len(before) and until[end - 1] != tokenizer.eos_token_id:
        end -= 1
    # A template that ends no answer: everything up to the next message is the answer.
    end = end if end > len(before) else len(until)
    if until[len(before) : end] in ([], [tokenizer.eos_token_id]):
        raise ValueError(f"messages.{number}: the assistant's answer is empty")
    return len(before), end


def _ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def num_embeddings(path: str) -> int:
    """How many token ids the model of a folder or hub name knows."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    return config.get_text_config().vocab_size


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
