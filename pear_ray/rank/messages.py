"""The advice and the cautions of a ranking, in sentences that claim no more than the numbers."""

from __future__ import annotations

from typing import Any

LOW_ENTROPY_NATS = 0.18
"""Below it RL hardly explored, for one 3 B coder model (arXiv 2606.18487)."""
LARGE_K, MANY_SAMPLES = 64, 256
"""The pass@large-k that was shown to predict results of RL (arXiv 2510.01624)."""
LARGE_SHARE = 0.5


def advice(document: dict[str, Any]) -> str:
    """Return where to start RL, and how certain that is."""
    rows, k, num_problems = document["candidates"], document["k"], document["num_problems"]
    best = next(row for row in rows if row["rank"] is not None)
    values = {row["pass_at_k"]["value"] for row in rows}
    if values == {0.0} or values == {1.0}:
        solved, wanted = ("no", "easier") if values == {0.0} else ("every", "harder")
        return (
            f"These {num_problems} problems do not separate the candidates: each solves {solved} problem in"
            f" {document['sampler']['samples_per_problem']} samples. Evaluate on {wanted} ones."
        )
    score = f"pass@{k} {format_interval(best['pass_at_k'])}"
    tied = [name for name, lead in document["leads"].items() if lead["low"] <= 0]
    if tied:
        text = (
            f"{best['label']} has the highest {score}, but on {num_problems} problems it is not significantly ahead of"
            f" {' and '.join(tied)}: start RL from the cheapest of them, or evaluate on more problems."
        )
    else:
        text = f"Start RL from {best['label']}, which has the highest {score}"
        if document["leads"]:
            nearest, lead = next(iter(document["leads"].items()))
            text += f", ahead of {nearest} by {format_interval(lead, '+')}"
        text += f"; it stays first in {best['probability_of_first']:.0%} of resamples of problems."
    return f"{text} {track_record_text(document)}"


def track_record_text(document: dict[str, Any]) -> str:
    """Return how well the ranking's predictor did so far."""
    record, k = document["track_record"], document["k"]
    num_known, scores = record["num_known"], record["predictors"].get(f"pass@{k}")
    if scores is None:
        return f"Only {num_known} results after RL are known, too few to score pass@{k} here."
    if scores["spearman"] is None:
        return f"The {num_known} known results after RL are all equal."
    text = f"On {num_known} known results after RL, pass@{k} has Spearman {scores['spearman']:.2f}"
    if (heldout := scores["heldout_r_squared"]) is None:
        return f"{text}."
    return f"{text} and held-out R^2 {heldout['mean']:.2f} +- {heldout['sd']:.2f}."


def cautions(document: dict[str, Any]) -> list[str]:
    """Return the caveats of the ranking and of each candidate."""
    rows, k, texts = document["candidates"], document["k"], []
    if k < LARGE_K:
        texts.append(
            f"pass@{k} of {document['sampler']['samples_per_problem']} samples stands in for"
            f" pass@{LARGE_K} of {MANY_SAMPLES}, which was validated as a predictor."
        )
    alone = [row["label"] for row in rows if row["heldout_loss"] is not None and not row["loss_comparable_with"]]
    if alone:
        texts.append(
            f"Held-out loss was not used for {', '.join(alone)}: it is comparable only between"
            " checkpoints trained on the same data with the same loss (rank.trained_on)."
        )
    if document["track_record"].get("loss_is_confounded"):
        texts.append(
            "The track record of held-out loss is confounded: the checkpoints with known results"
            " were trained on different data or with different losses."
        )
    for row in rows:
        texts += candidate_cautions(row, document["group_size"])
    return texts


def candidate_cautions(row: dict[str, Any], group_size: int) -> list[str]:
    """Return the caveats of one candidate."""
    label, silent, entropy = row["label"], row["share_without_signal"], row["entropy"]
    clipped, texts = row["completions_clipped_ratio"], []
    if row["dropped_for"]:
        texts.append(f"dropped because {row['dropped_for']} has better pass@1 and held-out loss.")
    if silent is not None and silent > LARGE_SHARE:
        texts.append(
            f"expect {silent:.0%} of groups of {group_size} to be all correct or all wrong, without"
            " learning signal; choose other problems or larger groups."
        )
    if entropy is not None and entropy < LOW_ENTROPY_NATS:
        texts.append(
            f"entropy {entropy:.3f} nats per token is below {LOW_ENTROPY_NATS}; RL may have little left to explore."
        )
    if row["regime"] == "severe over-training":
        texts.append("held-out loss is over 1.10 times its lowest; stop SFT earlier.")
    if clipped > LARGE_SHARE:
        texts.append(f"{clipped:.0%} of completions were truncated at the maximum length.")
    return [f"{label}: {text}" for text in texts]


def format_interval(score: dict[str, float], sign: str = "") -> str:
    """Return a value with its interval, such as "0.441 [0.379, 0.500]"."""
    return f"{score['value']:{sign}.3f} [{score['low']:{sign}.3f}, {score['high']:{sign}.3f}]"
