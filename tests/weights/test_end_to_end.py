"""From DeepSpeed learners through the object store into a vLLM engine: both sides hold the same,
whether versions travel whole or as what changed."""

from __future__ import annotations

import itertools
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


class Kind(NamedTuple):
    """Whether embeddings are tied, how many ranks learn, and how often a version is whole."""

    tied: bool
    num_ranks: int
    full_every: int


KINDS = [Kind(*kind) for kind in itertools.product((True, False), (1, 2), (1, 8))]
SETTINGS = Settings(tokens_per_micro_batch=200, timeout_seconds=200)
OPTIMIZER = Optimizer(learning_rate=1e-2, schedule="constant", warmup_fraction=0.0)
NUM_VERSIONS = 3
# Of all elements, those that a step is let change where versions are to travel as changes.
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


PROBE = sequences(seed=99)


@ray.remote(max_calls=1)
def learn(rank, num_ranks, meetings, folder):
    """What every rank does, for one kind after the other: publish, be looked at, learn."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting-{num_ranks}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks)
    for kind, (model, versions_actor, queue) in meetings.items():
        learner = Learner(model, "float32", SETTINGS, OPTIMIZER, num_steps=3, seed=0)
        publisher = Publisher(rank, bucket_mib=1, full_every=kind.full_every)
        for version in range(NUM_VERSIONS):
            share = publisher.publish(learner.partitions(), version)
            ray.get(versions_actor.announce.remote(share, num_ranks, 0, "only"))
            probe = pack(PROBE, 1, SETTINGS.tokens_per_micro_batch)[0]
            logprobs = by_origin(probe, learner.logprobs(probe))
            learner.export(folder / f"{name_of(kind)}-{version}", model)
            if rank == 0:
                np.savez(folder / f"{name_of(kind)}-{version}.npz", **logprobs)
            # Buckets die with this process: it goes on once they have been fetched.
            ray.get(queue.take.remote(version, SETTINGS.timeout_seconds))
            before = [part.clone() for _, _, part in learner.partitions()]
            batches = pack(sequences(version), num_ranks, SETTINGS.tokens_per_micro_batch)
            learner.step(batches[rank], Supervised())
            if kind.full_every > 1:
                undo_most(learner, before, version)


def undo_most(learner, before, seed):
    """Leave of a step's changes a few, as a small learning rate does in bfloat16."""
    draw = torch.Generator().manual_seed(seed)
    for (_, _, part), old in zip(learner.partitions(), before, strict=True):
        undone = torch.rand(part.shape, generator=draw) > CHANGED_SHARE
        part[undone] = old[undone]


def name_of(kind):
    return "-".join(map(str, kind))


def by_origin(batches, logprobs):
    found = {}
    for batch, values in zip(batches, logprobs, strict=True):
        owner = batch.sequence_ids_T[batch.trainable_T]
        found |= {origin: values[owner == n] for n, origin in enumerate(batch.origins)}
    return found


def generate(meetings, engine_of):
    """The other side: take every version, and say what was received and what the engine gives."""
    seen = {}
    traces = [
        ScoreRequest(
            tuple(s.token_ids[~s.trainable].tolist()), tuple(s.token_ids[s.trainable].tolist())
        )
        for s in PROBE
    ]
    for kind, (model, versions_actor, queue) in meetings.items():
        try:
            engine, replica, mark = engine_of(kind.tied), WeightCache(), None
            engine.load_folder(model)
            for number in range(NUM_VERSIONS):
                announced = ray.get(versions_actor.newest.remote(mark, SETTINGS.timeout_seconds))
                mark, newest = announced.mark, announced.versions[-1]
                loaded = served(engine, announced.versions, traces)
                fetched = {n: t.clone() for n, t in replica.fetch(newest, 60).items()}
                answers = engine.generate(
                    [SampleRequest(traces[0].prompt_ids, 1, seed=0, min_version=number)]
                )
                is_delta = newest.base_version is not None
                seen[kind, number] = (newest.version, is_delta, fetched, loaded, answers)
                ray.get(queue.put.remote(number, [ray.put(None)]))
        except BaseException as error:
            ray.get(queue.close.remote(repr(error)))
            raise
    return seen


def served(engine, versions, traces):
    """What the only engine says once it serves the last of the versions."""
    engine.serve(versions, traces, SETTINGS.timeout_seconds)
    end = time.monotonic() + SETTINGS.timeout_seconds
    while time.monotonic() < end:
        engine.finished()
        assert engine.failed_loads == []
        if engine.loaded:
            ((_, loaded),) = engine.loaded
            engine.loaded = []
            return loaded
        ray.wait(engine.calls, timeout=1)
    raise TimeoutError(f"version {versions[-1].version} was not loaded")


@pytest.fixture(scope="module")
def met(tiny_model, engine_of, tmp_path_factory):
    """One run of both sides: (folder with the learner's files, what the generator's side saw)."""
    folder = tmp_path_factory.mktemp("met")
    seen = {}
    for num_ranks in (1, 2):
        meetings = {
            kind: (str(tiny_model(kind.tied)), PolicyVersions.remote(), BatchQueue.remote())
            for kind in KINDS
            if kind.num_ranks == num_ranks
        }
        with ThreadPoolExecutor(1) as executor:
            generators = executor.submit(generate, meetings, engine_of)
            try:
                ranks = [learn.remote(n, num_ranks, meetings, folder) for n in range(num_ranks)]
                ray.get(ranks, timeout=SETTINGS.timeout_seconds)
            finally:
                for _, versions_actor, _ in meetings.values():
                    ray.get(versions_actor.close.remote("the learners have ended"))
            seen |= generators.result()
        for _, versions_actor, queue in meetings.values():
            ray.kill(versions_actor)
            ray.kill(queue)
    return folder, seen


MEETINGS = [(kind, number) for kind in KINDS for number in range(NUM_VERSIONS)]


@pytest.fixture(params=MEETINGS, ids=lambda meeting: f"{name_of(meeting[0])}-{meeting[1]}")
def meeting(request, met):
    folder, seen = met
    kind, number = request.param
    return folder / f"{name_of(kind)}-{number}", seen[request.param]


def test_what_is_fetched_is_what_is_exported(meeting):
    exported, (version, _, fetched, *_) = meeting
    assert version == int(exported.name[-1])
    saved = load_file(exported / "model.safetensors")
    assert fetched.keys() == saved.keys()
    assert all(torch.equal(fetched[name], tensor) for name, tensor in saved.items())


def test_learner_and_generator_give_the_probe_the_same_logprobs(meeting):
    exported, (version, _, _, loaded, _) = meeting
    learned = np.load(exported.with_name(f"{exported.name}.npz"))
    gaps = [
        float(np.abs(learned[sequence.origin] - scores).max())
        for sequence, scores in zip(PROBE, loaded.probe, strict=True)
    ]
    assert max(gaps) <= 1e-4
    assert loaded.version == version and 0 < loaded.pause_seconds < 60


def test_answers_carry_the_version(meeting):
    _, (version, *_, answers) = meeting
    ((answer,),) = answers
    assert answer.policy_versions == (version, version)


def test_after_the_first_version_changes_travel_where_they_are_few(met):
    _, seen = met
    found = {key: is_delta for key, (_, is_delta, *_) in seen.items()}
    assert found == {(kind, number): kind.full_every > 1 and number > 0 for kind, number in found}


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_versions_differ_by_far_more_than_the_engines(met, kind):
    _, seen = met
    for one, other in ((0, 1), (1, 2)):
        old, new = seen[kind, one][3].probe, seen[kind, other][3].probe
        gaps = [float(np.abs(a - b).max()) for a, b in zip(old, new, strict=True)]
        assert max(gaps) > 0.02
