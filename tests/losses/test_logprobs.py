"""Chunked log-probabilities against a softmax over all logits at once, in float64."""

from __future__ import annotations

import math
import weakref
from itertools import chain

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pear_ray.losses.logprobs import chunks, predicted_logprobs

WIDTH = 6
# Vocabulary, positions, requested tokens per position, positions per chunk.
SHAPES = {
    "one chunk": (11, 16, 1, 100),
    "exactly one chunk": (11, 16, 4, 16),
    "chunks of five, one left": (11, 16, 4, 5),
    "chunks of four, none left": (11, 16, 1, 4),
    "chunks of one": (11, 16, 2, 1),
    "less than one": (11, 5, 1, 0.5),
    "one position": (11, 1, 1, 4),
    "large vocabulary": (50_000, 7, 3, 2),
}
ONE_AND_MANY = [SHAPES["exactly one chunk"], SHAPES["chunks of five, one left"]]


class Case:
    """Random inputs; every other position requests one token twice if it requests several."""

    def __init__(self, vocabulary, num_positions, num_requested, per_chunk, dtype=torch.float32, scale=1.0):
        generator = torch.Generator().manual_seed(vocabulary + num_positions)
        hidden = torch.randn(num_positions + 3, WIDTH, generator=generator) * scale
        weight = torch.randn(vocabulary, WIDTH, generator=generator)
        self.hidden = hidden.to(dtype).requires_grad_()
        self.weight = torch.nn.Parameter(weight.to(dtype))
        # Out of order, and the first position twice if there are several.
        order = torch.randperm(num_positions + 2, generator=generator)[:num_positions] + 1
        self.predicted = torch.cat([order[:-1], order[:1]]) if num_positions else order
        shape = (num_positions, num_requested)
        self.ids = torch.randint(0, vocabulary, shape, generator=generator)
        self.ids[::2, -1] = self.ids[::2, 0]
        self.coefficients = torch.randn(shape, generator=generator)
        # Logits and softmax of a position: two float32 per vocabulary entry.
        self.logits_mib = per_chunk * vocabulary * 8 / 2**20

    def compute(self, top_k=0):
        inputs = (self.hidden, self.weight, self.ids, self.predicted)
        return predicted_logprobs(*inputs, logits_mib=self.logits_mib, top_k=top_k)

    def gradients(self, logprobs, *leaves, **options):
        leaves = leaves or (self.hidden, self.weight)
        return torch.autograd.grad((logprobs * self.coefficients).sum(), leaves, **options)

    def expected(self, top_k=0):
        """Return log-probs, entropies, masses, and the gradients, all in float64."""
        hidden = self.hidden.detach().double().requires_grad_()
        weight = self.weight.detach().double().requires_grad_()
        log_softmax = torch.log_softmax(hidden[self.predicted - 1] @ weight.T, -1)
        logprobs = log_softmax.gather(-1, self.ids)
        probs = log_softmax.detach().exp()
        masses = probs.sort(-1, descending=True).values[:, :top_k].sum(-1)
        values = logprobs.detach(), torch.special.entr(probs).sum(-1), masses
        return values, self.gradients(logprobs, hidden, weight)


def assert_close(values, expected, tolerance):
    """Assert that values agree relative to each value or to the largest."""
    for one, other in zip(values, expected, strict=True):
        largest = float(other.abs().max())
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_equal_the_full_softmax(shape):
    case = Case(*shape)
    values, gradients = case.expected(top_k=3)
    outputs = case.compute(top_k=3)
    assert all(value.dtype == torch.float32 for value in outputs)
    assert outputs.logprobs.shape == shape[1:3]
    assert_close(outputs, values, 2e-6)
    # The gradient of a hidden state is a float32 sum over the vocabulary.
    assert_close(case.gradients(outputs.logprobs), gradients, 5e-6 + 2e-9 * shape[0])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bfloat16_weights_give_float32_logprobs(shape):
    """Logits of up to 30, which bfloat16 holds to two digits."""
    case = Case(*shape, dtype=torch.bfloat16, scale=3.0)
    values, gradients = case.expected(top_k=3)
    outputs = case.compute(top_k=3)
    assert all(value.dtype == torch.float32 for value in outputs)
    assert_close(outputs, values, 5e-6)
    computed = case.gradients(outputs.logprobs)
    assert all(gradient.dtype == torch.bfloat16 for gradient in computed)
    assert_close(computed, gradients, 2e-2)


def test_gradients_of_chunks_are_summed_in_float32():
    """A bfloat16 sum of equal terms stops growing after 256 of them."""
    case = Case(11, 1000, 1, 1, dtype=torch.bfloat16)
    case.hidden.data.abs_()
    case.ids.fill_(3)
    case.coefficients.fill_(1.0)
    _, (_, expected) = case.expected()
    assert_close(case.gradients(case.compute().logprobs, case.weight), [expected], 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ONE_AND_MANY)
def test_a_second_backward_pass_repeats_the_first(shape, dtype):
    case = Case(*shape, dtype=dtype)
    logprobs = case.compute().logprobs
    first = case.gradients(logprobs, retain_graph=True)
    second = case.gradients(logprobs, retain_graph=True)
    assert_close(second, [gradient.double() for gradient in first], 1e-6)


@pytest.mark.parametrize("num_requested", [1, 4])
def test_no_positions_still_give_gradients_to_every_parameter(num_requested):
    """Under ZeRO-3 a rank without trainable tokens runs the same backward pass as the others."""
    case = Case(11, 0, num_requested, 4)
    outputs = case.compute(top_k=3)
    assert outputs.logprobs.shape == (0, num_requested)
    assert outputs.entropies.shape == outputs.top_masses.shape == (0,)
    for gradient, leaf in zip(case.gradients(outputs.logprobs), (case.hidden, case.weight), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("shape", ONE_AND_MANY)
def test_only_inputs_that_require_a_gradient_get_one(shape):
    case = Case(*shape)
    hidden_grad, weight_grad = case.gradients(case.compute().logprobs)
    case.weight.requires_grad_(False)
    (case.compute().logprobs * case.coefficients).sum().backward()
    assert torch.equal(case.hidden.grad, hidden_grad) and case.weight.grad is None
    case.weight.requires_grad_(True)
    case.hidden = case.hidden.detach()
    (case.compute().logprobs * case.coefficients).sum().backward()
    assert torch.equal(case.weight.grad, weight_grad) and case.hidden.grad is None


@pytest.mark.parametrize("shape", ONE_AND_MANY)
def test_without_gradients_the_values_are_the_same(shape):
    case = Case(*shape)
    outputs = case.compute(top_k=2)
    assert outputs.logprobs.requires_grad
    assert not outputs.entropies.requires_grad and not outputs.top_masses.requires_grad
    with torch.no_grad():
        plain = case.compute(top_k=2)
    assert not plain.logprobs.requires_grad
    assert all(torch.equal(one, other) for one, other in zip(plain, outputs, strict=True))


@pytest.mark.parametrize("shape", ONE_AND_MANY)
def test_a_weight_whose_memory_is_taken_away_between_the_passes(shape):
    """As DeepSpeed does under ZeRO-3: `data` is emptied, and filled again elsewhere."""
    case = Case(*shape)
    expected = case.gradients(case.compute().logprobs)
    logprobs = case.compute().logprobs
    values = case.weight.data
    case.weight.data = torch.empty(0)
    case.weight.data = values.clone()
    values.fill_(math.nan)
    for one, other in zip(case.gradients(logprobs), expected, strict=True):
        assert torch.equal(one, other)


def test_masses_and_entropies_by_hand():
    """The model predicts 1/2, 1/4, 1/8, 1/8 at one position and 1/4 each at the other."""
    hidden = torch.tensor([[1.0], [0.0], [0.0]])
    weight = torch.tensor([[8.0], [4.0], [2.0], [2.0]]).log()
    ids, predicted = torch.tensor([[0], [3]]), torch.tensor([1, 2])
    for top_k, masses in [(0, [0, 0]), (1, [0.5, 0.25]), (2, [0.75, 0.5]), (4, [1, 1])]:
        outputs = predicted_logprobs(hidden, weight, ids, predicted, logits_mib=1, top_k=top_k)
        torch.testing.assert_close(outputs.top_masses, torch.tensor(masses).float())
        bits = torch.tensor([1.75, 2.0])
        torch.testing.assert_close(outputs.entropies, bits * math.log(2))
        torch.testing.assert_close(outputs.logprobs[:, 0], torch.tensor([-1.0, -2.0]) * math.log(2))


@pytest.mark.parametrize("shape", ONE_AND_MANY)
def test_huge_logits_do_not_overflow(shape):
    case = Case(*shape, scale=1e4)
    outputs = case.compute(top_k=3)
    assert all(value.isfinite().all() for value in outputs)
    assert (outputs.logprobs <= 0).all() and (outputs.entropies >= 0).all()
    assert all(gradient.isfinite().all() for gradient in case.gradients(outputs.logprobs))


def test_other_hidden_states_do_not_matter():
    """A position's log-prob depends on the previous hidden state only."""
    case = Case(11, 5, 1, 2)
    with torch.no_grad():
        before = case.compute().logprobs
        others = torch.ones(len(case.hidden), dtype=torch.bool)
        others[case.predicted - 1] = False
        case.hidden[others] = 7.0
        assert torch.equal(case.compute().logprobs, before)
        case.hidden[case.predicted[0] - 1] = 7.0
        assert not torch.equal(case.compute().logprobs[0], before[0])


@pytest.mark.parametrize(("positions", "size"), [(0, 3), (1, 3), (3, 3), (7, 3), (7, 1), (7, 100)])
def test_chunks_cover_every_position_once_and_in_order(positions, size):
    parts = list(chunks(positions, size))
    assert len(parts) == max(1, math.ceil(positions / size))
    covered = [range(positions)[part] for part in parts]
    assert list(chain(*covered)) == list(range(positions))
    assert all(len(part) <= size for part in covered)


class Memory(TorchDispatchMode):
    """Records the largest tensor that an operation returned, in elements, and the bytes of live tensors, now and at
    peak."""

    def __init__(self):
        super().__init__()
        self.largest, self.peak, self.living = 0, 0, {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.living:
                    self.living[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.living.pop, storage.data_ptr())
        self.peak = max(self.peak, self.now)
        return result

    @property
    def now(self):
        return sum(self.living.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_exist_for_one_chunk_at_a_time(dtype):
    """Neither in the forward nor in the backward pass, which recomputes them."""
    case = Case(1000, 64, 1, 10, dtype=dtype)
    chunk = 10 * 1000
    with Memory() as memory:
        logprobs = case.compute(top_k=2).logprobs
        assert memory.now < 4 * chunk
        case.gradients(logprobs)
    assert memory.largest == chunk
    # All logits are 6.4 chunks; weight and hidden states are 0.7.
    assert memory.peak < 4 * 4 * chunk


def test_the_softmax_is_kept_if_it_fits_until_the_backward_pass():
    case = Case(1000, 64, 1, 64)
    softmax = 4 * 64 * 1000
    with Memory() as memory:
        logprobs = case.compute().logprobs
        assert softmax < memory.now < 1.5 * softmax
        case.gradients(logprobs, retain_graph=True)
        assert memory.now < softmax
        with torch.no_grad():
            case.compute()
        assert memory.now < softmax
