"""One rank of a DeepSpeed ZeRO-3 learner. It knows tokens and coefficients, not algorithms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import get_scheduler
from transformers.integrations import HfDeepSpeedConfig

from pear_ray.algorithms.objectives import Objective, Tokens
from pear_ray.config import Learner as Settings
from pear_ray.config import Optimiser
from pear_ray.engines.model import load_policy, policy_inputs
from pear_ray.records import TrainingBatch


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did: loss per trainable token of the global batch, the gradient's
    norm before clipping, and the objective's facts summed over micro-batches and ranks."""

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    facts: dict[str, np.ndarray]


class Learner:
    """Parameters, gradients and optimiser states of one rank; every method is collective."""

    def __init__(
        self,
        path: str,
        dtype: str,
        settings: Settings,
        optimiser: Optimiser,
        num_steps: int,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        config = deepspeed_config(dtype, optimiser)
        # Alive while the model loads, it lets transformers partition each parameter at once.
        self._partitioned_loading = HfDeepSpeedConfig(config)
        # A full micro-batch's chunks: as many on every rank and in every step.
        chunks = -(-settings.tokens_per_micro_batch // settings.tokens_per_logits_chunk)
        policy = load_policy(path, dtype, chunks)
        if settings.activation_checkpointing:
            policy.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
        self._engine, *_ = deepspeed.initialize(
            model=policy,
            model_parameters=policy.parameters(),
            config=config,
            lr_scheduler=lambda adam: get_scheduler(
                optimiser.schedule,
                adam,
                num_warmup_steps=round(optimiser.warmup_fraction * num_steps),
                num_training_steps=num_steps,
            ),
        )
        self._device = self._engine.device

    def step(self, batches: Sequence[TrainingBatch], objective: Objective) -> StepResult:
        """One optimiser step on this rank's micro-batches of the global batch.

        Sums of the losses are divided by the GLOBAL number of trainable tokens, and multiplied by
        the number of ranks because DeepSpeed averages gradients over ranks: so the step does not
        depend on how the batch was cut.
        """
        num_tokens = batches[0].num_trainable_tokens_global
        learning_rate = self._engine.get_lr()[0]
        scale = dist.get_world_size() / num_tokens
        totals: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            sums = objective(self._forward(batch))
            self._engine.backward(sums.loss * scale)
            for name, value in {**sums.facts, "loss": sums.loss.detach()}.items():
                totals[name] = totals.get(name, 0) + value.double()
        self._engine.step()
        facts = self._over_ranks(totals)
        return StepResult(
            loss=float(facts.pop("loss")) / num_tokens,
            grad_norm=float(self._engine.get_global_grad_norm()),
            learning_rate=learning_rate,
            num_tokens=num_tokens,
            facts=facts,
        )

    @torch.no_grad()
    def logprobs(self, batches: Sequence[TrainingBatch]) -> list[np.ndarray]:
        """Log-probs of the trainable tokens of each micro-batch of this rank, float32."""
        self._engine.eval()
        found = [self._forward(batch).logprobs.cpu().numpy() for batch in batches]
        self._engine.train()
        return found

    def partitions(self) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        """Name (as in the Hugging Face folder), full shape, and this rank's flat partition of
        every parameter. Partitions are padded to equal size over ranks: joined in rank order and
        cut to the full size they are the parameter. No communication."""
        for name, parameter in self._engine.module.language_model.named_parameters():
            yield name, tuple(parameter.ds_shape), parameter.ds_tensor.detach()

    def save(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint: weights, optimiser and schedule."""
        self._engine.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=False)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint that as many ranks saved."""
        self._engine.load_checkpoint(str(folder), tag="state")

    def export(self, folder: Path, tokenizer_path: str) -> None:
        """Write a Hugging Face folder, from rank 0; one parameter at a time is gathered."""
        model = self._engine.module.language_model
        state: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if dist.get_rank() == 0:
                    state[name] = parameter.detach().cpu().clone()
        if dist.get_rank() == 0:
            from pear_ray.engines.export import write_folder

            write_folder(model, state, folder, tokenizer_path)
        dist.barrier()

    def _forward(self, batch: TrainingBatch) -> Tokens:
        logprobs, entropies = self._engine(**policy_inputs(batch, self._device))

        def chosen(values_T: np.ndarray) -> Tensor:
            return torch.from_numpy(values_T[batch.trainable_T]).to(self._device)

        return Tokens(
            logprobs=logprobs,
            entropies=entropies,
            sampled_logprobs=chosen(batch.sampled_logprobs_T),
            coefficients=chosen(batch.coefficients_T),
            sequence_ids=chosen(batch.sequence_ids_T),
            origins=batch.origins,
        )

    def _over_ranks(self, totals: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        names = sorted(totals)
        flat = torch.cat([totals[name].reshape(-1) for name in names])
        dist.all_reduce(flat)
        parts = flat.cpu().split([totals[name].numel() for name in names])
        return {
            name: part.reshape(totals[name].shape).numpy()
            for name, part in zip(names, parts, strict=True)
        }


def deepspeed_config(dtype: str, optimiser: Optimiser) -> dict:
    """ZeRO stage 3 with everything partitioned, however small a parameter is."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimiser.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimiser.learning_rate,
                "weight_decay": optimiser.weight_decay,
                "torch_adam": True,
            },
        },
        "zero_optimization": {
            "stage": 3,
            # By default parameters below 100,000 elements stay whole on every rank.
            "stage3_param_persistence_threshold": 0,
        },
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }
