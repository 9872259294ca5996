"""From ZeRO-3 learners through the object store into a vLLM engine: both sides hold the same."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import ray
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pear_ray.actors.board import Board, StepQueue
from pear_ray.algorithms.objectives import Supervised
from pear_ray.algorithms.packing import pack
from pear_ray.config import Learner as Settings
from pear_ray.config import Optimiser
from pear_ray.engines.generator import Request
from pear_ray.engines.learner import Learner
from pear_ray.records import TrainingSequence
from pear_ray.weights.assemble import fetch
from pear_ray.weights.publish import publish

NUM_RANKS = 2
SETTINGS = Settings(tokens_per_micro_batch=200, deadline_seconds=200)
OPTIMISER = Optimiser(learning_rate=1e-2, schedule="constant", warmup_fraction=0.0)
NUM_VERSIONS = 3
KINDS = {"tied": True, "untied": False}


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
def learn(rank, num_ranks, models, folder):
    """What every rank does, for one model after the other: publish, be looked at, learn."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks)
    for kind, (model, board, queue) in models.items():
        learner = Learner(model, "float32", SETTINGS, OPTIMISER, num_steps=3, seed=0)
        for version in range(NUM_VERSIONS):
            buckets = publish(learner.partitions(), rank, bucket_mib=1)
            ray.get(board.announce.remote(version, rank, num_ranks, buckets))
            probe = pack(PROBE, 1, SETTINGS.tokens_per_micro_batch)[0]
            logprobs = by_origin(probe, learner.logprobs(probe))
            learner.export(folder / f"{kind}-{version}", model)
            if rank == 0:
                np.savez(folder / f"{kind}-{version}.npz", **logprobs)
            # Buckets die with this process: it goes on once they have been fetched.
            ray.get(queue.take.remote(version, SETTINGS.deadline_seconds))
            batches = pack(sequences(version), num_ranks, SETTINGS.tokens_per_micro_batch)
            learner.step(batches[rank], Supervised())


def by_origin(batches, logprobs):
    found = {}
    for batch, values in zip(batches, logprobs, strict=True):
        owner = batch.sequence_ids_T[batch.trainable_T]
        found |= {origin: values[owner == n] for n, origin in enumerate(batch.origins)}
    return found


def generate(models, engine_of):
    """The other side: take every version, and say what was received and what the engine gives."""
    seen = {}
    rows = [(s.token_ids[~s.trainable].tolist(), s.token_ids[s.trainable].tolist()) for s in PROBE]
    for kind, (model, board, queue) in models.items():
        try:
            pool = engine_of(KINDS[kind])
            pool.serve(model)
            for number in range(NUM_VERSIONS):
                version = ray.get(board.newest.remote(number, SETTINGS.deadline_seconds))
                pause = pool.update(version, 60)
                scores = dict(zip((s.origin for s in PROBE), pool.score(rows), strict=True))
                answers = pool.sample([Request(tuple(rows[0][0]), 1, seed=0)], 1.0)
                seen[kind, number] = (version.version, fetch(version, 60), scores, answers, pause)
                ray.get(queue.put.remote(number, [ray.put(None)]))
        except BaseException as error:
            ray.get(queue.close.remote(repr(error)))
            raise
    return seen


@pytest.fixture(scope="module")
def met(tiny_model, engine_of, tmp_path_factory):
    """One run of both sides: (folder with the learner's files, what the generator's side saw)."""
    folder = tmp_path_factory.mktemp("met")
    models = {
        kind: (str(tiny_model(tied)), Board.remote(), StepQueue.remote())
        for kind, tied in KINDS.items()
    }
    with ThreadPoolExecutor(1) as executor:
        generators = executor.submit(generate, models, engine_of)
        try:
            ranks = [learn.remote(n, NUM_RANKS, models, folder) for n in range(NUM_RANKS)]
            ray.get(ranks, timeout=SETTINGS.deadline_seconds)
        finally:
            for _, board, _ in models.values():
                ray.get(board.close.remote("the learners have ended"))
        seen = generators.result()
    for _, board, queue in models.values():
        ray.kill(board)
        ray.kill(queue)
    return folder, seen


MEETINGS = [(kind, number) for kind in KINDS for number in range(NUM_VERSIONS)]


@pytest.fixture(params=MEETINGS, ids=lambda meeting: "-".join(map(str, meeting)))
def meeting(request, met):
    folder, seen = met
    kind, number = request.param
    return folder / f"{kind}-{number}", seen[request.param]


def test_what_is_fetched_is_what_is_exported(meeting):
    exported, (version, fetched, *_) = meeting
    assert version == int(exported.name[-1])
    saved = load_file(exported / "model.safetensors")
    assert fetched.keys() == saved.keys()
    assert all(torch.equal(fetched[name], tensor) for name, tensor in saved.items())


def test_learner_and_generator_give_the_probe_the_same_logprobs(meeting):
    exported, (_, _, scores, _, pause) = meeting
    learned = np.load(exported.with_name(f"{exported.name}.npz"))
    gaps = [float(np.abs(learned[origin] - scores[origin]).max()) for origin in scores]
    assert len(gaps) == len(PROBE)
    assert max(gaps) <= 1e-4
    assert 0 < pause < 60


def test_answers_carry_the_version(meeting):
    _, (version, _, _, answers, _) = meeting
    assert answers[0][0].policy_versions == (version, version)


@pytest.mark.parametrize("kind", KINDS)
def test_versions_differ_by_far_more_than_the_engines(met, kind):
    _, seen = met
    for one, other in ((0, 1), (1, 2)):
        old, new = seen[kind, one][2], seen[kind, other][2]
        assert max(float(np.abs(old[origin] - new[origin]).max()) for origin in old) > 0.1
