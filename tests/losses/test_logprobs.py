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
# Words, places, tokens asked for at each, places in a chunk.
SHAPES = {
    "one chunk": (11, 16, 1, 100),
    "just one chunk": (11, 16, 4, 16),
    "chunks of five, one left": (11, 16, 4, 5),
    "chunks of four, none left": (11, 16, 1, 4),
    "one by one": (11, 16, 2, 1),
    "not even one": (11, 5, 1, 0.5),
    "one place": (11, 1, 1, 4),
    "many words": (50_000, 7, 3, 2),
}
ONE_AND_MANY = [SHAPES["just one chunk"], SHAPES["chunks of five, one left"]]


class Case:
    """Random inputs; every second place asks for one token twice if it asks for several."""

    def __init__(
        self, vocabulary, num_places, num_asked, per_chunk, dtype=torch.float32, scale=1.0
    ):
        generator = torch.Generator().manual_seed(vocabulary + num_places)
        hidden = torch.randn(num_places + 3, WIDTH, generator=generator) * scale
        weight = torch.randn(vocabulary, WIDTH, generator=generator)
        self.hidden = hidden.to(dtype).requires_grad_()
        self.weight = torch.nn.Parameter(weight.to(dtype))
        # Not in order, and where there are several the first stands twice.
        order = torch.randperm(num_places + 2, generator=generator)[:num_places] + 1
        self.predicted = torch.cat([order[:-1], order[:1]]) if num_places else order
        shape = (num_places, num_asked)
        self.ids = torch.randint(0, vocabulary, shape, generator=generator)
        self.ids[::2, -1] = self.ids[::2, 0]
        self.coefficients = torch.randn(shape, generator=generator)
        # Logits and softmax of a place: two float32 for each word.
        self.logits_mib = per_chunk * vocabulary * 8 / 2**20

    def read(self, top_k=0):
        inputs = (self.hidden, self.weight, self.ids, self.predicted)
        return predicted_logprobs(*inputs, logits_mib=self.logits_mib, top_k=top_k)

    def gradients(self, logprobs, *leaves, **options):
        leaves = leaves or (self.hidden, self.weight)
        return torch.autograd.grad((logprobs * self.coefficients).sum(), leaves, **options)

    def expected(self, top_k=0):
        """Log-probs, entropies, masses; gradients of hidden states and weight. All in float64."""
        hidden = self.hidden.detach().double().requires_grad_()
        weight = self.weight.detach().double().requires_grad_()
        log_softmax = torch.log_softmax(hidden[self.predicted - 1] @ weight.T, -1)
        logprobs = log_softmax.gather(-1, self.ids)
        probs = log_softmax.detach().exp()
        masses = probs.sort(-1, descending=True).values[:, :top_k].sum(-1)
        values = logprobs.detach(), torch.special.entr(probs).sum(-1), masses
        return values, self.gradients(logprobs, hidden, weight)


def close(found, expected, tolerance):
    """Within a share of each value, or of the largest of all."""
    for one, other in zip(found, expected, strict=True):
        largest = float(other.abs().max())
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_those_of_the_full_softmax(shape):
    case = Case(*shape)
    values, gradients = case.expected(top_k=3)
    reading = case.read(top_k=3)
    assert all(value.dtype == torch.float32 for value in reading)
    assert reading.logprobs.shape == shape[1:3]
    close(reading, values, 2e-6)
    # That of a hidden state is a float32 sum over all words.
    close(case.gradients(reading.logprobs), gradients, 5e-6 + 2e-9 * shape[0])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bfloat16_weights_give_float32_logprobs(shape):
    """Logits of up to 30, of which bfloat16 would hold two digits."""
    case = Case(*shape, dtype=torch.bfloat16, scale=3.0)
    values, gradients = case.expected(top_k=3)
    reading = case.read(top_k=3)
    assert all(value.dtype == torch.float32 for value in reading)
    close(reading, values, 5e-6)
    found = case.gradients(reading.logprobs)
    assert all(gradient.dtype == torch.bfloat16 for gradient in found)
    close(found, gradients, 2e-2)


def test_the_gradients_of_many_chunks_are_summed_in_float32():
    """A bfloat16 sum of like terms stands still after 256 of them."""
    case = Case(11, 1000, 1, 1, dtype=torch.bfloat16)
    case.hidden.data.abs_()
    case.ids.fill_(3)
    case.coefficients.fill_(1.0)
    _, (_, of_weight) = case.expected()
    close(case.gradients(case.read().logprobs, case.weight), [of_weight], 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ONE_AND_MANY)
def test_a_second_backward_pass_gives_the_same(shape, dtype):
    case = Case(*shape, dtype=dtype)
    logprobs = case.read().logprobs
    first = case.gradients(logprobs, retain_graph=True)
    second = case.gradients(logprobs, retain_graph=True)
    close(second, [gradient.double() for gradient in first], 1e-6)


@pytest.mark.parametrize("num_asked", [1, 4])
def test_nothing_predicted_still_reaches_every_parameter(num_asked):
    """Under ZeRO-3 a rank without a trainable token runs the same backward pass as the others."""
    case = Case(11, 0, num_asked, 4)
    reading = case.read(top_k=3)
    assert reading.logprobs.shape == (0, num_asked)
    assert reading.entropies.shape == reading.top_masses.shape == (0,)
    for gradient, leaf in zip(
        case.gradients(reading.logprobs), (case.hidden, case.weight), strict=True
    ):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("shape", ONE_AND_MANY)
def test_only_what_wants_a_gradient_gets_one(shape):
    case = Case(*shape)
    of_hidden, of_weight = case.gradients(case.read().logprobs)
    case.weight.requires_grad_(False)
    (case.read().logprobs * case.coefficients).sum().backward()
    assert torch.equal(case.hidden.grad, of_hidden) and case.weight.grad is None
    case.weight.requires_grad_(True)
    case.hidden = case.hidden.detach()
    (case.read().logprobs * case.coefficients).sum().backward()
    assert torch.equal(case.weight.grad, of_weight) and case.hidden.grad is None


@pytest.mark.parametrize("shape", ONE_AND_MANY)
def test_without_gradients_the_values_are_the_same(shape):
    case = Case(*shape)
    reading = case.read(top_k=2)
    assert reading.logprobs.requires_grad
    assert not reading.entropies.requires_grad and not reading.top_masses.requires_grad
    with torch.no_grad():
        plain = case.read(top_k=2)
    assert not plain.logprobs.requires_grad
    assert all(torch.equal(one, other) for one, other in zip(plain, reading, strict=True))


@pytest.mark.parametrize("shape", ONE_AND_MANY)
def test_a_weight_whose_memory_is_taken_away_between_the_passes(shape):
    """As DeepSpeed does under ZeRO-3: `data` is emptied, and filled again elsewhere."""
    case = Case(*shape)
    expected = case.gradients(case.read().logprobs)
    logprobs = case.read().logprobs
    values = case.weight.data
    case.weight.data = torch.empty(0)
    case.weight.data = values.clone()
    values.fill_(math.nan)
    for found, wanted in zip(case.gradients(logprobs), expected, strict=True):
        assert torch.equal(found, wanted)


def test_masses_and_entropies_by_hand():
    """The model gives the words 1/2, 1/4, 1/8, 1/8 at one place and 1/4 each at the other."""
    hidden = torch.tensor([[1.0], [0.0], [0.0]])
    weight = torch.tensor([[8.0], [4.0], [2.0], [2.0]]).log()
    ids, predicted = torch.tensor([[0], [3]]), torch.tensor([1, 2])
    for top_k, masses in [(0, [0, 0]), (1, [0.5, 0.25]), (2, [0.75, 0.5]), (4, [1, 1])]:
        reading = predicted_logprobs(hidden, weight, ids, predicted, logits_mib=1, top_k=top_k)
        torch.testing.assert_close(reading.top_masses, torch.tensor(masses).float())
        bits = torch.tensor([1.75, 2.0])
        torch.testing.assert_close(reading.entropies, bits * math.log(2))
        torch.testing.assert_close(reading.logprobs[:, 0], torch.tensor([-1.0, -2.0]) * math.log(2))


@pytest.mark.parametrize("shape", ONE_AND_MANY)
def test_huge_logits_overflow_nowhere(shape):
    case = Case(*shape, scale=1e4)
    reading = case.read(top_k=3)
    assert all(value.isfinite().all() for value in reading)
    assert (reading.logprobs <= 0).all() and (reading.entropies >= 0).all()
    assert all(gradient.isfinite().all() for gradient in case.gradients(reading.logprobs))


def test_other_places_do_not_matter():
    """A place's log-prob comes from the hidden state just before it and from no other."""
    case = Case(11, 5, 1, 2)
    with torch.no_grad():
        before = case.read().logprobs
        behind = torch.ones(len(case.hidden), dtype=torch.bool)
        behind[case.predicted - 1] = False
        case.hidden[behind] = 7.0
        assert torch.equal(case.read().logprobs, before)
        case.hidden[case.predicted[0] - 1] = 7.0
        assert not torch.equal(case.read().logprobs[0], before[0])


@pytest.mark.parametrize(("places", "size"), [(0, 3), (1, 3), (3, 3), (7, 3), (7, 1), (7, 100)])
def test_chunks_cover_every_place_once_and_in_order(places, size):
    parts = list(chunks(places, size))
    assert len(parts) == max(1, math.ceil(places / size))
    covered = [range(places)[part] for part in parts]
    assert list(chain(*covered)) == list(range(places))
    assert all(len(part) <= size for part in covered)


class Memory(TorchDispatchMode):
    """The largest tensor that any operation gave back, in elements, and the bytes of those that
    live: now, and at most."""

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
def test_logits_never_exist_for_more_than_a_chunk(dtype):
    """Neither in the forward pass nor in the backward pass, which makes them again."""
    case = Case(1000, 64, 1, 10, dtype=dtype)
    chunk = 10 * 1000
    with Memory() as memory:
        logprobs = case.read(top_k=2).logprobs
        assert memory.now < 4 * chunk
        case.gradients(logprobs)
    assert memory.largest == chunk
    # All logits are 6.4 chunks; weight and hidden states are 0.7.
    assert memory.peak < 4 * 4 * chunk


def test_the_softmax_is_kept_where_it_fits_and_only_until_it_was_used():
    case = Case(1000, 64, 1, 64)
    softmax = 4 * 64 * 1000
    with Memory() as memory:
        logprobs = case.read().logprobs
        assert softmax < memory.now < 1.5 * softmax
        case.gradients(logprobs, retain_graph=True)
        assert memory.now < softmax
        with torch.no_grad():
            case.read()
        assert memory.now < softmax
