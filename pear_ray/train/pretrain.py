"""Makes a small network from nothing, in one process: what a user would download instead."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import get_scheduler

from pear_ray.config import Pretrain
from pear_ray.data.tokenizer import conversation_ids, load_tokenizer
from pear_ray.losses.packing import pack
from pear_ray.records import Problem, TrainingSequence
from pear_ray.tasks.task import Demonstrator
from pear_ray.train.export import write_folder
from pear_ray.train.model import load_policy, policy_inputs, write_new_model


def pretrain(folder: Path, settings: Pretrain, task: Demonstrator, num_threads: int) -> float:
    """Train a Qwen3 in float32 on the answers of `task`'s demonstrations: a new one, or a copy of
    the folder's sibling `settings.start_from`.

    Returns:
        Mean loss of the last tenth of the steps, nats per answer token.
    """
    torch.set_num_threads(num_threads)
    if settings.start_from is None:
        blank = folder.with_name(folder.name + ".untrained")
        write_new_model(blank, settings, task.vocabulary())
    else:
        blank = folder.with_name(settings.start_from)
    tokenizer = load_tokenizer(str(blank))
    policy = load_policy(str(blank), "float32")
    optimizer = torch.optim.AdamW(
        policy.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    scheduler = get_scheduler("cosine", optimizer, settings.steps // 20, settings.steps)
    demonstrations = task.demonstrations(settings.styles, settings.solved_fraction, settings.seed)
    losses = []
    for _ in range(settings.steps):
        sequences = [
            sequence(tokenizer, *pair)
            for pair in islice(demonstrations, settings.examples_per_step)
        ]
        num_tokens = sum(len(s.token_ids) for s in sequences)
        # Sorted by length, in two packs.
        ((batch, *more),) = pack(
            sequences, 1, num_tokens // 2 + max(len(s.token_ids) for s in sequences)
        )
        optimizer.zero_grad()
        loss = 0.0
        for part in (batch, *more):
            logprobs, *_ = policy(**policy_inputs(part, torch.device("cpu")))
            part_loss = -logprobs.sum() / part.num_trainable_tokens_global
            part_loss.backward()
            loss += part_loss.item()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss)
    write_folder(policy.language_model, policy.language_model.state_dict(), folder, str(blank))
    return float(np.mean(losses[-max(1, settings.steps // 10) :]))


def sequence(tokenizer: Tokenizer, problem: Problem, answer: str) -> TrainingSequence:
    """A demonstration as tokens, its answer trainable."""
    messages = [*problem.messages, {"role": "assistant", "content": answer}]
    found = conversation_ids(tokenizer, messages)
    blank = np.zeros(len(found.response_ids))
    return TrainingSequence.of(
        found.prompt_ids, found.response_ids, blank, 1.0, problem.problem_id, found.trainable
    )
