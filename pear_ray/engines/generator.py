"""A vLLM engine that samples completions, scores given ones and swaps weights in place."""

from __future__ import annotations

import gc
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from ray.util.metrics import Counter, Gauge
from torch import Tensor

from pear_ray.config import Generator as Settings
from pear_ray.data.tokenizer import decode_completion
from pear_ray.metrics import METRIC_HELP
from pear_ray.process import keep_freed_memory
from pear_ray.records import Completion
from pear_ray.train.hf_folder import open_tensors

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

WEIGHT_TRANSFER = "ray_object_store"
SECONDS_BETWEEN_REPORTS = 1.0  # engines of small models run a hundred steps a second
# Names of metrics and of vLLM's attributes.
COUNTERS = {
    "prompt_tokens": "num_prompt_tokens",
    "generation_tokens": "num_generation_tokens",
    "preemptions": "num_preempted_reqs",
}
GAUGES = {
    "num_requests_running": "num_running_reqs",
    "num_requests_waiting": "num_waiting_reqs",
    "kv_cache_usage": "kv_cache_usage",
}


@dataclass(frozen=True)
class SampleRequest:
    """A prompt to sample `num_samples` completions for, with weights of `min_version` or newer. Completion i depends on
    the weights and `seed` + i alone, not on the engine or its other requests."""

    prompt_ids: tuple[int, ...]
    num_samples: int
    seed: int
    temperature: float = 1.0
    min_version: int = 0
    max_new_tokens: int | None = None  # lowers the engine's own limit


@dataclass(frozen=True)
class ScoreRequest:
    """A prompt and a response to score with weights of `min_version` or newer."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    min_version: int = 0
    num_samples: ClassVar[int] = 1


Request = SampleRequest | ScoreRequest
# (prompt_ids, response_ids) of each row to score
Rows = Iterable[tuple[Sequence[int], Sequence[int]]]
# log-probs float32 [tokens], ids int32 [tokens, k] of the k most likely tokens, their log-probs float32 [tokens, k]
TopScores = tuple[np.ndarray, np.ndarray, np.ndarray]


def configure_process(path: str, settings: Settings, on_cpu: bool) -> None:
    """Set the environment variables, threads and log level of an engine's process."""
    from transformers import AutoConfig

    logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"))
    # Read when vLLM is imported; in one process the engine starts ten times faster.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    if getattr(config, "max_position_embeddings", None) == settings.max_model_len:
        # `Generator` adds one position, whose token is never read.
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    if on_cpu:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib)
        # oneDNN caches kernels by number of tokens, 1,024 of them by default.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        torch.set_num_threads(settings.threads)
        if settings.tensor_parallel_size > 1:
            # To bind cores, vLLM requires one NUMA node for each process of an engine.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            os.environ["OMP_NUM_THREADS"] = str(settings.threads)
        keep_freed_memory()


class Generator:
    """A vLLM engine in the calling process (and in its workers, with tensor parallelism). `num_top`: largest k of
    `score_top`. `only_scores`: chunk prompts on CPUs too. `follows_learner`: prepare new weights while requests run."""

    def __init__(
        self,
        path: str,
        dtype: str,
        settings: Settings,
        seed: int,
        num_top: int = 0,
        only_scores: bool = False,
        follows_learner: bool = False,
    ) -> None:
        on_cpu = settings.num_gpus == 0
        configure_process(path, settings, on_cpu)
        # The import allocates a million permanent objects; collecting them costs 20 % of its time.
        gc.disable()
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        gc.freeze()
        gc.enable()

        chunks_prefill = only_scores or not on_cpu or settings.max_num_batched_tokens <= settings.max_model_len
        executor = "uni" if settings.tensor_parallel_size == 1 else "mp" if on_cpu else "ray"
        self._settings = settings
        self._llm = LLM(
            model=path,
            dtype=dtype,
            seed=seed,
            # vLLM cannot score without generating one more token.
            max_model_len=settings.max_model_len + 1,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            # vLLM cannot rewind a seeded CPU generator after a partial prefill.
            enable_chunked_prefill=chunks_prefill,
            tensor_parallel_size=settings.tensor_parallel_size,
            distributed_executor_backend=executor,
            enforce_eager=on_cpu,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            enable_prefix_caching=False,
            # A step in flight during a swap would label its tokens with the wrong weight version.
            async_scheduling=None if only_scores else False,
            weight_transfer_config=WeightTransferConfig(backend=WEIGHT_TRANSFER),
            trust_remote_code=False,
            disable_log_stats=not settings.metrics,
            max_logprobs=max(20, num_top),
            use_tqdm_on_load=False,
        )
        if settings.metrics:
            self._llm.llm_engine.logger_manager = EngineStatistics()
        self._tokenizer = self._llm.get_tokenizer()
        wants_standby = on_cpu and executor == "uni" and follows_learner
        self._llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {"with_standby": wants_standby}})
        # With a standby vLLM's only worker runs in this process, so that it can be called with lambdas.
        self._has_standby = wants_standby and all(
            self._llm.collective_rpc(lambda worker: worker.weight_transfer_engine.standby is not None)
        )
        self._prepared: Mapping[str, Tensor] = {}
        # vLLM's V2 model runner returns the scores of a request as one array.
        self._is_dense = self._llm.llm_engine.vllm_config.use_v2_model_runner
        self._in_flight: dict[str, Request] = {}
        self._set_version(0)

    @property
    def is_idle(self) -> bool:
        """Return whether no request is in flight."""
        return not self._in_flight

    def add(self, key: str, request: Request) -> None:
        """Add a request; `step` returns its result under `key`."""
        response_ids = request.response_ids if isinstance(request, ScoreRequest) else ()
        prompt: Any = {"prompt_token_ids": [*request.prompt_ids, *response_ids]}
        self._llm.llm_engine.add_request(key, prompt, self._params(request))
        self._in_flight[key] = request

    def step(self) -> list[tuple[str, tuple[Completion, ...] | np.ndarray]]:
        """Run one forward pass; return the (key, result) pairs of finished requests.

        Results of a `SampleRequest`: completions, with log-probs at temperature 1 under the weights that sampled each
        token; of a `ScoreRequest`: log-probs of the response, float32.
        """
        finished: list[tuple[str, tuple[Completion, ...] | np.ndarray]] = []
        for output in self._llm.llm_engine.step():
            if not output.finished:
                continue
            request = self._in_flight.pop(output.request_id)
            if isinstance(request, SampleRequest):
                finished.append((output.request_id, self._completions(output)))
            else:
                finished.append((output.request_id, self._logprobs(output, request)))
        return finished

    def score(self, rows: Rows) -> list[np.ndarray]:
        """Return the log-probs of each response, float32; RuntimeError unless one for each token."""
        requests = [ScoreRequest(tuple(prompt), tuple(response)) for prompt, response in rows]
        outputs = self._prefill(requests, [self._params(request) for request in requests])
        return [self._logprobs(*pair) for pair in zip(outputs, requests, strict=True)]

    def score_top(self, rows: Rows, k: int) -> list[TopScores]:
        """Return the log-probs of each response and the k most likely tokens at its positions."""
        requests = [ScoreRequest(tuple(prompt), tuple(response)) for prompt, response in rows]
        outputs = self._prefill(requests, flat_params(k))
        return [flat_logprobs(*pair, k) for pair in zip(outputs, requests, strict=True)]

    def _prefill(self, requests: Sequence[ScoreRequest], params: Any) -> Any:
        prompts: Any = [{"prompt_token_ids": [*row.prompt_ids, *row.response_ids]} for row in requests]
        return self._llm.generate(prompts, params, use_tqdm=False)

    def prepare_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Stage `tensors` (names and shapes of the Hugging Face folder) for `swap_weights`; may run in another thread
        than `step`. On CPUs, where loading repacks every matrix, load them into the standby model."""
        if self._has_standby:
            torch.set_num_threads(self._settings.threads)
            self._llm.collective_rpc(lambda worker: worker.weight_transfer_engine.load_standby(tensors))
        else:
            self._prepared = tensors

    def swap_weights(self, version: int) -> float:
        """Replace the live weights with the prepared ones; return the seconds without generation."""
        started = time.perf_counter()
        if self._has_standby:
            self._llm.collective_rpc(lambda worker: worker.weight_transfer_engine.swap_standby(worker.model_runner))
        else:
            tensors, self._prepared = self._prepared, {}
            self._llm.collective_rpc("start_weight_update")
            self._llm.collective_rpc("update_weights", kwargs={"update_info": {"tensors": tensors}})
            self._llm.collective_rpc("finish_weight_update")
        self._llm.reset_prefix_cache()
        self._set_version(version)
        return time.perf_counter() - started

    def load_folder(self, path: str, version: int) -> None:
        """Replace the live weights with those of a Hugging Face folder of the same architecture."""
        files = open_tensors(Path(path))
        self.prepare_weights({name: file.get_tensor(name) for name, file in files.items()})
        self.swap_weights(version)

    def _set_version(self, version: int) -> None:
        # vLLM attaches the number to each token it samples.
        self._llm.llm_engine.set_weight_version(str(version))
        self.version = version

    def _params(self, request: Request) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if isinstance(request, SampleRequest):
            room = self._settings.max_model_len - len(request.prompt_ids)
            limits = (self._settings.max_new_tokens, request.max_new_tokens, room)
            return SamplingParams(
                n=request.num_samples,
                temperature=request.temperature,
                seed=request.seed,
                max_tokens=min(limit for limit in limits if limit is not None),
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        if not self._is_dense:
            return flat_params(0)
        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprob_token_ids=np.asarray(request.response_ids, dtype=np.int32)[:, None],
            prompt_logprob_start=len(request.prompt_ids) - 1,
            detokenize=False,
        )

    def _completions(self, output: Any) -> tuple[Completion, ...]:
        completions = []
        for sample in output.outputs:
            token_ids, logprobs = tuple(sample.token_ids), tuple(sample.logprobs.logprobs)
            if len(logprobs) != len(token_ids):
                raise RuntimeError(f"expected {len(token_ids)} sampled log-probs, got {len(logprobs)}")
            text = decode_completion(self._tokenizer, token_ids)
            spans = tuple((int(span.version), span.end - span.start) for span in sample.weight_versions)
            completions.append(Completion(token_ids, logprobs, text, str(sample.finish_reason), spans))
        return tuple(completions)

    def _logprobs(self, output: Any, request: ScoreRequest) -> np.ndarray:
        if not self._is_dense:
            return flat_logprobs(output, request, 0)[0]
        scores, num_tokens = output.prompt_token_id_logprobs, len(request.response_ids)
        shape = None if scores is None else tuple(scores.shape)
        if shape != (num_tokens, 1):
            raise RuntimeError(f"scores: expected shape {(num_tokens, 1)}, got {shape}")
        return np.asarray(scores, dtype=np.float32)[:, 0]


class EngineStatistics:
    """Replaces vLLM's logger manager: exports at Ray's Prometheus endpoint. vLLM's own exporter requires Ray Serve."""

    def __init__(self) -> None:
        texts = METRIC_HELP["engine"]
        self._counters = {name: Counter(f"pear_ray_engine_{name}", texts[name]) for name in COUNTERS}
        self._gauges = {name: Gauge(f"pear_ray_engine_{name}", texts[name]) for name in GAUGES}
        self._sums = dict.fromkeys(COUNTERS, 0)
        self._reported_at = 0.0

    def record(self, scheduler_stats: SchedulerStats, iteration_stats: IterationStats | None, **_: object) -> None:
        """Add one step; called by vLLM. Exports once a second, and when the engine goes idle."""
        if iteration_stats is not None:
            for name, attribute in COUNTERS.items():
                self._sums[name] += getattr(iteration_stats, attribute)
        is_idle = not scheduler_stats.num_running_reqs and not scheduler_stats.num_waiting_reqs
        if not is_idle and time.monotonic() < self._reported_at + SECONDS_BETWEEN_REPORTS:
            return
        self._reported_at = time.monotonic()
        for name, attribute in GAUGES.items():
            self._gauges[name].set(getattr(scheduler_stats, attribute))
        for name, total in self._sums.items():
            if total:
                self._counters[name].inc(total)
        self._sums = dict.fromkeys(COUNTERS, 0)

    def log(self) -> None:
        """Do nothing; called by vLLM to print a log line."""


def same_architecture(one: str, other: str) -> bool:
    """Return whether an engine that serves folder `one` can load the weights of folder `other`."""

    def shape(path: str) -> dict[str, Any]:
        config = json.loads((Path(path) / "config.json").read_text())
        incidental = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
        return {key: value for key, value in config.items() if key not in incidental}

    return Path(one).is_dir() and Path(other).is_dir() and shape(one) == shape(other)


def flat_params(num_top: int) -> Any:
    """Return parameters that request the log-probs of all prompt tokens in flat lists."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=num_top, flat_logprobs=True, detokenize=False)


def flat_logprobs(output: Any, request: ScoreRequest, num_top: int) -> TopScores:
    """Return the response's part of vLLM's flat prompt log-probs; RuntimeError if the scored ids are not those sent."""
    # At each position vLLM lists the token itself, then the most likely ones; the first token has none.
    flat, sent = output.prompt_logprobs, [*request.prompt_ids, *request.response_ids][1:]
    shape, response = (len(sent), 1 + num_top), slice(-len(request.response_ids), None)
    ids = np.asarray(flat.token_ids, dtype=np.int32)
    if ids.size != shape[0] * shape[1] or ids.reshape(shape)[:, 0].tolist() != sent:
        raise RuntimeError(f"scored tokens: expected the {len(sent)} sent, got {len(flat.token_ids)} that differ")
    logprobs = np.asarray(flat.logprobs, dtype=np.float32).reshape(shape)[response]
    return logprobs[:, 0], ids.reshape(shape)[response, 1:], logprobs[:, 1:]
