"""DeepSpeed learners publish full versions and deltas, a vLLM engine loads them, and the weights and log-probs of both
sides agree."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
import ray
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pear_ray.config import Learner as Settings
from pear_ray.config import Optimizer
from pear_ray.data.batch_queue import BatchQueue
from pear_ray.engines.generator import SampleRequest, ScoreRequest
from pear_ray.losses.packing import pack
from pear_ray.losses.sft import Supervised
from pear_ray.records import TrainingSequence
from pear_ray.train.learner import Learner
from pear_ray.weights.fetch import WeightCache
from pear_ray.weights.publish import Publisher
from pear_ray.weights.registry import PolicyVersions


class Case(NamedTuple):
    """One combination of tied embeddings, number of learner ranks and `weights.full_every`."""

    tied: bool
    num_ranks: int
    full_every: int


# Pairwise: all combinations of two of the three settings.
CASES = [Case(True, 1, 1), Case(True, 2, 8), Case(False, 1, 8), Case(False, 2, 1)]
SETTINGS = Settings(tokens_per_micro_batch=200, timeout_seconds=200)
OPTIMIZER = Optimizer(learning_rate=1e-2, schedule="constant", warmup_fraction=0.0)
NUM_VERSIONS = 3
# Share of the elements that a step may change if versions are to be deltas.
CHANGED_SHARE = 0.1


def sequences(seed, count=12):
    draw = np.random.default_rng(seed)
    return [
        TrainingSequence.of(
            draw.integers(0, 100, 1 + number % 5),
            draw.integers(0, 100, 3 + number),
            np.zeros(3 + number),
            1.0,
            str(number),
        )
        for number in range(count)
    ]


PARITY_SEQUENCES = sequences(seed=99)


@ray.remote(max_calls=1)
def learn(rank, num_ranks, channels, folder):
    """Publish, export and take a step on one rank, for one case after the other."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    torch.set_num_threads(1)
    init_method = f"file://{folder}/init-{num_ranks}"
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=num_ranks)
    for case, (model, registry, queue) in channels.items():
        learner = Learner(model, "float32", SETTINGS, OPTIMIZER, num_steps=3, seed=0)
        publisher = Publisher(rank, bucket_mib=1, full_every=case.full_every)
        for version in range(NUM_VERSIONS):
            shard = publisher.publish(learner.partitions(), version)
            ray.get(registry.announce.remote(shard, num_ranks, 0, "only"))
            batches = pack(PARITY_SEQUENCES, 1, SETTINGS.tokens_per_micro_batch)[0]
            logprobs = by_origin(batches, learner.logprobs(batches))
            learner.export(folder / f"{name_of(case)}-{version}", model)
            if rank == 0:
                np.savez(folder / f"{name_of(case)}-{version}.npz", **logprobs)
            # Wait until the engine has fetched the buckets: they are lost with this process.
            ray.get(queue.take.remote(version, SETTINGS.timeout_seconds))
            before = [part.clone() for _, _, part in learner.partitions()]
            batches = pack(sequences(version), num_ranks, SETTINGS.tokens_per_micro_batch)
            learner.step(batches[rank], Supervised())
            if case.full_every > 1:
                undo_most(learner, before, version)


def undo_most(learner, before, seed):
    """Undo most of a step's changes, as a small learning rate does in bfloat16."""
    draw = torch.Generator().manual_seed(seed)
    for (_, _, part), old in zip(learner.partitions(), before, strict=True):
        undone = torch.rand(part.shape, generator=draw) > CHANGED_SHARE
        part[undone] = old[undone]


def name_of(case):
    return "-".join(map(str, case))


def by_origin(batches, logprobs):
    found = {}
    for batch, values in zip(batches, logprobs, strict=True):
        owner = batch.sequence_ids_T[batch.trainable_T]
        found |= {origin: values[owner == n] for n, origin in enumerate(batch.origins)}
    return found


def generate(channels, engine_of):
    """Load every version into an engine; return what was fetched, scored and sampled."""
    seen = {}
    requests = [
        ScoreRequest(tuple(s.token_ids[~s.trainable].tolist()), tuple(s.token_ids[s.trainable].tolist()))
        for s in PARITY_SEQUENCES
    ]
    for case, (model, registry, queue) in channels.items():
        try:
            engine, cache, cursor = engine_of(case.tied), WeightCache(), None
            engine.load_folder(model)
            for number in range(NUM_VERSIONS):
                published = ray.get(registry.newest.remote(cursor, SETTINGS.timeout_seconds))
                cursor, newest = published.cursor, published.versions[-1]
                update = update_engine(engine, published.versions, requests)
                fetched = {n: t.clone() for n, t in cache.fetch(newest, 60).items()}
                completions = engine.generate([SampleRequest(requests[0].prompt_ids, 1, seed=0, min_version=number)])
                is_delta = newest.base_version is not None
                seen[case, number] = (newest.version, is_delta, fetched, update, completions)
                ray.get(queue.put.remote(number, [ray.put(None)]))
        except BaseException as error:
            ray.get(queue.close.remote(repr(error)))
            raise
    return seen


def update_engine(pool, versions, parity_requests):
    """Load the last of `versions` into the pool's only engine; return its WeightUpdateResult."""
    pool.update_weights(versions, parity_requests, SETTINGS.timeout_seconds)
    end = time.monotonic() + SETTINGS.timeout_seconds
    while time.monotonic() < end:
        pool.pop_finished()
        assert pool.failed_updates == []
        if pool.weight_updates:
            ((_, update),) = pool.weight_updates
            pool.weight_updates = []
            return update
        ray.wait(pool.pending_calls, timeout=1)
    raise TimeoutError(f"version {versions[-1].version} was not loaded")


@pytest.fixture(scope="module")
def exchange(tiny_model, engine_of, tmp_path_factory):
    """Run both sides; return (folder of the learners' files, results of the engine's side)."""
    folder = tmp_path_factory.mktemp("exchange")
    seen = {}
    for num_ranks in (1, 2):
        channels = {
            case: (str(tiny_model(case.tied)), PolicyVersions.remote(), BatchQueue.remote())
            for case in CASES
            if case.num_ranks == num_ranks
        }
        with ThreadPoolExecutor(1) as executor:
            generators = executor.submit(generate, channels, engine_of)
            try:
                ranks = [learn.remote(n, num_ranks, channels, folder) for n in range(num_ranks)]
                ray.get(ranks, timeout=SETTINGS.timeout_seconds)
            finally:
                for _, registry, _ in channels.values():
                    ray.get(registry.close.remote("the learners have ended"))
            seen |= generators.result()
        for _, registry, queue in channels.values():
            ray.kill(registry)
            ray.kill(queue)
    return folder, seen


RESULTS = [(case, number) for case in CASES for number in range(NUM_VERSIONS)]


@pytest.fixture(params=RESULTS, ids=lambda key: f"{name_of(key[0])}-{key[1]}")
def result(request, exchange):
    folder, seen = exchange
    case, number = request.param
    return folder / f"{name_of(case)}-{number}", seen[request.param]


def test_fetched_weights_equal_the_export(result):
    exported, (version, _, fetched, *_) = result
    assert version == int(exported.name[-1])
    saved = load_file(exported / "model.safetensors")
    assert fetched.keys() == saved.keys()
    assert all(torch.equal(fetched[name], tensor) for name, tensor in saved.items())


def test_learner_and_engine_logprobs_agree(result):
    exported, (version, _, _, update, _) = result
    learned = np.load(exported.with_name(f"{exported.name}.npz"))
    gaps = [
        float(np.abs(learned[sequence.origin] - scores).max())
        for sequence, scores in zip(PARITY_SEQUENCES, update.parity_logprobs, strict=True)
    ]
    assert max(gaps) <= 1e-4
    assert update.version == version and 0 < update.pause_seconds < 60


def test_completions_carry_the_version(result):
    _, (version, *_, completions) = result
    ((completion,),) = completions
    assert completion.policy_versions == (version, version)


def test_versions_after_the_first_are_deltas_if_few_elements_change(exchange):
    _, seen = exchange
    found = {key: is_delta for key, (_, is_delta, *_) in seen.items()}
    assert found == {(case, number): case.full_every > 1 and number > 0 for case, number in found}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_versions_differ_by_far_more_than_learner_and_engine(exchange, case):
    _, seen = exchange
    for one, other in ((0, 1), (1, 2)):
        old, new = seen[case, one][3].parity_logprobs, seen[case, other][3].parity_logprobs
        gaps = [float(np.abs(a - b).max()) for a, b in zip(old, new, strict=True)]
        assert max(gaps) > 0.02
