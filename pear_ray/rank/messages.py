"""A ranking in sentences that a person can act on, and that claim no more than the numbers."""

from __future__ import annotations

from typing import Any

LOW_ENTROPY_NATS = 0.18
"""Below it RL hardly explored, for one coder model of 3 B (arXiv 2606.18487)."""
LARGE_K, MANY_SAMPLES = 64, 256
"""What pass@large-k meant where it was found to predict (arXiv 2510.01624)."""
MUCH = 0.5


def advice(document: dict[str, Any]) -> str:
    """Where to start RL, and how sure that is."""
    rows, k = document["candidates"], document["k"]
    standing = [row for row in rows if row["rank"] is not None]
    first, num_problems = standing[0], document["num_problems"]
    values = {row["pass_at_k"]["value"] for row in rows}
    if values <= {0.0, 1.0} and len(values) == 1:
        what = (
            "no candidate answered any problem" if values == {0.0} else "all candidates solve all"
        )
        other = "easier" if values == {0.0} else "harder"
        return (
            f"These {num_problems} problems cannot tell where RL should start: {what} in"
            f" {document['sampler']['samples_per_problem']} tries. Evaluate on {other} ones."
        )
    level = [name for name, lead in document["leads"].items() if lead["low"] <= 0]
    reached = f"pass@{k} {interval(first['pass_at_k'])}"
    if level:
        text = (
            f"{first['label']} has the highest {reached}, but on these {num_problems} problems"
            f" cannot be told apart from {' and '.join(level)}: start RL from the cheapest of them,"
            " or evaluate on more problems."
        )
    else:
        text = f"Start RL from {first['label']}, {reached}, the highest"
        if document["leads"]:
            nearest, lead = next(iter(document["leads"].items()))
            text += f": ahead of {nearest} by {interval(lead, '+')}"
        text += (
            f"; drawing the problems again it stays first in {first['probability_of_first']:.0%}."
        )
    return f"{text} {record_in_words(document)}"


def record_in_words(document: dict[str, Any]) -> str:
    """What is known of how well the ranking's predictor predicts."""
    record, k = document["track_record"], document["k"]
    found = record["predictors"].get(f"pass@{k}")
    if found is None:
        return (
            f"Results after RL are known for {record['num_known']} of them, too few to say how well"
            f" pass@{k} predicts here."
        )
    if found["spearman"] is None:
        return f"The {record['num_known']} known results after RL are all alike."
    text = (
        f"On the {record['num_known']} whose result after RL is known, pass@{k} ranked with"
        f" Spearman {found['spearman']:.2f}"
    )
    spread = found["heldout_r_squared"]
    return text + (
        f" and held-out R^2 {spread['mean']:.2f} +- {spread['sd']:.2f}." if spread else "."
    )


def cautions(document: dict[str, Any]) -> list[str]:
    """What a reader might otherwise take for more than it is."""
    rows, group_size = document["candidates"], document["group_size"]
    told = []
    num_samples = document["sampler"]["samples_per_problem"]
    if document["k"] < LARGE_K:
        told.append(
            f"pass@{document['k']} of {num_samples} answers stands in for pass@{LARGE_K} of"
            f" {MANY_SAMPLES}, with which the procedure was tested."
        )
    measured = [row for row in rows if row["heldout_loss"] is not None]
    alone = [row["label"] for row in measured if not row["loss_comparable_with"]]
    if alone:
        told.append(
            f"Held-out loss was not used for {', '.join(alone)}: it compares only checkpoints"
            " trained on the same data with the same loss (rank.trained_on names it)."
        )
    if document["track_record"].get("loss_is_confounded"):
        told.append(
            "The track record of held-out loss is confounded: the checkpoints with known results"
            " were trained on different data or with different losses."
        )
    for row in rows:
        told += of_candidate(row, group_size)
    return told


def of_candidate(row: dict[str, Any], group_size: int) -> list[str]:
    """The cautions of one candidate."""
    label, told = row["label"], []
    if row["dropped_for"]:
        told.append(
            f"{label} was dropped: {row['dropped_for']} is better in pass@1 and in held-out loss."
        )
    silent = row["share_without_signal"]
    if silent is not None and silent > MUCH:
        told.append(
            f"{label}: {silent:.0%} of groups of {group_size} will be all right or all wrong and"
            " teach nothing; choose other problems or larger groups."
        )
    if row["entropy"] is not None and row["entropy"] < LOW_ENTROPY_NATS:
        told.append(
            f"{label}: entropy {row['entropy']:.3f} nats per token is below {LOW_ENTROPY_NATS}; RL"
            " may have little left to explore."
        )
    if row["regime"] == "severe over-training":
        told.append(f"{label}: its held-out loss is over 1.10 times its lowest; stop SFT earlier.")
    if row["completions_clipped_ratio"] > MUCH:
        told.append(f"{label}: {row['completions_clipped_ratio']:.0%} of its answers were cut off.")
    return told


def interval(score: dict[str, float], sign: str = "") -> str:
    """.441 [.379, .500]"""
    return f"{score['value']:{sign}.3f} [{score['low']:{sign}.3f}, {score['high']:{sign}.3f}]"
