"""vLLM engines against transformers on the same ids, before and after new weights."""

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
from pear_ray.weights.types import WeightVersion

LONGEST = 48  # max_model_len. Rows are read in one piece; stages/test_score.py reads in chunks.


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture(scope="module")
def models(tied, tiny_model):
    """Folders of two models of one architecture; engines start with the first."""
    return [str(tiny_model(tied, seed)) for seed in (0, 1)]


@pytest.fixture
def engine(models, tied, engine_of):
    """The engine, serving the first model."""
    pool = engine_of(tied)
    pool.load_folder(models[0])
    return pool


def scored(engine, rows):
    return engine.generate(
        [ScoreRequest(tuple(prompt), tuple(response)) for prompt, response in rows]
    )


def rows_of(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [
        (draw.integers(0, 100, p).tolist(), draw.integers(0, 100, r).tolist()) for p, r in lengths
    ]


ROWS = rows_of(
    [(1, 1), (1, 2), (2, 1), (1, LONGEST - 1), (LONGEST - 1, 1), (20, LONGEST - 20)]
    + [(1 + n % 13, 1 + n % 29) for n in range(40)]
)


@torch.no_grad()
def by_transformers(folder, rows):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    scores = []
    for prompt, response in rows:
        ids = torch.tensor([*prompt, *response])
        logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        places = torch.arange(len(prompt), len(ids))
        scores.append(logprobs[places - 1, ids[places]].numpy())
    return scores


def largest_gap(ours, theirs):
    gaps = [np.abs(o - t).max() for o, t in zip(ours, theirs, strict=True)]
    assert [len(o) for o in ours] == [len(t) for t in theirs]
    return float(max(gaps))


def test_scores_are_those_of_transformers(engine, models):
    scores = scored(engine, ROWS)
    assert {score.dtype for score in scores} == {np.dtype(np.float32)}
    gap = largest_gap(scores, by_transformers(models[0], ROWS))
    assert gap <= 1e-4


def test_scores_follow_the_weights_that_are_loaded(engine, models):
    """With tied embeddings the output head once kept its old weights, without an error."""
    before = scored(engine, ROWS)
    for folder in (models[1], models[0], models[1]):
        engine.load_folder(folder)
        gap = largest_gap(scored(engine, ROWS), by_transformers(folder, ROWS))
        assert gap <= 1e-4
    # The models differ so much that a mixture of both would show.
    assert largest_gap(scored(engine, ROWS), before) > 1


def requests_of(count, num_samples=4, temperature=1.0):
    prompts = rows_of([(1 + n % 9, 1) for n in range(count)], seed=1)
    return [
        SampleRequest(tuple(prompt), num_samples, 1000 * number, temperature)
        for number, (prompt, _) in enumerate(prompts)
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_are_scored_ones(engine, models, temperature):
    requests = requests_of(24, temperature=temperature)
    answers = engine.generate(requests)
    assert [len(group) for group in answers] == [4] * 24
    rows, sampled = [], []
    for request, group in zip(requests, answers, strict=True):
        for answer in group:
            rows.append((list(request.prompt_ids), list(answer.token_ids)))
            sampled.append(np.asarray(answer.logprobs, np.float32))
    gap = largest_gap(scored(engine, rows), sampled)
    gap = max(gap, largest_gap(by_transformers(models[0], rows), sampled))
    assert gap <= 1e-4


def test_an_answer_ends_with_its_end_or_at_the_longest(engine):
    answers = [a for group in engine.generate(requests_of(24)) for a in group]
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    eos = 1
    for answer in answers:
        stopped = answer.finish_reason == "stop"
        assert (answer.token_ids[-1] == eos) == stopped
        assert eos not in answer.token_ids[:-1]
        assert len(answer.token_ids) == len(answer.logprobs) <= 24
        assert stopped or len(answer.token_ids) == 24
        assert "<" not in answer.text


def test_answers_say_which_weights_wrote_them(engine, models):
    def version():
        ((answer,),) = engine.generate(requests_of(1, num_samples=1))
        oldest, newest = answer.policy_versions
        assert oldest == newest
        return newest

    first = version()
    assert version() == first
    engine.load_folder(models[1])
    assert version() == first + 1


def test_answers_go_on_while_weights_are_made_ready_and_across_the_change(engine, models):
    """Each token before the change has the log-prob that the old weights give it, though the new
    ones were fetched, repacked and put aside meanwhile."""
    weights = load_file(f"{models[1]}/model.safetensors")
    partitions = [(name, tuple(t.shape), t.flatten()) for name, t in weights.items()]
    version = WeightVersion.of([Publisher(0, bucket_mib=1, full_every=1).publish(partitions, 99)])
    requests = dict(enumerate(requests_of(120, num_samples=8)))
    engine.wait_ready()
    engine.submit(list(requests.items()))
    groups, end, is_served = {}, time.monotonic() + 200, False
    while len(groups) < len(requests) and time.monotonic() < end:
        ray.wait(engine.calls, timeout=1, fetch_local=False)
        groups |= dict(engine.finished())
        if groups and not is_served:
            engine.serve((version,), (), timeout_seconds=100)
            is_served = True
    ((_, loaded),), engine.loaded = engine.loaded, []
    assert loaded.version == 99 and engine.failed_loads == []
    answers = [(requests[key], answer) for key, group in groups.items() for answer in group]
    under_way = [pair for pair in answers if len(pair[1].version_spans) == 2]
    assert under_way and all(answer.version_spans[1][0] == 99 for _, answer in under_way)
    rows, sampled = [], []
    for request, answer in under_way:
        count = answer.version_spans[0][1]
        rows.append((list(request.prompt_ids), list(answer.token_ids[:count])))
        sampled.append(np.asarray(answer.logprobs[:count], np.float32))
    assert largest_gap(by_transformers(models[0], rows), sampled) <= 1e-4
    assert largest_gap(scored(engine, ROWS), by_transformers(models[1], ROWS)) <= 1e-4


def test_seeds_decide_the_answers_whatever_else_is_served(engine):
    requests = requests_of(24)
    alone = engine.generate(requests)
    backwards = engine.generate(requests[::-1])[::-1]
    few = engine.generate(requests[5:7])
    tokens = [[answer.token_ids for answer in group] for group in alone]
    assert [[a.token_ids for a in group] for group in backwards] == tokens
    assert [[a.token_ids for a in group] for group in few] == tokens[5:7]
    # Other seeds give other answers, and so do the samples of one request.
    other = [SampleRequest(r.prompt_ids, r.num_samples, r.seed + 17) for r in requests]
    assert [[a.token_ids for a in g] for g in engine.generate(other)] != tokens
    assert all(len(set(group)) > 1 for group in tokens)
    # Answers may be asked for one by one.
    single = [replace(r, num_samples=1, seed=r.seed + n) for r in requests[:6] for n in range(4)]
    answers = [answer.token_ids for (answer,) in engine.generate(single)]
    assert answers == [ids for group in tokens[:6] for ids in group]


def test_a_request_may_want_shorter_answers(engine):
    requests = [replace(request, max_new_tokens=3) for request in requests_of(24)]
    answers = [answer for group in engine.generate(requests) for answer in group]
    assert all(len(answer.token_ids) <= 3 for answer in answers)
    assert {len(a.token_ids) for a in answers if a.finish_reason == "length"} == {3}


def test_a_row_that_does_not_fit_is_an_error(engine):
    with pytest.raises(Exception, match="49"):
        scored(engine, rows_of([(20, 29)]))
    assert len(scored(engine, ROWS[:2])) == 2
