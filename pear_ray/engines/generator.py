"""A vLLM engine: samples answers, scores given ones, and takes new weights while it lives."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from pear_ray.config import Generator as Settings
from pear_ray.records import Completion

WEIGHT_TRANSFER = "ray_object_store"


@dataclass(frozen=True)
class Request:
    """One prompt to answer `num_samples` times. The seed decides the answers, whichever engine
    serves the request and whatever else it serves."""

    prompt_ids: tuple[int, ...]
    num_samples: int
    seed: int


class Generator:
    """One engine in the calling process (with tensor parallelism, also in its workers)."""

    def __init__(self, path: str, dtype: str, settings: Settings, seed: int) -> None:
        on_cpu = settings.num_gpus == 0
        # Both are read when vLLM is imported or the engine starts; in one process the engine
        # starts ten times faster.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if on_cpu:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib)
            torch.set_num_threads(settings.threads)
        logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"))
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        executor = "uni" if settings.tensor_parallel == 1 else "mp" if on_cpu else "ray"
        self._settings = settings
        self._llm = LLM(
            model=path,
            dtype=dtype,
            seed=seed,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_concurrent,
            max_num_batched_tokens=max(settings.max_model_len, 8192),
            tensor_parallel_size=settings.tensor_parallel,
            distributed_executor_backend=executor,
            enforce_eager=on_cpu,
            gpu_memory_utilization=settings.memory_fraction,
            enable_prefix_caching=False,
            weight_transfer_config=WeightTransferConfig(backend=WEIGHT_TRANSFER),
            trust_remote_code=False,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        self._tokenizer = self._llm.get_tokenizer()
        self._llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})
        self.version = 0

    def sample(
        self, requests: Sequence[Request], temperature: float
    ) -> list[tuple[Completion, ...]]:
        """The answers to each request, with the log-prob of every token under the weights that
        wrote it (at temperature 1, whatever the sampling temperature)."""
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                n=request.num_samples,
                temperature=temperature,
                seed=request.seed,
                max_tokens=self._settings.max_new_tokens,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
            )
            for request in requests
        ]
        prompts: Any = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        return [tuple(self._completion(answer) for answer in out.outputs) for out in outputs]

    def score(self, rows: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        """Log-probs of the response tokens of each (prompt_ids, response_ids), float32.

        Raises:
            RuntimeError: the engine returned something else than one value per token sent.
        """
        from vllm import SamplingParams

        rows = list(rows)
        parameters = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        prompts: Any = [{"prompt_token_ids": [*prompt, *response]} for prompt, response in rows]
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        return [
            response_logprobs(out.prompt_logprobs, prompt, response)
            for out, (prompt, response) in zip(outputs, rows, strict=True)
        ]

    def load(self, tensors: Mapping[str, Tensor], version: int) -> float:
        """Replace the live weights by `tensors` (names and shapes of the Hugging Face folder).

        Returns:
            Seconds in which the engine could not generate.
        """
        started = time.perf_counter()
        self._llm.collective_rpc("start_weight_update")
        self._llm.collective_rpc("update_weights", kwargs={"update_info": {"tensors": tensors}})
        self._llm.collective_rpc("finish_weight_update")
        self._llm.reset_prefix_cache()
        self._llm.llm_engine.set_weight_version(str(version))
        self.version = version
        return time.perf_counter() - started

    def load_folder(self, path: str, version: int) -> None:
        """Replace the live weights by those of a Hugging Face folder of the same architecture."""
        tensors: dict[str, Tensor] = {}
        for file in sorted(Path(path).glob("*.safetensors")):
            with safe_open(file, framework="pt") as handle:
                tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        self.load(tensors, version)

    def _completion(self, answer: Any) -> Completion:
        token_ids = tuple(answer.token_ids)
        logprobs = tuple(answer.logprobs.logprobs)
        if len(logprobs) != len(token_ids):
            raise RuntimeError(f"{len(logprobs)} log-probs for {len(token_ids)} sampled tokens")
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return Completion(
            token_ids=token_ids,
            logprobs=logprobs,
            text=text.strip(),
            finish_reason=str(answer.finish_reason),
            policy_versions=(self.version, self.version),
        )


def same_architecture(one: str, other: str) -> bool:
    """Whether an engine that serves `one` can load the weights in the folder `other`."""

    def shape(path: str) -> dict[str, Any]:
        config = json.loads((Path(path) / "config.json").read_text())
        incidental = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
        return {key: value for key, value in config.items() if key not in incidental}

    return Path(one).is_dir() and Path(other).is_dir() and shape(one) == shape(other)


def response_logprobs(
    flat: Any, prompt_ids: Sequence[int], response_ids: Sequence[int]
) -> np.ndarray:
    """The response's part of vLLM's flat prompt log-probs, after checking that the engine read
    exactly the ids it was sent (the first token has no log-prob)."""
    sent = [*prompt_ids, *response_ids][1:]
    if list(flat.token_ids) != sent:
        raise RuntimeError(
            f"the engine scored {len(flat.token_ids)} tokens that differ from the {len(sent)} sent"
        )
    return np.asarray(flat.logprobs[-len(response_ids) :], dtype=np.float32)
