"""vLLM engines against transformers on the same ids, before and after weight updates."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pear_ray.engines.generator import SampleRequest, ScoreRequest
from pear_ray.weights.publish import Publisher
from pear_ray.weights.registry import WeightVersion

# No chunked prefill here; tests/score covers chunks.
MAX_MODEL_LEN = 48


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture(scope="module")
def models(tied, tiny_model):
    """Return the folders of two models of one architecture."""
    return [str(tiny_model(tied, seed)) for seed in (0, 1)]


@pytest.fixture
def pool(models, tied, engine_of):
    """Return the pool of one engine, serving the first model."""
    pool = engine_of(tied)
    pool.load_folder(models[0])
    return pool


def scored(pool, rows):
    return pool.generate([ScoreRequest(tuple(prompt), tuple(response)) for prompt, response in rows])


def random_rows(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [(draw.integers(0, 100, p).tolist(), draw.integers(0, 100, r).tolist()) for p, r in lengths]


ROWS = random_rows(
    [(1, 1), (1, 2), (2, 1), (1, MAX_MODEL_LEN - 1), (MAX_MODEL_LEN - 1, 1), (20, MAX_MODEL_LEN - 20)]
    + [(1 + n % 13, 1 + n % 29) for n in range(40)]
)


@torch.no_grad()
def scored_by_transformers(folder, rows):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    scores = []
    for prompt, response in rows:
        ids = torch.tensor([*prompt, *response])
        logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        positions = torch.arange(len(prompt), len(ids))
        scores.append(logprobs[positions - 1, ids[positions]].numpy())
    return scores


def largest_gap(ours, theirs):
    gaps = [np.abs(o - t).max() for o, t in zip(ours, theirs, strict=True)]
    assert [len(o) for o in ours] == [len(t) for t in theirs]
    return float(max(gaps))


def test_scores_match_transformers(pool, models):
    scores = scored(pool, ROWS)
    assert {score.dtype for score in scores} == {np.dtype(np.float32)}
    gap = largest_gap(scores, scored_by_transformers(models[0], ROWS))
    assert gap <= 1e-4


def test_scores_follow_the_loaded_weights(pool, models):
    """Regression test: with tied embeddings the output head kept its old weights."""
    before = scored(pool, ROWS)
    for folder in (models[1], models[0], models[1]):
        pool.load_folder(folder)
        gap = largest_gap(scored(pool, ROWS), scored_by_transformers(folder, ROWS))
        assert gap <= 1e-4
    # The models differ by more than any error of a partial update.
    assert largest_gap(scored(pool, ROWS), before) > 1


def sample_requests(count, num_samples=4, temperature=1.0):
    prompts = random_rows([(1 + n % 9, 1) for n in range(count)], seed=1)
    return [
        SampleRequest(tuple(prompt), num_samples, 1000 * number, temperature)
        for number, (prompt, _) in enumerate(prompts)
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_match_scored_ones(pool, models, temperature):
    requests = sample_requests(24, temperature=temperature)
    completions = pool.generate(requests)
    assert [len(group) for group in completions] == [4] * 24
    rows, sampled = [], []
    for request, group in zip(requests, completions, strict=True):
        for completion in group:
            rows.append((list(request.prompt_ids), list(completion.token_ids)))
            sampled.append(np.asarray(completion.logprobs, np.float32))
    gap = largest_gap(scored(pool, rows), sampled)
    gap = max(gap, largest_gap(scored_by_transformers(models[0], rows), sampled))
    assert gap <= 1e-4


def test_completions_end_with_eos_or_at_the_length_limit(pool):
    completions = [a for group in pool.generate(sample_requests(24)) for a in group]
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    eos = 1
    for completion in completions:
        stopped = completion.finish_reason == "stop"
        assert (completion.token_ids[-1] == eos) == stopped
        assert eos not in completion.token_ids[:-1]
        assert len(completion.token_ids) == len(completion.logprobs) <= 24
        assert stopped or len(completion.token_ids) == 24
        assert "<" not in completion.text


def test_completions_carry_their_weight_version(pool, models):
    def version():
        ((completion,),) = pool.generate(sample_requests(1, num_samples=1))
        oldest, newest = completion.policy_versions
        assert oldest == newest
        return newest

    first = version()
    assert version() == first
    pool.load_folder(models[1])
    assert version() == first + 1


def test_completions_go_on_during_a_weight_update(pool, models):
    """Tokens sampled before the swap have their log-probs under the old weights, although the new ones were fetched and
    prepared meanwhile."""
    weights = load_file(f"{models[1]}/model.safetensors")
    partitions = [(name, tuple(t.shape), t.flatten()) for name, t in weights.items()]
    version = WeightVersion.of([Publisher(0, bucket_mib=1, full_every=1).publish(partitions, 99)])
    requests = dict(enumerate(sample_requests(120, num_samples=8)))
    pool.wait_ready()
    pool.submit(list(requests.items()))
    groups, deadline, is_updated = {}, time.monotonic() + 200, False
    while len(groups) < len(requests) and time.monotonic() < deadline:
        ray.wait(pool.pending_calls, timeout=1, fetch_local=False)
        groups |= dict(pool.pop_finished())
        if groups and not is_updated:
            pool.update_weights((version,), (), timeout_seconds=100)
            is_updated = True
    ((_, update),), pool.weight_updates = pool.weight_updates, []
    assert update.version == 99 and pool.failed_updates == []
    completions = [(requests[key], completion) for key, group in groups.items() for completion in group]
    mixed = [pair for pair in completions if len(pair[1].version_spans) == 2]
    assert mixed and all(completion.version_spans[1][0] == 99 for _, completion in mixed)
    rows, sampled = [], []
    for request, completion in mixed:
        count = completion.version_spans[0][1]
        rows.append((list(request.prompt_ids), list(completion.token_ids[:count])))
        sampled.append(np.asarray(completion.logprobs[:count], np.float32))
    assert largest_gap(scored_by_transformers(models[0], rows), sampled) <= 1e-4
    assert largest_gap(scored(pool, ROWS), scored_by_transformers(models[1], ROWS)) <= 1e-4


def test_completions_depend_on_seeds_alone(pool):
    requests = sample_requests(24)
    alone = pool.generate(requests)
    backwards = pool.generate(requests[::-1])[::-1]
    few = pool.generate(requests[5:7])
    tokens = [[completion.token_ids for completion in group] for group in alone]
    assert [[a.token_ids for a in group] for group in backwards] == tokens
    assert [[a.token_ids for a in group] for group in few] == tokens[5:7]
    # Other seeds give other completions, and so do the samples of one request.
    other = [SampleRequest(r.prompt_ids, r.num_samples, r.seed + 17) for r in requests]
    assert [[a.token_ids for a in g] for g in pool.generate(other)] != tokens
    assert all(len(set(group)) > 1 for group in tokens)
    # Sample i of a request equals a single sample with seed + i.
    single = [replace(r, num_samples=1, seed=r.seed + n) for r in requests[:6] for n in range(4)]
    completions = [completion.token_ids for (completion,) in pool.generate(single)]
    assert completions == [ids for group in tokens[:6] for ids in group]


def test_max_new_tokens_of_a_request_is_a_limit(pool):
    requests = [replace(request, max_new_tokens=3) for request in sample_requests(24)]
    completions = [completion for group in pool.generate(requests) for completion in group]
    assert all(len(completion.token_ids) <= 3 for completion in completions)
    assert {len(a.token_ids) for a in completions if a.finish_reason == "length"} == {3}


def test_a_row_beyond_the_context_raises(pool):
    with pytest.raises(Exception, match="49"):
        scored(pool, random_rows([(20, 29)]))
    assert len(scored(pool, ROWS[:2])) == 2
