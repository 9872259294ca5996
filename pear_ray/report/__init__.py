"""Stage `report`: one page, one text and one spreadsheet of everything a run measured.

Reads the files of the run directory and nothing else, and needs no Ray.

    RUN/report/index.html    SECTIONS: text, tables and figures, self-contained
    RUN/report/report.md     the tables of arms, for a terminal or a pull request
    RUN/report/report.csv    one row per checkpoint
"""

from __future__ import annotations

import csv
import io
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from pear_ray.config import TRAINING_STAGES, Job
from pear_ray.report import diagnostics, results
from pear_ray.report.elements import Section, clock
from pear_ray.report.load import RunData, load_run
from pear_ray.run import RunDir, atomic_folder

WIDTH = 100
NOT_IN_SPREADSHEET = ("path", "pass_at_k", "pass_at_k_curve", "parts", "kl_from_start")
# By name in page.html.j2. A section without rows is listed as missing.
SECTIONS: dict[Callable[[RunData], Section], str] = {
    results.study: "",
    results.arms: "pass@k of the checkpoints (no evaluate/scorecard.json)",
    results.differences: "paired differences between arms (none in evaluate/scorecard.json)",
    results.ranking: "ranking (no rank/ranking.json)",
    results.learning: "learning curves (no rows of sft, rl or cooperate in metrics.jsonl)",
    diagnostics.weights: "importance weights (no arm has weighted SFT steps)",
    results.answers: "answers (no evaluate/scorecard.json)",
    diagnostics.scores: "behavior log-probs (stage score has not run in this folder)",
    diagnostics.parity: "engine/trainer parity (no rows of rl or cooperate in metrics.jsonl)",
    diagnostics.seconds: "time (no stage in manifest.json)",
    diagnostics.events: "events (none recorded)",
}


def run(job: Job, run: RunDir) -> dict[str, Any]:
    """Write index.html, report.md and report.csv into RUN/report."""
    data = load_run(job, run.folder)
    sections = {function.__name__: function(data) for function in SECTIONS}
    shown = {name: section for name, section in sections.items() if any(table.rows for table in section.tables)}
    missing = [text for function, text in SECTIONS.items() if text and function.__name__ not in shown]
    with atomic_folder(run.folder / "report") as folder:
        (folder / "index.html").write_text(page(data, shown, missing))
        (folder / "report.md").write_text(markdown(data, sections, missing))
        (folder / "report.csv").write_text(spreadsheet(data))
    return {"page": str(run.folder / "report" / "index.html")}


def page(data: RunData, sections: dict[str, Section], missing: list[str]) -> str:
    """Return the page. It loads nothing from the network."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(Path(__file__).with_name("page.html.j2").read_text()).render(
        run=data.folders[0],
        job=data.job,
        conclusion=results.conclusion(data),
        caution=results.caution(data),
        missing=missing,
        sections=sections,
        written=clock(time.time()),
    )


def markdown(data: RunData, sections: dict[str, Section], missing: list[str]) -> str:
    """Return conclusion and main tables; the table of arms comes first."""
    names = ("study" if data.study else "arms", "differences")
    tables = [table for name in names for table in sections[name].tables if table.rows]
    if any(arm.rows for arm in data.arms):
        tables.append(results.training(data))
    texts = [results.conclusion(data), results.caution(data)]
    texts += [f"Not in this run: {'; '.join(missing)}."] if missing else []
    blocks = [table.markdown() for table in tables]
    blocks[1:1] = [textwrap.fill(text, WIDTH) + "\n" for text in texts]
    return "\n".join(blocks)


def spreadsheet(data: RunData) -> str:
    """Return one row per checkpoint, evaluated or only trained; unknown cells are empty."""
    trained = {f"{a.prefix}{s}": (a, s) for a in data.arms for s in TRAINING_STAGES if a.of(s)}
    rows = []
    for label in dict.fromkeys([*data.cards, *trained]):
        row: dict[str, Any] = {"checkpoint": label}
        if label in trained:
            arm, stage = trained[label]
            seconds = arm.manifest.get("stages", {}).get(stage, {}).get("seconds")
            row |= {"arm": arm.name, "stage": stage, "steps": len(arm.of(stage)), "seconds": seconds}
        card = data.cards.get(label, {})
        for k, score in card.get("pass_at_k", {}).items():
            row[f"pass_at_{k}"] = score["value"]
            row |= {f"pass_at_{k}_{end}": score[end] for end in ("low", "high")}
        row |= {key: value for key, value in card.items() if key not in NOT_IN_SPREADSHEET}
        if divergence := card.get("kl_from_start"):
            row["kl_from_start"] = divergence["value"]
        rows.append(row | card.get("parts", {}))
    header = dict.fromkeys(["checkpoint", "arm", "stage", "steps", "seconds", *(key for row in rows for key in row)])
    file = io.StringIO()
    writer = csv.DictWriter(file, list(header), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
