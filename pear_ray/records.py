"""What flows between functions, read top to bottom: this file is the data flow.

Notation used everywhere: `_T` is the packed tokens of one rank's micro-batch, `_G` one problem's
group of completions. Log-probabilities are natural logs in float32; `logprobs_T[t]` is the
log-probability OF token t.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

Message = dict[str, str]

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


@dataclass(frozen=True)
class Example:
    """One offline trace: a conversation whose last message is the assistant's.

    Made by the user or by stage `sample`, eaten by `score`. A corpus that was sampled here also
    carries what the sampler saw, so that `score` can prove that it sees the same.

        Example(example_id="tutor-17", messages=({"role": "user", "content": "3 7 9 > 30 :"},
                {"role": "assistant", "content": "undo 30 - 9 = 21 , 21 / 3 = 7"}),
                source="tutor", split="train", correct=True)
    """

    example_id: str
    messages: tuple[Message, ...]
    source: str
    split: str
    correct: bool | None = None
    response_ids: tuple[int, ...] | None = None
    behavior_logprobs: tuple[float, ...] | None = None


EXAMPLE_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("messages", MESSAGES),
        ("source", pa.string()),
        ("split", pa.string()),
        ("correct", pa.bool_()),
        ("response_ids", pa.list_(pa.int32())),
        ("behavior_logprobs", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class TokenizedExample:
    """An example as token ids, or the reason why it is no use ("" where it is of use).

    Made and eaten inside `score`. `response_ids` begin with the first answer; between answers of a
    longer conversation they hold the other side's tokens, and `trainable` says which are the
    assistant's (None: all). `scorer` is the entry of [behavior] whose model scores the row,
    another than `source` where a reference stands in for an unknown author. `content` is a
    fingerprint of the prompt, `digest` of the whole conversation.

        TokenizedExample("tutor-17", source="tutor", scorer="tutor", split="train",
                         split_is_given=False, correct=True, prompt_ids=(16, 20, 22, 2, 43, 3),
                         response_ids=(11, 43, 5, ...), trainable=None,
                         recorded_logprobs=(-0.51, ...), truncated=False, content=-46116860184,
                         digest="9c1e...", reason="")
    """

    example_id: str
    source: str
    scorer: str
    split: str
    split_is_given: bool
    correct: bool | None
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    trainable: tuple[bool, ...] | None
    recorded_logprobs: tuple[float, ...] | None
    truncated: bool
    content: int
    digest: str
    reason: str


TOKENIZED_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("source", pa.string()),
        ("scorer", pa.string()),
        ("split", pa.string()),
        ("split_is_given", pa.bool_()),
        ("correct", pa.bool_()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("trainable", pa.list_(pa.bool_())),
        ("recorded_logprobs", pa.list_(pa.float32())),
        ("truncated", pa.bool_()),
        ("content", pa.int64()),
        ("digest", pa.string()),
        ("reason", pa.string()),
    ]
)


@dataclass(frozen=True)
class ScoredExample:
    """An example as token ids, with the log-probability its author gave each response token.

    Made by `score`, eaten by `sft`. `behavior_logprobs` has one float32 per response token, 0
    where `trainable` is false (None: all are trainable). `logprobs_from` is "behavior" (computed
    here under the author's model), "reference" (under a stand-in for an unknown author) or
    "recorded" (brought along and confirmed by a probe); `recorded_gap` is the largest difference
    between what was recorded and what was computed here, in nats, where there are both.
    `top_ids` and `top_logprobs` hold the k likeliest tokens of each place one after the other,
    where the job asks for them.

        ScoredExample("tutor-17", prompt_ids=(16, 20, 22, 2, 43, 3), response_ids=(11, 43, 5, ...),
                      behavior_logprobs=(-0.51, -0.02, ...), behavior_model="runs/x/tutor",
                      source="tutor", tokenizer_digest="5f0c...", template_digest="a1b2...",
                      split="train", correct=True, recorded_gap=2.4e-7, trainable=None,
                      truncated=False, logprobs_from="behavior")
    """

    example_id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    behavior_logprobs: tuple[float, ...]
    behavior_model: str
    source: str
    tokenizer_digest: str
    template_digest: str
    split: str
    correct: bool | None = None
    recorded_gap: float | None = None
    trainable: tuple[bool, ...] | None = None
    truncated: bool = False
    logprobs_from: str = "behavior"
    top_ids: tuple[int, ...] | None = None
    top_logprobs: tuple[float, ...] | None = None


SCORED_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("behavior_logprobs", pa.list_(pa.float32())),
        ("behavior_model", pa.string()),
        ("source", pa.string()),
        ("tokenizer_digest", pa.string()),
        ("template_digest", pa.string()),
        ("split", pa.string()),
        ("correct", pa.bool_()),
        ("recorded_gap", pa.float32()),
        ("trainable", pa.list_(pa.bool_())),
        ("truncated", pa.bool_()),
        ("logprobs_from", pa.string()),
        ("top_ids", pa.list_(pa.int32())),
        ("top_logprobs", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class Problem:
    """Something to answer, and what its task needs to judge an answer.

    Made by a task, eaten by `sample`, `rl` and `evaluate`.

        Problem("countdown-3-7-9-30", "countdown", ({"role": "user", "content": "3 7 9 > 30 :"},),
                reference="3 7 9 > 30", split="train")
    """

    problem_id: str
    task: str
    messages: tuple[Message, ...]
    reference: str
    split: str


@dataclass(frozen=True)
class Completion:
    """One sampled answer. `logprobs` are the sampler's, one per token of `token_ids`, and
    `version_spans` say which weight version wrote how many of the tokens, in their order. With a
    KL penalty `reference_logprobs` are the reference policy's of the same tokens. `trace_ids` are
    the tokens of an offline trace that it goes on from, `trace_logprobs` its author's; `text` is
    the whole.

        Completion(token_ids=(11, 43, 1), logprobs=(-0.7, -1.2, -0.01), text="undo 30",
                   finish_reason="stop", version_spans=((4, 2), (5, 1)))
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str
    version_spans: tuple[tuple[int, int], ...]
    reference_logprobs: tuple[float, ...] | None = None
    trace_ids: tuple[int, ...] = ()
    trace_logprobs: tuple[float, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Length of the whole answer."""
        return len(self.trace_ids) + len(self.token_ids)

    @property
    def policy_versions(self) -> tuple[int, int]:
        """The oldest and the newest weight version that wrote a token of it."""
        versions = [version for version, _ in self.version_spans]
        return min(versions), max(versions)


@dataclass(frozen=True)
class Grade:
    """What a task says of an answer. `parts` are named shares of the reward or facts about the
    answer (1.0 = yes); `note` says in words why an answer earned nothing.

        Grade(reward=1.0, correct=True, parts={"style_undo": 1.0}, note="")
    """

    reward: float
    correct: bool
    parts: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class RolloutGroup:
    """All answers to one problem with their verdicts and advantages, for the learners."""

    problem_id: str
    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    grades: tuple[Grade, ...]
    advantages: tuple[float, ...]


@dataclass(frozen=True)
class TrainingSequence:
    """Where SFT and RL meet: tokens, which of them are learned, and two numbers for each.

    In SFT `sampled_logprobs` are the behavior policy's and `coefficients` are 1, or below 0 for a
    trace that is known to be wrong; in RL they are the rollout engine's and the advantage. All
    arrays have one entry per token (prompt included); entries of tokens that are not trainable are
    0. `origin` is the corpus source or the problem id, for diagnostics only. For distillation
    `teacher_ids` and `teacher_logprobs` hold the behavior policy's k likeliest tokens at each
    place; for a KL penalty `reference_logprobs` are the reference policy's of the same tokens.
    Beside rollouts `from_trace` says which tokens are a trace's (None: none is).

        TrainingSequence(token_ids=[16, 20, 3, 11, 1], trainable=[0, 0, 0, 1, 1], origin="tutor",
                         sampled_logprobs=[0, 0, 0, -0.7, -0.01], coefficients=[0, 0, 0, 1, 1])
    """

    token_ids: np.ndarray  # int64 [tokens]
    trainable: np.ndarray  # bool [tokens]
    sampled_logprobs: np.ndarray  # float32 [tokens]
    coefficients: np.ndarray  # float32 [tokens]
    origin: str
    teacher_ids: np.ndarray | None = None  # int64 [tokens, k]
    teacher_logprobs: np.ndarray | None = None  # float32 [tokens, k]
    reference_logprobs: np.ndarray | None = None  # float32 [tokens]
    from_trace: np.ndarray | None = None  # bool [tokens]

    @classmethod
    def of(
        cls,
        prompt_ids: Any,
        response_ids: Any,
        sampled_logprobs: Any,
        coefficient: float,
        origin: str,
        response_trainable: Any = None,
        top_ids: Any = None,
        top_logprobs: Any = None,
        reference_logprobs: Any = None,
    ) -> TrainingSequence:
        """The sequence of one prompt and one response, of which every token is trainable unless
        `response_trainable` (bool, one for each) says otherwise. `sampled_logprobs` and
        `reference_logprobs` are one for each response token; `top_ids` and `top_logprobs` the
        likeliest tokens of each response token's place, k after k.

        Raises:
            ValueError: more or fewer log-probs than response tokens.
        """
        num_prompt, num_response = len(prompt_ids), len(response_ids)
        trainable = np.zeros(num_prompt + num_response, dtype=bool)
        trainable[num_prompt:] = True if response_trainable is None else response_trainable

        def where_trainable(logprobs: Any) -> np.ndarray:
            if len(logprobs) != num_response:
                raise ValueError(
                    f"{origin}: {len(logprobs)} log-probs for {num_response} response tokens"
                )
            spread = np.zeros(num_prompt + num_response, np.float32)
            spread[num_prompt:] = logprobs
            return np.where(trainable, spread, np.float32(0))

        given = reference_logprobs is not None
        reference = where_trainable(reference_logprobs) if given else None
        return cls(
            token_ids=np.concatenate(
                [np.asarray(prompt_ids, np.int64), np.asarray(response_ids, np.int64)]
            ),
            trainable=trainable,
            sampled_logprobs=where_trainable(sampled_logprobs),
            coefficients=trainable.astype(np.float32) * coefficient,
            origin=origin,
            teacher_ids=_behind(num_prompt, num_response, top_ids, np.int64),
            teacher_logprobs=_behind(num_prompt, num_response, top_logprobs, np.float32),
            reference_logprobs=reference,
        )


def _behind(num_prompt: int, num_response: int, flat: Any, dtype: type) -> np.ndarray | None:
    """`flat` as [tokens, k], zero for the prompt's tokens; None where there is nothing."""
    if flat is None:
        return None
    rows: np.ndarray = np.asarray(flat, dtype).reshape(num_response, -1)
    return np.concatenate([np.zeros((num_prompt, rows.shape[1]), dtype), rows])


@dataclass(frozen=True)
class TrainingBatch:
    """One rank's micro-batch: whole sequences end to end, plus the counts of the GLOBAL batch.

    `sequence_ids_T` numbers the sequences of this micro-batch from 0; `position_ids_T` restarts
    at 0 in each. A loss returns sums over its own tokens; the learner divides once by
    `num_trainable_tokens_global`. `num_sequences_global` counts the sequences with a trainable
    token that is not a trace's; `num_trace_tokens_global` and `num_trace_sequences_global` count
    those of `from_trace_T`. `origins[s]` is the origin of sequence s.

        TrainingBatch(token_ids_T=[16, 3, 11, 1, 17, 3, 1], position_ids_T=[0, 1, 2, 3, 0, 1, 2],
                      sequence_ids_T=[0, 0, 0, 0, 1, 1, 1], trainable_T=[0, 0, 1, 1, 0, 0, 1], ...)
    """

    token_ids_T: np.ndarray
    position_ids_T: np.ndarray
    sequence_ids_T: np.ndarray
    trainable_T: np.ndarray
    sampled_logprobs_T: np.ndarray
    coefficients_T: np.ndarray
    origins: tuple[str, ...]
    num_trainable_tokens_global: int
    num_sequences_global: int
    teacher_ids_T: np.ndarray | None = None
    teacher_logprobs_T: np.ndarray | None = None
    reference_logprobs_T: np.ndarray | None = None
    from_trace_T: np.ndarray | None = None
    num_trace_tokens_global: int = 0
    num_trace_sequences_global: int = 0


@dataclass(frozen=True)
class Attempt:
    """A sampled answer of an evaluation, a row of RUN/evaluate/attempts.parquet. Token ids and
    log-probs (nats, of each token) are kept of the first answer to each problem.

        Attempt("sft", "countdown-3-7-9-30", "countdown", sample=3, text="undo 30 - 9 = ...",
                correct=True, reward=1.0, num_tokens=13, finish_reason="stop", mean_logprob=-0.21,
                note="", parts={"style_undo": 1.0}, response_ids=None, logprobs=None)
    """

    checkpoint: str
    problem_id: str
    task: str
    sample: int
    text: str
    correct: bool
    reward: float
    num_tokens: int
    finish_reason: str
    mean_logprob: float
    note: str
    parts: dict[str, float]
    response_ids: tuple[int, ...] | None
    logprobs: tuple[float, ...] | None


ATTEMPT_SCHEMA = pa.schema(
    [
        ("checkpoint", pa.string()),
        ("problem_id", pa.string()),
        ("task", pa.string()),
        ("sample", pa.int32()),
        ("text", pa.string()),
        ("correct", pa.bool_()),
        ("reward", pa.float32()),
        ("num_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("mean_logprob", pa.float32()),
        ("note", pa.string()),
        ("parts", pa.map_(pa.string(), pa.float32())),
        ("response_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
    ]
)
