"""Log-probability of every response token under the policy that wrote it.

Ray Data reads the corpus and tokenises it once; vLLM actors score the rows of each source under
that source's model. Unusable rows go to rejected.jsonl with the reason.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data.expressions import col, lit

from pear_ray.actors.cluster import connect
from pear_ray.actors.scorer import Scorer, Tokenise
from pear_ray.config import BadInput, Job
from pear_ray.engines.generator import same_architecture
from pear_ray.engines.tokenizer import digests, load_tokenizer
from pear_ray.manifest import Run
from pear_ray.tracking import Tracker

log = logging.getLogger(__name__)

ROWS_PER_BATCH = 1024


def run(job: Job, run: Run) -> dict[str, Any]:
    """Score the corpus into RUN/scored."""
    check_one_tokenizer(job)
    connect()
    # Its plans fill the log of a job. Its progress bars are in a terminal and on the dashboard.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    tokenised = tokenise(job, run).materialize()
    num_rows = tokenised.count()
    if num_rows == 0:
        raise BadInput(f"corpus: {corpus_path(job, run)} holds no rows; expected at least one")
    rejected = tokenised.filter(expr=col("reason") != lit("")).take_all()
    refuse_too_many(job, corpus_path(job, run), rejected, num_rows)
    with run.new_folder("scored") as folder:
        for sources in sharing_engines(job):
            score(job, tokenised, sources, folder)
        with (folder / "rejected.jsonl").open("w") as file:
            for row in rejected:
                file.write(json.dumps({k: row[k] for k in ("example_id", "reason")}) + "\n")
        facts = {"rows": num_rows, "rejected": len(rejected), "sources": measured(folder)}
    with closing(Tracker(run.folder, "score", job.tracking).rewind(0)) as tracker:
        for number, (source, numbers) in enumerate(facts["sources"].items()):
            tracker.log(number, source=source, rejected=len(rejected), **numbers)
            log.info("score: %s: %s", source, in_words(numbers))
    return facts


def tokenise(job: Job, run: Run) -> ray.data.Dataset:
    """Every row of the corpus as token ids, or with the reason why it is no use."""
    rows_to_ids = Tokenise(
        job.model_path(),
        frozenset(job.behaviour),
        job.generator.max_model_len,
        job.corpus.heldout_fraction,
    )
    corpus = read_corpus(job, run)
    return corpus.map_batches(rows_to_ids, batch_size=ROWS_PER_BATCH, batch_format="pyarrow")


def sharing_engines(job: Job) -> list[dict[str, str]]:
    """Model of each source, apart by architecture: an engine that serves one model of several
    loads the others' weights sooner than another engine starts."""
    shared: list[dict[str, str]] = []
    for source in sorted(job.behaviour):
        path = job.model_path(source)
        for models in shared:
            if same_architecture(next(iter(models.values())), path):
                models[source] = path
                break
        else:
            shared.append({source: path})
    return shared


def score(job: Job, tokenised: ray.data.Dataset, models: dict[str, str], folder: Path) -> None:
    """Score the usable rows of these sources into Parquet files, sorted by source and id."""
    usable = (col("reason") == lit("")) & col("source").is_in(list(models))
    scored = (
        tokenised.filter(expr=usable)
        .sort(["source", "example_id"])
        .map_batches(
            Scorer,
            fn_constructor_args=(models, job.model.dtype, job.generator, job.run.seed),
            batch_format="pyarrow",
            batch_size=ROWS_PER_BATCH,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=job.generator.replicas),
            num_cpus=job.generator.num_cpus,
            num_gpus=job.generator.num_actor_gpus,
        )
    )
    scored.write_parquet(str(folder))


def measured(folder: Path) -> dict[str, dict[str, Any]]:
    """What was written of each source: rows, response tokens, and the largest difference to
    log-probs that rows brought along."""
    files = [str(file) for file in folder.glob("*.parquet")]
    if not files:
        return {}
    table = pq.ParquetDataset(files).read(columns=["source", "response_ids", "recorded_gap"])
    lengths = pc.list_value_length(table.column("response_ids"))
    table = table.append_column("response_tokens", lengths).group_by("source")
    totals = table.aggregate(
        [([], "count_all"), ("response_tokens", "sum"), ("recorded_gap", "max")]
    ).sort_by("source")
    return {
        row["source"]: {
            "rows": row["count_all"],
            "response_tokens": row["response_tokens_sum"],
            "recorded_gap_max": row["recorded_gap_max"],
        }
        for row in totals.to_pylist()
    }


def in_words(numbers: dict[str, Any]) -> str:
    """What was measured of one source, on one line."""
    gap = numbers["recorded_gap_max"]
    beside = "" if gap is None else f", at most {gap:.1e} nats from the recorded log-probs"
    return f"{numbers['rows']} rows, {numbers['response_tokens']} response tokens{beside}"


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
            # Each of Ray Data's readers of file footers is a process; it starts eight for one file.
            os.environ["RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"] = str(min(8, len(parquet)))
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
