"""One rank of a DeepSpeed ZeRO learner. It knows tokens, coefficients and sums, not algorithms: the objective turns a
micro-batch into a loss.

    sequences of a step --micro_batches--> this rank's packs --backward--> gradients, sums
                                                             --update----> StepResult
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_grad, safe_set_local_grad, safe_update_full_grad_vectorized
from torch import Tensor, nn
from transformers import PreTrainedModel, get_scheduler
from transformers.integrations import HfDeepSpeedConfig

from pear_ray.config import Learner as LearnerConfig
from pear_ray.config import Optimizer
from pear_ray.losses import LossInputs, Objective
from pear_ray.losses.packing import pack
from pear_ray.records import TrainingBatch, TrainingSequence
from pear_ray.statistics import seed_of
from pear_ray.train.attention import SequenceGroup
from pear_ray.train.hf_folder import write_hf_folder
from pear_ray.train.model import PackedPolicy, add_adapters, load_policy, merged_parameters, policy_inputs


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
        zero_config = deepspeed_config(dtype, config, optimizer)
        # While this object lives, transformers partitions each parameter as it loads it.
        self._partition_on_load = HfDeepSpeedConfig(zero_config)
        policy = load_policy(path, dtype, config.logits_mib)
        parameters = self._trained_parameters(policy, optimizer)
        if config.activation_checkpointing:
            policy.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
        num_warmup_steps = round(optimizer.warmup_fraction * num_steps)
        self._engine, *_ = deepspeed.initialize(
            model=policy,
            model_parameters=parameters,
            config=zero_config,
            lr_scheduler=lambda adam: get_scheduler(optimizer.schedule, adam, num_warmup_steps, num_steps),
        )
        self._device = self._engine.device
        size = config.sequence_parallel
        self._group = SequenceGroup.create(size, config.timeout_seconds) if size > 1 else None
        # The sequence length at which attention costs as much as the matrix products in a forward and backward pass:
        # 6 * weights FLOP per token = 6 * layers * width * length.
        model = policy.language_model.config.get_text_config()
        num_weights = sum(getattr(p, "ds_numel", p.numel()) for p in policy.language_model.parameters())
        self._crossover_tokens = num_weights / (model.num_hidden_layers * model.hidden_size)

    def _trained_parameters(self, policy: PackedPolicy, optimizer: Optimizer) -> list[Any]:
        """Insert adapters, if any; return the optimizer's parameters or parameter groups."""
        if self._config.lora is not None:
            add_adapters(policy.language_model, self._config.lora)
        return [parameter for parameter in policy.parameters() if parameter.requires_grad]

    def micro_batches(
        self, sequences: Sequence[TrainingSequence], counted: Sequence[TrainingSequence] | None = None
    ) -> list[TrainingBatch]:
        """Return this rank's micro-batches of one step. Every rank passes the same `sequences`; `counted`, and the
        ValueErrors, as in `pack`."""
        size = self._config.sequence_parallel
        num_groups = dist.get_world_size() // size
        packs = pack(sequences, num_groups, self._config.tokens_per_pack, self._crossover_tokens, counted)
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
            scale_gradients(self._engine, factor)
        own_norm = None
        # DeepSpeed computes the norm itself if it partitions or keeps master weights.
        if self._config.zero_stage == 0 and self._dtype == "float32":
            # Taken before the step, which clips these gradients in place.
            own_norm = nn.utils.get_total_norm([p.grad for p in self._engine.module.parameters() if p.grad is not None])
        self._engine.step()
        grad_norm = self._engine.get_global_grad_norm() if own_norm is None else own_norm
        loss = float(sums["loss"]) * factor / num_tokens
        metric_sums = {name: value for name, value in sums.items() if name != "loss"}
        return StepResult(loss, float(grad_norm), learning_rate, num_tokens, metric_sums)

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
        """Yield name (as in the Hugging Face folder), full shape and this rank's flat partition of every parameter,
        without communication. Partitions have equal size on all ranks: joined in rank order and cut to the full size
        they are the parameter."""
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        for name, parameter in self._engine.module.language_model.named_parameters():
            if hasattr(parameter, "ds_tensor"):
                yield name, tuple(parameter.ds_shape), parameter.ds_tensor.detach()
                continue
            yield name, tuple(parameter.shape), partition(parameter.detach(), rank, num_ranks)

    def save(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint: weights, optimizer and schedule."""
        self._engine.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=False)

    def load(self, folder: Path, universal: bool = False) -> None:
        """Load a checkpoint of the same number of ranks, or one in DeepSpeed's universal format of any number."""
        # DeepSpeed reads this flag at load time, not only from its initial configuration.
        self._engine._config.load_universal_checkpoint = universal
        self._engine.load_checkpoint(str(folder), tag="state")
        # DeepSpeed 0.19 gives all groups of parameters one tensor with the number of steps, which each then counts up.
        for state in self._engine.optimizer.optimizer.state.values() if universal else ():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()

    def export(self, folder: Path, tokenizer_path: str) -> None:
        """Write a Hugging Face folder from rank 0, with adapters merged. Parameters are gathered one by one."""
        model = self._engine.module.language_model
        state: dict[str, Tensor] = {}
        for name, parameters, merge in self._export_parameters(model):
            with deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")]):
                if dist.get_rank() == 0:
                    state[name] = merge().detach().cpu().clone()
        if dist.get_rank() == 0:
            write_hf_folder(model, state, folder, tokenizer_path)
        dist.barrier()

    def _export_parameters(self, model: PreTrainedModel) -> Iterator[tuple[str, list[Tensor], Callable[[], Tensor]]]:
        return merged_parameters(model)

    def _forward(self, batch: TrainingBatch, top_k: int) -> LossInputs:
        inputs = policy_inputs(batch, self._device, self._config.sequence_parallel)
        logprobs, entropies, top_masses = self._predict(inputs, top_k)

        def select(values_T: np.ndarray | None) -> Any:
            return None if values_T is None else torch.from_numpy(values_T[batch.trainable_T]).to(self._device)

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


def deepspeed_config(dtype: str, config: LearnerConfig, optimizer: Optimizer) -> dict[str, Any]:
    """Return DeepSpeed's configuration."""
    # The default threshold leaves parameters below 100,000 elements whole on every rank.
    zero_optimization: dict[str, Any] = {"stage": config.zero_stage, "stage3_param_persistence_threshold": 0}
    if config.offload != "none":
        zero_optimization["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "parameters":
        zero_optimization["offload_param"] = {"device": "cpu"}
    adam = {"lr": optimizer.learning_rate, "betas": list(optimizer.betas), "eps": optimizer.eps}
    adam |= {"weight_decay": optimizer.weight_decay, "torch_adam": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": zero_optimization,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }


def accumulate(totals: dict[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    """Add one micro-batch's sums to `totals`, in float64."""
    for name, value in sums.items():
        totals[name] = totals.get(name, 0) + value.double()


def scale_gradients(engine: Any, factor: float) -> None:
    """Multiply the accumulated gradients by `factor`, the same on every rank."""
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    if not hasattr(trained[0], "ds_id"):
        safe_update_full_grad_vectorized(trained, lambda grad, _: grad * factor)
        # DeepSpeed 0.19 with offloading clips stages 1 and 2 by norms recorded in backward.
        norms = getattr(engine.optimizer, "norm_for_param_grads", {})
        for parameter_id in norms:
            norms[parameter_id] *= factor
        return
    for parameter in trained:
        safe_set_local_grad(parameter, safe_get_local_grad(parameter) * factor)


def partition(tensor: Tensor, rank: int, num_ranks: int) -> Tensor:
    """Return a rank's flat part of a tensor, padded with zeros to the size of the largest, as under ZeRO-3."""
    flat = tensor.reshape(-1)
    size = -(-flat.numel() // num_ranks)
    own = flat[rank * size : (rank + 1) * size]
    return nn.functional.pad(own, (0, size - own.numel()))


def write_universal_checkpoint(folder: Path, universal: Path) -> None:
    """Convert a checkpoint to DeepSpeed's universal format, which any number of ranks can load."""
    from deepspeed.checkpoint.ds_to_universal import main

    folders = {"input_folder": str(folder / "state"), "output_folder": str(universal / "state")}
    num_workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    main(Namespace(**folders, **num_workers, keep_temp_folder=False, strict=True, inject_missing_state=True))
