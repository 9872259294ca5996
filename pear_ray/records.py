"""Records that flow between the stages, in the order of the data flow; those in Parquet have an Arrow schema, too.

`_T` is the packed tokens of one rank's micro-batch, `_G` one problem's group of completions. Log-probabilities are
natural logs in float32; `logprobs_T[t]` is the log-probability OF token t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa

Message = Annotated[dict[str, str], pa.struct([("role", pa.string()), ("content", pa.string())])]
Array = Sequence[Any] | np.ndarray


def schema_of(record: type) -> pa.Schema:
    """Return the Arrow schema of a dataclass: one column per field, int32 and float32 numbers, lists for tuples, maps
    for dicts; `Annotated[..., pa.DataType]` overrides the type."""
    return pa.schema([(name, _arrow_type(hint)) for name, hint in get_type_hints(record, include_extras=True).items()])


def _arrow_type(hint: Any) -> pa.DataType:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return args[1]
    if origin in (Union, UnionType):
        (hint,) = (arg for arg in args if arg is not NoneType)
        return _arrow_type(hint)
    if origin is tuple:
        return pa.list_(_arrow_type(args[0]))
    if origin is dict:
        return pa.map_(*map(_arrow_type, args))
    return {str: pa.string(), bool: pa.bool_(), int: pa.int32(), float: pa.float32()}[hint]


@dataclass(frozen=True)
class Example:
    """One offline trace: a conversation that ends with the assistant's message. Made by the user or by `sample`, which
    adds the sampler's token ids and log-probs for `score` to verify; read by `score`.

        Example("teacher-17", messages=({"role": "user", "content": "3 7 9 > 30 :"}, {"role": "assistant",
                "content": "undo 30 - 9 = 21 , 21 / 3 = 7"}), source="teacher", split="train", correct=True)
    """

    example_id: str
    messages: tuple[Message, ...]
    source: str
    split: str
    correct: bool | None = None
    response_ids: tuple[int, ...] | None = None
    behavior_logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class TokenizedExample:
    """An example as token ids, or the reason why it was rejected ("" if it was not); internal to `score`.

    `response_ids` start with the first assistant message; in a multi-turn conversation they include the other messages'
    tokens, and `trainable` marks the assistant's (None: all). `scorer` is the entry of [behavior] whose model scores
    the row: not `source` if a fallback replaces an unknown author. `content` is a hash of the prompt, `digest` of all.

        TokenizedExample("teacher-17", source="teacher", scorer="teacher", split="train", split_is_given=False,
            correct=True, prompt_ids=(16, 20, 22, 2, 43, 3), response_ids=(11, 43, 5, ...), trainable=None,
            truncated=False, recorded_logprobs=(-0.51, ...), content=-46116860184, digest="9c1e...", reason="")
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
    content: Annotated[int, pa.int64()]
    digest: str
    reason: str


@dataclass(frozen=True)
class ScoredExample:
    """An example as token ids, with the log-probability that its author gave each response token. Made by `score`, read
    by `sft`.

    `behavior_logprobs` has one float32 per response token, 0 if `trainable` is false (None: all are trainable).
    `logprobs_from` is "behavior" (computed here under the author's model), "reference" (under a fallback for an unknown
    author) or "recorded" (supplied with the corpus and verified on a sample); `recorded_gap` is the largest difference
    between recorded and computed log-probs, in nats, if both exist. `top_ids` and `top_logprobs` hold the k likeliest
    tokens of each position, flattened, if the job requests them.

        ScoredExample("teacher-17", prompt_ids=(16, 20, 22, 2, 43, 3), response_ids=(11, 43, 5, ...), source="teacher",
            behavior_logprobs=(-0.51, -0.02, ...), behavior_model="runs/x/teacher", tokenizer_digest="5f0c...",
            template_digest="a1b2...", split="train", correct=True, recorded_gap=2.4e-7, logprobs_from="behavior")
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


@dataclass(frozen=True)
class Problem:
    """A prompt, with what its task needs to grade a completion. Made by a task, read by `sample`, `rl` and `evaluate`.

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
    """One sampled answer. `logprobs` are the engine's, one per token of `token_ids`; `version_spans` lists (weight
    version, number of tokens) in sampling order. With a KL penalty `reference_logprobs` are the reference policy's
    log-probs of the same tokens. `prefix_ids` is the beginning of a demonstration that the completion continues,
    `prefix_logprobs` its author's log-probs; `text` covers both.

        Completion(token_ids=(11, 43, 1), logprobs=(-0.7, -1.2, -0.01), text="undo 30",
                   finish_reason="stop", version_spans=((4, 2), (5, 1)))
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str
    version_spans: tuple[tuple[int, int], ...]
    reference_logprobs: tuple[float, ...] | None = None
    prefix_ids: tuple[int, ...] = ()
    prefix_logprobs: tuple[float, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Length in tokens, including the prefix."""
        return len(self.prefix_ids) + len(self.token_ids)

    @property
    def policy_versions(self) -> tuple[int, int]:
        """The oldest and the newest weight version that sampled a token."""
        versions = [version for version, _ in self.version_spans]
        return min(versions), max(versions)


@dataclass(frozen=True)
class Grade:
    """A task's assessment of a completion. `parts` are named components of the reward or properties of the completion
    (1.0 = yes); `note` is the reason for a reward of 0.

        Grade(reward=1.0, correct=True, parts={"style_undo": 1.0}, note="")
    """

    reward: float
    correct: bool
    parts: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class RolloutGroup:
    """All completions of one prompt with their grades and advantages, for the learners.

    RolloutGroup("countdown-3-7-9-30", prompt_ids=(16, 20, 3), completions=(..., ...),
                 grades=(Grade(1.0, True), Grade(0.0, False)), advantages=(0.71, -0.71))
    """

    problem_id: str
    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    grades: tuple[Grade, ...]
    advantages: tuple[float, ...]


@dataclass(frozen=True)
class TrainingSequence:
    """A sequence to train on: the common input of SFT and RL. All arrays have one entry per token (prompt included), 0
    for tokens that are not trainable.

    In SFT `sampled_logprobs` are the behavior policy's, and `coefficients` are 1, or negative for a wrong response; in
    RL they are the engine's and the advantage. `origin` is the corpus source or the problem id, for diagnostics only.
    For distillation `teacher_ids` and `teacher_logprobs` are the behavior policy's k likeliest tokens of each position;
    for a KL penalty `reference_logprobs` are the reference policy's. `from_demonstration` marks demonstrations' tokens.

        TrainingSequence(token_ids=[16, 20, 3, 11, 1], trainable=[0, 0, 0, 1, 1], origin="teacher",
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
    from_demonstration: np.ndarray | None = None  # bool [tokens]

    @classmethod
    def of(
        cls,
        prompt_ids: Array,
        response_ids: Array,
        sampled_logprobs: Array,
        coefficient: float,
        origin: str,
        response_trainable: Array | None = None,
        top_ids: Array | None = None,
        top_logprobs: Array | None = None,
        reference_logprobs: Array | None = None,
    ) -> TrainingSequence:
        """Create the sequence of one prompt and one response. `sampled_logprobs`, `reference_logprobs` and
        `response_trainable` (bool; default: all) have one entry per response token, else ValueError; `top_ids` and
        `top_logprobs` have k per response token, flattened."""
        num_prompt, num_response = len(prompt_ids), len(response_ids)
        trainable = np.zeros(num_prompt + num_response, dtype=bool)
        trainable[num_prompt:] = True if response_trainable is None else response_trainable

        def masked(logprobs: Array) -> np.ndarray:
            if len(logprobs) != num_response:
                raise ValueError(
                    f"{origin}: expected {num_response} log-probs, one per response token, got {len(logprobs)}"
                )
            padded = np.zeros(num_prompt + num_response, np.float32)
            padded[num_prompt:] = logprobs
            return np.where(trainable, padded, np.float32(0))

        def top_k(values: Array, dtype: type) -> np.ndarray:
            rows: np.ndarray = np.asarray(values, dtype).reshape(num_response, -1)
            return np.pad(rows, ((num_prompt, 0), (0, 0)))

        return cls(
            token_ids=np.concatenate([np.asarray(prompt_ids, np.int64), np.asarray(response_ids, np.int64)]),
            trainable=trainable,
            sampled_logprobs=masked(sampled_logprobs),
            coefficients=trainable.astype(np.float32) * coefficient,
            origin=origin,
            teacher_ids=None if top_ids is None else top_k(top_ids, np.int64),
            teacher_logprobs=None if top_logprobs is None else top_k(top_logprobs, np.float32),
            reference_logprobs=None if reference_logprobs is None else masked(reference_logprobs),
        )


@dataclass(frozen=True)
class TrainingBatch:
    """One rank's micro-batch: whole sequences end to end, with counts of the GLOBAL batch. A loss returns sums over its
    own tokens; the learner divides once by `num_trainable_tokens_global`.

    `sequence_ids_T` numbers the sequences of this micro-batch from 0; `position_ids_T` restarts at 0 in each;
    `origins[s]` is the origin of sequence s. `num_sequences_global` counts sequences with a trainable token outside
    demonstrations; `num_demonstration_*_global` count those of `from_demonstration_T`.

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
    from_demonstration_T: np.ndarray | None = None
    num_demonstration_tokens_global: int = 0
    num_demonstration_sequences_global: int = 0


@dataclass(frozen=True)
class Attempt:
    """A sampled answer of an evaluation, one row of RUN/evaluate/attempts.parquet. Token ids and log-probs (nats, per
    token) are kept for the first answer to each problem.

        Attempt("sft", "countdown-3-7-9-30", "countdown", sample=3, text="undo 30 - 9 = ...", correct=True, reward=1.0,
                num_tokens=13, finish_reason="stop", mean_logprob=-0.21, note="", parts={"style_undo": 1.0},
                response_ids=None, logprobs=None)
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


EXAMPLE_SCHEMA, TOKENIZED_SCHEMA = schema_of(Example), schema_of(TokenizedExample)
SCORED_SCHEMA, ATTEMPT_SCHEMA = schema_of(ScoredExample), schema_of(Attempt)
