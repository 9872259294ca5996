"""pass@k of the run's checkpoints on held-out problems, with intervals over problems.

Every checkpoint answers the same problems with the same seeds, so that two of them are compared
pair by pair.
"""

from __future__ import annotations

import logging
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.actors.cluster import connect
from pear_ray.actors.engines import fleet_of
from pear_ray.actors.fleet import Fleet
from pear_ray.actors.verifiers import Verifiers
from pear_ray.algorithms.seeds import seed_of
from pear_ray.algorithms.statistics import bootstrap_interval, mean_pass_at_k
from pear_ray.config import Job
from pear_ray.engines.generator import Request, Trace
from pear_ray.engines.tokenizer import load_tokenizer, prompt_ids
from pear_ray.manifest import Run, write_json
from pear_ray.records import ATTEMPT_SCHEMA, Problem
from pear_ray.tasks import heldout_problems

log = logging.getLogger(__name__)


def run(job: Job, run: Run) -> dict[str, Any]:
    """Evaluate the model the run starts from and every export of it and of its arms."""
    checkpoints = checkpoints_of(job, run.folder)
    connect()
    problems = heldout_problems(job.tasks, job.evaluation.num_problems, job.run.seed)
    heldout = heldout_rows(job.scored_folder)
    rows: list[dict[str, Any]] = []
    cards: dict[str, Any] = {}
    verifier = Verifiers(job.tasks, job.verifier)
    try:
        first = next(iter(checkpoints.values()))
        with fleet_of(job, first, partial(run.event, "evaluate")) as fleet:
            for number, (label, path) in enumerate(checkpoints.items()):
                if number:
                    fleet.load_folder(path)
                attempts, parts = attempt(job, label, path, problems, fleet, verifier)
                rows += attempts
                cards[label] = card(job, path, attempts, parts)
                cards[label]["heldout_nll"] = heldout_nll(fleet, heldout)
                log.info("evaluate: %s: %s", label, in_words(cards[label]))
    finally:
        verifier.close()
    with run.new_folder("evaluate") as folder:
        pq.write_table(pa.Table.from_pylist(rows, ATTEMPT_SCHEMA), folder / "attempts.parquet")
        write_json(folder / "scorecard.json", scorecard(job, len(problems), cards, rows))
    return {label: {k: v["value"] for k, v in c["pass_at_k"].items()} for label, c in cards.items()}


def in_words(card: dict[str, Any]) -> str:
    """A scorecard on one line."""
    return ", ".join(f"pass@{k} {v['value']:.3f}" for k, v in card["pass_at_k"].items())


def checkpoints_of(job: Job, folder: Path) -> dict[str, str]:
    """Label and folder of every model to evaluate, in the order in which they came to be."""
    found = {"base": job.model_path()}
    for home in [folder, *(folder / "arms" / arm.name for arm in job.arms)]:
        for stage in ("sft", "rl"):
            export = home / stage / "export"
            if export.exists():
                found[stage if home == folder else f"{home.name}/{stage}"] = str(export)
    return found | job.evaluation.checkpoints


def attempt(
    job: Job,
    label: str,
    path: str,
    problems: list[Problem],
    fleet: Fleet,
    verifier: Verifiers,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Attempt rows of one checkpoint, and the mean of each part of its verdicts."""
    tokenizer = load_tokenizer(path)
    requests = [
        Request(
            tuple(prompt_ids(tokenizer, problem.messages)),
            job.evaluation.samples_per_problem,
            seed_of(job.run.seed, "evaluate", problem.problem_id),
            job.evaluation.temperature,
        )
        for problem in problems
    ]
    answers = fleet.ask(requests)
    pairs = [
        (problem, number, answer)
        for problem, group in zip(problems, answers, strict=True)
        for number, answer in enumerate(group)
    ]
    verdicts = verifier.judge([(problem, answer.text) for problem, _, answer in pairs])
    rows = [
        {
            "checkpoint": label,
            "problem_id": problem.problem_id,
            "task": problem.task,
            "sample": number,
            "text": answer.text,
            "correct": verdict.correct,
            "reward": verdict.reward,
            "num_tokens": len(answer.token_ids),
            "finish_reason": answer.finish_reason,
            "mean_logprob": float(np.mean(answer.logprobs)),
            "note": verdict.note,
        }
        for (problem, number, answer), verdict in zip(pairs, verdicts, strict=True)
    ]
    names = sorted({name for verdict in verdicts for name in verdict.parts})
    parts = {n: float(np.mean([v.parts.get(n, 0.0) for v in verdicts])) for n in names}
    return rows, parts


def card(
    job: Job, path: str, rows: list[dict[str, Any]], parts: dict[str, float]
) -> dict[str, Any]:
    """What the scorecard says of one checkpoint."""
    num_samples = job.evaluation.samples_per_problem
    num_correct = np.array([row["correct"] for row in rows]).reshape(-1, num_samples).sum(axis=1)
    pass_at_k = {}
    for k in job.evaluation.ks:
        values = mean_pass_at_k(num_samples, num_correct, k)
        low, high = bootstrap_interval(values, job.run.seed)
        pass_at_k[str(k)] = {"value": float(values.mean()), "low": low, "high": high}
    return {
        "path": path,
        "pass_at_k": pass_at_k,
        "response_tokens_mean": float(np.mean([row["num_tokens"] for row in rows])),
        "truncated_share": float(np.mean([row["finish_reason"] == "length" for row in rows])),
        "mean_logprob": float(np.mean([row["mean_logprob"] for row in rows])),
        "parts": parts,
    }


def heldout_rows(folder: Path) -> list[dict[str, Any]]:
    """Prompt and response ids of the held-out rows of the scored corpus, if there is one, and
    which of the latter are the assistant's."""
    rows = []
    for file in sorted(folder.glob("*.parquet")):
        wanted = {"prompt_ids", "response_ids", "trainable"} & set(pq.read_schema(file).names)
        heldout = [("split", "==", "heldout")]
        rows += pq.read_table(file, columns=sorted(wanted), filters=heldout).to_pylist()
    return rows


def heldout_nll(fleet: Fleet, rows: list[dict[str, Any]]) -> float | None:
    """Mean loss over the assistant's tokens of the held-out rows, in nats."""
    if not rows:
        return None
    scores = fleet.ask([Trace(tuple(r["prompt_ids"]), tuple(r["response_ids"])) for r in rows])
    chosen = [score[row.get("trainable") or ...] for score, row in zip(scores, rows, strict=True)]
    return float(-np.concatenate(chosen).mean())


def scorecard(
    job: Job, num_problems: int, cards: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The whole document, with paired differences between checkpoints of one kind."""
    num_samples = job.evaluation.samples_per_problem
    correct = {
        label: np.array([r["correct"] for r in rows if r["checkpoint"] == label])
        .reshape(-1, num_samples)
        .sum(axis=1)
        for label in cards
    }
    differences = []
    for before, after in pairs_of(list(cards)):
        for k in job.evaluation.ks:
            paired = mean_pass_at_k(num_samples, correct[after], k) - mean_pass_at_k(
                num_samples, correct[before], k
            )
            low, high = bootstrap_interval(paired, job.run.seed)
            value = float(paired.mean())
            differences.append(
                {"a": after, "b": before, "k": k, "value": value, "low": low, "high": high}
            )
    return {
        "num_problems": num_problems,
        "samples_per_problem": num_samples,
        "temperature": job.evaluation.temperature,
        "max_new_tokens": job.generator.max_new_tokens,
        "seed": job.run.seed,
        "checkpoints": cards,
        "differences": differences,
    }


def pairs_of(labels: list[str]) -> list[tuple[str, str]]:
    """Checkpoints worth comparing, (b, a) for "a minus b": one arm before and after RL, and two
    arms at the same stage."""
    pairs = []
    for b, a in combinations(labels, 2):
        (arm_b, stage_b), (arm_a, stage_a) = (label.rpartition("/")[::2] for label in (b, a))
        if {stage_b, stage_a} <= {"sft", "rl"} and (arm_b == arm_a) != (stage_b == stage_a):
            pairs.append((b, a))
    return pairs
