"""Log-probability of every response token under the policy that wrote it.

Ray Data reads the corpus and tokenises it once; vLLM actors score the rows of each source under
that source's model. Unusable rows go to rejected.jsonl with the reason.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import ray
import ray.data
from ray.data.expressions import col, lit

from pear_ray.actors.cluster import connect
from pear_ray.actors.scorer import Scorer, Tokenise
from pear_ray.algorithms.seeds import seed_of
from pear_ray.config import BadInput, Job
from pear_ray.engines.model import digests, load_tokenizer
from pear_ray.manifest import Run
from pear_ray.records import SCORED_SCHEMA
from pear_ray.tracking import Tracker

log = logging.getLogger(__name__)

ROWS_PER_BATCH = 1024


def run(job: Job, run: Run) -> dict[str, Any]:
    """Score the corpus into RUN/scored."""
    check_one_tokenizer(job)
    connect()
    # A log of a job is no place for moving bars; the dashboard has Ray Data's own.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    corpus = read_corpus(job, run)
    tokenised = corpus.map_batches(
        Tokenise,
        fn_constructor_args=(
            job.model_path(),
            frozenset(job.behaviour),
            job.generator.max_model_len,
            job.corpus.heldout_fraction,
        ),
        batch_format="pyarrow",
        num_cpus=min(1.0, job.generator.num_cpus),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=job.generator.replicas),
    ).materialize()
    num_rows = tokenised.count()
    if num_rows == 0:
        raise BadInput(f"corpus: {corpus_path(job, run)} holds no rows; expected at least one")
    rejected = tokenised.filter(expr=col("reason") != lit("")).take_all()
    refuse_too_many(job, corpus_path(job, run), rejected, num_rows)
    usable = tokenised.filter(expr=col("reason") == lit(""))
    tracker = Tracker(run.folder, "score", job.tracking).rewind(0)
    facts: dict[str, Any] = {"rows": num_rows, "rejected": len(rejected), "sources": {}}
    with run.new_folder("scored") as folder:
        for number, source in enumerate(sorted(job.behaviour)):
            numbers = score_source(job, usable, source, folder)
            if numbers:
                tracker.log(number, source=source, rejected=len(rejected), **numbers)
                facts["sources"][source] = numbers
        with (folder / "rejected.jsonl").open("w") as file:
            for row in rejected:
                file.write(json.dumps({k: row[k] for k in ("example_id", "reason")}) + "\n")
    tracker.close()
    return facts


def score_source(job: Job, usable: ray.data.Dataset, source: str, folder: Path) -> dict[str, Any]:
    """Score the rows of one source, sorted by example_id, into Parquet files."""
    rows = usable.filter(expr=col("source") == lit(source)).materialize()
    if rows.count() == 0:
        return {}
    started = time.time()
    seed = seed_of(job.run.seed, "score", source)
    scored = rows.map_batches(
        Scorer,
        fn_constructor_args=(job.model_path(source), job.model.dtype, job.generator, seed),
        batch_format="pyarrow",
        batch_size=ROWS_PER_BATCH,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=job.generator.replicas),
        num_cpus=job.generator.num_cpus,
        num_gpus=job.generator.num_actor_gpus,
    ).materialize()
    seconds = round(time.time() - started, 3)
    gaps: list[float] = []
    num_tokens = 0
    small = scored.select_columns(["recorded_gap", "num_response_tokens"])
    for batch in small.iter_batches(batch_format="pyarrow"):
        num_tokens += pc.sum(batch.column("num_response_tokens")).as_py()
        gaps += [gap for gap in [pc.max(batch.column("recorded_gap")).as_py()] if gap is not None]
    gap = max(gaps, default=None)
    facts = {
        "rows": scored.count(),
        "response_tokens": num_tokens,
        "seconds": seconds,
        "recorded_gap_max": gap,
    }
    scored.sort("example_id").select_columns(SCORED_SCHEMA.names).write_parquet(str(folder))
    log.info("score: %s: %d rows, largest gap to recorded log-probs %s", source, facts["rows"], gap)
    return facts


def corpus_path(job: Job, run: Run) -> Path:
    """Where the Example rows are."""
    return Path(job.corpus.path).absolute() if job.corpus.path else run.folder / "sample"


def read_corpus(job: Job, run: Run) -> ray.data.Dataset:
    """The corpus as a Ray Dataset.

    Raises:
        BadInput: the file cannot be read, or has no `messages`, `source` or `example_id`.
    """
    path = corpus_path(job, run)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    parquet = [str(file) for file in files if file.suffix == ".parquet"]
    lines = [str(file) for file in files if file.suffix in (".jsonl", ".json")]
    if not parquet and not lines:
        raise BadInput(f"corpus.path: {path} holds no .parquet or .jsonl file; expected one")
    try:
        if parquet:
            corpus = ray.data.read_parquet(parquet)
        else:
            corpus = ray.data.read_json(lines, lines=True)
        columns = corpus.columns()
    except (OSError, ValueError, ray.exceptions.RayError) as error:
        raise BadInput(f"corpus.path: {path} cannot be read: {error}") from error
    missing = {"example_id", "messages", "source"} - set(columns or ())
    if columns and missing:
        raise BadInput(
            f"corpus.path: {path} has columns {sorted(columns)}; expected also {sorted(missing)}"
        )
    return corpus


def refuse_too_many(job: Job, path: Path, rejected: list[dict[str, Any]], num_rows: int) -> None:
    """Stop, with nothing written, when more rows are unusable than the job allows."""
    allowed = job.corpus.max_rejected_fraction
    if len(rejected) > allowed * num_rows:
        first = rejected[0]
        raise BadInput(
            f"{path}: row {first['example_id']!r}: {first['reason']}\n"
            f"{len(rejected)} of {num_rows} rows are unusable; expected at most a share of"
            f" corpus.max_rejected_fraction = {allowed}"
        )


def check_one_tokenizer(job: Job) -> None:
    """Refuse behaviour policies whose ids or template are not the student's: a token ratio
    compares two probabilities of the SAME token."""
    ours = digests(load_tokenizer(job.model_path()))
    for source in job.behaviour:
        if digests(load_tokenizer(job.model_path(source))) != ours:
            raise BadInput(
                f"behaviour.{source}: {job.model_path(source)} has another vocabulary or chat"
                f" template than {job.model_path()}; expected the same, since PEAR divides the"
                " probabilities of one token under both models"
            )
