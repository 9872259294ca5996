"""Hugging Face tokenizers and chat templates: conversations to token ids and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from pear_ray.errors import ConfigError, require
from pear_ray.records import Message, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids before the first answer and from there on. `trainable` has one flag per response token: True for the
    assistant's tokens, each answer up to and including its end-of-sequence token."""

    prompt_ids: list[int]
    response_ids: list[int]
    trainable: list[bool]


def load_tokenizer(path: str, field: str = "model.path") -> Tokenizer:
    """Load the tokenizer of a folder or hub name; raise ConfigError, naming `field`, if there is none or it lacks a
    chat template or an end-of-sequence token."""
    # Slow to import (seconds); engines that were requested earlier start meanwhile.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{field}: expected a tokenizer, got {path}: {error}") from error
    for part, value in (("chat template", tokenizer.chat_template), ("end-of-sequence token", tokenizer.eos_token_id)):
        require(value is not None, field, f"a tokenizer with a {part}", f"none in {path}")
    return tokenizer


def num_embeddings(path: str) -> int:
    """Return the number of embedding rows of a model: every token id must be below it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config().vocab_size


def tokenizer_digests(tokenizer: Tokenizer) -> tuple[str, str]:
    """Return fingerprints of vocabulary and chat template: two models' token ids are comparable only if both agree."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return fingerprint(vocabulary), fingerprint(str(tokenizer.chat_template))


def fingerprint(text: str) -> str:
    """Return the first 16 hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encode_problems(path: str, problems: Sequence[Problem], max_model_len: int) -> list[tuple[int, ...]]:
    """Return each problem's prompt ids; raise ConfigError if one leaves no room to answer."""
    tokenizer = load_tokenizer(path)
    prompts = encode_prompts(tokenizer, [problem.messages for problem in problems])
    for problem, prompt in zip(problems, prompts, strict=True):
        expected = f"more than {len(prompt)}, the prompt tokens of held-out problem {problem.problem_id}"
        require(max_model_len > len(prompt), "generator.max_model_len", expected, max_model_len)
    return prompts


def encode_prompts(tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]]) -> list[tuple[int, ...]]:
    """Return the prompt ids of each conversation, up to the assistant's turn."""
    if not conversations:
        return []
    # Batched: a tokenizer call costs more than the tokens of one prompt.
    batch = [list(messages) for messages in conversations]
    texts = tokenizer.apply_chat_template(batch, tokenize=False, add_generation_prompt=True)
    return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
    """Return the token ids of a conversation, by default up to the assistant's turn."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decode_completion(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Return a completion's text as reward functions see it: no special tokens, stripped."""
    return str(tokenizer.decode(token_ids, skip_special_tokens=True)).strip()


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> EncodedConversation:
    """Tokenize a conversation that ends with an answer, as the model saw and sampled it. Raise ValueError if the
    template rejects it or changes the tokens before an answer once more turns follow, or if an answer is empty."""
    try:
        ids = encode_prompt(tokenizer, messages, add_generation_prompt=False)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [_answer_span(tokenizer, messages, number, ids) for number in answers]
    # Python errors inside a template expression surface as TypeError.
    except (TemplateError, TypeError) as error:
        raise ValueError(f"messages: rejected by the chat template: {error}") from error
    first, last = spans[0][0], spans[-1][1]
    trainable = [False] * len(ids)
    for start, end in spans:
        trainable[start:end] = [True] * (end - start)
    return EncodedConversation(ids[:first], ids[first:last], trainable[first:last])


def _answer_span(tokenizer: Tokenizer, messages: Sequence[Message], number: int, ids: list[int]) -> tuple[int, int]:
    before, until = encode_prompt(tokenizer, messages[:number]), ids
    if number < len(messages) - 1:
        until = encode_prompt(tokenizer, messages[: number + 1], add_generation_prompt=False)
    if ids[: len(before)] != before or ids[: len(until)] != until:
        raise ValueError(
            f"messages.{number}: expected a chat template that keeps the tokens up to this answer when more turns"
            " follow, got different ones"
        )
    # Without an end-of-sequence token, everything up to the next message is the answer.
    answer, end_id = until[len(before) :], tokenizer.eos_token_id
    if end_id in answer:
        answer = answer[: len(answer) - answer[::-1].index(end_id)]
    if answer in ([], [end_id]):
        raise ValueError(f"messages.{number}: expected an answer, got an empty one")
    return len(before), len(before) + len(answer)
