"""PEAR's weights against the paper's formulas in plain Python, and the identities they imply."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.losses.pear import pear_weights

LEVELS = ("token", "block", "sequence")
PAPER_CLIPS = {"clip_log_ratio": (-0.08, 0.3), "clip_log_weight": (-10.0, 5.0)}
NO_CLIPS = {"clip_log_ratio": (-1e9, 1e9), "clip_log_weight": (-1e9, 1e9)}


def slow_weights(target, behavior, ids, *, level, discount, block_size, clip_log_ratio, clip_log_weight):
    """Loop over responses and tokens, with one sum over the suffix for each token."""
    weights = []
    for _, members in itertools.groupby(range(len(ids)), key=lambda i: ids[i]):
        members = list(members)
        length = len(members)
        delta = np.array([target[i] - behavior[i] for i in members], dtype=np.float64)
        delta = np.minimum(np.maximum(delta, clip_log_ratio[0]), clip_log_ratio[1])
        for t in range(1, length + 1):
            if level == "token":
                log_weight = (length - t) * math.log(discount) + delta[t:].sum()
            elif level == "block":
                end_of_block = min(math.ceil(t / block_size) * block_size, length)
                log_weight = (length - end_of_block) * math.log(discount)
                log_weight += delta[end_of_block:].sum()
            else:
                log_weight = delta.sum()
            weights.append(math.exp(min(max(log_weight, clip_log_weight[0]), clip_log_weight[1])))
    return np.array(weights)


def random_pack(rng, lengths, dtype=np.float64):
    """Return log-probs of both policies and ids for responses of the given lengths, end to end."""
    tokens = sum(lengths)
    behavior = -rng.exponential(1.0, tokens).astype(dtype)
    spread = rng.choice([0.0, 0.02, 0.1, 1.0, 10.0])
    target = (behavior + spread * rng.standard_normal(tokens) + rng.normal(0, 0.05)).astype(dtype)
    names = rng.permutation(10 * len(lengths))[: len(lengths)] - 3
    return target, behavior, np.repeat(names, lengths)


def random_settings(rng):
    return {
        "discount": float(rng.choice([1.0, 0.999, 0.9, 0.3, rng.uniform(0.01, 1.0)])),
        "block_size": int(rng.choice([1, 2, 3, 4, 7, 15, 64])),
        "clip_log_ratio": [(-0.08, 0.3), (-0.5, 0.5), (-20.0, 20.0)][rng.integers(3)],
        "clip_log_weight": [(-10.0, 5.0), (-1.0, 0.5), (-300.0, 300.0)][rng.integers(3)],
    }


def tensors(pack):
    return tuple(torch.from_numpy(array) for array in pack)


@pytest.mark.parametrize("level", LEVELS)
def test_random_packs_equal_the_formulas(level):
    rng = np.random.default_rng(LEVELS.index(level))
    for _ in range(300):
        lengths = rng.choice([1, 2, 3, 4, 5, 9, 17, 40], size=rng.integers(1, 7))
        pack, chosen = random_pack(rng, lengths), random_settings(rng)
        expected = slow_weights(*pack, level=level, **chosen)
        weights = pear_weights(*tensors(pack), level=level, **chosen).numpy()
        np.testing.assert_allclose(weights, expected, rtol=1e-9, err_msg=f"{lengths} {chosen}")


def padded_weights(target, behavior, lengths, *, level, discount, block_size, clip_log_ratio, clip_log_weight):
    """The paper's pseudo-code: one padded and masked row per response."""
    length, position = np.array(lengths)[:, None], np.arange(max(lengths))
    mask = position < length
    delta = np.zeros(mask.shape)
    delta[mask] = np.clip(target - behavior, *clip_log_ratio)
    suffix = np.cumsum(delta[:, ::-1], axis=1)[:, ::-1] - delta
    if level == "token":
        log_weights = (length - 1 - position) * math.log(discount) + suffix
    elif level == "block":
        last = np.minimum(position // block_size * block_size + block_size, length) - 1
        log_weights = (length - 1 - last) * math.log(discount)
        log_weights += np.take_along_axis(suffix, last, axis=1)
    else:
        log_weights = np.broadcast_to(delta.sum(axis=1, keepdims=True), mask.shape)
    return np.exp(np.clip(log_weights, *clip_log_weight))[mask]


@pytest.mark.parametrize("level", LEVELS)
def test_long_responses_equal_the_padded_pseudo_code(level):
    """Lengths from 1 to 10,000, evenly over orders of magnitude; inputs in both dtypes."""
    rng = np.random.default_rng(11)
    for number in range(18):
        dtype = (np.float64, np.float32)[number % 2]
        lengths = np.exp(rng.uniform(0, math.log(10_001), rng.integers(1, 8))).astype(int).tolist()
        lengths += [[], [1], [10_000]][number % 3]
        pack, chosen = random_pack(rng, lengths, dtype), random_settings(rng)
        target, behavior = (array.astype(np.float64) for array in pack[:2])
        expected = padded_weights(target, behavior, lengths, level=level, **chosen)
        weights = pear_weights(*tensors(pack), level=level, **chosen).numpy()
        assert weights.dtype == dtype
        # float32 holds e^-300 as 0 and e^300 as infinity: only what it can hold is compared.
        held = (dtype == np.float64) | (np.abs(np.log(expected)) < 80)
        rtol = 1e-8 if dtype == np.float64 else 3e-7
        np.testing.assert_allclose(weights[held], expected[held], rtol=rtol, err_msg=f"{chosen}")


def test_weights_are_products_of_the_ratios():
    rng = np.random.default_rng(3)
    pi, beta = rng.uniform(0.2, 1, 6), rng.uniform(0.2, 1, 6)
    pack = tensors((np.log(pi), np.log(beta), np.zeros(6, int)))
    token = pear_weights(*pack, level="token", discount=0.9, **NO_CLIPS)
    block = pear_weights(*pack, level="block", discount=0.9, block_size=4, **NO_CLIPS)
    sequence = pear_weights(*pack, level="sequence", discount=0.9, **NO_CLIPS)
    products = [0.9 ** (5 - t) * math.prod((pi / beta)[t + 1 :]) for t in range(6)]
    np.testing.assert_allclose(token, products)
    np.testing.assert_allclose(block, [products[3]] * 4 + [1.0] * 2)
    np.testing.assert_allclose(sequence, [math.prod(pi / beta)] * 6)


@pytest.mark.parametrize("level", LEVELS)
def test_equal_policies_without_discount_give_exactly_one(level):
    """Also next to responses on which the policies differ: their sums leave no residue."""
    rng = np.random.default_rng(0)
    target, behavior, ids = random_pack(rng, [30, 50, 20], np.float32)
    target[30:80] = behavior[30:80]
    weights = pear_weights(*tensors((target, behavior, ids)), level=level, discount=1.0)
    assert torch.equal(weights[30:80], torch.ones(50))


def test_last_token_has_weight_one_at_token_level():
    rng = np.random.default_rng(1)
    lengths = [1, 6, 1, 40, 3]
    weights = pear_weights(*tensors(random_pack(rng, lengths)), level="token", discount=0.5)
    assert torch.equal(weights[np.cumsum(lengths) - 1], torch.ones(5, dtype=torch.float64))


def test_blocks_of_one_token_equal_token_level():
    rng = np.random.default_rng(2)
    pack = tensors(random_pack(rng, [1, 13, 8]))
    assert torch.equal(pear_weights(*pack, level="block", block_size=1), pear_weights(*pack, level="token"))


@pytest.mark.parametrize("block_size", [13, 14, 1000])
def test_one_block_per_response_gives_exactly_one(block_size):
    rng = np.random.default_rng(3)
    pack = tensors(random_pack(rng, [1, 13, 8], np.float32))
    weights = pear_weights(*pack, level="block", block_size=block_size)
    assert torch.equal(weights, torch.ones(22))


def test_sequence_level_is_the_clipped_sum_without_discount():
    delta = torch.tensor([0.1, -0.05, 0.2, 0.25], dtype=torch.float64)
    pack = (delta - 1, torch.full_like(delta, -1), torch.zeros(4, dtype=torch.int64))
    weights = pear_weights(*pack, level="sequence", discount=0.5)
    torch.testing.assert_close(weights, torch.full_like(delta, math.exp(0.5)))
    capped = pear_weights(*pack, level="sequence", clip_log_weight=(-10.0, 0.4))
    torch.testing.assert_close(capped, torch.full_like(delta, math.exp(0.4)))


def test_log_ratios_are_clipped_before_the_sum_and_log_weights_after():
    """Ten nats on one token count as 0.3, and 40 such tokens as 5."""
    behavior = torch.full((41,), -10.0, dtype=torch.float64)
    ids = torch.zeros(41, dtype=torch.int64)
    weights = pear_weights(torch.zeros_like(behavior), behavior, ids, level="token", discount=1.0)
    torch.testing.assert_close(weights[-3:].log(), torch.tensor([0.6, 0.3, 0.0]).double())
    torch.testing.assert_close(weights[0].log(), torch.tensor(5.0).double())
    floor = pear_weights(behavior * 200, behavior, ids.repeat(1), level="token", discount=1.0)
    torch.testing.assert_close(floor[0].log(), torch.tensor(-0.08 * 40).double())


@pytest.mark.parametrize("level", LEVELS)
def test_weights_stay_within_the_clip(level):
    pack = tensors(random_pack(np.random.default_rng(5), [400, 3, 900]))
    weights = pear_weights(*pack, level=level, **PAPER_CLIPS)
    assert weights.min() >= math.exp(-10) and weights.max() <= math.exp(5)


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_neighbors_and_padding_change_nothing(level, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=6))
    target, behavior, ids = random_pack(rng, lengths, np.float32)
    padding = np.zeros(data.draw(st.integers(1, 50)), np.float32)
    packed = pear_weights(
        *tensors(
            (
                np.concatenate([target, padding]),
                np.concatenate([behavior, padding]),
                np.concatenate([ids, np.full(len(padding), -99)]),
            )
        ),
        level=level,
    )
    ends = np.cumsum(lengths)
    for start, end in zip(ends - lengths, ends, strict=True):
        alone = pear_weights(*tensors((target, behavior, ids)), level=level)[start:end]
        single = pear_weights(*tensors((target[start:end], behavior[start:end], ids[start:end])), level=level)
        torch.testing.assert_close(packed[start:end], single, rtol=3e-7, atol=0)
        torch.testing.assert_close(alone, single, rtol=3e-7, atol=0)


def test_an_id_may_return_after_another():
    rng = np.random.default_rng(8)
    target, behavior, _ = random_pack(rng, [4, 5, 6])
    returning = np.repeat([1, 0, 1], [4, 5, 6])
    fresh = np.repeat([0, 1, 2], [4, 5, 6])
    assert torch.equal(
        pear_weights(*tensors((target, behavior, returning)), level="token"),
        pear_weights(*tensors((target, behavior, fresh)), level="token"),
    )


@pytest.mark.parametrize("level", LEVELS)
def test_no_gradient_flows_through_the_weights(level):
    target, behavior, ids = tensors(random_pack(np.random.default_rng(9), [5, 9]))
    target.requires_grad_()
    behavior.requires_grad_()
    weights = pear_weights(target, behavior, ids, level=level)
    assert not weights.requires_grad
    (weights * target).sum().backward()
    assert torch.equal(target.grad, weights)
    assert behavior.grad is None


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shape_and_dtype_are_those_of_the_target(level, dtype):
    for tokens in (0, 1, 6):
        target = torch.zeros(tokens, dtype=dtype)
        ids = torch.zeros(tokens, dtype=torch.int32)
        weights = pear_weights(target, target.float() - 0.01, ids, level=level)
        assert weights.shape == (tokens,) and weights.dtype == dtype


@pytest.mark.parametrize("level", LEVELS)
def test_no_host_sync(level):
    """On meta tensors every access to a value fails."""
    target = torch.empty(9, device="meta")
    ids = torch.empty(9, dtype=torch.int64, device="meta")
    assert pear_weights(target, target, ids, level=level).shape == (9,)


def test_inputs_are_not_modified():
    pack = tensors(random_pack(np.random.default_rng(10), [5, 9]))
    before = [tensor.clone() for tensor in pack]
    pear_weights(*pack, level="block")
    assert all(torch.equal(a, b) for a, b in zip(pack, before, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"level": "tokens"}, r"^level: expected one of \[.*\], got 'tokens'$"),
        ({"level": "none"}, "level: .*got 'none'"),
        ({"discount": 0.0}, "^discount: expected .*, got 0.0$"),
        ({"discount": 1.01}, "discount: .*got 1.01"),
        ({"discount": math.nan}, "discount: .*got nan"),
        ({"block_size": 0}, "^block_size: expected at least 1, got 0$"),
    ],
)
def test_settings_out_of_range_are_refused(changed, message):
    logprobs, ids = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        pear_weights(logprobs, logprobs, ids, **{"level": "token", **changed})


@pytest.mark.parametrize("shapes", [((3,), (4,), (3,)), ((3,), (3,), (2,)), ((1, 3), (1, 3), (1, 3)), ((), (), ())])
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="expected"):
        pear_weights(*(torch.zeros(shape) for shape in shapes), level="token")


def test_prefix_sums_over_hundred_thousand_tokens_stay_exact():
    """A response after 100,000 tokens at the upper clip has the same weights as alone."""
    random.seed(0)
    delta = torch.tensor([random.uniform(-0.08, 0.3) for _ in range(12)], dtype=torch.float64)
    before = torch.full((100_000,), 0.3, dtype=torch.float64)
    target = torch.cat([before, delta]).float()
    ids = torch.cat([torch.zeros(100_000), torch.ones(12)]).long()
    packed = pear_weights(target, torch.zeros_like(target), ids, level="token")[-12:]
    alone = pear_weights(target[-12:], torch.zeros(12), ids[-12:], level="token")
    torch.testing.assert_close(packed, alone, rtol=2e-7, atol=0)
