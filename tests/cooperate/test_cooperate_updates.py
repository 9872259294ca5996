"""Each method on 1 and 2 ranks against its formulas, and against `rl` and `sft` at the extremes of lambda.

Importing the libraries is slow: this file, run as a program, does it once and forks each rank.
"""

from __future__ import annotations

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
from safetensors.torch import load_file, save_file

from pear_ray.config import Job
from pear_ray.losses.policy import group_advantages
from pear_ray.records import Completion, Grade, RolloutGroup, TrainingSequence
from pear_ray.rl.rollouts import RolloutBatch
from pear_ray.rl.scheduler import StepBatch
from pear_ray.rl.train_step import PolicyGradientStep, RankConfig
from tests.cooperate import formulas

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1000)]

TIMEOUT_SECONDS = 800
RANKS = (1, 2)
NUM_STEPS = 5
RL = {
    "steps": NUM_STEPS,
    "learning_rate": 0.1,
    "warmup_fraction": 0.0,
    "weight_decay": 0.1,
    # Large, so that an update is proportional to the gradient. With a small eps the sign of a gradient near 0, and with
    # it the update, would depend on the order of summation, and all elements would move by the learning rate, so that
    # none would have moved most.
    "eps": 1.0,
    "max_grad_norm": 0.4,
    "prompts_per_step": 3,
    "group_size": 4,
}
LORA = {"rank": 4, "alpha": 8}
PEAR = {"level": "token", "clip_log_ratio": (-0.3, 0.3)}
SUM = {"type": "sum", "rl_weight": 0.4}
BRIDGE = {"type": "bridge", "lora": LORA, "refresh_steps": 3}
TRAPO = {
    "type": "trapo",
    "prefix_groups": (2, 1, 1),
    "prefix_fracs": (0.0, 0.5, 1.0),
    "prefix_returns": (0.0, 0.5, 0.9),
}
# Keys of [cooperate] and keys of [sft].
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sum": ({"method": SUM}, PEAR),
    "sum, high entropy": ({"method": SUM, "entropy_top_frac": 0.3}, {"level": "none"}),
    "alternate": ({"method": {"type": "alternate", "frozen_frac": 0.002}}, PEAR),
    "trapo": ({"method": TRAPO}, PEAR),
    "bridge": ({"method": BRIDGE}, PEAR),
    "bridge without meta": (
        {"method": {"type": "bridge", "lora": LORA, "meta_objective": False, "rl_weight": 0.7}},
        {"level": "none"},
    ),
}
# Methods that must equal `rl` or `sft` to the bit.
EXTREMES = {
    "lambda 1": (SUM | {"rl_weight": 1.0}, "rl"),
    "lambda 0": (SUM | {"rl_weight": 0.0}, "sft"),
    "no prefixes": (TRAPO | {"prefix_fracs": (0.0, 0.0, 0.0)}, "rl"),
    "bridge, lambda 1": (BRIDGE | {"rl_weight": 1.0}, "rl"),
}


def make_job(model: str, num_ranks: int, cooperate: dict[str, Any], sft: dict[str, Any]) -> Job:
    return Job(
        run={"dir": "nowhere", "seed": 3},
        model={"path": model, "dtype": "float32"},
        tasks=[{"name": "countdown"}],
        sft=sft,
        rl=RL,
        cooperate=cooperate,
        generator={"max_new_tokens": 16, "max_model_len": 40},
        learner={"num_workers": num_ranks, "tokens_per_micro_batch": 90, "logits_mib": 0.05},
    )


def make_rollouts(step: int, has_prefixes: bool = False) -> RolloutBatch:
    """The random batch of a step, the same on each rank."""
    draw = np.random.default_rng(step)

    def ids(upper: int) -> tuple[int, ...]:
        return tuple(draw.integers(0, 100, draw.integers(2, upper)).tolist())

    def logprobs(ids: tuple[int, ...]) -> tuple[float, ...]:
        return tuple(draw.normal(-4.6, 0.4, len(ids)).tolist())

    groups = []
    for number in range(RL["prompts_per_step"]):
        prompt = ids(8)
        completions = []
        for sample in range(RL["group_size"]):
            prefix = ids(7) if has_prefixes and sample > 1 else ()
            sampled = () if has_prefixes and sample == 3 and number else ids(12)
            completions.append(
                Completion(
                    sampled,
                    logprobs(sampled),
                    "",
                    "stop",
                    ((step, len(sampled)),),
                    prefix_ids=prefix,
                    prefix_logprobs=logprobs(prefix),
                )
            )
        rewards = draw.integers(0, 2, RL["group_size"]).astype(float)
        # The first group of even steps has equal rewards.
        rewards[:2] = (0, 1) if number or step % 2 else (rewards[2], rewards[2])
        rewards[3] = rewards[3] if number or step % 2 else rewards[2]
        advantages = group_advantages(torch.tensor(rewards), "grpo").tolist()
        grades = tuple(Grade(reward, reward > 0) for reward in rewards.tolist())
        groups.append(RolloutGroup(f"p{step}-{number}", prompt, tuple(completions), grades, tuple(advantages)))
    demonstrations = []
    for number in range(4):
        prompt, response = ids(8), ids(13)
        row = prompt, response, logprobs(response), 1.0, f"author {number % 2}"
        demonstrations.append(TrainingSequence.of(*row))
    batch = StepBatch(step, tuple(groups), 0, 0, (), () if has_prefixes else tuple(demonstrations))
    return RolloutBatch(batch, (), (), {}, {})


def for_formulas(rollouts: RolloutBatch) -> tuple[list[Any], list[Any]]:
    """Completions with sampled tokens and demonstrations, as `formulas` expects them."""
    completions, demonstrations = [], []
    for group in rollouts.batch.groups:
        for completion, advantage in zip(group.completions, group.advantages, strict=True):
            start = len(group.prompt_ids) + len(completion.prefix_ids)
            ids = np.array([*group.prompt_ids, *completion.prefix_ids, *completion.token_ids])
            if completion.token_ids:
                completions.append((ids, start, completion.logprobs, advantage))
            if completion.prefix_ids:
                prefix = len(group.prompt_ids), start, completion.prefix_logprobs
                demonstrations.append((ids, *prefix))
    for sequence in rollouts.batch.demonstrations:
        start, ids = int(sequence.trainable.argmax()), sequence.token_ids
        demonstrations.append((ids, start, len(ids), sequence.sampled_logprobs[start:].tolist()))
    return completions, demonstrations


class Rank:
    """A rank's process, which runs all methods one after another."""

    def __init__(self, number: int, num_ranks: int, model: str, folder: Path) -> None:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(num_ranks)}
        torch.set_num_threads(1)
        rendezvous = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=number, world_size=num_ranks)
        self.number, self.num_ranks, self.model, self.folder = number, num_ranks, model, folder

    def config(self, cooperate: dict[str, Any], sft: dict[str, Any]) -> RankConfig:
        job = make_job(self.model, self.num_ranks, cooperate, sft)
        return RankConfig(job, self.folder, "cooperate", self.model, None, None)

    def train_step(self, cooperate: dict[str, Any], sft: dict[str, Any]) -> Any:
        from pear_ray.cooperate import train_step_class

        config = self.config(cooperate, sft)
        return train_step_class(config.job.cooperate.method)([], config)

    def save_adapters(self, train_step: Any, name: str) -> None:
        adapters = {}
        for label, shape, part in train_step.learner.partitions():
            if label.endswith((".lora_A", ".lora_B")):
                parts = [torch.empty_like(part) for _ in range(self.num_ranks)]
                dist.all_gather(parts, part.contiguous())
                size = int(np.prod(shape))
                adapters[label] = torch.cat(parts)[:size].view(shape).clone()
        if self.number == 0 and adapters:
            save_file(adapters, self.folder / f"{name}.safetensors")

    def run_methods(self) -> None:
        for name, (cooperate, sft) in METHODS.items():
            train_step = self.train_step(cooperate, sft)
            self.save_adapters(train_step, f"{name}, first adapters")
            for step in range(NUM_STEPS):
                train_step.train(step, make_rollouts(step, name == "trapo"))
            self.save_adapters(train_step, f"{name}, adapters")
            for label, learner in train_step._learners.items():
                learner.export(self.folder / f"{name}, {label}", self.model)

    def run_extremes(self) -> None:
        from pear_ray.sft.loss import build_sft_loss
        from pear_ray.train.learner import Learner

        config = self.config({}, PEAR)
        train_steps = {"rl": PolicyGradientStep(config)}
        for name, (method, _) in EXTREMES.items():
            train_steps[name] = self.train_step({"method": method}, PEAR)
        for name, train_step in train_steps.items():
            for step in range(NUM_STEPS):
                train_step.train(step, make_rollouts(step))
            train_step.learner.export(self.folder / name, self.model)
        job = config.job
        sft = Learner(self.model, "float32", job.learner, job.rl, job.rl.steps, job.run.seed)
        loss = build_sft_loss(job, [], sft)
        for step in range(NUM_STEPS):
            sft.step(sft.micro_batches(make_rollouts(step).batch.demonstrations), loss)
        sft.export(self.folder / "sft", self.model)


def run_rank(number: int, num_ranks: int, model: str, folder: Path) -> None:
    rank = Rank(number, num_ranks, model, folder)
    rank.run_methods()
    rank.run_extremes()


def main(model: str, folder: str) -> None:
    for num_ranks in RANKS:
        subfolder = Path(folder) / str(num_ranks)
        subfolder.mkdir()
        context = multiprocessing.get_context("fork")
        ranks = [
            context.Process(target=run_rank, args=(n, num_ranks, model, subfolder), daemon=True)
            for n in range(num_ranks)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert not any(rank.exitcode for rank in ranks), [rank.exitcode for rank in ranks]


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> str:
    return str(tiny_model(False))


@pytest.fixture(scope="module")
def outputs(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `main` writes."""
    folder = tmp_path_factory.mktemp("methods")
    process = subprocess.run(
        [sys.executable, __file__, model, str(folder)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return folder


def apply_formulas(name: str, model: str, adapters: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Weights of policy and shadow, with the adapters merged, and adapters after all steps."""
    cooperate, sft = METHODS[name]
    job = make_job(model, 1, cooperate, sft)
    assert job.cooperate is not None
    settings = job.cooperate.sft_of(job.sft).model_dump()
    settings["entropy_top_frac"] = job.cooperate.entropy_top_frac
    network = formulas.Network(model, LORA)
    policy = formulas.Parameters(network.weights(), RL["learning_rate"])
    shadow = formulas.Parameters(network.weights(), RL["learning_rate"])
    lora = formulas.Parameters(adapters, 10 * RL["learning_rate"])
    steps = [for_formulas(make_rollouts(step, name == "trapo")) for step in range(NUM_STEPS)]
    optimizer, rl_weight = job.rl.model_dump(), getattr(job.cooperate.method, "rl_weight", 0.5)
    common = steps, settings, optimizer
    match name:
        case "bridge":
            formulas.bridge(network, policy, shadow, lora, *common, rl_weight, refresh_steps=3)
        case "trapo":
            formulas.trapo(network, policy, *common)
        case "alternate":
            formulas.alternate(network, policy, *common, frozen_frac=0.002)
        case _:
            formulas.weighted_sum(network, policy, lora, *common, rl_weight)
    merged = {
        label: network.merge(parameters.tensors, lora.tensors)
        for label, parameters in (("policy", policy), ("shadow", shadow))
    }
    return merged | {"adapters": lora.tensors}


def load_adapters(path: Path) -> dict[str, torch.Tensor]:
    """The adapters by their names in `formulas`, in double precision; {} if there are none."""
    tensors = load_file(path) if path.exists() else {}
    return {name.replace(".lora_", "."): tensor.double() for name, tensor in tensors.items()}


def max_difference(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    assert tensors.keys() == others.keys()
    return max(float((tensors[n].double() - others[n].double()).abs().max()) for n in tensors)


@pytest.mark.parametrize("name", METHODS)
def test_updates_follow_the_formulas(outputs: Path, model: str, name: str) -> None:
    first_adapters = load_adapters(outputs / "1" / f"{name}, first adapters.safetensors")
    expected = apply_formulas(name, model, first_adapters)
    start = load_file(Path(model) / "model.safetensors")
    for num_ranks in RANKS:
        folder = outputs / str(num_ranks)
        policy = load_file(folder / f"{name}, policy" / "model.safetensors")
        assert max_difference(policy, expected["policy"]) <= 1e-6
        # Otherwise the bound would prove little.
        assert max_difference(policy, start) > 1e-3
        if name == "bridge":
            shadow = load_file(folder / "bridge, shadow" / "model.safetensors")
            assert max_difference(shadow, expected["shadow"]) <= 1e-6
        if first_adapters:
            adapters = load_adapters(folder / f"{name}, adapters.safetensors")
            assert max_difference(adapters, expected["adapters"]) <= 1e-6


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("name", EXTREMES)
def test_at_the_extremes_of_lambda_a_method_equals_rl_or_sft(outputs: Path, num_ranks: int, name: str) -> None:
    folders = (outputs / str(num_ranks) / label for label in (name, EXTREMES[name][1]))
    weights, expected = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(weights[label], expected[label]) for label in expected)


if __name__ == "__main__":
    main(*sys.argv[1:])
