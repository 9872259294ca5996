"""A vLLM engine: samples answers, scores given ones, and takes new weights while it lives."""

from __future__ import annotations

import gc
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
from torch import Tensor

from pear_ray.config import Generator as Settings
from pear_ray.data.tokenizer import answer_text
from pear_ray.engines.vllm_metrics import EngineStatistics
from pear_ray.environment import keep_freed_memory
from pear_ray.records import Completion
from pear_ray.train.safetensors_io import open_tensors

WEIGHT_TRANSFER = "ray_object_store"


@dataclass(frozen=True)
class SampleRequest:
    """One prompt to answer `num_samples` times, under weights of `min_version` or newer. The seed
    decides the answers, whichever engine serves the request and whatever else it serves: answer i
    is that of `seed` + i alone. `max_new_tokens` may be less than the engine's."""

    prompt_ids: tuple[int, ...]
    num_samples: int
    seed: int
    temperature: float = 1.0
    min_version: int = 0
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class ScoreRequest:
    """A given answer, whose response tokens are to be scored under the newest weights."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    min_version: int = 0


def settle_process(path: str, settings: Settings, on_cpu: bool) -> None:
    """Variables and threads of a process that is going to be an engine."""
    # Both are read when vLLM is imported or the engine starts; in one process the engine
    # starts ten times faster.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if num_positions(path) == settings.max_model_len:
        # One place more than the model has: that of a token which is never read.
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    if on_cpu:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib)
        # oneDNN keeps code for each number of tokens it has met: a thousand, unless told.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        torch.set_num_threads(settings.threads)
        if settings.tensor_parallel_size > 1:
            # Bound to cores, each process of an engine would need a memory node of its own.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            os.environ["OMP_NUM_THREADS"] = str(settings.threads)
        keep_freed_memory()


class Generator:
    """One engine in the calling process (with tensor parallelizm, also in its workers). One that
    `only_scores` reads batches of even size, on CPUs too; `num_top` is the most that `score_top`
    will be asked for. One that `follows` a learner is made for new weights while it works."""

    def __init__(
        self,
        path: str,
        dtype: str,
        settings: Settings,
        seed: int,
        num_top: int = 0,
        only_scores: bool = False,
        follows: bool = False,
    ) -> None:
        on_cpu = settings.num_gpus == 0
        settle_process(path, settings, on_cpu)
        logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"))
        # A million objects come to stay: looking for garbage among them is a fifth of the import.
        gc.disable()
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        gc.freeze()
        gc.enable()

        executor = "uni" if settings.tensor_parallel_size == 1 else "mp" if on_cpu else "ray"
        self._settings = settings
        self._llm = LLM(
            model=path,
            dtype=dtype,
            seed=seed,
            # To score a row, vLLM must generate a token behind it.
            max_model_len=settings.max_model_len + 1,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.batch_tokens,
            # On CPUs a request with a seed must not be cut: vLLM cannot set its generator back.
            enable_chunked_prefill=only_scores
            or not on_cpu
            or settings.batch_tokens <= settings.max_model_len,
            tensor_parallel_size=settings.tensor_parallel_size,
            distributed_executor_backend=executor,
            enforce_eager=on_cpu,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            enable_prefix_caching=False,
            # With it a step is under way while weights change, and its tokens get the wrong number.
            async_scheduling=None if only_scores else False,
            weight_transfer_config=WeightTransferConfig(backend=WEIGHT_TRANSFER),
            trust_remote_code=False,
            disable_log_stats=not settings.metrics,
            max_logprobs=max(20, num_top),
            use_tqdm_on_load=False,
        )
        if settings.metrics:
            statistics: Any = EngineStatistics()
            self._llm.llm_engine.logger_manager = statistics
        self._tokenizer = self._llm.get_tokenizer()
        wants_spare = on_cpu and executor == "uni" and follows
        info = {"init_info": {"with_spare": wants_spare}}
        self._llm.collective_rpc("init_weight_transfer_engine", kwargs=info)
        self._has_spare = wants_spare and all(self._llm.collective_rpc(has_spare))
        self._coming: Mapping[str, Tensor] = {}
        self._is_dense = self._llm.llm_engine.vllm_config.use_v2_model_runner
        self._open: dict[str, SampleRequest | ScoreRequest] = {}
        self._name(0)

    @property
    def is_idle(self) -> bool:
        """Whether everything that was added is finished."""
        return not self._open

    def add(self, key: str, work: SampleRequest | ScoreRequest) -> None:
        """Take up a prompt or a trace beside those in work; `step` tells of its end."""
        parameters: Any
        if isinstance(work, SampleRequest):
            ids, parameters = work.prompt_ids, self._sampling(work)
        else:
            ids = (*work.prompt_ids, *work.response_ids)
            parameters = dense_request(work) if self._is_dense else flat_request(0)
        prompt: Any = {"prompt_token_ids": list(ids)}
        self._llm.llm_engine.add_request(key, prompt, parameters)
        self._open[key] = work

    def step(self) -> list[tuple[str, tuple[Completion, ...] | np.ndarray]]:
        """One forward pass for everything in work. Returns what finished, by key: the answers to
        a request, with the log-prob of every token under the weights that wrote it (at
        temperature 1, whatever the sampling temperature); the log-probs of a trace's response
        tokens, float32."""
        finished: list[tuple[str, tuple[Completion, ...] | np.ndarray]] = []
        for output in self._llm.llm_engine.step():
            if not output.finished:
                continue
            work = self._open.pop(output.request_id)
            if isinstance(work, SampleRequest):
                answers = tuple(self._completion(answer) for answer in output.outputs)
                finished.append((output.request_id, answers))
            elif self._is_dense:
                finished.append((output.request_id, dense_logprobs(output, work)))
            else:
                logprobs, _, _ = flat_logprobs(output, work.prompt_ids, work.response_ids, 0)
                finished.append((output.request_id, logprobs))
        return finished

    def score(self, rows: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        """Log-probs of the response tokens of each (prompt_ids, response_ids), float32.

        Raises:
            RuntimeError: the engine returned something else than one value per token sent.
        """
        rows = list(rows)
        if self._is_dense:
            traces = [ScoreRequest(tuple(prompt), tuple(response)) for prompt, response in rows]
            outputs = self._prefill(rows, [dense_request(trace) for trace in traces])
            return [dense_logprobs(out, trace) for out, trace in zip(outputs, traces, strict=True)]
        outputs = self._prefill(rows, flat_request(0))
        return [flat_logprobs(out, *row, 0)[0] for out, row in zip(outputs, rows, strict=True)]

    def score_top(
        self, rows: Iterable[tuple[Sequence[int], Sequence[int]]], k: int
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The same, and for each response token the `k` likeliest tokens of its place:
        (log-probs float32 [tokens], ids int32 [tokens, k], their log-probs float32 [tokens, k])."""
        rows = list(rows)
        outputs = self._prefill(rows, flat_request(k))
        return [flat_logprobs(out, *row, k) for out, row in zip(outputs, rows, strict=True)]

    def _prefill(self, rows: list[tuple[Sequence[int], Sequence[int]]], parameters: Any) -> Any:
        prompts: Any = [{"prompt_token_ids": [*prompt, *response]} for prompt, response in rows]
        return self._llm.generate(prompts, parameters, use_tqdm=False)

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Make ready what `take` will serve: `tensors` (names and shapes of the Hugging Face
        folder). May be called from another thread, while this one steps. Where loading repacks
        every matrix, which is on CPUs, a spare model takes them now; elsewhere they wait."""
        if self._has_spare:
            torch.set_num_threads(self._settings.threads)
            self._llm.collective_rpc(fill_spare, args=(tensors,))
        else:
            self._coming = tensors

    def take(self, version: int) -> float:
        """Replace the live weights by those that were prepared.

        Returns:
            Seconds in which the engine could not generate.
        """
        started = time.perf_counter()
        if self._has_spare:
            self._llm.collective_rpc(exchange_spare)
        else:
            tensors, self._coming = self._coming, {}
            self._llm.collective_rpc("start_weight_update")
            self._llm.collective_rpc("update_weights", kwargs={"update_info": {"tensors": tensors}})
            self._llm.collective_rpc("finish_weight_update")
        self._llm.reset_prefix_cache()
        self._name(version)
        return time.perf_counter() - started

    def load_folder(self, path: str, version: int) -> None:
        """Replace the live weights by those of a Hugging Face folder of the same architecture."""
        files = open_tensors(Path(path))
        self.prepare({name: file.get_tensor(name) for name, file in files.items()})
        self.take(version)

    def _name(self, version: int) -> None:
        """Number the live weights; vLLM notes the number beside each token that they write."""
        self._llm.llm_engine.set_weight_version(str(version))
        self.version = version

    def _sampling(self, request: SampleRequest) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        room = self._settings.max_model_len - len(request.prompt_ids)
        limit = self._settings.max_new_tokens
        if request.max_new_tokens is not None:
            limit = min(limit, request.max_new_tokens)
        return SamplingParams(
            n=request.num_samples,
            temperature=request.temperature,
            seed=request.seed,
            max_tokens=min(limit, room),
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, answer: Any) -> Completion:
        token_ids = tuple(answer.token_ids)
        logprobs = tuple(answer.logprobs.logprobs)
        if len(logprobs) != len(token_ids):
            raise RuntimeError(f"{len(logprobs)} log-probs for {len(token_ids)} sampled tokens")
        return Completion(
            token_ids=token_ids,
            logprobs=logprobs,
            text=answer_text(self._tokenizer, token_ids),
            finish_reason=str(answer.finish_reason),
            version_spans=tuple(
                (int(span.version), span.end - span.start) for span in answer.weight_versions
            ),
        )


# Asked of vLLM's only worker, which is in this process: not by way of the engine's steps.
def has_spare(worker: Any) -> bool:
    """Whether a second model takes weights."""
    return worker.weight_transfer_engine.standby is not None


def fill_spare(worker: Any, tensors: Mapping[str, Tensor]) -> None:
    """Load into the second model."""
    worker.weight_transfer_engine.fill_spare(tensors)


def exchange_spare(worker: Any) -> None:
    """Serve the second model."""
    worker.weight_transfer_engine.exchange(worker.model_runner)


def num_positions(path: str) -> int | None:
    """The longest context of a model, in tokens, where its configuration names one."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def same_architecture(one: str, other: str) -> bool:
    """Whether an engine that serves `one` can load the weights in the folder `other`."""

    def shape(path: str) -> dict[str, Any]:
        config = json.loads((Path(path) / "config.json").read_text())
        incidental = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
        return {key: value for key, value in config.items() if key not in incidental}

    return Path(one).is_dir() and Path(other).is_dir() and shape(one) == shape(other)


def flat_request(num_top: int) -> Any:
    """Asks for the log-prob of every token sent, in flat lists, not a dictionary per token."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=num_top, flat_logprobs=True, detokenize=False
    )


def flat_logprobs(
    output: Any, prompt_ids: Sequence[int], response_ids: Sequence[int], num_top: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The response's part of vLLM's flat prompt log-probs, each token's own before the likeliest
    of its place, after checking that the engine read exactly the ids it was sent (the first token
    has no log-prob)."""
    flat, sent = output.prompt_logprobs, [*prompt_ids, *response_ids][1:]
    shape = (len(sent), 1 + num_top)
    ids = np.asarray(flat.token_ids, dtype=np.int32)
    if ids.size != shape[0] * shape[1] or ids.reshape(shape)[:, 0].tolist() != sent:
        raise RuntimeError(
            f"the engine scored {len(flat.token_ids)} tokens that differ from the {len(sent)} sent"
        )
    logprobs = np.asarray(flat.logprobs, dtype=np.float32).reshape(shape)[-len(response_ids) :]
    return logprobs[:, 0], ids.reshape(shape)[-len(response_ids) :, 1:], logprobs[:, 1:]


def dense_request(trace: ScoreRequest) -> Any:
    """Asks vLLM's newer model runner for one array with the response tokens' log-probs alone."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprob_token_ids=np.asarray(trace.response_ids, dtype=np.int32)[:, None],
        prompt_logprob_start=len(trace.prompt_ids) - 1,
        detokenize=False,
    )


def dense_logprobs(output: Any, trace: ScoreRequest) -> np.ndarray:
    """The answer to it, after checking that there is one value for each token."""
    scores, num_tokens = output.prompt_token_id_logprobs, len(trace.response_ids)
    if scores is None or tuple(scores.shape) != (num_tokens, 1):
        found = None if scores is None else tuple(scores.shape)
        raise RuntimeError(
            f"the engine returned scores of shape {found} for {num_tokens} response tokens"
        )
    return np.asarray(scores, dtype=np.float32)[:, 0]
