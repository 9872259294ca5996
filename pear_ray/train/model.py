"""A Hugging Face causal LM that maps packed sequences to the log-probs of chosen tokens, with adapters if asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pear_ray.config import Lora
from pear_ray.errors import ConfigError
from pear_ray.losses.logprobs import predicted_logprobs
from pear_ray.losses.packing import pack
from pear_ray.records import TrainingBatch, TrainingSequence
from pear_ray.train import attention
from pear_ray.train.hf_folder import check_architecture

# The name that peft gives to the adapters of a model.
ADAPTER = "default"
# (prompt_ids, response_ids)
TokenizedRow = tuple[Sequence[int], Sequence[int]]


class LogprobHead(nn.Module):
    """Replaces a model's output head and returns log-probs instead of logits. The weight is used once per pass, so
    ZeRO-3 gathers it once."""

    def __init__(self, head: nn.Linear, logits_mib: float) -> None:
        super().__init__()
        self.weight = head.weight
        self.logits_mib = logits_mib

    def forward(self, hidden_T: Tensor, token_ids: Tensor, predicted: Tensor, top_k: int) -> tuple[Tensor, ...]:
        """Return the fields of `logprobs.TokenLogprobs`."""
        logits_mib = self.logits_mib
        return tuple(
            predicted_logprobs(hidden_T, self.weight, token_ids, predicted, logits_mib=logits_mib, top_k=top_k)
        )


class PackedPolicy(nn.Module):
    """A causal LM whose forward pass takes a pack and returns log-probs of chosen tokens."""

    def __init__(self, language_model: PreTrainedModel, logits_mib: float) -> None:
        super().__init__()
        self.language_model = language_model
        language_model.set_output_embeddings(LogprobHead(language_model.get_output_embeddings(), logits_mib))

    def forward(
        self,
        packed_ids_T: Tensor,
        position_ids_T: Tensor,
        token_ids: Tensor,
        predicted: Tensor,
        top_k: int = 0,
        **layout: Any,
    ) -> tuple[Tensor, ...]:
        """Return, for the m candidate `token_ids` at each of the n positions `predicted`, in float32: log-probs [n, m]
        (with gradient), entropies [n] and the total probability of the `top_k` likeliest tokens [n]. `layout` goes to
        the attention (`attention.pack_layout`)."""
        hidden = self.language_model.base_model(
            input_ids=packed_ids_T[None], position_ids=position_ids_T[None], use_cache=False, **layout
        ).last_hidden_state[0]
        return self.language_model.get_output_embeddings()(hidden, token_ids, predicted, top_k)


def policy_inputs(batch: TrainingBatch, device: torch.device, group_size: int = 1) -> dict[str, Any]:
    """Return `PackedPolicy.forward`'s arguments for the trainable tokens of a micro-batch. The first candidate is the
    token itself; the teacher's likeliest tokens follow, if any. An untrained sequence is appended so that the number of
    tokens divides by `group_size`, the ranks that share the pack."""
    predicted = np.flatnonzero(batch.trainable_T)
    token_ids = batch.token_ids_T[predicted, None]
    if batch.teacher_ids_T is not None:
        token_ids = np.concatenate([token_ids, batch.teacher_ids_T[predicted]], axis=1)
    num_padding = -len(batch.token_ids_T) % group_size
    sequence_ids_T = np.pad(batch.sequence_ids_T, (0, num_padding), constant_values=len(batch.origins))
    inputs = {
        "packed_ids_T": np.pad(batch.token_ids_T, (0, num_padding)),
        "position_ids_T": np.append(batch.position_ids_T, np.arange(num_padding)),
        "token_ids": token_ids,
        "predicted": predicted,
    }
    tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
    return tensors | attention.pack_layout(sequence_ids_T, device)


def load_policy(path: str, dtype: str, logits_mib: float = 512.0, device_map: str | None = None) -> PackedPolicy:
    """Load a Hugging Face folder or hub name, from safetensors only. Raise ConfigError if the logits are not a plain
    product with the output head, or if some layer is not attention."""
    is_varlen = torch.cuda.is_available() and dtype == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        attn_implementation=attention.VARLEN if is_varlen else attention.BY_RUNS,
        use_safetensors=True,
        trust_remote_code=False,
        device_map=device_map,
    )
    check_architecture(path, model.config.get_text_config())
    if model._is_stateful:
        raise ConfigError(f"{path}: expected attention only, got a model with recurrent state")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ConfigError(f"{path}: expected an output head without bias, got one with")
    return PackedPolicy(model, logits_mib)


def add_adapters(model: PreTrainedModel, config: Lora) -> None:
    """Insert adapters into the model's linear layers and freeze all other parameters."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = list(config.targets)
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets)
    inject_adapter_in_model(lora, model, adapter_name=ADAPTER)


def merged_parameters(model: PreTrainedModel) -> Iterator[tuple[str, list[Tensor], Callable[[], Tensor]]]:
    """Yield, for every parameter of the model without adapters: its name in the Hugging Face folder, the parameters to
    gather, and a function that merges the gathered ones."""

    def merged_weight(layer: Any) -> Tensor:
        return layer.base_layer.weight + layer.get_delta_weight(ADAPTER)

    adapted = {f"{name}.base_layer.weight": layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    for name, parameter in model.named_parameters():
        plain_name = name.replace(".base_layer.", ".")
        if (layer := adapted.get(name)) is not None:
            parts = [parameter, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
            yield plain_name, parts, partial(merged_weight, layer)
        elif ".lora_" not in name:
            yield plain_name, [parameter], partial(Tensor.detach, parameter)


def trainer_logprobs(
    path: str, dtype: str, rows: Sequence[TokenizedRow], tokens_per_pack: int, num_threads: int
) -> list[np.ndarray]:
    """Load a model and return `policy_logprobs` of `rows`, as the learner computes them at step 0: same code, precision
    and packing. The model is spread over all visible GPUs, if any."""
    torch.set_num_threads(num_threads)
    on_gpu = torch.cuda.is_available()
    policy = load_policy(path, dtype, device_map="auto" if on_gpu else None).eval()
    return policy_logprobs(policy, rows, tokens_per_pack, torch.device("cuda" if on_gpu else "cpu"))


@torch.no_grad()
def policy_logprobs(
    policy: PackedPolicy, rows: Sequence[TokenizedRow], tokens_per_pack: int, device: torch.device
) -> list[np.ndarray]:
    """Return the log-probs of the response tokens of each row, float32."""
    sequences = [
        TrainingSequence.of(prompt, response, np.zeros(len(response)), 1.0, str(number))
        for number, (prompt, response) in enumerate(rows)
    ]
    by_row: dict[int, np.ndarray] = {}
    for batch in pack(sequences, 1, tokens_per_pack)[0]:
        logprobs = policy(**policy_inputs(batch, device))[0][:, 0].cpu().numpy()
        lengths = np.bincount(batch.sequence_ids_T[batch.trainable_T])
        pieces = np.split(logprobs, np.cumsum(lengths)[:-1])
        by_row |= dict(zip(map(int, batch.origins), pieces, strict=True))
    return [by_row[row] for row in range(len(rows))]
