"""One rank of a DeepSpeed learner. It knows tokens and coefficients, not algorithms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler
from transformers.integrations import HfDeepSpeedConfig

from pear_ray.config import Learner as Settings
from pear_ray.config import Optimizer
from pear_ray.losses.inputs import LossInputs, Objective
from pear_ray.losses.packing import pack
from pear_ray.records import TrainingBatch, TrainingSequence
from pear_ray.seeds import seed_of
from pear_ray.train import zero
from pear_ray.train.export import write_folder
from pear_ray.train.lora import add_adapters, merged_parameters
from pear_ray.train.model import PackedPolicy, load_policy, policy_inputs
from pear_ray.train.ulysses import SequenceGroup


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did: loss per trainable token of the global batch, the gradient's
    norm before clipping, and the objective's facts summed over micro-batches and ranks."""

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    facts: dict[str, np.ndarray]


class Learner:
    """Parameters, gradients and optimizer states of one rank; every method is collective."""

    def __init__(
        self,
        path: str,
        dtype: str,
        settings: Settings,
        optimizer: Optimizer,
        num_steps: int,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self._settings, self._dtype, self._seed = settings, dtype, seed
        config = zero.deepspeed_config(dtype, settings, optimizer)
        # Alive while the model loads, it lets transformers partition each parameter at once.
        self._partitioned_loading = HfDeepSpeedConfig(config)
        policy = load_policy(path, dtype, settings.logits_mib)
        trained = self._trained(policy, optimizer)
        if settings.activation_checkpointing:
            policy.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
        self._engine, *_ = deepspeed.initialize(
            model=policy,
            model_parameters=trained,
            config=config,
            lr_scheduler=lambda adam: get_scheduler(
                optimizer.schedule,
                adam,
                num_warmup_steps=round(optimizer.warmup_fraction * num_steps),
                num_training_steps=num_steps,
            ),
        )
        self._device = self._engine.device
        size = settings.sequence_parallel
        self._group = SequenceGroup.of(size, settings.timeout_seconds) if size > 1 else None
        self._crossover_tokens = crossover_tokens(policy.language_model)

    def _trained(self, policy: PackedPolicy, optimizer: Optimizer) -> list[Any]:
        """What the optimizer is given, parameters or groups of them, after adapters were put in."""
        if self._settings.lora is not None:
            add_adapters(policy.language_model, self._settings.lora)
        return [parameter for parameter in policy.parameters() if parameter.requires_grad]

    def share(
        self,
        sequences: Sequence[TrainingSequence],
        counted: Sequence[TrainingSequence] | None = None,
    ) -> list[TrainingBatch]:
        """This rank's micro-batches of the sequences of one step, which all ranks are given alike;
        `counted` as for `pack`.

        Raises:
            ValueError: no sequence, or one longer than a micro-batch.
        """
        size = self._settings.sequence_parallel
        tokens_per_pack = self._settings.tokens_per_pack
        num_groups = dist.get_world_size() // size
        packed = pack(sequences, num_groups, tokens_per_pack, self._crossover_tokens, counted)
        return packed[dist.get_rank() // size]

    def step(self, batches: Sequence[TrainingBatch], objective: Objective) -> StepResult:
        """One optimizer step on this rank's micro-batches of the global batch."""
        facts = self.backward(batches, objective)
        num_tokens = batches[0].num_trainable_tokens_global
        return self.update(facts, num_tokens, objective.factor(facts, num_tokens))

    def backward(
        self, batches: Sequence[TrainingBatch], objective: Objective
    ) -> dict[str, np.ndarray]:
        """Gradients of one optimizer step, for `update`. Returns the objective's facts and `loss`,
        summed over micro-batches and ranks.

        Sums of the losses are divided by the GLOBAL number of trainable tokens, and multiplied by
        the number of ranks because DeepSpeed averages gradients over ranks: so the step does not
        depend on how the batch was cut.
        """
        # What is dropped depends on the step alone, also in a run that was taken up again.
        torch.manual_seed(seed_of(self._seed, self._engine.global_steps, dist.get_rank()))
        scale = dist.get_world_size() / batches[0].num_trainable_tokens_global
        totals: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            sums = objective(self._forward(batch, objective.top_k))
            self._engine.backward(sums.loss * scale)
            add(totals, sums.facts | {"loss": sums.loss.detach()})
        return self._over_ranks(totals)

    def update(
        self, facts: Mapping[str, np.ndarray], num_tokens: int, factor: float = 1.0
    ) -> StepResult:
        """The optimizer's step with the gradients of `backward`, which said these facts of so many
        tokens, times `factor`."""
        learning_rate = self._engine.get_lr()[0]
        if factor != 1.0:
            zero.scale_gradients(self._engine, factor)
        plain_norm = zero.norm_of_plain_grads(self._engine.module, self._settings, self._dtype)
        self._engine.step()
        return StepResult(
            loss=float(facts["loss"]) * factor / num_tokens,
            grad_norm=zero.grad_norm(self._engine, plain_norm),
            learning_rate=learning_rate,
            num_tokens=num_tokens,
            facts={name: fact for name, fact in facts.items() if name != "loss"},
        )

    @torch.no_grad()
    def measure(
        self, batches: Sequence[TrainingBatch], objective: Objective
    ) -> dict[str, np.ndarray]:
        """The objective's facts and `loss`, summed over micro-batches and ranks, without a step."""
        self._engine.eval()
        totals: dict[str, Tensor] = {}
        for batch in batches:
            sums = objective(self._forward(batch, objective.top_k))
            add(totals, sums.facts | {"loss": sums.loss})
        self._engine.train()
        return self._over_ranks(totals)

    @torch.no_grad()
    def logprobs(self, batches: Sequence[TrainingBatch]) -> list[np.ndarray]:
        """Log-probs of the trainable tokens of each micro-batch of this rank, float32."""
        self._engine.eval()
        found = [self._forward(batch, 0).logprobs.cpu().numpy() for batch in batches]
        self._engine.train()
        return found

    def partitions(self) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        """Name (as in the Hugging Face folder), full shape, and this rank's flat partition of
        every parameter (`zero.partitions`)."""
        return zero.partitions(self._engine.module.language_model)

    def save(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint: weights, optimizer and schedule."""
        self._engine.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=False)

    def load(self, folder: Path, universal: bool = False) -> None:
        """Go on from a checkpoint that as many ranks saved, or from one in DeepSpeed's universal
        form, for any number of ranks."""
        # Looked at when a checkpoint is loaded, whatever was configured at the start.
        self._engine._config.load_universal_checkpoint = universal
        self._engine.load_checkpoint(str(folder), tag="state")

    def export(self, folder: Path, tokenizer_path: str) -> None:
        """Write a Hugging Face folder, from rank 0; a few parameters at a time are gathered.
        Adapters are merged into the weights they adapt."""
        model = self._engine.module.language_model
        state: dict[str, Tensor] = {}
        for name, parameters, merge in self._whole_parameters(model):
            with zero.whole(parameters):
                if dist.get_rank() == 0:
                    state[name] = merge().detach().cpu().clone()
        if dist.get_rank() == 0:
            write_folder(model, state, folder, tokenizer_path)
        dist.barrier()

    def _whole_parameters(
        self, model: PreTrainedModel
    ) -> Iterator[tuple[str, list[Tensor], Callable[[], Tensor]]]:
        return merged_parameters(model)

    def _forward(self, batch: TrainingBatch, top_k: int) -> LossInputs:
        # What is padded for the ranks of a group is not trainable: nothing of it is chosen below.
        shared = batch if self._group is None else self._group.padded(batch)
        logprobs, entropies, top_masses = self._read(policy_inputs(shared, self._device), top_k)

        def chosen(values_T: np.ndarray) -> Tensor:
            return torch.from_numpy(values_T[batch.trainable_T]).to(self._device)

        theirs_T, reference_T = batch.teacher_logprobs_T, batch.reference_logprobs_T
        return LossInputs(
            logprobs=logprobs[:, 0],
            entropies=entropies,
            sampled_logprobs=chosen(batch.sampled_logprobs_T),
            coefficients=chosen(batch.coefficients_T),
            sequence_ids=chosen(batch.sequence_ids_T),
            origins=batch.origins,
            num_tokens_global=batch.num_trainable_tokens_global,
            num_sequences_global=batch.num_sequences_global,
            top_masses=top_masses,
            teacher_logprobs=None if theirs_T is None else chosen(theirs_T),
            logprobs_of_teacher=None if theirs_T is None else logprobs[:, 1:],
            reference_logprobs=None if reference_T is None else chosen(reference_T),
            from_trace=None if batch.from_trace_T is None else chosen(batch.from_trace_T),
            num_trace_tokens_global=batch.num_trace_tokens_global,
            num_trace_sequences_global=batch.num_trace_sequences_global,
        )

    def _read(self, inputs: dict[str, Any], top_k: int) -> tuple[Tensor, ...]:
        if self._group is None:
            return self._engine(**inputs, top_k=top_k)
        group, num_predictions = self._group, len(inputs["predicted"])
        stretch, own = group.stretch(inputs)
        found = self._engine(**stretch, top_k=top_k)
        return tuple(group.joined(values, own, num_predictions) for values in found)

    def _over_ranks(self, totals: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        names = sorted(totals)
        flat = torch.cat([totals[name].reshape(-1) for name in names])
        dist.all_reduce(flat)
        # Ranks that share a pack have each counted all of it.
        flat /= self._settings.sequence_parallel
        parts = flat.cpu().split([totals[name].numel() for name in names])
        return {
            name: part.reshape(totals[name].shape).numpy()
            for name, part in zip(names, parts, strict=True)
        }


def crossover_tokens(model: PreTrainedModel) -> float:
    """The length at which the attention of a sequence costs as much as its matrix products, in a
    forward and backward pass: 6 weights FLOP per token against 6 layers width length."""
    config = model.config.get_text_config()
    num_weights = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    return num_weights / (config.num_hidden_layers * config.hidden_size)


def add(totals: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add one micro-batch's sums, in float64."""
    for name, value in more.items():
        totals[name] = totals.get(name, 0) + value.double()
