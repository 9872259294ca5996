"""The probe: fixed answers, whoever began them."""

from __future__ import annotations

import pytest

from pear_ray.records import Completion, Grade, RolloutGroup
from pear_ray.rl.rollouts import first_answer, trace_of


@pytest.mark.parametrize(
    "answer",
    [
        Completion((7, 8, 1), (-0.5, -1.0, -0.25), "", "stop", ((0, 3),)),
        Completion((1,), (-0.25,), "", "stop", ((0, 1),), None, (7, 8), (-0.5, -1.0)),
        Completion((), (), "", "stop", (), None, (7, 8, 1), (-0.5, -1.0, -0.25)),
    ],
)
def test_all_of_an_answer_is_scored(answer):
    group = RolloutGroup("problem", (4, 5), (answer,), (Grade(0.0, False),), (0.0,))
    found = first_answer(group)
    assert found.token_ids.tolist() == [4, 5, 7, 8, 1]
    assert found.sampled_logprobs.tolist() == [0, 0, -0.5, -1.0, -0.25]
    assert trace_of(found).prompt_ids == (4, 5) and trace_of(found).response_ids == (7, 8, 1)
