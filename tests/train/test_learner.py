"""The learner on 1, 2 and 4 ranks against plain PyTorch in one process.

Engines are imported slowly: this file, run as a program, does it once and forks every rank. Each
number of ranks leaves files, which the tests then read.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_scheduler

from pear_ray.config import Learner as Settings
from pear_ray.config import Lora, Optimizer
from pear_ray.data.tokenizer import digests, load_tokenizer
from pear_ray.losses.sft import Supervised, Weighted
from pear_ray.losses.weighting import Pear
from pear_ray.records import TrainingSequence
from pear_ray.train.learner import Learner
from pear_ray.train.zero import to_universal

RANKS = (1, 2, 4)
# What so many ranks kept, so many others go on with.
RESHAPED = ((2, 1), (1, 2), (4, 2))
SECONDS = 400
NUM_STEPS = 20
# The norm of the gradient lies on both sides of the bound, and the learning rate changes.
OPTIMIZER = Optimizer(
    learning_rate=2e-4,
    schedule="linear",
    warmup_fraction=0.0,
    weight_decay=1.0,
    max_grad_norm=5.8,
)
# Prompt and response lengths of the steps, in turn; the first two need packs with nothing to learn
# when they are cut small and dealt to four ranks.
LENGTHS = (
    ((3, 20), (1, 5), (6, 2), (2, 13), (9, 1)),
    ((4, 8), (2, 3), (1, 1)),
    ((5, 5), (1, 17), (3, 9), (7, 1), (2, 2), (8, 15), (1, 12)),
)
ROOMY, TIGHT = 200, 25
KEPT_AT = 7
NUM_ADAPTER_STEPS = 4
CHANGES: dict[str, dict[str, Any]] = {
    "tight": {"activation_checkpointing": True},
    "stage 0": {"zero_stage": 0},
    "stage 2": {"zero_stage": 2},
    "offload": {"offload": "parameters"},
    # Packs over two ranks, some of an odd number of tokens.
    "shared": {"sequence_parallel": 2},
}
MADE = {1: ("tight", "stage 0"), 2: tuple(CHANGES), 4: ("tight", "stage 0", "shared")}
PEAR = Weighted(weigh=Pear("token", discount=1.0), sources=("even", "odd"))
UNCLIPPED = dataclasses.replace(
    PEAR, weigh=dataclasses.replace(PEAR.weigh, clip_log_ratio=(0.0, 0.0))
)


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
    """What one rank of a run does: learners one after another, and notes of what they did."""

    def __init__(self, rank, num_ranks, model, folder):
        self.rank, self.num_ranks, self.model, self.folder = rank, num_ranks, model, folder

    def learner(self, tokens_per_micro_batch=ROOMY, **changes):
        settings = Settings(
            num_workers=self.num_ranks,
            tokens_per_micro_batch=tokens_per_micro_batch,
            logits_mib=0.02,
            **changes,
        )
        return Learner(self.model, "float32", settings, OPTIMIZER, NUM_STEPS, seed=0)

    def step(self, learner, step, name, objective=None, batches=None):
        batches = batches or learner.share(sequences(step))
        result = learner.step(batches, objective or Supervised())
        facts = {key: np.asarray(value).tolist() for key, value in result.facts.items()}
        self.note(f"{name}-{step}", dataclasses.asdict(result) | {"facts": facts})
        if step + 1 in (1, NUM_STEPS):
            self.export(learner, f"{name}-{step}")

    def export(self, learner, name):
        learner.export(self.folder / name, self.model)

    def note(self, name, facts):
        (self.folder / f"{name}.{self.rank}.json").write_text(json.dumps(facts))

    def note_partitions(self, learner):
        """Sizes and values of the partitions, and whatever else of the model is in memory."""
        own = {name: (shape, part.numel()) for name, shape, part in learner.partitions()}
        values = {name: part.numpy() for name, _, part in learner.partitions()}
        np.savez(self.folder / f"partitions.{self.rank}.npz", **values)
        engine = learner._engine
        states = engine.optimizer.fp32_partitioned_groups_flat
        self.note(
            "partitions",
            {
                "own": own,
                "whole": sum(parameter.numel() for parameter in engine.module.parameters()),
                "optimised": sum(state.numel() for state in states),
            },
        )


def begun(number, num_ranks, model, folder):
    """A rank in a process of its own."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(num_ranks)}
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=number, world_size=num_ranks)
    return Rank(number, num_ranks, model, folder)


def everything(number, num_ranks, model, folder):
    """One rank's process."""
    rank = begun(number, num_ranks, model, folder)
    learner = rank.learner()
    rank.note_partitions(learner)
    rank.export(learner, "before")
    for step in range(KEPT_AT):
        rank.step(learner, step, "roomy")
    learner.save(folder / "kept")
    dist.barrier()
    # What was kept is all that another learner needs to go on.
    learner = rank.learner()
    learner.load(folder / "kept")
    for step in range(KEPT_AT, NUM_STEPS):
        rank.step(learner, step, "roomy")

    for name in MADE[num_ranks]:
        learner = rank.learner(TIGHT, **CHANGES[name])
        for step in range(NUM_STEPS):
            rank.step(learner, step, name)

    learner = rank.learner(TIGHT, lora=Lora(rank=4))
    rank.export(learner, "untrained adapters")
    for step in range(NUM_ADAPTER_STEPS):
        rank.step(learner, step, "adapters")
    rank.export(learner, "adapters")

    learner = rank.learner()
    own = [with_logprobs(b, learner.logprobs([b])[0]) for b in learner.share(sequences(0))]
    rank.step(learner, 0, "pear", PEAR, own)
    learner = rank.learner(TIGHT)
    rank.step(learner, 0, "unclipped", UNCLIPPED)
    if "shared" in MADE[num_ranks]:
        for name, size in (("weighted", 1), ("weighted, shared", 2)):
            rank.step(rank.learner(TIGHT, sequence_parallel=size), 0, name, PEAR)


def gone_on(number, num_ranks, model, folder):
    """One rank's process, of a run that another number of ranks began."""
    rank = begun(number, num_ranks, model, folder)
    learner = rank.learner()
    learner.load(folder / "universal", universal=True)
    for step in range(KEPT_AT, NUM_STEPS):
        rank.step(learner, step, "roomy")


def main(model, folder):
    """Each number of ranks in turn, then some that go on with what others kept."""
    folder = Path(folder)
    for num_ranks in RANKS:
        run_ranks(everything, num_ranks, model, folder / str(num_ranks))
    for kept_by, num_ranks in RESHAPED:
        own = folder / f"{kept_by} to {num_ranks}"
        to_universal(folder / str(kept_by) / "kept", own / "universal")
        run_ranks(gone_on, num_ranks, model, own)


def run_ranks(target, num_ranks, model, folder):
    folder.mkdir(exist_ok=True)
    ranks = [
        multiprocessing.get_context("fork").Process(
            target=target, args=(number, num_ranks, model, folder), daemon=True
        )
        for number in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    codes = [rank.exitcode for rank in ranks]
    assert not any(codes), f"of {num_ranks} ranks: exit codes {codes}"


def with_logprobs(batch, logprobs):
    """The batch as if the model in training had written it: every delta is 0."""
    sampled_T = batch.sampled_logprobs_T.copy()
    sampled_T[batch.trainable_T] = logprobs
    return dataclasses.replace(batch, sampled_logprobs_T=sampled_T)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The files of one number of ranks."""

    num_ranks: int
    folder: Path
    model: Path

    def notes(self, name):
        return [
            json.loads((self.folder / f"{name}.{rank}.json").read_text())
            for rank in range(self.num_ranks)
        ]


@pytest.fixture(scope="module")
def model(tiny_model):
    """A folder. Of one layer: ranks that share two cores wait for each other layer by layer."""
    return tiny_model(False, num_layers=1)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """The folder that `main` filled."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, __file__, str(model), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module", params=RANKS)
def outcome(request, finished, model):
    return Outcome(request.param, finished / str(request.param), model)


@pytest.fixture(scope="module")
def reference(model):
    """The same steps, one sequence at a time: losses, gradient norms, rates and parameters."""
    policy = AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(
        policy.parameters(), OPTIMIZER.learning_rate, weight_decay=OPTIMIZER.weight_decay
    )
    scheduler = get_scheduler("linear", optimizer, 0, NUM_STEPS)
    steps = []
    for step in range(NUM_STEPS):
        loss = sum(minus_logprobs(policy, s) for s in sequences(step))
        loss = loss / sum(int(s.trainable.sum()) for s in sequences(step))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), OPTIMIZER.max_grad_norm)
        facts = {
            "loss": loss.item(),
            "grad_norm": float(norm),
            "learning_rate": scheduler.get_last_lr()[0],
        }
        optimizer.step()
        scheduler.step()
        parameters = {name: p.detach().clone() for name, p in policy.named_parameters()}
        steps.append((facts, parameters))
    norms = [facts["grad_norm"] for facts, _ in steps]
    assert min(norms) < OPTIMIZER.max_grad_norm < max(norms)
    return steps


def minus_logprobs(model, sequence):
    """Sum over the response's tokens of minus log-prob times coefficient."""
    ids = torch.from_numpy(sequence.token_ids)
    logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    places = torch.from_numpy(np.flatnonzero(sequence.trainable))
    own = logprobs[places - 1, ids[places]]
    return -(own * torch.from_numpy(sequence.coefficients)[places]).sum()


def weights(folder):
    return load_file(folder / "model.safetensors")


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.mark.parametrize(
    ("num_ranks", "name"), [(n, name) for n in RANKS for name in ("roomy", *MADE[n])]
)
def test_steps_are_those_of_one_plain_process(finished, model, reference, num_ranks, name):
    outcome = Outcome(num_ranks, finished / str(num_ranks), model)
    for step, (facts, parameters) in enumerate(reference):
        for ours in outcome.notes(f"{name}-{step}"):
            assert ours["loss"] == pytest.approx(facts["loss"], abs=1e-5)
            assert ours["grad_norm"] == pytest.approx(facts["grad_norm"], rel=1e-5)
            assert ours["learning_rate"] == pytest.approx(facts["learning_rate"])
        if step in (0, NUM_STEPS - 1):
            exported = weights(outcome.folder / f"{name}-{step}")
            assert largest_difference(exported, parameters) <= 1e-5


def test_every_parameter_is_truly_partitioned(outcome):
    notes = outcome.notes("partitions")
    before = weights(outcome.model)
    num_parameters = sum(tensor.numel() for tensor in before.values())
    for note in notes:
        assert note["own"].keys() == before.keys()
        for name, (shape, length) in note["own"].items():
            assert tuple(shape) == before[name].shape
            assert length == -(-before[name].numel() // outcome.num_ranks)
        # Nothing whole is in memory, and the optimizer has a rank's share only.
        assert note["whole"] == 0
        assert note["optimised"] == sum(length for _, length in note["own"].values())
        assert note["optimised"] <= num_parameters / outcome.num_ranks * 1.01
    parts = [np.load(outcome.folder / f"partitions.{r}.npz") for r in range(outcome.num_ranks)]
    for name, tensor in before.items():
        joined = np.concatenate([part[name] for part in parts])
        assert np.array_equal(joined[: tensor.numel()], tensor.numpy().reshape(-1))


def test_an_export_is_a_folder_that_transformers_loads(outcome):
    exported = outcome.folder / "before"
    assert largest_difference(weights(exported), weights(outcome.model)) == 0
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert largest_difference(dict(model.named_parameters()), weights(outcome.model)) == 0
    assert model.config.to_dict() == AutoModelForCausalLM.from_pretrained(
        outcome.model
    ).config.to_dict() | {"_name_or_path": model.config._name_or_path}
    assert digests(load_tokenizer(str(exported))) == digests(load_tokenizer(str(outcome.model)))
    assert model.generation_config.eos_token_id == load_tokenizer(str(exported)).eos_token_id
    assert not list(outcome.folder.glob("*.partial"))


def test_adapters_alone_are_trained_and_merged_into_what_is_exported(outcome, finished):
    base = weights(outcome.model)
    assert largest_difference(weights(outcome.folder / "untrained adapters"), base) == 0
    trained = weights(outcome.folder / "adapters")
    assert trained.keys() == base.keys()
    changed = {name for name in base if not torch.equal(trained[name], base[name])}
    assert changed == {name for name in base if "_proj." in name}
    one_rank = weights(finished / "1" / "adapters")
    assert largest_difference(trained, one_rank) <= 1e-5


@pytest.mark.parametrize(("pear", "plain"), [("pear-0", "roomy-0"), ("unclipped-0", "tight-0")])
def test_pear_without_ratios_or_discount_is_plain_sft_bit_for_bit(outcome, pear, plain):
    for ours, theirs in zip(outcome.notes(pear), outcome.notes(plain), strict=True):
        for name in ("loss", "grad_norm", "num_tokens"):
            assert ours[name] == theirs[name]
        assert ours["facts"]["weight"] == ours["num_tokens"]
        assert ours["facts"]["sequences/even"] == 3
        assert ours["facts"]["sequences/odd"] == 2
        assert ours["facts"]["first_weight/odd"] == 2
    assert largest_difference(weights(outcome.folder / pear), weights(outcome.folder / plain)) == 0


@pytest.mark.parametrize("num_ranks", [n for n in RANKS if "shared" in MADE[n]])
def test_weights_sum_over_the_ranks_that_share_a_response(finished, model, num_ranks):
    outcome = Outcome(num_ranks, finished / str(num_ranks), model)
    (alone, *_), shared = outcome.notes("weighted-0"), outcome.notes("weighted, shared-0")
    assert alone["facts"]["weight"] != pytest.approx(alone["num_tokens"], rel=1e-2)
    for ours in shared:
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
        for name, value in alone["facts"].items():
            assert ours["facts"][name] == pytest.approx(value, rel=1e-5), name
    exported = (weights(outcome.folder / name) for name in ("weighted-0", "weighted, shared-0"))
    assert largest_difference(*exported) <= 1e-5


@pytest.mark.parametrize(("kept_by", "num_ranks"), RESHAPED)
def test_another_number_of_ranks_goes_on(finished, model, reference, kept_by, num_ranks):
    outcome = Outcome(num_ranks, finished / f"{kept_by} to {num_ranks}", model)
    for step in range(KEPT_AT, NUM_STEPS):
        for ours in outcome.notes(f"roomy-{step}"):
            assert ours["loss"] == pytest.approx(reference[step][0]["loss"], abs=1e-5)
            assert ours["learning_rate"] == pytest.approx(reference[step][0]["learning_rate"])
    exported = weights(outcome.folder / f"roomy-{NUM_STEPS - 1}")
    assert largest_difference(exported, reference[-1][1]) <= 1e-5


def test_facts_do_not_depend_on_the_cut(outcome):
    for step in range(NUM_STEPS):
        (roomy, *_), (tight, *_) = outcome.notes(f"roomy-{step}"), outcome.notes(f"tight-{step}")
        for name, value in roomy["facts"].items():
            assert tight["facts"][name] == pytest.approx(value, rel=1e-5)


if __name__ == "__main__":
    main(*sys.argv[1:])
