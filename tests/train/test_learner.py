"""The learner on 1, 2 and 4 ranks against plain PyTorch in one process.

Importing DeepSpeed is slow: this file, run as a program, does it once and forks every rank. Each number of ranks writes
files, which the tests then read.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_scheduler

from pear_ray.config import Learner as LearnerConfig
from pear_ray.config import Lora, Optimizer
from pear_ray.data.tokenizer import load_tokenizer, tokenizer_digests
from pear_ray.losses.pear import Pear
from pear_ray.losses.sft import Supervised, Weighted
from pear_ray.records import TrainingSequence
from pear_ray.train import learner as learner_module
from pear_ray.train.learner import Learner, partition, write_universal_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1000)]


def by(num_ranks, *others):
    """Parameters of a test; four ranks, which wait for each other on two cores, are of the long tier."""
    return pytest.param(num_ranks, *others, marks=[pytest.mark.nightly] * (num_ranks == 4))


RANKS = [by(1), by(2), by(4)]
# (ranks that save a checkpoint, ranks that resume from it)
RESHAPED = [by(2, 1), by(1, 2), by(4, 2)]
FEW, FOUR = ("1", "2", "2 to 1", "1 to 2"), ("4", "4 to 2")
SECONDS = 800
NUM_STEPS = 20
# Gradient norms lie on both sides of the clip, and the learning rate changes.
OPTIMIZER = Optimizer(learning_rate=2e-4, schedule="linear", warmup_fraction=0.0, weight_decay=1.0, max_grad_norm=5.8)
# Prompt and response lengths of the steps, in turn; the first two need filler packs if they are dealt to four ranks in
# small packs.
LENGTHS = (
    ((3, 20), (1, 5), (6, 2), (2, 13), (9, 1)),
    ((4, 8), (2, 3), (1, 1)),
    ((5, 5), (1, 17), (3, 9), (7, 1), (2, 2), (8, 15), (1, 12)),
)
ROOMY, TIGHT = 200, 25
SAVED_AT = 7
NUM_ADAPTER_STEPS = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "tight": {"activation_checkpointing": True},
    "stage 0": {"zero_stage": 0},
    "stage 2": {"zero_stage": 2},
    "offload": {"offload": "parameters"},
    # Packs over two ranks, some with an odd number of tokens.
    "shared": {"sequence_parallel": 2},
}
VARIANTS_BY_RANKS = {1: ("tight", "stage 0"), 2: tuple(VARIANTS), 4: ("tight", "stage 0", "shared")}
PEAR = Weighted(weigh=Pear("token", discount=1.0), sources=("even", "odd"))
UNCLIPPED = dataclasses.replace(PEAR, weigh=dataclasses.replace(PEAR.weigh, clip_log_ratio=(0.0, 0.0)))


def sequences(step):
    draw = np.random.default_rng(step)
    return [
        TrainingSequence.of(
            draw.integers(0, 100, num_prompt),
            draw.integers(0, 100, num_response),
            draw.normal(-3, 1, num_response),
            float(draw.uniform(0.1, 2)),
            "odd" if number % 2 else "even",
        )
        for number, (num_prompt, num_response) in enumerate(LENGTHS[step % len(LENGTHS)])
    ]


class Rank:
    """One rank: trains one learner after another and writes their results."""

    def __init__(self, rank, num_ranks, model, folder):
        self.rank, self.num_ranks, self.model, self.folder = rank, num_ranks, model, folder

    def learner(self, tokens_per_micro_batch=ROOMY, **changes):
        config = LearnerConfig(
            num_workers=self.num_ranks, tokens_per_micro_batch=tokens_per_micro_batch, logits_mib=0.02, **changes
        )
        return Learner(self.model, "float32", config, OPTIMIZER, NUM_STEPS, seed=0)

    def step(self, learner, step, name, objective=None, batches=None):
        batches = batches or learner.micro_batches(sequences(step))
        result = learner.step(batches, objective or Supervised())
        sums = {key: np.asarray(value).tolist() for key, value in result.metric_sums.items()}
        self.record(f"{name}-{step}", dataclasses.asdict(result) | {"metric_sums": sums})
        if step + 1 in (1, NUM_STEPS):
            self.export(learner, f"{name}-{step}")

    def export(self, learner, name):
        learner.export(self.folder / name, self.model)

    def record(self, name, results):
        (self.folder / f"{name}.{self.rank}.json").write_text(json.dumps(results))

    def record_partitions(self, learner):
        """Record the partitions and the sizes of everything else of the model in memory."""
        own = {name: (shape, part.numel()) for name, shape, part in learner.partitions()}
        values = {name: part.numpy() for name, _, part in learner.partitions()}
        np.savez(self.folder / f"partitions.{self.rank}.npz", **values)
        engine = learner._engine
        states = engine.optimizer.fp32_partitioned_groups_flat
        num_whole = sum(parameter.numel() for parameter in engine.module.parameters())
        num_optimized = sum(state.numel() for state in states)
        sizes = {"own": own, "whole": num_whole, "optimized": num_optimized}
        self.record("partitions", sizes)


def in_small_groups(config):
    """Let the optimizer have several groups of parameters, as it has with more than 1e9 parameters on a rank."""
    config["zero_optimization"]["sub_group_size"] = 20_000
    return config


def start_rank(number, num_ranks, model, folder):
    """Join the process group of a new process."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(num_ranks)}
    torch.set_num_threads(1)
    original = learner_module.deepspeed_config
    learner_module.deepspeed_config = lambda *arguments: in_small_groups(original(*arguments))
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=number, world_size=num_ranks)
    return Rank(number, num_ranks, model, folder)


def train_variants(number, num_ranks, model, folder):
    """Run one rank's process."""
    rank = start_rank(number, num_ranks, model, folder)
    learner = rank.learner()
    rank.record_partitions(learner)
    rank.export(learner, "before")
    for step in range(SAVED_AT):
        rank.step(learner, step, "roomy")
    learner.save(folder / "saved")
    dist.barrier()
    # The checkpoint is all that a new learner needs.
    learner = rank.learner()
    learner.load(folder / "saved")
    for step in range(SAVED_AT, NUM_STEPS):
        rank.step(learner, step, "roomy")

    for name in VARIANTS_BY_RANKS[num_ranks]:
        learner = rank.learner(TIGHT, **VARIANTS[name])
        for step in range(NUM_STEPS):
            rank.step(learner, step, name)

    learner = rank.learner(TIGHT, lora=Lora(rank=4))
    rank.export(learner, "untrained adapters")
    for step in range(NUM_ADAPTER_STEPS):
        rank.step(learner, step, "adapters")
    rank.export(learner, "adapters")

    learner = rank.learner()
    own = [with_logprobs(b, learner.logprobs([b])[0]) for b in learner.micro_batches(sequences(0))]
    rank.step(learner, 0, "pear", PEAR, own)
    learner = rank.learner(TIGHT)
    rank.step(learner, 0, "unclipped", UNCLIPPED)
    if "shared" in VARIANTS_BY_RANKS[num_ranks]:
        for name, size in (("weighted", 1), ("weighted, shared", 2)):
            rank.step(rank.learner(TIGHT, sequence_parallel=size), 0, name, PEAR)


def resume(number, num_ranks, model, folder):
    """Run one rank's process of a run that another number of ranks started."""
    rank = start_rank(number, num_ranks, model, folder)
    learner = rank.learner()
    learner.load(folder / "universal", universal=True)
    for step in range(SAVED_AT, NUM_STEPS):
        rank.step(learner, step, "roomy")


def main(model, folder, *runs):
    """Train with 2 ranks for "2"; for "2 to 1" resume on 1 rank from the checkpoint of 2."""
    folder = Path(folder)
    for run in runs:
        own, (saved_by, *resumed_by) = folder / run, run.split(" to ")
        if not resumed_by:
            run_ranks(train_variants, int(run), model, own)
            continue
        write_universal_checkpoint(folder / saved_by / "saved", own / "universal")
        run_ranks(resume, int(resumed_by[0]), model, own)


def run_ranks(target, num_ranks, model, folder):
    folder.mkdir(exist_ok=True)
    ranks = [
        multiprocessing.get_context("fork").Process(target=target, args=(number, num_ranks, model, folder), daemon=True)
        for number in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    codes = [rank.exitcode for rank in ranks]
    assert not any(codes), f"of {num_ranks} ranks: exit codes {codes}"


def with_logprobs(batch, logprobs):
    """Return the batch as if sampled by the model in training: every log-ratio is 0."""
    sampled_T = batch.sampled_logprobs_T.copy()
    sampled_T[batch.trainable_T] = logprobs
    return dataclasses.replace(batch, sampled_logprobs_T=sampled_T)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The files written by one number of ranks."""

    num_ranks: int
    folder: Path
    model: Path

    def results(self, name):
        return [json.loads((self.folder / f"{name}.{rank}.json").read_text()) for rank in range(self.num_ranks)]


@pytest.fixture(scope="module")
def model(tiny_model):
    """A folder; one layer, since ranks that share two cores wait for each other at every layer."""
    return tiny_model(False, num_layers=1)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """Return a function that returns the folder of the runs of `main` on one or two ranks, or with four of them."""
    folder = tmp_path_factory.mktemp("ranks")

    @cache
    def finish(*runs):
        command = [sys.executable, __file__, str(model), str(folder), *runs]
        process = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        assert process.returncode == 0, process.stderr[-5000:]
        return folder

    return lambda run: finish(*(FOUR if "4" in run else FEW))


@pytest.fixture(scope="module")
def outcome_of(finished, model):
    """Return a function that returns the Outcome of a number of ranks."""
    return lambda num_ranks: Outcome(num_ranks, finished(str(num_ranks)) / str(num_ranks), model)


@pytest.fixture(scope="module", params=RANKS)
def outcome(request, outcome_of):
    return outcome_of(request.param)


@pytest.fixture(scope="module")
def reference(model):
    """The same steps in plain PyTorch, one sequence at a time: results and parameters."""
    policy = AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(policy.parameters(), OPTIMIZER.learning_rate, weight_decay=OPTIMIZER.weight_decay)
    scheduler = get_scheduler("linear", optimizer, 0, NUM_STEPS)
    steps = []
    for step in range(NUM_STEPS):
        loss = sum(minus_logprobs(policy, s) for s in sequences(step))
        loss = loss / sum(int(s.trainable.sum()) for s in sequences(step))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), OPTIMIZER.max_grad_norm)
        rate = scheduler.get_last_lr()[0]
        expected = {"loss": loss.item(), "grad_norm": float(norm), "learning_rate": rate}
        optimizer.step()
        scheduler.step()
        parameters = {name: p.detach().clone() for name, p in policy.named_parameters()}
        steps.append((expected, parameters))
    norms = [expected["grad_norm"] for expected, _ in steps]
    assert min(norms) < OPTIMIZER.max_grad_norm < max(norms)
    return steps


def minus_logprobs(model, sequence):
    """Return the sum over the response of -log-prob * coefficient."""
    ids = torch.from_numpy(sequence.token_ids)
    logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    positions = torch.from_numpy(np.flatnonzero(sequence.trainable))
    own = logprobs[positions - 1, ids[positions]]
    return -(own * torch.from_numpy(sequence.coefficients)[positions]).sum()


def weights(folder):
    return load_file(folder / "model.safetensors")


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.mark.parametrize(
    ("num_ranks", "name"), [by(n, name) for n, names in VARIANTS_BY_RANKS.items() for name in ("roomy", *names)]
)
def test_every_variant_matches_one_plain_process(outcome_of, reference, num_ranks, name):
    outcome = outcome_of(num_ranks)
    for step, (expected, parameters) in enumerate(reference):
        for ours in outcome.results(f"{name}-{step}"):
            assert ours["loss"] == pytest.approx(expected["loss"], abs=1e-5)
            assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
            assert ours["learning_rate"] == pytest.approx(expected["learning_rate"])
        if step in (0, NUM_STEPS - 1):
            exported = weights(outcome.folder / f"{name}-{step}")
            assert largest_difference(exported, parameters) <= 1e-5


def test_every_parameter_is_partitioned(outcome):
    results = outcome.results("partitions")
    before = weights(outcome.model)
    num_parameters = sum(tensor.numel() for tensor in before.values())
    for result in results:
        assert result["own"].keys() == before.keys()
        for name, (shape, length) in result["own"].items():
            assert tuple(shape) == before[name].shape
            assert length == -(-before[name].numel() // outcome.num_ranks)
        # No whole parameter is in memory, and the optimizer holds this rank's share only.
        assert result["whole"] == 0
        assert result["optimized"] == sum(length for _, length in result["own"].values())
        assert result["optimized"] <= num_parameters / outcome.num_ranks * 1.01
    parts = [np.load(outcome.folder / f"partitions.{r}.npz") for r in range(outcome.num_ranks)]
    for name, tensor in before.items():
        joined = np.concatenate([part[name] for part in parts])
        assert np.array_equal(joined[: tensor.numel()], tensor.numpy().reshape(-1))


@given(st.integers(1, 40), st.integers(1, 9))
def test_partitions_of_equal_size_join_to_the_whole(num_elements, num_ranks):
    tensor = torch.arange(1.0, num_elements + 1)
    parts = [partition(tensor, rank, num_ranks) for rank in range(num_ranks)]
    assert {len(part) for part in parts} == {-(-num_elements // num_ranks)}
    joined = torch.cat(parts)
    assert torch.equal(joined[:num_elements], tensor) and not joined[num_elements:].any()


def test_transformers_loads_an_export(outcome):
    exported = outcome.folder / "before"
    assert largest_difference(weights(exported), weights(outcome.model)) == 0
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert largest_difference(dict(model.named_parameters()), weights(outcome.model)) == 0
    assert model.config.to_dict() == AutoModelForCausalLM.from_pretrained(outcome.model).config.to_dict() | {
        "_name_or_path": model.config._name_or_path
    }
    exported_digests = tokenizer_digests(load_tokenizer(str(exported)))
    assert exported_digests == tokenizer_digests(load_tokenizer(str(outcome.model)))
    assert model.generation_config.eos_token_id == load_tokenizer(str(exported)).eos_token_id
    assert not list(outcome.folder.glob("*.partial"))


def test_only_adapters_are_trained_and_an_export_merges_them(outcome, finished):
    base = weights(outcome.model)
    assert largest_difference(weights(outcome.folder / "untrained adapters"), base) == 0
    trained = weights(outcome.folder / "adapters")
    assert trained.keys() == base.keys()
    changed = {name for name in base if not torch.equal(trained[name], base[name])}
    assert changed == {name for name in base if "_proj." in name}
    one_rank = weights(finished("1") / "1" / "adapters")
    assert largest_difference(trained, one_rank) <= 1e-5


@pytest.mark.parametrize(("pear", "plain"), [("pear-0", "roomy-0"), ("unclipped-0", "tight-0")])
def test_pear_without_ratios_or_discount_is_plain_sft_bit_for_bit(outcome, pear, plain):
    for ours, theirs in zip(outcome.results(pear), outcome.results(plain), strict=True):
        for name in ("loss", "grad_norm", "num_tokens"):
            assert ours[name] == theirs[name]
        assert ours["metric_sums"]["weight"] == ours["num_tokens"]
        assert ours["metric_sums"]["sequences/even"] == 3
        assert ours["metric_sums"]["sequences/odd"] == 2
        assert ours["metric_sums"]["first_weight/odd"] == 2
    assert largest_difference(weights(outcome.folder / pear), weights(outcome.folder / plain)) == 0


@pytest.mark.parametrize("num_ranks", RANKS[1:])
def test_weights_sum_over_the_ranks_that_share_a_response(outcome_of, num_ranks):
    outcome = outcome_of(num_ranks)
    (alone, *_), shared = outcome.results("weighted-0"), outcome.results("weighted, shared-0")
    assert alone["metric_sums"]["weight"] != pytest.approx(alone["num_tokens"], rel=1e-2)
    for ours in shared:
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
        for name, value in alone["metric_sums"].items():
            assert ours["metric_sums"][name] == pytest.approx(value, rel=1e-5), name
    exported = (weights(outcome.folder / name) for name in ("weighted-0", "weighted, shared-0"))
    assert largest_difference(*exported) <= 1e-5


@pytest.mark.parametrize(("saved_by", "num_ranks"), RESHAPED)
def test_another_number_of_ranks_resumes(finished, model, reference, saved_by, num_ranks):
    run = f"{saved_by} to {num_ranks}"
    outcome = Outcome(num_ranks, finished(run) / run, model)
    for step in range(SAVED_AT, NUM_STEPS):
        for ours in outcome.results(f"roomy-{step}"):
            assert ours["loss"] == pytest.approx(reference[step][0]["loss"], abs=1e-5)
            assert ours["learning_rate"] == pytest.approx(reference[step][0]["learning_rate"])
    exported = weights(outcome.folder / f"roomy-{NUM_STEPS - 1}")
    assert largest_difference(exported, reference[-1][1]) <= 1e-5


def test_metric_sums_do_not_depend_on_the_packing(outcome):
    for step in range(NUM_STEPS):
        (roomy, *_), (tight, *_) = (outcome.results(f"roomy-{step}"), outcome.results(f"tight-{step}"))
        for name, value in roomy["metric_sums"].items():
            assert tight["metric_sums"][name] == pytest.approx(value, rel=1e-5)


if __name__ == "__main__":
    main(*sys.argv[1:])
