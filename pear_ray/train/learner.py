"""One rank of a DeepSpeed learner. It knows tokens, coefficients and sums, not algorithms: the objective turns a
micro-batch into a loss.

    sequences of a step --micro_batches--> this rank's packs --backward--> gradients, sums
                                                             --update----> StepResult
"""

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

from pear_ray.config import Learner as LearnerConfig
from pear_ray.config import Optimizer
from pear_ray.losses.inputs import LossInputs, Objective
from pear_ray.losses.packing import pack
from pear_ray.records import TrainingBatch, TrainingSequence
from pear_ray.seeds import seed_of
from pear_ray.train import zero
from pear_ray.train.hf_folder import write_hf_folder
from pear_ray.train.lora import add_adapters, merged_parameters
from pear_ray.train.model import PackedPolicy, load_policy, policy_inputs
from pear_ray.train.ulysses import SequenceGroup


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: loss per trainable token of the global batch, gradient norm before clipping, and the
    objective's sums over micro-batches and ranks. Example:

    StepResult(loss=0.93, grad_norm=1.7, learning_rate=1e-5, num_tokens=4096,
               metric_sums={"nll": array(3809.3), "tokens_to_learn": array(4096.0)})
    """

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    metric_sums: dict[str, np.ndarray]


class Learner:
    """One rank's parameters, gradients and optimizer states. Every method is collective."""

    def __init__(
        self, path: str, dtype: str, config: LearnerConfig, optimizer: Optimizer, num_steps: int, seed: int
    ) -> None:
        torch.manual_seed(seed)
        self._dtype = dtype
        self._config = config
        self._seed = seed
        deepspeed_config = zero.deepspeed_config(dtype, config, optimizer)
        # While this object lives, transformers partitions each parameter as it loads it.
        self._partition_on_load = HfDeepSpeedConfig(deepspeed_config)
        policy = load_policy(path, dtype, config.logits_mib)
        parameters = self._trained_parameters(policy, optimizer)
        if config.activation_checkpointing:
            policy.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
        self._engine, *_ = deepspeed.initialize(
            model=policy,
            model_parameters=parameters,
            config=deepspeed_config,
            lr_scheduler=lambda adam: get_scheduler(
                optimizer.schedule,
                adam,
                num_warmup_steps=round(optimizer.warmup_fraction * num_steps),
                num_training_steps=num_steps,
            ),
        )
        self._device = self._engine.device
        size = config.sequence_parallel
        self._group = SequenceGroup.create(size, config.timeout_seconds) if size > 1 else None
        self._crossover_tokens = crossover_tokens(policy.language_model)

    def _trained_parameters(self, policy: PackedPolicy, optimizer: Optimizer) -> list[Any]:
        """Insert adapters, if any; return the optimizer's parameters or parameter groups."""
        if self._config.lora is not None:
            add_adapters(policy.language_model, self._config.lora)
        return [parameter for parameter in policy.parameters() if parameter.requires_grad]

    def micro_batches(
        self, sequences: Sequence[TrainingSequence], counted: Sequence[TrainingSequence] | None = None
    ) -> list[TrainingBatch]:
        """Return this rank's micro-batches of one step. Every rank passes the same `sequences`; `counted` as in `pack`.

        Raises:
            ValueError: no sequence, or one longer than a micro-batch.
        """
        size = self._config.sequence_parallel
        tokens_per_pack = self._config.tokens_per_pack
        num_groups = dist.get_world_size() // size
        packs = pack(sequences, num_groups, tokens_per_pack, self._crossover_tokens, counted)
        return packs[dist.get_rank() // size]

    def step(self, batches: Sequence[TrainingBatch], objective: Objective) -> StepResult:
        """Take one optimizer step on this rank's micro-batches of the global batch."""
        sums = self.backward(batches, objective)
        num_tokens = batches[0].num_trainable_tokens_global
        return self.update(sums, num_tokens, objective.grad_scale(sums, num_tokens))

    def backward(self, batches: Sequence[TrainingBatch], objective: Objective) -> dict[str, np.ndarray]:
        """Accumulate the gradients of one step. Return the objective's sums and `loss`, over micro-batches and ranks.

        Each loss, a sum, is divided by the GLOBAL number of trainable tokens, and multiplied by the number of ranks
        because DeepSpeed averages gradients over ranks. Thus the step does not depend on how the batch is cut.
        """
        # Dropout depends on the step alone, so a resumed run repeats it.
        torch.manual_seed(seed_of(self._seed, self._engine.global_steps, dist.get_rank()))
        scale = dist.get_world_size() / batches[0].num_trainable_tokens_global
        totals: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            outputs = objective(self._forward(batch, objective.top_k))
            self._engine.backward(outputs.loss * scale)
            accumulate(totals, outputs.metric_sums | {"loss": outputs.loss.detach()})
        return self._reduce(totals)

    def update(self, sums: Mapping[str, np.ndarray], num_tokens: int, factor: float = 1.0) -> StepResult:
        """Multiply the gradients of `backward` by `factor` and take the optimizer's step. `sums` is what `backward`
        returned, over `num_tokens` trainable tokens."""
        learning_rate = self._engine.get_lr()[0]
        if factor != 1.0:
            zero.scale_gradients(self._engine, factor)
        # Taken before the step, which clips these gradients in place.
        grad_norm = zero.unpartitioned_grad_norm(self._engine.module, self._config, self._dtype)
        self._engine.step()
        if grad_norm is None:
            grad_norm = self._engine.get_global_grad_norm()
        return StepResult(
            loss=float(sums["loss"]) * factor / num_tokens,
            grad_norm=float(grad_norm),
            learning_rate=learning_rate,
            num_tokens=num_tokens,
            metric_sums={name: value for name, value in sums.items() if name != "loss"},
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[TrainingBatch], objective: Objective) -> dict[str, np.ndarray]:
        """Return the sums of `backward` without gradients, in evaluation mode."""
        self._engine.eval()
        totals: dict[str, Tensor] = {}
        for batch in batches:
            outputs = objective(self._forward(batch, objective.top_k))
            accumulate(totals, outputs.metric_sums | {"loss": outputs.loss})
        self._engine.train()
        return self._reduce(totals)

    @torch.no_grad()
    def logprobs(self, batches: Sequence[TrainingBatch]) -> list[np.ndarray]:
        """Return the log-probs of the trainable tokens of each micro-batch, float32."""
        self._engine.eval()
        logprobs = [self._forward(batch, 0).logprobs.cpu().numpy() for batch in batches]
        self._engine.train()
        return logprobs

    def partitions(self) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        """Yield name (as in the Hugging Face folder), full shape and this rank's flat partition of every parameter
        (`zero.partitions`)."""
        return zero.partitions(self._engine.module.language_model)

    def save(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint: weights, optimizer and schedule."""
        self._engine.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=False)

    def load(self, folder: Path, universal: bool = False) -> None:
        """Load a checkpoint written by the same number of ranks, or one in DeepSpeed's universal format
        by any number."""
        # DeepSpeed reads this flag at load time, not only from its initial configuration.
        self._engine._config.load_universal_checkpoint = universal
        self._engine.load_checkpoint(str(folder), tag="state")

    def export(self, folder: Path, tokenizer_path: str) -> None:
        """Write a Hugging Face folder from rank 0, with adapters merged. Parameters are gathered one by one."""
        model = self._engine.module.language_model
        state: dict[str, Tensor] = {}
        for name, parameters, merge in self._export_parameters(model):
            with zero.gathered(parameters):
                if dist.get_rank() == 0:
                    state[name] = merge().detach().cpu().clone()
        if dist.get_rank() == 0:
            write_hf_folder(model, state, folder, tokenizer_path)
        dist.barrier()

    def _export_parameters(self, model: PreTrainedModel) -> Iterator[tuple[str, list[Tensor], Callable[[], Tensor]]]:
        return merged_parameters(model)

    def _forward(self, batch: TrainingBatch, top_k: int) -> LossInputs:
        # Padding added for a sequence group is not trainable, so `select` never reaches it.
        padded = batch if self._group is None else self._group.pad(batch)
        logprobs, entropies, top_masses = self._predict(policy_inputs(padded, self._device), top_k)

        def select(values_T: np.ndarray | None) -> Any:
            if values_T is None:
                return None
            return torch.from_numpy(values_T[batch.trainable_T]).to(self._device)

        return LossInputs(
            logprobs=logprobs[:, 0],
            entropies=entropies,
            sampled_logprobs=select(batch.sampled_logprobs_T),
            coefficients=select(batch.coefficients_T),
            sequence_ids=select(batch.sequence_ids_T),
            origins=batch.origins,
            num_tokens_global=batch.num_trainable_tokens_global,
            num_sequences_global=batch.num_sequences_global,
            top_masses=top_masses,
            teacher_logprobs=select(batch.teacher_logprobs_T),
            logprobs_of_teacher=None if batch.teacher_logprobs_T is None else logprobs[:, 1:],
            reference_logprobs=select(batch.reference_logprobs_T),
            from_demonstration=select(batch.from_demonstration_T),
            num_demonstration_tokens_global=batch.num_demonstration_tokens_global,
            num_demonstration_sequences_global=batch.num_demonstration_sequences_global,
        )

    def _predict(self, inputs: dict[str, Any], top_k: int) -> tuple[Tensor, ...]:
        """Run the model on a whole pack, or on this rank's slice of one and gather the rest."""
        if self._group is None:
            return self._engine(**inputs, top_k=top_k)
        group, num_predictions = self._group, len(inputs["predicted"])
        own_inputs, own = group.slice_inputs(inputs)
        outputs = self._engine(**own_inputs, top_k=top_k)
        return tuple(group.gather(values, own, num_predictions) for values in outputs)

    def _reduce(self, totals: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Sum over ranks, in one all-reduce."""
        names = sorted(totals)
        flat = torch.cat([totals[name].reshape(-1) for name in names])
        dist.all_reduce(flat)
        # Each rank of a sequence group has counted the whole pack.
        flat /= self._config.sequence_parallel
        parts = flat.cpu().split([totals[name].numel() for name in names])
        return {name: part.reshape(totals[name].shape).numpy() for name, part in zip(names, parts, strict=True)}


def crossover_tokens(model: PreTrainedModel) -> float:
    """Return the sequence length at which attention costs as much as the matrix products in a forward and backward
    pass: 6 * weights FLOP per token = 6 * layers * width * length."""
    config = model.config.get_text_config()
    num_weights = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    return num_weights / (config.num_hidden_layers * config.hidden_size)


def accumulate(totals: dict[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    """Add one micro-batch's sums to `totals`, in float64."""
    for name, value in sums.items():
        totals[name] = totals.get(name, 0) + value.double()
