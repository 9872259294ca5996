"""Tokenized rows and their log-probs merged, file by file, into the scored dataset, and checks of the result."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from pear_ray.config import Job
from pear_ray.errors import ConfigError, require
from pear_ray.records import SCORED_SCHEMA
from pear_ray.score.shards import MAX_TASKS, ScoringPlan, TokenizedFile, logprobs_path, tokenized_path


@dataclass(frozen=True)
class RowLogprobs:
    """Log-probs of one row, and the columns of the scored dataset that describe them. `gaps` are the absolute
    differences to the recorded log-probs of the trainable tokens, in nats, if the row has both; top_ids and
    top_logprobs are flat."""

    behavior_logprobs: np.ndarray
    logprobs_from: str = "recorded"
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    gaps: np.ndarray | None = None


@dataclass(frozen=True)
class MergeLogprobs:
    """Maps {number, name} of a tokenized file to {stats}, JSON of `ScoreStats`. Writes scored/part-NUMBER.parquet,
    rejected/NUMBER.jsonl and probe/NUMBER.parquet. `models` are the behavior models by scorer, `digests` those of
    tokenizer and chat template."""

    folder: Path
    plan: ScoringPlan
    models: Mapping[str, str]
    digests: tuple[str, str]

    def __call__(self, file: dict[str, Any]) -> dict[str, str]:
        """Merge one file."""
        number, stats = f"{file['number']:06d}", ScoreStats()
        tokenized = pq.ParquetFile(tokenized_path(self.folder, file["name"]))
        with (
            pq.ParquetWriter(self.folder / f"scored/part-{number}.parquet", SCORED_SCHEMA) as scored,
            pq.ParquetWriter(self.folder / f"probe/{number}.parquet", SCORED_SCHEMA) as probe,
            (self.folder / f"rejected/{number}.jsonl").open("w") as rejected,
        ):
            for group in range(tokenized.num_row_groups):
                table = tokenized.read_row_group(group)
                results = self._results(file["name"], group, table)
                names = table.column("example_id").to_pylist()
                for name, result in zip(names, results, strict=True):
                    if isinstance(result, str):
                        rejected.write(json.dumps({"example_id": name, "reason": result}) + "\n")
                logprobs = [result for result in results if isinstance(result, RowLogprobs)]
                usable = table.filter(pa.array([not isinstance(result, str) for result in results], pa.bool_()))
                rows = self._scored_rows(usable, logprobs)
                stats.num_rejected += len(results) - len(logprobs)
                stats.add_rows(rows, logprobs)
                scored.write_table(rows)
                probe.write_table(rows.filter(pa.array(self.plan.in_probe(usable))))
        return {"stats": json.dumps(vars(stats))}

    def _results(self, name: str, group: int, table: pa.Table) -> list[RowLogprobs | str]:
        """Return the log-probs of each row of a row group, or why it is rejected."""
        computed: dict[int, RowLogprobs] = {}
        for scorer in table.column("scorer").unique().drop_null().to_pylist():
            path = logprobs_path(self.folder, name, group, scorer)
            if path.exists():
                stored = pq.read_table(path)
                columns = (stored.column(name).to_numpy() for name in ("logprobs", "top_ids", "top_logprobs"))
                for row, logprobs, ids, top in zip(stored.column("row").to_pylist(), *columns, strict=True):
                    computed[row] = RowLogprobs(logprobs, top_ids=ids, top_logprobs=top)
        recorded, trainable = (table.column(column).to_numpy() for column in ("recorded_logprobs", "trainable"))
        sources, scorers = (table.column(column).to_pylist() for column in ("source", "scorer"))
        results: list[RowLogprobs | str] = []
        for i, reason in enumerate(self.plan.reject_reasons(table)):
            if reason:
                results.append(reason)
            elif i not in computed and recorded[i] is None:
                raise RuntimeError(f"{name}: row {i} of row group {group} was never scored")
            elif i not in computed:
                results.append(RowLogprobs(recorded[i]))
            elif not np.isfinite(computed[i].behavior_logprobs).all():
                expected = "behavior_logprobs: expected finite log-probs"
                results.append(f"{expected}, got NaN or infinity from the model of {scorers[i]!r}")
            else:
                origin = "behavior" if sources[i] == scorers[i] else "reference"
                gaps = None
                if recorded[i] is not None:
                    is_own = ... if trainable[i] is None else trainable[i]
                    gaps = np.abs(recorded[i] - computed[i].behavior_logprobs)[is_own]
                results.append(replace(computed[i], logprobs_from=origin, gaps=gaps))
        return results

    def _scored_rows(self, rows: pa.Table, logprobs: list[RowLogprobs]) -> pa.Table:
        """Return ScoredExample rows of usable tokenized rows."""
        names = ("behavior_logprobs", "logprobs_from", "top_ids", "top_logprobs")
        new: dict[str, list[Any]] = {name: [getattr(row, name) for row in logprobs] for name in names}
        new["recorded_gap"] = [None if row.gaps is None else float(row.gaps.max()) for row in logprobs]
        new["behavior_model"] = [self.models[scorer] for scorer in rows.column("scorer").to_pylist()]
        for name, digest in zip(("tokenizer_digest", "template_digest"), self.digests, strict=True):
            new[name] = [digest] * rows.num_rows
        columns = [
            pa.array(new[column.name], column.type) if column.name in new else rows.column(column.name)
            for column in SCORED_SCHEMA
        ]
        return pa.table(columns, schema=SCORED_SCHEMA)


@dataclass
class ScoreStats:
    """Number of rejected rows, and by source: sums over the scored rows and the largest gap to recorded log-probs."""

    num_rejected: int = 0
    sums: dict[str, Counter[Any]] = field(default_factory=lambda: defaultdict(Counter))
    max_gaps: dict[str, float] = field(default_factory=dict)

    def add_rows(self, rows: pa.Table, logprobs: list[RowLogprobs]) -> None:
        """Count scored rows with their log-probs."""
        columns = (rows.column(name).to_pylist() for name in ("source", "truncated"))
        for source, truncated, row in zip(*columns, logprobs, strict=True):
            sums, num_tokens = self.sums[source], len(row.behavior_logprobs)
            sums.update({"rows": 1, "response_tokens": num_tokens, "truncated": int(truncated)})
            sums[f"from_{row.logprobs_from}"] += 1
            if row.gaps is not None:
                sums.update({"gap_sum": float(row.gaps.sum()), "gap_tokens": len(row.gaps)})
                self.max_gaps[source] = max(float(row.gaps.max()), self.max_gaps.get(source, 0.0))

    def merge(self, document: Mapping[str, Any]) -> None:
        """Add the statistics of another file, as JSON has them."""
        self.num_rejected += document["num_rejected"]
        for source, sums in document["sums"].items():
            self.sums[source].update(sums)
        for source, gap in document["max_gaps"].items():
            self.max_gaps[source] = max(gap, self.max_gaps.get(source, 0.0))

    def by_source(self) -> dict[str, dict[str, Any]]:
        """Return counts and gaps of each source, as facts.json has them."""
        return {
            source: {
                **{name: sums[name] for name in ("rows", "response_tokens", "truncated")},
                **{name: count for name, count in sorted(sums.items()) if name.startswith("from_")},
                "recorded_gap_mean": sums["gap_sum"] / sums["gap_tokens"] if sums["gap_tokens"] else None,
                "recorded_gap_max": self.max_gaps.get(source),
            }
            for source, sums in sorted(self.sums.items())
        }


def merged_rejects(folder: Path) -> Iterator[dict[str, str]]:
    """Yield example_id and reason of all rejected rows, in order."""
    for path in sorted((folder / "rejected").glob("*.jsonl")):
        with path.open() as lines:
            yield from map(json.loads, lines)


def merge_files(
    job: Job, folder: Path, plan: ScoringPlan, tokenized: Sequence[TokenizedFile], digests: tuple[str, str]
) -> ScoreStats:
    """Merge token ids and log-probs, file by file; return the statistics of all rows."""
    for name in ("scored", "rejected", "probe"):
        (folder / name).mkdir(exist_ok=True)
    models = {source: job.model_path(source) for source in job.behavior}
    items = [{"number": number, "name": file.name} for number, file in enumerate(tokenized)]
    merged = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_TASKS)).map(
        MergeLogprobs(folder, plan, models, digests)
    )
    stats = ScoreStats()
    for row in merged.iter_rows():
        stats.merge(json.loads(row["stats"]))
    return stats


def check_rejected(job: Job, path: str, num_rejected: int, num_rows: int, rejected: Iterator[dict[str, str]]) -> None:
    """Raise ConfigError, with the first reason, if too many rows are rejected."""
    limit = job.corpus.max_rejected_fraction
    if num_rejected > limit * num_rows:
        first = next(rejected)
        raise ConfigError(
            f"{path}: row {first['example_id']!r}: {first['reason']}\ncorpus.max_rejected_fraction: expected at most"
            f" {limit} of the rows rejected, got {num_rejected} of {num_rows}"
        )


def check_recorded_logprobs(job: Job, stats: ScoreStats) -> None:
    """Raise ConfigError if recorded log-probs are not those of the source's model."""
    limit = job.corpus.max_logprob_gap
    within = f"within corpus.max_logprob_gap = {limit} nats per token"
    for source, numbers in stats.by_source().items():
        gap = numbers["recorded_gap_mean"]
        if gap is not None:
            expected = f"log-probs of {job.model_path(source)} for source {source!r} {within}"
            got = f'a gap of {gap:.3g} (or set corpus.recorded_logprobs = "ignore" to compute them)'
            require(gap <= limit, job.corpus.columns.behavior_logprobs, expected, got)


def compare_with_trainer(job: Job, folder: Path) -> dict[str, dict[str, float]]:
    """Return the gaps between trainer and engine on the probe, by source. Raise ConfigError if the two disagree: PEAR
    ratios would consist of that error."""
    settings, limit = job.generator, job.corpus.max_logprob_gap
    within = f"within corpus.max_logprob_gap = {limit} nats per token"
    task = measure_trainer_gap.options(
        num_cpus=settings.num_cpus, num_gpus=-(-settings.num_gpus // 1), label_selector=job.placement.generators
    )
    pending = {source: task.remote(job, folder / "probe", job.model_path(source)) for source in job.behavior}
    gaps = {source: ray.get(gap, timeout=settings.timeout_seconds) for source, gap in pending.items()}
    for source, gap in gaps.items():
        if gap["rows"]:
            expected = f"engine and trainer log-probs of {job.model_path(source)} {within}"
            got = f"a gap of {gap['mean_gap']:.3g} on {gap['rows']} rows"
            require(gap["mean_gap"] <= limit, f"behavior.{source}", expected, got)
    return gaps


@ray.remote
def measure_trainer_gap(job: Job, folder: Path, model: str) -> dict[str, float]:
    """Return trainer minus engine log-probs of one model's rows in the probe, in nats per trainable token: `bias` is
    the mean, `spread` the standard deviation; the gaps are absolute. Counts alone if there are no rows."""
    from pear_ray.train.model import trainer_logprobs

    table = pq.ParquetDataset(sorted(map(str, folder.glob("*.parquet")))).read()
    rows = table.filter(pc.equal(table.column("behavior_model"), model)).to_pylist()
    if not rows:
        return {"rows": 0, "tokens": 0}
    ids = [(row["prompt_ids"], row["response_ids"]) for row in rows]
    logprobs = trainer_logprobs(model, job.model.dtype, ids, job.learner.tokens_per_pack, job.generator.threads)
    differences = [
        (ours - np.asarray(row["behavior_logprobs"]))[row["trainable"] or ...]
        for ours, row in zip(logprobs, rows, strict=True)
    ]
    gaps = np.concatenate(differences).astype(np.float64)
    sizes = np.abs(gaps)
    figures = {"bias": gaps.mean(), "spread": gaps.std(), "mean_gap": sizes.mean(), "max_gap": sizes.max()}
    return {"rows": len(rows), "tokens": len(gaps), **{name: float(value) for name, value in figures.items()}}
