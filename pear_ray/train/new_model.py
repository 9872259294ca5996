"""Small Qwen3 models made from scratch, for jobs that name no model to download."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, get_scheduler

from pear_ray.config import Pretrain
from pear_ray.data.tokenizer import encode_conversation, load_tokenizer
from pear_ray.losses.packing import pack
from pear_ray.records import Problem, TrainingSequence
from pear_ray.tasks import Demonstrator
from pear_ray.train.hf_folder import write_hf_folder
from pear_ray.train.model import load_policy, policy_inputs

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ ' ' + eos_token"
    " }}{% endif %}{% if not loop.last %}{{ ' ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ' ' }}{%"
    " endif %}"
)


def write_new_model(folder: Path, settings: Pretrain, vocabulary: Sequence[str]) -> None:
    """Write a Qwen3 with random weights and a word-level tokenizer over `vocabulary`."""
    specials = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    ids = {token: number for number, token in enumerate([*specials.values(), *vocabulary])}
    word_level = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    word_level.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_level, **specials)
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(settings.seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            # A multiple of 64 suits matrix kernels.
            vocab_size=-(-len(ids) // 64) * 64,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            num_key_value_heads=settings.num_heads,
            head_dim=64,
            max_position_embeddings=4096,
            tie_word_embeddings=settings.tie_word_embeddings,
            initializer_range=settings.initializer_range,
            pad_token_id=ids["<pad>"],
            eos_token_id=ids["<eos>"],
            bos_token_id=None,
        )
    )
    model.generation_config.eos_token_id = ids["<eos>"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pretrain_model(folder: Path, settings: Pretrain, task: Demonstrator, num_threads: int) -> float:
    """Train a Qwen3 in float32 on `task`'s demonstrations, from random weights or the sibling folder
    `settings.start_from`. Write it to `folder`; return the mean loss of the last tenth of the steps, nats per token."""
    torch.set_num_threads(num_threads)
    if settings.start_from is None:
        source = folder.with_name(folder.name + ".untrained")
        write_new_model(source, settings, task.vocabulary())
    else:
        source = folder.with_name(settings.start_from)
    tokenizer = load_tokenizer(str(source))
    policy = load_policy(str(source), "float32")
    optimizer = torch.optim.AdamW(policy.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = get_scheduler("cosine", optimizer, settings.steps // 20, settings.steps)
    demonstrations = task.demonstrations(settings.styles, settings.solved_fraction, settings.seed)
    losses = []
    for _ in range(settings.steps):
        drawn = islice(demonstrations, settings.examples_per_step)
        sequences = [demonstration_sequence(tokenizer, problem, answer) for problem, answer in drawn]
        lengths = [len(sequence.token_ids) for sequence in sequences]
        (batches,) = pack(sequences, 1, sum(lengths) // 2 + max(lengths))
        optimizer.zero_grad()
        loss = 0.0
        for batch in batches:
            logprobs, *_ = policy(**policy_inputs(batch, torch.device("cpu")))
            batch_loss = -logprobs.sum() / batch.num_trainable_tokens_global
            batch_loss.backward()
            loss += batch_loss.item()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss)
    model = policy.language_model
    write_hf_folder(model, model.state_dict(), folder, str(source))
    return float(np.mean(losses[-max(1, settings.steps // 10) :]))


def demonstration_sequence(tokenizer: PreTrainedTokenizerBase, problem: Problem, answer: str) -> TrainingSequence:
    """Return a demonstration as a training sequence; the answer's tokens are trainable."""
    ids = encode_conversation(tokenizer, [*problem.messages, {"role": "assistant", "content": answer}])
    logprobs = np.zeros(len(ids.response_ids))
    return TrainingSequence.of(ids.prompt_ids, ids.response_ids, logprobs, 1.0, problem.problem_id, ids.trainable)
