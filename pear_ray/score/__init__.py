"""Stage `score`: log-probability of every response token under the policy that wrote it.

    corpus files ──read_corpus──▶ rows ──TokenizeRows──▶ token ids ──sort by id, write_sorted──┐
                                                                                               ▼
       logprobs/ ◀──Scorer: vLLM actors, shard by shard── plan ◀──plan_scoring── tokenized/ (shards)
           │                                                                          │
           └─────────────────────────────▶ MergeLogprobs ◀────────────────────────────┘
                                                 ▼
                          scored/  rejected/  probe/ ──compare_with_trainer──▶ gap to the trainer

Each row is scored by the model of its source. Rows with recorded log-probs are scored only if they are in the probe,
which compares engine, trainer and record. Rejected rows go to rejected.jsonl with the reason. A stored shard is never
scored again: after a crash the same command scores the others.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.data

from pear_ray.config import Job
from pear_ray.data.corpus_files import CorpusFiles, find_corpus_files, read_corpus
from pear_ray.errors import ConfigError, require
from pear_ray.run import LAYOUT, RunDir, connect, installed_versions, write_json
from pear_ray.score.merge import (
    check_recorded_logprobs,
    check_rejected,
    compare_with_trainer,
    merge_files,
    merged_rejects,
)
from pear_ray.score.scorer import log_progress, run_scorers
from pear_ray.score.shards import (
    ScoringPlan,
    TokenizedFile,
    logprobs_path,
    plan_scoring,
    tokenization_rejects,
    write_sorted,
)
from pear_ray.score.tokenize import TokenizeRows, check_same_tokenizer

log = logging.getLogger(__name__)

ROWS_PER_BATCH = 256
BYTES_PER_BLOCK = 16 * 2**20


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Score the corpus into RUN/scored; return the facts for the manifest."""
    digests = check_same_tokenizer(job)
    files = find_corpus_files(job.corpus.path or str(run.folder / "sample"))
    made_from = {"corpus": files.digest, "tokenizer": digests, "versions": installed_versions()}
    if not run.is_made_from("scored", made_from):
        connect()
        configure_ray_data(job)
        with run.resumable_folder("scored", made_from) as folder:
            facts = score_corpus(job, run, files, folder, digests)
            write_json(folder / "scored" / "facts.json", {"layout": LAYOUT} | facts)
    facts = json.loads((run.folder / "scored" / "facts.json").read_text())
    log.info("score: %d of %d rows rejected", facts["rejected"], facts["rows"])
    for source, stats in facts["sources"].items():
        rows, tokens, gap = (stats[k] for k in ("rows", "response_tokens", "recorded_gap_max"))
        note = "" if gap is None else f", recorded log-probs off by at most {gap:.1e} nats"
        log.info("score: %s: %d rows, %d response tokens%s", source, rows, tokens, note)
    return facts


def score_corpus(job: Job, run: RunDir, files: CorpusFiles, folder: Path, digests: tuple[str, str]) -> dict[str, Any]:
    """Do the steps that are missing in the work directory `folder`; return the stage's facts."""
    tokenized = tokenize_corpus(job, files, folder)
    num_rows = sum(file.num_rows for file in tokenized)
    require(num_rows, "corpus.path", "at least one row", f"none in {files.path}")
    num_rejected = sum(file.num_rejected for file in tokenized)
    check_rejected(job, files.path, num_rejected, num_rows, tokenization_rejects(folder, tokenized))

    plan = plan_scoring(folder, tokenized, job.corpus.probe_rows)
    score_shards(job, run, folder, plan, tokenized)
    stats = merge_files(job, folder, plan, tokenized, digests)
    check_rejected(job, files.path, stats.num_rejected, num_rows, merged_rejects(folder))
    check_recorded_logprobs(job, stats)

    calibration = compare_with_trainer(job, folder)
    with (folder / "scored" / "rejected.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in merged_rejects(folder))
    return {"rows": num_rows, "rejected": stats.num_rejected, "sources": stats.by_source(), "calibration": calibration}


def configure_ray_data(job: Job) -> None:
    """Use small blocks, so that memory does not grow with the corpus, and log little."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = BYTES_PER_BLOCK
    # Polling stops an engine every second while the kernel counts its pages.
    context.memory_usage_poll_interval_s = None
    context.wait_for_min_actors_s = int(job.generator.timeout_seconds)
    # Plans would fill the job's log; progress is on the Ray dashboard.
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def tokenize_corpus(job: Job, files: CorpusFiles, folder: Path) -> list[TokenizedFile]:
    """Write the corpus as token ids, unless done; return the files in the order of their rows."""
    done = folder / "tokenized.json"
    if done.exists():
        return [TokenizedFile.from_dict(document) for document in json.loads(done.read_text())]
    shutil.rmtree(folder / "tokenized", ignore_errors=True)
    (folder / "tokenized").mkdir()
    rows = TokenizeRows(job)
    tokenize = rows.from_parquet if files.are_parquet else rows.from_json_lines
    write_args = (folder, job.corpus.rows_per_part)
    try:
        written = (
            read_corpus(files, job.corpus.columns)
            .map_batches(tokenize, batch_size=ROWS_PER_BATCH, batch_format="pyarrow")
            .sort("example_id")
            .map_batches(write_sorted, fn_args=write_args, batch_size=None, batch_format="pyarrow")
            .take_all()
        )
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OSError | ValueError):
            # After the first line comes Ray's advice on retries.
            first, *_ = str(error.cause).splitlines()
            raise ConfigError(f"corpus.path: cannot be read: {first}") from error
        raise
    tokenized = [TokenizedFile.from_dict(json.loads(row["file"])) for row in written]
    tokenized.sort(key=lambda file: file.first_id)
    write_json(done, [asdict(file) for file in tokenized])
    return tokenized


def score_shards(job: Job, run: RunDir, folder: Path, plan: ScoringPlan, tokenized: Sequence[TokenizedFile]) -> None:
    """Score every shard without log-probs."""
    (folder / "logprobs").mkdir(exist_ok=True)
    shards = [shard for file in tokenized for shard in file.shards]
    missing = [s for s in shards if not logprobs_path(folder, s.file, s.row_group, s.scorer).exists()]
    if len(missing) < len(shards):
        text = f"{len(shards) - len(missing)} of {len(shards)} shards were scored before"
        run.event("score", "resumed", text)
        log.info("score: %s", text)
    num_rejected = sum(file.num_rejected for file in tokenized)
    log_progress(job, run, run_scorers(job, folder, plan, missing), missing, num_rejected)
