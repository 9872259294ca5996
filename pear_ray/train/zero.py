"""DeepSpeed's side of a learner: its configuration, and what differs between ZeRO stages."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_local_grad,
    safe_set_local_grad,
    safe_update_full_grad_vectorized,
)
from torch import Tensor, nn

from pear_ray.config import Learner as Settings
from pear_ray.config import Optimizer


def deepspeed_config(dtype: str, settings: Settings, optimizer: Optimizer) -> dict[str, Any]:
    """Everything partitioned that the stage partitions, however small a parameter is."""
    stage: dict[str, Any] = {
        "stage": settings.zero_stage,
        # By default parameters below 100,000 elements stay whole on every rank.
        "stage3_param_persistence_threshold": 0,
    }
    if settings.offload != "none":
        stage["offload_optimizer"] = {"device": "cpu"}
    if settings.offload == "parameters":
        stage["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.learning_rate,
                "betas": list(optimizer.betas),
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                "torch_adam": True,
            },
        },
        "zero_optimization": stage,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }


def partitions(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Name, full shape, and this rank's flat partition of every parameter. Partitions are of equal
    size over ranks, the last ones padded: joined in rank order and cut to the full size they are
    the parameter. No communication."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    parameter: Any
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_tensor"):
            yield name, tuple(parameter.ds_shape), parameter.ds_tensor.detach()
            continue
        flat = parameter.detach().reshape(-1)
        size = -(-flat.numel() // num_ranks)
        own = flat[rank * size : (rank + 1) * size]
        yield name, tuple(parameter.shape), nn.functional.pad(own, (0, size - own.numel()))


def whole(parameters: list[Tensor]) -> Any:
    """A context in which every rank holds `parameters` whole; a collective under ZeRO-3."""
    return deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")])


def scale_gradients(engine: Any, factor: float) -> None:
    """Multiply the gradients of the step to be taken, on every rank alike."""
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    if not hasattr(trained[0], "ds_id"):
        safe_update_full_grad_vectorized(trained, lambda grad, _: grad * factor)
        # With offloading, stages 1 and 2 clip by the norms that they noted in the backward pass.
        norms = getattr(engine.optimizer, "norm_for_param_grads", {})
        for number in norms:
            norms[number] *= factor
        return
    for parameter in trained:
        safe_set_local_grad(parameter, safe_get_local_grad(parameter) * factor)


def grad_norm(engine: Any, norm_of_plain_grads: Tensor | None) -> float:
    """The gradient's norm before clipping, over all ranks. DeepSpeed tells it where it partitions
    or keeps master weights; otherwise it is that of the gradients, which every rank holds whole."""
    if norm_of_plain_grads is not None:
        return float(norm_of_plain_grads)
    return float(engine.get_global_grad_norm())


def norm_of_plain_grads(module: nn.Module, settings: Settings, dtype: str) -> Tensor | None:
    """That norm under stage 0 in float32, before the step clips it; None elsewhere."""
    if settings.zero_stage > 0 or dtype != "float32":
        return None
    return torch.nn.utils.get_total_norm(
        [p.grad for p in module.parameters() if p.grad is not None]
    )


def to_universal(folder: Path, universal: Path) -> None:
    """Write a checkpoint in the form that any number of ranks can read."""
    from deepspeed.checkpoint.ds_to_universal import main

    main(
        Namespace(
            input_folder=str(folder / "state"),
            output_folder=str(universal / "state"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
