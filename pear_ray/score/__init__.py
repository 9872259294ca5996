"""Log-probability of every response token under the policy that wrote it.

Ray Data reads the corpus, tokenizes it once and sorts it by name into parts. vLLM actors score
part after part, each under the model of its author; rows that bring log-probs are scored only
where a probe asks for it. What they found is put together with the tokens, file by file. Unusable
rows go to rejected.jsonl with the reason. A probe then compares engine, trainer and record.

A part that is stored is never scored again: after any crash the same command scores the others.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import ray.data

from pear_ray.config import Job
from pear_ray.data import corpus_files
from pear_ray.data.tokenizer import num_embeddings
from pear_ray.engines.generator import same_architecture
from pear_ray.errors import ConfigError
from pear_ray.metrics import Tracker
from pear_ray.ray_cluster import connect
from pear_ray.run import LAYOUT, RunDir, installed_versions, write_json
from pear_ray.score.calibration import calibrate
from pear_ray.score.checks import (
    check_same_tokenizer,
    refuse_disagreement,
    refuse_too_many,
    refuse_unconfirmed,
)
from pear_ray.score.merge import MergeLogprobs, ScoreStats
from pear_ray.score.progress import Progress
from pear_ray.score.scorer import Scorer
from pear_ray.score.shards import ScoringPlan, Shard, logprobs_file, write_sorted
from pear_ray.score.tokenize import Tokenize, TokenizeConfig

log = logging.getLogger(__name__)

ROWS_PER_BATCH = 256
BYTES_PER_BLOCK = 16 * 2**20
# Parts of one task are told of together, so a task has one part unless there are very many.
MAX_TASKS = 4096


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Score the corpus into RUN/scored."""
    prints = check_same_tokenizer(job)
    path = job.corpus.path or str(run.folder / "sample")
    files = corpus_files.find(path)
    made_from = {
        "corpus": files.fingerprint,
        "tokenizer": prints,
        "versions": installed_versions(),
    }
    if not run.is_made_from("scored", made_from):
        connect()
        prepare_ray_data(job)
        with run.resumable_folder("scored", made_from) as folder:
            facts = make(job, run, files, path, folder, prints)
            write_json(folder / "scored" / "facts.json", {"layout": LAYOUT} | facts)
    facts = json.loads((run.folder / "scored" / "facts.json").read_text())
    log.info("score: %d of %d rows rejected", facts["rejected"], facts["rows"])
    for source, numbers in facts["sources"].items():
        log.info("score: %s: %s", source, in_words(numbers))
    return facts


def make(
    job: Job,
    run: RunDir,
    files: corpus_files.Files,
    path: str,
    folder: Path,
    prints: tuple[str, str],
) -> dict[str, Any]:
    """Everything from the corpus to `folder`/scored, or what of it is missing there."""
    tokenized = tokenize(job, files, folder)
    num_rows = sum(file["num_rows"] for file in tokenized)
    if num_rows == 0:
        raise ConfigError(f"corpus.path: {path} holds no rows; expected at least one")
    num_rejected = sum(file["num_rejected"] for file in tokenized)
    refuse_too_many(job, path, num_rejected, num_rows, rejected_rows(folder, tokenized))
    selection = select(job, folder, tokenized)
    score(job, run, folder, tokenized, selection)
    figures = assemble(job, folder, tokenized, selection, prints)
    refuse_too_many(job, path, figures.num_rejected, num_rows, rejected_lines(folder))
    refuse_unconfirmed(job, figures)
    calibration = compare_with_trainer(job, folder)
    refuse_disagreement(job, calibration)
    with (folder / "scored" / "rejected.jsonl").open("w") as whole:
        whole.writelines(json.dumps(row) + "\n" for row in rejected_lines(folder))
    return {
        "rows": num_rows,
        "rejected": figures.num_rejected,
        "sources": figures.by_source(),
        "calibration": calibration,
    }


def prepare_ray_data(job: Job) -> None:
    """Small blocks, so that memory does not depend on the corpus, and quiet."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = BYTES_PER_BLOCK
    # Once a second it would stop an engine, for as long as the kernel takes to count its pages.
    context.memory_usage_poll_interval_s = None
    context.wait_for_min_actors_s = int(job.generator.timeout_seconds)
    # Its plans fill the log of a job. Its progress bars are in a terminal and on the dashboard.
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def tokenize(job: Job, files: corpus_files.Files, folder: Path) -> list[dict[str, Any]]:
    """Write the corpus as tokens below `folder`, unless that is done; returns what
    `write_sorted` says of each file, in the order of their rows."""
    done = folder / "tokenized.json"
    if done.exists():
        return json.loads(done.read_text())
    shutil.rmtree(folder / "tokenized", ignore_errors=True)
    (folder / "tokenized").mkdir()
    paths = [job.model_path(), *(job.model_path(source) for source in job.behavior)]
    settings = job.corpus
    rules = TokenizeConfig(
        columns=settings.columns,
        sources=frozenset(job.behavior),
        source=settings.source,
        fallback_scorer=settings.fallback_scorer,
        heldout_fraction=settings.heldout_fraction,
        max_model_len=job.generator.max_model_len,
        truncates=settings.on_overlength == "truncate",
        keeps_recorded=settings.recorded_logprobs == "probe",
        num_embeddings=min(num_embeddings(path) for path in paths),
    )
    to_ids = Tokenize(job.model_path(), rules)
    try:
        written = (
            corpus_files.read(files, settings.columns)
            .map_batches(
                to_ids.table if files.are_parquet else to_ids.lines,
                batch_size=ROWS_PER_BATCH,
                batch_format="pyarrow",
            )
            .sort("example_id")
            .map_batches(
                write_sorted,
                fn_args=(folder / "tokenized", settings.rows_per_part),
                batch_size=None,
                batch_format="pyarrow",
            )
            .take_all()
        )
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OSError | ValueError):
            # What follows the first line is Ray's advice on retries.
            first, *_ = str(error.cause).splitlines()
            raise ConfigError(f"corpus.path: cannot be read: {first}") from error
        raise
    tokenized = [json.loads(row["facts"]) for row in written]
    tokenized.sort(key=lambda file: file["first_id"])
    write_json(done, tokenized)
    return tokenized


def select(job: Job, folder: Path, tokenized: list[dict[str, Any]]) -> ScoringPlan:
    """The probe's share of each scorer's rows, and prompts both trained on and held out."""
    totals: dict[str, int] = {}
    for part in parts_of(tokenized):
        totals[part.scorer] = totals.get(part.scorer, 0) + part.num_rows
    probes = {scorer: min(1.0, job.corpus.probe_rows / total) for scorer, total in totals.items()}
    if not any(file["splits_are_given"] for file in tokenized):
        return ScoringPlan(probes, frozenset())
    names = [folder / "tokenized" / f"{file['file']}.parquet" for file in tokenized]

    def contents(split: str, among: np.ndarray | None) -> np.ndarray:
        found = [np.empty(0, np.int64)]
        for name in names:
            table = pq.read_table(name, columns=["content"], filters=[("split", "==", split)])
            values = np.unique(table.column("content").drop_null().to_numpy())
            found.append(values if among is None else np.intersect1d(values, among))
        return np.unique(np.concatenate(found))

    overlapping = contents("train", among=contents("heldout", among=None))
    return ScoringPlan(probes, frozenset(overlapping.tolist()))


def score(
    job: Job, run: RunDir, folder: Path, tokenized: list[dict[str, Any]], selection: ScoringPlan
) -> None:
    """Score every part that has no log-probs yet, one set of engines after the other."""
    (folder / "logprobs").mkdir(exist_ok=True)
    parts = parts_of(tokenized)
    missing = [part for part in parts if not logprobs_file(folder, *part.key).exists()]
    if len(missing) < len(parts):
        text = f"{len(parts) - len(missing)} of {len(parts)} parts were scored before"
        run.event("score", "resumed", text)
        log.info("score: %s", text)
    with closing(Tracker(run.folder, "score", job.tracking).rewind(0)) as tracker:
        rejected = sum(file["num_rejected"] for file in tokenized)
        progress = Progress(run, tracker, missing, rejected)
        for models in sharing_engines(job):
            mine = [part for part in missing if part.scorer in models]
            if mine:
                progress.follow(scored(job, folder, models, selection, mine))


def sharing_engines(job: Job) -> list[dict[str, str]]:
    """Model of each source, apart by architecture: an engine that serves one model of several
    loads the others' weights sooner than another engine starts."""
    shared: list[dict[str, str]] = []
    for source in sorted(job.behavior):
        path = job.model_path(source)
        for models in shared:
            if same_architecture(next(iter(models.values())), path):
                models[source] = path
                break
        else:
            shared.append({source: path})
    return shared


def scored(
    job: Job, folder: Path, models: dict[str, str], selection: ScoringPlan, parts: list[Shard]
) -> ray.data.Dataset:
    """What engines of these models do with these parts, as they do it."""
    in_order = sorted(parts, key=lambda part: part.scorer)
    settings = job.generator
    return ray.data.from_items(
        [asdict(part) for part in in_order], override_num_blocks=min(len(parts), MAX_TASKS)
    ).map(
        Scorer,
        fn_constructor_args=(
            folder, models, selection, job.model.dtype, settings, job.run.seed,
            job.corpus.top_logprobs,
        ),
        compute=ray.data.ActorPoolStrategy(
            min_size=settings.fewest_engines,
            max_size=settings.num_engines,
            # Else an engine is called from another thread than it was made in, and an engine on
            # CPUs keeps its number of threads by thread.
            enable_true_multi_threading=True,
            max_concurrent_calls_per_actor=1,
        ),
        num_cpus=settings.num_cpus,
        num_gpus=settings.num_actor_gpus,
        label_selector=job.placement.generators,
    )  # fmt: skip


def assemble(
    job: Job,
    folder: Path,
    tokenized: list[dict[str, Any]],
    selection: ScoringPlan,
    prints: tuple[str, str],
) -> ScoreStats:
    """Put tokens and log-probs together, file by file."""
    for name in ("scored", "rejected", "probe"):
        (folder / name).mkdir(exist_ok=True)
    facts_of_scorer = {
        source: {
            "behavior_model": job.model_path(source),
            "tokenizer_digest": prints[0],
            "template_digest": prints[1],
        }
        for source in job.behavior
    }
    files = [{"number": n, "file": file["file"]} for n, file in enumerate(tokenized)]
    done = ray.data.from_items(files, override_num_blocks=min(len(files), MAX_TASKS)).map(
        MergeLogprobs(folder, selection, facts_of_scorer)
    )
    figures = ScoreStats()
    for row in done.iter_rows():
        figures.merge(json.loads(row["facts"]))
    return figures


def compare_with_trainer(job: Job, folder: Path) -> dict[str, Any]:
    """How the trainer's forward pass and the engine differ on the probe, by behavior model."""
    settings = job.generator
    resources = {"num_cpus": settings.num_cpus, "num_gpus": -(-settings.num_gpus // 1)}
    calls = {
        source: calibrate.options(**resources, label_selector=job.placement.generators).remote(
            folder / "probe",
            job.model_path(source),
            job.model.dtype,
            job.learner.tokens_per_pack,
            settings.threads,
        )
        for source in job.behavior
    }
    deadline = settings.timeout_seconds
    return {source: ray.get(call, timeout=deadline) for source, call in calls.items()}


def rejected_rows(folder: Path, tokenized: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows that tokenizing rejected."""
    for file in tokenized:
        if file["num_rejected"]:
            path = folder / "tokenized" / f"{file['file']}.parquet"
            columns = ["example_id", "reason"]
            found = pq.read_table(path, columns=columns, filters=[("reason", "!=", "")])
            yield from found.to_pylist()


def rejected_lines(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows that were rejected by the end, in order."""
    for path in sorted((folder / "rejected").glob("*.jsonl")):
        with path.open() as lines:
            yield from map(json.loads, lines)


def parts_of(tokenized: list[dict[str, Any]]) -> list[Shard]:
    """All parts, in the order of their rows."""
    return [Shard(**part) for file in tokenized for part in file["parts"]]


def in_words(numbers: dict[str, Any]) -> str:
    """What was measured of one source, on one line."""
    gap = numbers["recorded_gap_max"]
    beside = "" if gap is None else f", at most {gap:.1e} nats from the recorded log-probs"
    return f"{numbers['rows']} rows, {numbers['response_tokens']} response tokens{beside}"
