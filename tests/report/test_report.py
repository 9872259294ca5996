"""The page, the table and the words of a report."""

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
from pear_ray.report.load import read
from pear_ray.run import open_run
from tests.report.reported_run import (
    ARMS,
    HOSTILE,
    job_of,
    made,
    rl_rows,
    scorecard,
    sft_rows,
    whole_run,
    write_lines,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, list[dict[str, str]]]:
    """What a whole run leaves, made once."""
    return made(whole_run(tmp_path_factory.mktemp("laptop")))


class Page(HTMLParser):
    """Every tag with its attributes, the text of headings, and whether tags are balanced."""

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
    """Cells of every table."""
    tables = []
    for block in markdown.strip().split("\n\n"):
        lines = block.split("\n")
        if lines[0].startswith("|"):
            assert re.fullmatch(r"(\| -+ )+\|", lines[1])
            assert len({len(line) for line in lines}) == 1
            cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
            tables.append([[cell.strip() for cell in row] for row in cells])
    return tables


def test_a_whole_run_has_every_section_in_order(whole: Any) -> None:
    page = whole[0]
    assert Page(page).headings == [
        "Arms",
        "Arms against each other",
        "Where should RL start?",
        "Learning",
        "Importance weights",
        "What the answers look like",
        "Scores of the corpus",
        "Do generators and learners hold the same weights?",
        "Where the time went",
        "Events",
        "What was run",
    ]
    assert "Not in this run" not in page


def test_the_page_is_self_contained_and_speaks_to_everyone(whole: Any) -> None:
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
            assert re.search(" from | at ", attributes["aria-label"])
    assert not re.search(r"url\((?!#)|@import", whole[0])
    assert "prefers-color-scheme: dark" in whole[0] and "@media print" in whole[0]


def test_text_from_the_run_stays_text(tmp_path: Path) -> None:
    job = whole_run(tmp_path)
    home = tmp_path / "arms" / "pear"
    rows = sft_rows(True)
    for row in rows:
        row["first_weight_by_source"] = {HOSTILE: 0.5}
    write_lines(home / "metrics.jsonl", rows)
    page = made(job)[0]
    assert "<script" not in page and "<img" not in page
    assert page.count("&lt;script&gt;") >= 3
    assert Page(page).open == []


def test_no_nan_reaches_a_reader(tmp_path: Path) -> None:
    job = whole_run(tmp_path)
    rows = sft_rows(True, 5) + rl_rows(5)
    for row in rows:
        row |= {"entropy": None, "sample_seconds": None, "logprob_parity_max": None}
    write_lines(tmp_path / "arms" / "pear" / "metrics.jsonl", rows)
    (tmp_path / "arms" / "sft" / "metrics.jsonl").unlink()
    page, markdown, _ = made(job)
    text = re.sub(r"<style.*?</style>|<details.*?</details>|<[^>]*>", "", page, flags=re.S)
    labels = " ".join(re.findall(r'aria-label="([^"]*)"', page))
    for read_by_someone in (text, labels, markdown):
        assert not re.search(r"\b(nan|NaN|None|inf)\b", read_by_someone)
    assert 'd="' in page and not re.search(r' d="[^"]*nan', page)


def test_the_verdict_says_what_the_interval_and_the_noise_floor_allow(tmp_path: Path) -> None:
    whole_run(tmp_path)

    def said(lead: float) -> str:
        (tmp_path / "evaluate" / "scorecard.json").write_text(json.dumps(scorecard(lead=lead)))
        return report.conclusion(read(tmp_path))

    assert said(0.022) == (
        "After RL pear is ahead of sft, pass@1 0.383 against 0.361. The paired difference is"
        " +0.022 [-0.008, +0.052] over 256 problems: its 95 % interval includes 0, and it is below"
        " the noise floor of 0.040."
    )
    assert "After RL sft is ahead of pear, pass@1 0.361 against 0.311." in said(-0.05)
    assert "+0.050 [+0.020, +0.080]" in said(-0.05)
    assert "excludes 0, and it is not below the noise floor" in said(-0.05)
    assert "is level with" in said(0.0)
    assert "one seed proves nothing" in report.caution(read(tmp_path))


def test_markdown_begins_with_the_table_of_arms_and_fits_a_terminal(whole: Any) -> None:
    markdown = whole[1]
    arms, differences, training = tables_of(markdown)
    assert markdown.startswith("| arm ")
    assert max(map(len, markdown.splitlines())) <= 110
    assert arms[0][:2] == ["arm", "of"]
    assert [row[:2] for row in arms[2:5]] == [[a, "pass@1"] for a in ("base", *ARMS)]
    assert arms[4][2:] == ["0.240 [0.210, 0.270]", "0.383 [0.353, 0.413]", "+0.143"]
    assert differences[2][0] == "pear/rl - sft/rl"
    assert training[2][:2] == ["sft", "46"]


def test_spreadsheet_has_a_row_for_every_checkpoint(whole: Any) -> None:
    rows = whole[2]
    assert [row["checkpoint"] for row in rows] == [
        "base",
        "sft/sft",
        "sft/rl",
        "pear/sft",
        "pear/rl",
    ]
    assert float(rows[4]["pass_at_1"]) == pytest.approx(0.383)
    assert (rows[4]["arm"], rows[4]["stage"], rows[4]["steps"]) == ("pear", "rl", "32")
    assert rows[0]["arm"] == rows[0]["heldout_nll"] == ""


def test_a_change_that_was_paired_shows_its_interval(tmp_path: Path) -> None:
    whole_run(tmp_path)
    card = scorecard()
    paired = {"a": "pear/sft", "b": "pear/rl", "k": 1, "value": -0.143, "low": -0.17, "high": -0.12}
    card["differences"].append(paired)
    (tmp_path / "evaluate" / "scorecard.json").write_text(json.dumps(card))
    markdown = report.markdown(read(tmp_path), [])
    assert "+0.143 [+0.120, +0.170]" in markdown
    assert "pear/sft - pear/rl" not in markdown


@pytest.fixture
def cooperating(tmp_path: Path) -> Job:
    """A whole run whose arm `pear` ends with `cooperate`."""
    document = whole_run(tmp_path).model_dump()
    document["arms"][1]["cooperate"] = {"refresh_steps": 4}
    job = Job(**document | {"cooperate": {"method": "bridge"}})
    (tmp_path / "config.json").write_text(job.model_dump_json())
    rows = [
        row | {"stage": "cooperate", "sft_nll": 1.2 - 0.01 * row["step"], "cooperative_gain": 0.1}
        for row in rl_rows()
    ]
    write_lines(tmp_path / "arms" / "pear" / "metrics.jsonl", sft_rows(True) + rows)
    card = tmp_path / "evaluate" / "scorecard.json"
    card.write_text(card.read_text().replace("pear/rl", "pear/cooperate"))
    return job


def test_an_arm_that_cooperates_stands_beside_one_that_does_not(cooperating: Job) -> None:
    page, markdown, rows = made(cooperating)
    measured = read(cooperating.folder)
    assert [arm.last_stage for arm in measured.arms] == ["rl", "cooperate"]
    assert report.conclusion(measured).startswith(
        "After RL pear is ahead of sft, pass@1 0.383 against 0.361. The paired difference is +0.022"
    )
    assert "sft.level = token, cooperate.method = bridge, cooperate.refresh_steps = 4" in page
    arms, differences, training = tables_of(markdown)
    assert [row[0] for row in arms[2:]] == ["base", *ARMS] * 2
    assert arms[4][2:] == ["0.240 [0.210, 0.270]", "0.383 [0.353, 0.413]", "+0.143"]
    assert differences[2][0] == "pear/cooperate - sft/rl"
    assert [row[3] for row in training[2:]] == ["32", "32"]
    assert [row["checkpoint"] for row in rows][-1] == "pear/cooperate"
    assert (rows[-1]["stage"], rows[-1]["steps"]) == ("cooperate", "32")
    assert "Not in this run" not in page
    (gain, traces) = (
        re.search(rf'aria-label="{title}, [^"]*"', page)
        for title in ("RL: gain over the shadow", "RL: negative log-likelihood of traces")
    )
    assert gain and traces and "sft" not in gain[0] + traces[0]
    pass_rate = re.search(r'aria-label="RL: pass rate, [^"]*"', page)
    after = re.search(r'aria-label="pass@k after RL, [^"]*"', page)
    assert pass_rate and "sft" in pass_rate[0] and "pear" in pass_rate[0]
    assert after and "sft/rl" in after[0] and "pear/cooperate" in after[0]


def test_a_run_without_arms_is_its_own_arm(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", sft_rows(True) + rl_rows())
    card = scorecard(("x",))
    card["checkpoints"] = {
        label.split("/")[-1]: entry for label, entry in card["checkpoints"].items()
    }
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "scorecard.json").write_text(json.dumps(card))
    page, markdown, rows = made(job_of(tmp_path, ()))
    assert f"{tmp_path.name} has pass@1 0.361 after RL and 0.244 before it." in page
    assert len(tables_of(markdown)[0]) == 2 + 4
    assert [row["checkpoint"] for row in rows] == ["base", "sft", "rl"]


def test_only_sft_done_names_what_is_absent(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", sft_rows(False, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sft", "st')
    page, markdown, rows = made(job_of(tmp_path, ()))
    assert Page(page).headings == ["Learning", "What was run"]
    (absent,) = re.findall(r"Not in this run: (.*)</p>", page)
    for missing in ("scorecard.json", "weighted", "paired", "score has not run", "rows of rl"):
        assert missing in absent
    assert "No checkpoint has been evaluated: there is no result yet." in page
    assert tables_of(markdown)[0][2][:2] == [tmp_path.name, "3"]
    assert rows[0]["steps"] == "3"


def test_an_evaluation_before_rl_claims_nothing_after_it(tmp_path: Path) -> None:
    whole_run(tmp_path)
    card = scorecard()
    card["checkpoints"] = {k: v for k, v in card["checkpoints"].items() if not k.endswith("/rl")}
    card["differences"] = []
    (tmp_path / "evaluate" / "scorecard.json").write_text(json.dumps(card))
    assert "Nothing has been evaluated after RL" in report.conclusion(read(tmp_path))


def test_answers_stand_beside_each_other_where_verdicts_differ(whole: Any) -> None:
    page = whole[0]
    for problem in (9, 10, 11):
        for label in ("base", "sft/sft", "pear/rl"):
            assert f"{label} {problem} 0<" in page
    assert "pear/rl 8 0<" not in page and "pear/rl 9 1<" not in page


def test_an_empty_run_folder_is_refused(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    with (
        open_run(job) as run,
        pytest.raises(ConfigError, match=r"expected rows of score, sft, rl or cooperate"),
    ):
        report.run(job, run)
    assert not (tmp_path / "report").exists()


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "scorecard.json").write_text("{")
    with pytest.raises(ConfigError, match=r"scorecard\.json: .*expected the JSON"):
        read(tmp_path)


def test_the_same_run_gives_the_same_figures(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", sft_rows(False, 3))
    job = job_of(tmp_path, ())
    first, second = (re.sub(r"written .*", "", made(job)[0]) for _ in range(2))
    assert first == second


def test_scores_say_who_scored_and_what_the_trainer_thinks_of_it(whole) -> None:
    text = " ".join(re.sub("<[^>]*>", " ", whole[0]).split())
    assert "all sources together: 3 of 3603." in text
    assert "tutor 1800 0 1800 0 61234 3.0e-06 coder 1800 1800 0 0 61234" in text
    assert "tutor 250 -2.0e-07 4.0e-07 3.0e-07 7.0e-06" in text
