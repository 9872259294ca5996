"""DeepSpeed ZeRO: its configuration, and what differs between its stages."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_grad, safe_set_local_grad, safe_update_full_grad_vectorized
from torch import Tensor, nn

from pear_ray.config import Learner as LearnerConfig
from pear_ray.config import Optimizer


def deepspeed_config(dtype: str, config: LearnerConfig, optimizer: Optimizer) -> dict[str, Any]:
    """Return DeepSpeed's configuration."""
    zero_optimization: dict[str, Any] = {
        "stage": config.zero_stage,
        # The default leaves parameters below 100,000 elements whole on every rank.
        "stage3_param_persistence_threshold": 0,
    }
    if config.offload != "none":
        zero_optimization["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "parameters":
        zero_optimization["offload_param"] = {"device": "cpu"}
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
        "zero_optimization": zero_optimization,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }


def partitions(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Yield name, full shape and this rank's flat partition of every parameter, without communication. Partitions have
    equal size on all ranks: joined in rank order and cut to the full size they are the parameter."""
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


def gathered(parameters: list[Tensor]) -> Any:
    """Return a context in which every rank holds `parameters` whole; collective under ZeRO-3."""
    return deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")])


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


def unpartitioned_grad_norm(module: nn.Module, config: LearnerConfig, dtype: str) -> Tensor | None:
    """Return the gradient norm under stage 0 in float32; None otherwise, since DeepSpeed computes the norm itself if it
    partitions or keeps master weights."""
    if config.zero_stage > 0 or dtype != "float32":
        return None
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def write_universal_checkpoint(folder: Path, universal: Path) -> None:
    """Convert a checkpoint to DeepSpeed's universal format, which any number of ranks can load."""
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
