"""Every method of stage `cooperate` on 1 and 2 ranks against its formulas, and at the ends of
lambda against `rl` and `sft`.

Engines are imported slowly: this file, run as a program, does it once and forks every rank.
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
from pear_ray.losses.advantages import group_advantages
from pear_ray.records import Completion, Grade, RolloutGroup, TrainingSequence
from pear_ray.rl.rollouts import RolloutBatch
from pear_ray.rl.scheduler import StepBatch
from tests.cooperate import both_signals as formulas

SECONDS = 400
RANKS = (1, 2)
NUM_STEPS, NUM_STEPS_AT_THE_ENDS = 5, 10
RL = {
    "steps": NUM_STEPS,
    "learning_rate": 0.1,
    "warmup_fraction": 0.0,
    "weight_decay": 0.1,
    # So large that a step is as a gradient is: of a gradient near 0 two ways of adding do not agree
    # on the sign, and the most moved elements would all have moved by the learning rate.
    "eps": 1.0,
    "max_grad_norm": 0.4,
    "prompts_per_step": 3,
    "group_size": 4,
}
LORA = {"rank": 4, "alpha": 8}
PEAR = {"level": "token", "clip_log_ratio": (-0.3, 0.3)}
# Name: keys of [cooperate], keys of [sft].
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sum": ({"rl_weight": 0.4}, PEAR),
    "sum, uncertain tokens": ({"rl_weight": 0.4, "entropy_top_frac": 0.3}, {"level": "none"}),
    "alternate": ({"method": "alternate", "frozen_frac": 0.002}, PEAR),
    "trapo": (
        {
            "method": "trapo",
            "prefix_groups": (2, 1, 1),
            "prefix_fracs": (0.0, 0.5, 1.0),
            "prefix_returns": (0.0, 0.5, 0.9),
        },
        PEAR,
    ),
    "bridge": ({"method": "bridge", "lora": LORA, "refresh_steps": 3}, PEAR),
    "bridge without meta": (
        {"method": "bridge", "lora": LORA, "meta_objective": False, "rl_weight": 0.7},
        {"level": "none"},
    ),
}


def job_of(model: str, num_ranks: int, cooperate: dict[str, Any], sft: dict[str, Any]) -> Job:
    """A job of which only training is looked at."""
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


def rollouts_of(step: int, is_guided: bool) -> RolloutBatch:
    """What would come from engines and corpus: drawn, the same everywhere."""
    draw = np.random.default_rng(step)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(draw.integers(0, 100, draw.integers(2, most)).tolist())

    def logprobs(of: tuple[int, ...]) -> tuple[float, ...]:
        return tuple(draw.normal(-4.6, 0.4, len(of)).tolist())

    groups = []
    for number in range(RL["prompts_per_step"]):
        prompt = ids(8)
        answers = []
        for place in range(RL["group_size"]):
            begun = ids(7) if is_guided and place > 1 else ()
            own = () if is_guided and place == 3 and number else ids(12)
            answers.append(
                Completion(own, logprobs(own), "", "stop", ((step, len(own)),), None)
                if not begun
                else Completion(
                    own,
                    logprobs(own),
                    "",
                    "stop",
                    ((step, len(own)),),
                    trace_ids=begun,
                    trace_logprobs=logprobs(begun),
                )
            )
        rewards = draw.integers(0, 2, RL["group_size"]).astype(float)
        # A group without signal now and then.
        rewards[:2] = (0, 1) if number or step % 2 else (rewards[2], rewards[2])
        rewards[3] = rewards[3] if number or step % 2 else rewards[2]
        advantages = group_advantages(torch.tensor(rewards), "grpo").tolist()
        grades = tuple(Grade(reward, reward > 0) for reward in rewards.tolist())
        groups.append(
            RolloutGroup(f"p{step}-{number}", prompt, tuple(answers), grades, tuple(advantages))
        )
    traces = []
    for number in range(4):
        prompt, response = ids(8), ids(13)
        traces.append(
            TrainingSequence.of(prompt, response, logprobs(response), 1.0, f"author {number % 2}")
        )
    shown = () if is_guided else tuple(traces)
    return RolloutBatch(StepBatch(step, tuple(groups), 0, 0, (), shown), (), (), {}, {})


def for_formulas(rollouts: RolloutBatch) -> tuple[list[Any], list[Any]]:
    """The same as the formulas take it: answers with own tokens, and traces."""
    answers, traces = [], []
    for group in rollouts.pop_batch.groups:
        for answer, advantage in zip(group.completions, group.advantages, strict=True):
            before = len(group.prompt_ids) + len(answer.trace_ids)
            ids = np.array([*group.prompt_ids, *answer.trace_ids, *answer.token_ids])
            answers.append((ids, before, answer.logprobs, advantage))
            if answer.trace_ids:
                traces.append((ids, len(group.prompt_ids), before, answer.trace_logprobs))
    for trace in rollouts.pop_batch.traces:
        first = int(trace.trainable.argmax())
        length = len(trace.token_ids)
        traces.append((trace.token_ids, first, length, trace.sampled_logprobs[first:].tolist()))
    return answers, traces


class Rank:
    """One rank's process: methods one after another."""

    def __init__(self, number: int, num_ranks: int, model: str, folder: Path) -> None:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(num_ranks)}
        torch.set_num_threads(1)
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=number, world_size=num_ranks)
        self.number, self.num_ranks, self.model, self.folder = number, num_ranks, model, folder

    def config(self) -> dict[str, Any]:
        return {"start": self.model, "queue": None, "groups": []}

    def method(self, cooperate: dict[str, Any], sft: dict[str, Any]) -> Any:
        from pear_ray.cooperate import METHODS as CLASSES

        job = job_of(self.model, self.num_ranks, cooperate, sft)
        assert job.cooperate is not None
        kind = CLASSES[job.cooperate.method, job.cooperate.meta_objective]
        return kind(job, self.config())

    def note_adapters(self, method: Any, name: str) -> None:
        """Every adapter, whole."""
        found = {}
        for label, shape, part in method.learner.partitions():
            if label.endswith((".lora_A", ".lora_B")):
                parts = [torch.empty_like(part) for _ in range(self.num_ranks)]
                dist.all_gather(parts, part.contiguous())
                size = int(np.prod(shape))
                found[label] = torch.cat(parts)[:size].view(shape).clone()
        if self.number == 0 and found:
            save_file(found, self.folder / f"{name}.safetensors")

    def everything(self) -> None:
        for name, (cooperate, sft) in METHODS.items():
            method = self.method(cooperate, sft)
            self.note_adapters(method, f"{name}, adapters at first")
            for step in range(NUM_STEPS):
                method.step(step, rollouts_of(step, name == "trapo"))
            self.note_adapters(method, f"{name}, adapters")
            for label, learner in method._learners.items():
                learner.export(self.folder / f"{name}, {label}", self.model)

    def ends(self) -> None:
        """Lambda 1 and `rl`, lambda 0 and `sft`, TRAPO without beginnings."""
        from pear_ray.rl.stage_rl import PolicyGradientStep
        from pear_ray.sft.build import objective_of
        from pear_ray.train.learner import Learner

        job = job_of(self.model, self.num_ranks, {}, PEAR)
        method = PolicyGradientStep(job, self.config())
        plain = Learner(self.model, "float32", job.learner, job.rl, job.rl.steps, job.run.seed)
        ours = {
            "rl": lambda step: method.step(step, rollouts_of(step, False)),
            "sft": lambda step: plain.step(
                plain.share(list(rollouts_of(step, False).pop_batch.traces)),
                objective_of(job, [], plain),
            ),
        }
        trapo = METHODS["trapo"][0] | {"prefix_fracs": (0.0, 0.0, 0.0)}
        made = {"rl": method, "sft": plain}
        for name, cooperate in {
            "lambda 1": {"rl_weight": 1.0},
            "lambda 0": {"rl_weight": 0.0},
            "no beginnings": trapo,
            "bridge, lambda 1": METHODS["bridge"][0] | {"rl_weight": 1.0},
        }.items():
            made[name] = other = self.method(cooperate, PEAR)
            ours[name] = lambda step, own=other: own.step(step, rollouts_of(step, False))
        for name, take_step in ours.items():
            for step in range(NUM_STEPS_AT_THE_ENDS):
                take_step(step)
            learner = getattr(made[name], "learner", made[name])
            learner.export(self.folder / name, self.model)


def begin(number: int, num_ranks: int, model: str, folder: Path) -> None:
    rank = Rank(number, num_ranks, model, folder)
    rank.everything()
    rank.ends()


def main(model: str, folder: str) -> None:
    """Each number of ranks in turn."""
    for num_ranks in RANKS:
        own = Path(folder) / str(num_ranks)
        own.mkdir()
        context = multiprocessing.get_context("fork")
        ranks = [
            context.Process(target=begin, args=(n, num_ranks, model, own), daemon=True)
            for n in range(num_ranks)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert not any(rank.exitcode for rank in ranks), [rank.exitcode for rank in ranks]


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> str:
    """A folder, of two layers."""
    return str(tiny_model(False))


@pytest.fixture(scope="module")
def finished(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `main` filled."""
    folder = tmp_path_factory.mktemp("methods")
    command = [sys.executable, __file__, model, str(folder)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def by_formulas(name: str, model: str, adapters: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Policy, shadow and adapters after the same steps."""
    cooperate, sft = METHODS[name]
    job = job_of(model, 1, cooperate, sft)
    assert job.cooperate is not None
    how = job.cooperate.sft_of(job.sft).model_dump()
    how["entropy_top_frac"] = job.cooperate.entropy_top_frac
    network = formulas.Network(model, LORA)
    policy = formulas.Values(network.weights(), RL["learning_rate"])
    shadow = formulas.Values(network.weights(), RL["learning_rate"])
    beside = formulas.Values(adapters, 10 * RL["learning_rate"])
    steps = [for_formulas(rollouts_of(step, name == "trapo")) for step in range(NUM_STEPS)]
    # An answer that is all trace has nothing for RL.
    steps = [([a for a in answers if len(a[0]) > a[1]], traces) for answers, traces in steps]
    optimizer, share = job.rl.model_dump(), job.cooperate.rl_weight
    match name:
        case "bridge":
            formulas.bridge(
                network, policy, shadow, beside, steps, how, optimizer, share, refresh=3
            )
        case "trapo":
            formulas.trapo(network, policy, steps, how, optimizer)
        case "alternate":
            formulas.alternate(network, policy, steps, how, optimizer, 0.002)
        case _:
            formulas.summed(network, policy, beside, steps, how, optimizer, share)
    return {"policy": policy, "shadow": shadow, "adapters": beside, "network": network}


def plain_names(adapters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adapters by the names that the formulas have, in double precision."""
    return {name.replace(".lora_", "."): tensor.double() for name, tensor in adapters.items()}


def merged(found: dict[str, Any], which: str) -> dict[str, torch.Tensor]:
    """Weights with the adapters added."""
    adapters, tensors = found["adapters"].tensors, dict(found[which].tensors)
    for name in adapters:
        if name.endswith(".A"):
            layer = name.removesuffix(".A")
            product = adapters[layer + ".B"] @ adapters[layer + ".A"]
            tensors[layer + ".weight"] = (
                tensors[layer + ".weight"] + found["network"].scaling * product
            )
    return tensors


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name]).abs().max()) for name in ours)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", METHODS)
def test_updates_are_those_of_the_formulas(finished: Path, model: str, name: str) -> None:
    first = finished / "1" / f"{name}, adapters at first.safetensors"
    adapters = plain_names(load_file(first)) if first.exists() else {}
    expected = by_formulas(name, model, adapters)
    before = load_file(Path(model) / "model.safetensors")
    for num_ranks in RANKS:
        own = finished / str(num_ranks)
        exported = load_file(own / f"{name}, policy" / "model.safetensors")
        assert largest_difference(exported, merged(expected, "policy")) <= 1e-6
        # The bound would say little if nothing had moved.
        assert largest_difference(exported, {n: t.double() for n, t in before.items()}) > 1e-3
        if name == "bridge":
            shadow = load_file(own / "bridge, shadow" / "model.safetensors")
            assert largest_difference(shadow, merged(expected, "shadow")) <= 1e-6
        if adapters:
            found = plain_names(load_file(own / f"{name}, adapters.safetensors"))
            assert largest_difference(found, expected["adapters"].tensors) <= 1e-6


ENDS = [
    ("lambda 1", "rl"),
    ("lambda 0", "sft"),
    ("no beginnings", "rl"),
    ("bridge, lambda 1", "rl"),
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize(("ours", "theirs"), ENDS)
def test_at_its_ends_it_is_another_stage(
    finished: Path, num_ranks: int, ours: str, theirs: str
) -> None:
    own = finished / str(num_ranks)
    one, other = (load_file(own / name / "model.safetensors") for name in (ours, theirs))
    assert all(torch.equal(one[name], other[name]) for name in other)


if __name__ == "__main__":
    main(*sys.argv[1:])
