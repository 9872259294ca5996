"""Tokenized rows and their log-probs, put together file by file into what `sft` reads."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pear_ray.records import SCORED_SCHEMA
from pear_ray.score.shards import ScoringPlan, arrays, logprobs_file


class MergeLogprobs:
    """Maps {file, number} to {facts}, JSON of what `Figures` counts. `facts_of_scorer` gives, by
    scorer, the columns that are the same in all its rows."""

    def __init__(
        self,
        folder: Path,
        selection: ScoringPlan,
        facts_of_scorer: Mapping[str, Mapping[str, str]],
    ) -> None:
        self._folder = folder
        self._selection = selection
        self._facts_of_scorer = facts_of_scorer

    def __call__(self, item: dict[str, Any]) -> dict[str, str]:
        """Write scored/part-NUMBER.parquet, rejected/NUMBER.jsonl and probe/NUMBER.parquet."""
        number, figures = f"{item['number']:06d}", ScoreStats()
        tokenized = pq.ParquetFile(self._folder / "tokenized" / f"{item['file']}.parquet")
        with (
            pq.ParquetWriter(
                self._folder / "scored" / f"part-{number}.parquet", SCORED_SCHEMA
            ) as scored,
            pq.ParquetWriter(self._folder / "probe" / f"{number}.parquet", SCORED_SCHEMA) as probe,
            (self._folder / "rejected" / f"{number}.jsonl").open("w") as rejected,
        ):
            for group in range(tokenized.num_row_groups):
                table = tokenized.read_row_group(group)
                answers, reasons = self._answers(item["file"], group, table)
                names = table.column("example_id").to_pylist()
                for name, reason in zip(names, reasons, strict=True):
                    if reason:
                        rejected.write(json.dumps({"example_id": name, "reason": reason}) + "\n")
                kept = pa.array([not reason for reason in reasons], pa.bool_())
                given = [answer for answer in answers if answer is not None]
                rows = self._scored(table.filter(kept), given)
                figures.num_rejected += len(answers) - len(given)
                figures.add(rows, [answer.get("gaps") for answer in given])
                scored.write_table(rows)
                probe.write_table(rows.filter(pa.array(self._selection.probed(table.filter(kept)))))
        return {"facts": json.dumps(figures.document())}

    def _answers(
        self, file: str, group: int, table: pa.Table
    ) -> tuple[list[dict[str, Any] | None], list[str]]:
        """Log-probs of each row with their origin, or None with the reason."""
        reasons = self._selection.reasons(table)
        computed: dict[int, dict[str, Any]] = {}
        for scorer in table.column("scorer").unique().drop_null().to_pylist():
            path = logprobs_file(self._folder, file, group, scorer)
            if path.exists():
                computed |= read_logprobs(path)
        recorded = arrays(table.column("recorded_logprobs"))
        trainable = arrays(table.column("trainable"))
        sources, scorers = (table.column(name).to_pylist() for name in ("source", "scorer"))
        answers: list[dict[str, Any] | None] = [None] * table.num_rows
        for i in range(table.num_rows):
            if reasons[i]:
                continue
            ours, theirs = computed.get(i), recorded[i]
            if ours is not None and not np.isfinite(ours["behavior_logprobs"]).all():
                reasons[i] = (
                    f"behavior_logprobs: the model of {scorers[i]!r} gave a NaN or infinity;"
                    " expected finite log-probs"
                )
            elif ours is not None:
                origin = "behavior" if sources[i] == scorers[i] else "reference"
                gaps = None
                if theirs is not None:
                    own = ... if trainable[i] is None else trainable[i]
                    gaps = np.abs(theirs - ours["behavior_logprobs"])[own]
                answers[i] = ours | {"logprobs_from": origin, "gaps": gaps}
            elif theirs is not None:
                answers[i] = {"behavior_logprobs": theirs, "logprobs_from": "recorded"}
            else:
                raise RuntimeError(f"{file}: row {i} of part {group} was never scored")
        return answers, reasons

    def _scored(self, rows: pa.Table, answers: list[dict[str, Any]]) -> pa.Table:
        """ScoredExample rows of usable rows."""
        constant = [self._facts_of_scorer[scorer] for scorer in rows.column("scorer").to_pylist()]
        gaps = [answer.get("gaps") for answer in answers]
        made: dict[str, list[Any]] = {
            "recorded_gap": [None if gap is None else float(gap.max()) for gap in gaps],
            **{
                name: [answer.get(name) for answer in answers]
                for name in ("behavior_logprobs", "logprobs_from", "top_ids", "top_logprobs")
            },
            **{
                name: [facts[name] for facts in constant]
                for name in ("behavior_model", "tokenizer_digest", "template_digest")
            },
        }
        columns = [
            pa.array(made[field.name], field.type)
            if field.name in made
            else rows.column(field.name)
            for field in SCORED_SCHEMA
        ]
        return pa.table(columns, schema=SCORED_SCHEMA)


class ScoreStats:
    """What became of rows: how many were rejected; and of each source rows, response tokens, rows
    by the origin of their log-probs, rows cut short, and differences to recorded log-probs."""

    def __init__(self) -> None:
        self.num_rejected = 0
        self._sums: dict[str, Counter[Any]] = defaultdict(Counter)
        self._largest: dict[str, float] = {}

    def add(self, rows: pa.Table, gaps: list[np.ndarray | None]) -> None:
        """Count these rows; `gaps` are the absolute differences of each, where there are any."""
        names = ("source", "logprobs_from", "truncated")
        facts = zip(*(rows.column(name).to_pylist() for name in names), strict=True)
        lengths = pc.list_value_length(rows.column("behavior_logprobs")).to_pylist()
        for (source, origin, truncated), length, gap in zip(facts, lengths, gaps, strict=True):
            sums = self._sums[source]
            sums.update({"rows": 1, "response_tokens": length, "truncated": int(truncated)})
            sums[f"from_{origin}"] += 1
            if gap is not None:
                sums.update({"gap_sum": float(gap.sum()), "gap_tokens": len(gap)})
                self._largest[source] = max(float(gap.max()), self._largest.get(source, 0.0))

    def merge(self, document: Mapping[str, Any]) -> None:
        """Add what another one counted."""
        self.num_rejected += document["num_rejected"]
        for source, sums in document["sums"].items():
            self._sums[source].update(sums)
        for source, gap in document["largest"].items():
            self._largest[source] = max(gap, self._largest.get(source, 0.0))

    def document(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {"num_rejected": self.num_rejected, "sums": self._sums, "largest": self._largest}

    def by_source(self) -> dict[str, dict[str, Any]]:
        """The figures of each source."""
        return {
            source: {
                "rows": sums["rows"],
                "response_tokens": sums["response_tokens"],
                "truncated": sums["truncated"],
                **{name: count for name, count in sorted(sums.items()) if name.startswith("from_")},
                "recorded_gap_mean": (
                    sums["gap_sum"] / sums["gap_tokens"] if sums["gap_tokens"] else None
                ),
                "recorded_gap_max": self._largest.get(source),
            }
            for source, sums in sorted(self._sums.items())
        }


def read_logprobs(path: Path) -> dict[int, dict[str, Any]]:
    """What the engine said of the rows of a part, by their number in it."""
    table = pq.read_table(path)
    columns = zip(
        *(arrays(table.column(name)) for name in ("logprobs", "top_ids", "top_logprobs")),
        strict=True,
    )
    return {
        row: {"behavior_logprobs": logprobs, "top_ids": ids, "top_logprobs": top}
        for row, (logprobs, ids, top) in zip(table.column("row").to_pylist(), columns, strict=True)
    }
