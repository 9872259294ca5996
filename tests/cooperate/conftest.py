"""A tiny model, and demonstrations of the first problems that it is asked."""

from __future__ import annotations

from itertools import islice

import pytest

from pear_ray.cooperate.schedulers import DemonstrationIndex
from pear_ray.data.scored_dataset import RowFilter, scan_dataset
from pear_ray.data.tokenizer import encode_prompt, load_tokenizer
from tests.cooperate.scheduler_driver import make_job, problem_stream
from tests.data.scored_rows import row, stored, table_of

ROW_FILTER = RowFilter(("vocabulary", "template"), 100, 64, negatives=False, top_logprobs=False)


@pytest.fixture(scope="session")
def model(tiny_model):
    return str(tiny_model(True))


@pytest.fixture(scope="session")
def index(model, tmp_path_factory):
    """Demonstrations of 2 to 10 tokens for the first problems, none for the others."""
    tokenizer, rows = load_tokenizer(model), {}
    for number, (_, problem) in enumerate(islice(problem_stream(make_job(model)), 9)):
        ids = tuple(encode_prompt(tokenizer, problem.messages))
        response = [10 + number] * (number + 1) + [1]
        changes = {
            "prompt_ids": ids,
            "response_ids": response,
            "behavior_logprobs": [-0.5 * (n + 1) for n in range(len(response))],
            "trainable": [n != 3 for n in range(len(response))] if number == 4 else None,
        }
        rows.setdefault(ids, row(f"{number}", **changes))
    folder = stored(tmp_path_factory.mktemp("scored"), table_of(*rows.values()))
    return DemonstrationIndex(scan_dataset(folder, ROW_FILTER), ROW_FILTER)
