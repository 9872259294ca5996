"""Parity sequences are whole completions, demonstration prefixes included."""

from __future__ import annotations

import pytest

from pear_ray.records import Completion, Grade, RolloutGroup
from pear_ray.rl.rollouts import parity_sequences, score_request


@pytest.mark.parametrize(
    "completion",
    [
        Completion((7, 8, 1), (-0.5, -1.0, -0.25), "", "stop", ((0, 3),)),
        Completion((1,), (-0.25,), "", "stop", ((0, 1),), None, (7, 8), (-0.5, -1.0)),
        Completion((), (), "", "stop", (), None, (7, 8, 1), (-0.5, -1.0, -0.25)),
    ],
)
def test_a_completion_is_scored_with_its_prefix(completion):
    group = RolloutGroup("problem", (4, 5), (completion,), (Grade(0.0, False),), (0.0,))
    (sequence,) = parity_sequences([group])
    assert sequence.token_ids.tolist() == [4, 5, 7, 8, 1]
    assert sequence.sampled_logprobs.tolist() == [0, 0, -0.5, -1.0, -0.25]
    request = score_request(sequence)
    assert (request.prompt_ids, request.response_ids) == ((4, 5), (7, 8, 1))
