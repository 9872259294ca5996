"""The page, the text and the spreadsheet of a report."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pear_ray import report
from pear_ray.config import Job
from pear_ray.errors import ConfigError
from pear_ray.report import results
from pear_ray.report.load import RunData, load_run
from pear_ray.report.results import caution, conclusion
from pear_ray.run import open_run
from tests.report.reported_run import (
    ARMS,
    HOSTILE,
    job_of,
    render,
    rl_rows,
    scorecard,
    sft_rows,
    write_lines,
    write_run,
)

Rendered = tuple[str, str, list[dict[str, str]]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """The report on a finished run."""
    return render(write_run(tmp_path_factory.mktemp("laptop")))


def with_scorecard(folder: Path, card: dict[str, Any]) -> RunData:
    """A finished run with another scorecard."""
    job = write_run(folder)
    (folder / "evaluate" / "scorecard.json").write_text(json.dumps(card))
    return load_run(job, folder)


class Page(HTMLParser):
    """Tags with their attributes, texts of headings, and whether tags are balanced."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(text)


def tables_of(markdown: str) -> list[list[list[str]]]:
    """Cells of every table, of which all lines have one width."""
    tables = []
    for block in markdown.strip().split("\n\n"):
        lines = block.split("\n")
        if lines[0].startswith("|"):
            assert re.fullmatch(r"(\| -+ )+\|", lines[1])
            assert len({len(line) for line in lines}) == 1
            cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
            tables.append([[cell.strip() for cell in row] for row in cells])
    return tables


def test_a_finished_run_has_every_section_in_order(whole: Rendered) -> None:
    page = whole[0]
    assert Page(page).headings == [
        "Results by arm",
        "Differences between arms",
        "Which checkpoint should RL start from?",
        "Learning curves",
        "Importance weights",
        "Answers",
        "Behavior log-probs",
        "Do engines and trainer agree?",
        "Time",
        "Events",
        "Job",
    ]
    assert "Not in this run" not in page
    assert "sft: sft.level = none; pear: sft.level = token." in page


def test_the_page_is_self_contained_and_accessible(whole: Rendered) -> None:
    page = Page(whole[0])
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
        if tag == "svg":
            assert attributes["role"] == "img"
            assert re.search(r" (from|at) -?\d", attributes["aria-label"])
    assert not re.search(r"url\((?!#)|@import", whole[0])
    assert "prefers-color-scheme: dark" in whole[0] and "@media print" in whole[0]


def test_text_of_the_run_is_escaped(tmp_path: Path) -> None:
    job = write_run(tmp_path)
    rows = sft_rows(True)
    for row in rows:
        row["first_weight_by_source"] = {HOSTILE: 0.5}
    write_lines(tmp_path / "arms" / "pear" / "metrics.jsonl", rows)
    page = render(job)[0]
    assert "<script" not in page and "<img" not in page
    assert page.count("&lt;script&gt;") >= 3
    assert Page(page).open == []


def test_unknown_values_are_shown_as_dashes(tmp_path: Path) -> None:
    job = write_run(tmp_path)
    rows = sft_rows(True, 5) + rl_rows(5)
    for row in rows:
        row |= {"entropy": None, "sample_seconds": None, "logprob_parity_max": None}
    write_lines(tmp_path / "arms" / "pear" / "metrics.jsonl", rows)
    (tmp_path / "arms" / "sft" / "metrics.jsonl").unlink()
    page, markdown, _ = render(job)
    text = re.sub(r"<style.*?</style>|<details.*?</details>|<[^>]*>", "", page, flags=re.S)
    labels = " ".join(re.findall(r'aria-label="([^"]*)"', page))
    for visible in (text, labels, markdown):
        assert not re.search(r"\b(nan|NaN|None|inf)\b", visible)
    assert 'd="' in page and not re.search(r' d="[^"]*nan', page)


@pytest.mark.parametrize(
    ("lead", "scores", "difference", "interval", "floor"),
    [
        (0.022, "pear 0.383, sft 0.361", "+0.022 [-0.008, +0.052]", "includes 0", "below"),
        (-0.05, "sft 0.361, pear 0.311", "+0.050 [+0.020, +0.080]", "excludes 0", "not below"),
        (0.0, "sft 0.361, pear 0.361", "-0.000 [-0.030, +0.030]", "includes 0", "below"),
    ],
)
def test_conclusion_states_interval_and_noise_floor(
    lead: float, scores: str, difference: str, interval: str, floor: str, tmp_path: Path
) -> None:
    data = with_scorecard(tmp_path, scorecard(lead=lead))
    text = conclusion(data)
    assert text.startswith(f"pass@1 after RL: {scores}.")
    for part in (difference, "256 problems", interval, f"is {floor} the noise floor of 0.040"):
        assert part in text
    assert "One seed (0) proves nothing" in caution(data)


def test_markdown_begins_with_the_table_of_arms_and_fits_a_terminal(whole: Rendered) -> None:
    markdown = whole[1]
    arms, differences, training = tables_of(markdown)
    assert markdown.startswith("| arm ")
    assert max(map(len, markdown.splitlines())) <= 110
    assert arms[0] == ["arm", "metric", "before RL", "after RL", "change"]
    assert [row[:2] for row in arms[2:5]] == [[a, "pass@1"] for a in ("base", *ARMS)]
    assert arms[4][2:] == ["0.240 [0.210, 0.270]", "0.383 [0.353, 0.413]", "+0.143"]
    assert differences[2] == [
        "pear/rl - sft/rl", "pass@1", "+0.022 [-0.008, +0.052]", "includes 0", "below",
    ]  # fmt: skip
    assert training[2][:2] == ["sft", "46"]


def test_spreadsheet_has_a_row_for_every_checkpoint(whole: Rendered) -> None:
    rows = whole[2]
    labels = ["base", "sft/sft", "sft/rl", "pear/sft", "pear/rl"]
    assert [row["checkpoint"] for row in rows] == labels
    assert float(rows[4]["pass_at_1"]) == pytest.approx(0.383)
    assert (rows[4]["arm"], rows[4]["stage"], rows[4]["steps"]) == ("pear", "rl", "32")
    assert rows[0]["arm"] == rows[0]["heldout_nll"] == ""


def test_a_paired_change_has_its_interval(tmp_path: Path) -> None:
    card = scorecard()
    paired = {"a": "pear/sft", "b": "pear/rl", "k": 1, "value": -0.143, "low": -0.17, "high": -0.12}
    card["differences"].append(paired)
    data = with_scorecard(tmp_path, card)
    sections = {"arms": results.arms(data), "differences": results.differences(data)}
    markdown = report.markdown(data, sections, [])
    assert "+0.143 [+0.120, +0.170]" in markdown
    assert "pear/sft - pear/rl" not in markdown


@pytest.fixture
def cooperating(tmp_path: Path) -> Job:
    """A finished run whose arm `pear` ends with `cooperate`."""
    document = write_run(tmp_path).model_dump()
    document["arms"][1]["cooperate"] = {"traces": "failed"}
    job = Job(**document | {"cooperate": {"method": "bridge"}})
    (tmp_path / "config.json").write_text(job.model_dump_json())
    rows = [
        row | {"stage": "cooperate", "sft_nll": 1.2 - 0.01 * row["step"], "cooperative_gain": 0.1} for row in rl_rows()
    ]
    write_lines(tmp_path / "arms" / "pear" / "metrics.jsonl", sft_rows(True) + rows)
    card = tmp_path / "evaluate" / "scorecard.json"
    card.write_text(card.read_text().replace("pear/rl", "pear/cooperate"))
    return job


def test_arms_with_rl_and_with_cooperate_are_compared(cooperating: Job) -> None:
    page, markdown, rows = render(cooperating)
    data = load_run(cooperating, cooperating.folder)
    assert [arm.last_stage for arm in data.arms] == ["rl", "cooperate"]
    text = conclusion(data)
    assert "pear 0.383, sft 0.361" in text and "pear - sft: +0.022" in text
    assert "sft.level = token, cooperate.method = bridge, cooperate.traces = failed" in page
    arms, differences, training = tables_of(markdown)
    assert [row[0] for row in arms[2:]] == ["base", *ARMS] * 2
    assert arms[4][2:] == ["0.240 [0.210, 0.270]", "0.383 [0.353, 0.413]", "+0.143"]
    assert differences[2][0] == "pear/cooperate - sft/rl"
    assert [row[3] for row in training[2:]] == ["32", "32"]
    assert [row["checkpoint"] for row in rows][-1] == "pear/cooperate"
    assert (rows[-1]["stage"], rows[-1]["steps"]) == ("cooperate", "32")
    assert "Not in this run" not in page
    arms_by_figure = {
        "RL: gain over the shadow model": ["pear"],
        "RL: negative log-likelihood of demonstrations": ["pear"],
        "RL: pass rate": ["sft", "pear"],
        "pass@k after RL": ["sft/rl", "pear/cooperate"],
    }
    for title, names in arms_by_figure.items():
        (label,) = re.findall(rf'aria-label="{title}, [^:]*: ([^"]*)"', page)
        assert [line.split()[0] for line in label.split("; ")] == names


def test_a_run_without_arms_is_its_own_arm(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", sft_rows(True) + rl_rows())
    card = scorecard(("x",))
    cards = {label.split("/")[-1]: entry for label, entry in card["checkpoints"].items()}
    (tmp_path / "evaluate").mkdir()
    card_file = tmp_path / "evaluate" / "scorecard.json"
    card_file.write_text(json.dumps(card | {"checkpoints": cards}))
    page, markdown, rows = render(job_of(tmp_path, ()))
    assert f"pass@1 after RL: {tmp_path.name} 0.361." in page
    assert len(tables_of(markdown)[0]) == 2 + 4
    assert [row["checkpoint"] for row in rows] == ["base", "sft", "rl"]


def test_missing_results_are_listed(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", sft_rows(False, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sft", "st')
    page, markdown, rows = render(job_of(tmp_path, ()))
    assert Page(page).headings == ["Learning curves", "Job"]
    (missing,) = re.findall(r"Not in this run: (.*)</p>", page)
    for result in ("scorecard.json", "weighted", "paired", "score has not run", "rows of rl"):
        assert result in missing
    assert "No checkpoint has been evaluated" in page
    assert tables_of(markdown)[0][2][:2] == [tmp_path.name, "3"]
    assert rows[0]["steps"] == "3"


def test_an_evaluation_before_rl_has_no_result_after_it(tmp_path: Path) -> None:
    card = scorecard() | {"differences": []}
    card["checkpoints"] = {k: v for k, v in card["checkpoints"].items() if not k.endswith("/rl")}
    text = conclusion(with_scorecard(tmp_path, card))
    assert text.startswith("No checkpoint has been evaluated after RL")


def test_answers_are_shown_for_the_problems_with_differing_grades(whole: Rendered) -> None:
    page = whole[0]
    for problem in (9, 10, 11):
        for label in ("base", "sft/sft", "pear/rl"):
            assert f"{label} {problem} 0<" in page
    assert "pear/rl 8 0<" not in page and "pear/rl 9 1<" not in page


def test_an_empty_run_directory_is_refused(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    message = r"expected rows of score, sft, rl or cooperate.* got nothing to report"
    with open_run(job) as run, pytest.raises(ConfigError, match=message):
        report.run(job, run)
    assert not (tmp_path / "report").exists()


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "scorecard.json").write_text("{")
    with pytest.raises(ConfigError, match=r"scorecard\.json: expected JSON, got "):
        load_run(job_of(tmp_path), tmp_path)


def test_the_same_run_gives_the_same_figures(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", sft_rows(False, 3))
    job = job_of(tmp_path, ())
    first, second = (re.sub(r"written .*", "", render(job)[0]) for _ in range(2))
    assert first == second


def test_behavior_logprobs_have_their_origin_and_calibration(whole: Rendered) -> None:
    text = " ".join(re.sub("<[^>]*>", " ", whole[0]).split())
    assert "Rejected: 3 of 3603 rows." in text
    assert "teacher_plain 1800 0 1800 0 61234 3.0e-06 teacher_cipher 1800 1800 0 0 61234 -" in text
    assert "teacher_plain 250 -2.0e-07 4.0e-07 3.0e-07 7.0e-06" in text
