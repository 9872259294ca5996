"""Tokenized rows and their log-probs merged, file by file, into the scored dataset."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pear_ray.records import SCORED_SCHEMA
from pear_ray.score.shards import ScoringPlan, logprobs_path, tokenized_path


@dataclass(frozen=True)
class RowLogprobs:
    """Log-probs of one row, and the columns of the scored dataset that describe them.

    `gaps` are the absolute differences to the recorded log-probs of the trainable tokens, in nats, if the row has both;
    top_ids and top_logprobs are flat.
    """

    behavior_logprobs: np.ndarray
    logprobs_from: str = "recorded"
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    gaps: np.ndarray | None = None

    @property
    def recorded_gap(self) -> float | None:
        """Return the largest difference to the recorded log-probs."""
        return None if self.gaps is None else float(self.gaps.max())


class MergeLogprobs:
    """Maps {number, name} of a tokenized file to {stats}, JSON of `ScoreStats`.

    Writes scored/part-NUMBER.parquet, rejected/NUMBER.jsonl and probe/NUMBER.parquet. `models` are the behavior models
    by scorer, `digests` those of tokenizer and chat template.
    """

    def __init__(self, folder: Path, plan: ScoringPlan, models: Mapping[str, str], digests: tuple[str, str]) -> None:
        self._folder = folder
        self._plan = plan
        self._models = models
        self._digests = digests

    def __call__(self, file: dict[str, Any]) -> dict[str, str]:
        """Merge one file."""
        number, stats = f"{file['number']:06d}", ScoreStats()
        tokenized = pq.ParquetFile(tokenized_path(self._folder, file["name"]))
        with ExitStack() as stack:
            scored, probe = (
                stack.enter_context(pq.ParquetWriter(self._folder / path, SCORED_SCHEMA))
                for path in (f"scored/part-{number}.parquet", f"probe/{number}.parquet")
            )
            path = self._folder / "rejected" / f"{number}.jsonl"
            rejected = stack.enter_context(path.open("w"))
            for group in range(tokenized.num_row_groups):
                table = tokenized.read_row_group(group)
                results = self._results(file["name"], group, table)
                names = table.column("example_id").to_pylist()
                for name, result in zip(names, results, strict=True):
                    if isinstance(result, str):
                        rejected.write(json.dumps({"example_id": name, "reason": result}) + "\n")
                logprobs = [result for result in results if isinstance(result, RowLogprobs)]
                is_usable = [isinstance(result, RowLogprobs) for result in results]
                usable = table.filter(pa.array(is_usable, pa.bool_()))
                rows = self._scored_rows(usable, logprobs)
                stats.num_rejected += len(results) - len(logprobs)
                stats.add_rows(rows, logprobs)
                scored.write_table(rows)
                probe.write_table(rows.filter(pa.array(self._plan.in_probe(usable))))
        return {"stats": json.dumps(stats.to_dict())}

    def _results(self, name: str, group: int, table: pa.Table) -> list[RowLogprobs | str]:
        """Return the log-probs of each row of a row group, or why it is rejected."""
        computed: dict[int, RowLogprobs] = {}
        for scorer in table.column("scorer").unique().drop_null().to_pylist():
            path = logprobs_path(self._folder, name, group, scorer)
            if path.exists():
                computed |= read_logprobs(path)
        recorded, trainable = (table.column(column).to_numpy() for column in ("recorded_logprobs", "trainable"))
        sources, scorers = (table.column(column).to_pylist() for column in ("source", "scorer"))
        results: list[RowLogprobs | str] = []
        for i, reason in enumerate(self._plan.reject_reasons(table)):
            if reason:
                results.append(reason)
            elif i not in computed and recorded[i] is None:
                raise RuntimeError(f"{name}: row {i} of row group {group} was never scored")
            elif i not in computed:
                results.append(RowLogprobs(recorded[i]))
            elif not np.isfinite(computed[i].behavior_logprobs).all():
                results.append(
                    "behavior_logprobs: expected finite log-probs, got NaN or infinity from the"
                    f" model of {scorers[i]!r}"
                )
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
        new: dict[str, list[Any]] = {
            name: [getattr(row, name) for row in logprobs]
            for name in (
                "behavior_logprobs", "logprobs_from", "recorded_gap", "top_ids", "top_logprobs"
            )
        }  # fmt: skip
        new["behavior_model"] = [self._models[s] for s in rows.column("scorer").to_pylist()]
        new["tokenizer_digest"] = [self._digests[0]] * rows.num_rows
        new["template_digest"] = [self._digests[1]] * rows.num_rows
        columns = [
            pa.array(new[field.name], field.type) if field.name in new else rows.column(field.name)
            for field in SCORED_SCHEMA
        ]
        return pa.table(columns, schema=SCORED_SCHEMA)


class ScoreStats:
    """Statistics of scored rows by source, and the number of rejected rows; mergeable."""

    def __init__(self) -> None:
        self.num_rejected = 0
        self._sums: dict[str, Counter[Any]] = defaultdict(Counter)
        self._max_gaps: dict[str, float] = {}

    def add_rows(self, rows: pa.Table, logprobs: list[RowLogprobs]) -> None:
        """Count scored rows with their log-probs."""
        columns = (rows.column(name).to_pylist() for name in ("source", "truncated"))
        lengths = pc.list_value_length(rows.column("behavior_logprobs")).to_pylist()
        for source, truncated, length, row in zip(*columns, lengths, logprobs, strict=True):
            sums = self._sums[source]
            sums.update({"rows": 1, "response_tokens": length, "truncated": int(truncated)})
            sums[f"from_{row.logprobs_from}"] += 1
            if row.gaps is not None:
                sums.update({"gap_sum": float(row.gaps.sum()), "gap_tokens": len(row.gaps)})
                self._max_gaps[source] = max(float(row.gaps.max()), self._max_gaps.get(source, 0.0))

    def merge(self, document: Mapping[str, Any]) -> None:
        """Add the statistics of another `to_dict`."""
        self.num_rejected += document["num_rejected"]
        for source, sums in document["sums"].items():
            self._sums[source].update(sums)
        for source, gap in document["max_gaps"].items():
            self._max_gaps[source] = max(gap, self._max_gaps.get(source, 0.0))

    def to_dict(self) -> dict[str, Any]:
        """Return everything, JSON-compatible."""
        return {"num_rejected": self.num_rejected, "sums": self._sums, "max_gaps": self._max_gaps}

    def by_source(self) -> dict[str, dict[str, Any]]:
        """Return counts and gaps of each source, as facts.json has them."""
        return {
            source: {
                "rows": sums["rows"],
                "response_tokens": sums["response_tokens"],
                "truncated": sums["truncated"],
                **{name: count for name, count in sorted(sums.items()) if name.startswith("from_")},
                "recorded_gap_mean": (sums["gap_sum"] / sums["gap_tokens"] if sums["gap_tokens"] else None),
                "recorded_gap_max": self._max_gaps.get(source),
            }
            for source, sums in sorted(self._sums.items())
        }


def read_logprobs(path: Path) -> dict[int, RowLogprobs]:
    """Return the log-probs that an engine computed for a shard, by position in the row group."""
    table = pq.read_table(path)
    columns = (table.column(name).to_numpy() for name in ("logprobs", "top_ids", "top_logprobs"))
    return {
        row: RowLogprobs(logprobs, top_ids=ids, top_logprobs=top)
        for row, logprobs, ids, top in zip(table.column("row").to_pylist(), *columns, strict=True)
    }


def merged_rejects(folder: Path) -> Iterator[dict[str, str]]:
    """Yield example_id and reason of all rejected rows, in order."""
    for path in sorted((folder / "rejected").glob("*.jsonl")):
        with path.open() as lines:
            yield from map(json.loads, lines)
