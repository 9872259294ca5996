"""`import pear_ray` and what it offers need torch and numpy alone."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pear_ray

PROGRAM = """
import sys
import pear_ray
assert not {"torch", "pydantic", "ray"} & set(sys.modules)
import torch
weights = pear_ray.pear_weights(
    torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.5]), torch.tensor([0, 0]), level="token"
)
assert weights.shape == (2,) and not weights.requires_grad
for kind in ("grpo", "dr_grpo", "rloo"):
    assert pear_ray.group_advantages(torch.tensor([0.0, 1.0]), kind).shape == (2,)
assert pear_ray.pass_at_k(10, 5, 1) == 0.5
assert issubclass(pear_ray.ConfigError, ValueError) and pear_ray.__version__
heavy = {"pydantic", "ray", "pyarrow", "vllm", "deepspeed", "transformers", "scipy"}
print(*heavy & set(sys.modules))
"""


def test_the_public_functions_import_torch_and_numpy_alone():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == []


def test_public_names_and_signatures():
    for name in pear_ray.__all__:
        assert getattr(pear_ray, name)
    parameters = inspect.signature(pear_ray.pear_weights).parameters
    assert list(parameters) == [
        "target_logprobs", "behavior_logprobs", "sequence_ids", "level", "discount", "block_size",
        "clip_log_ratio", "clip_log_weight",
    ]  # fmt: skip
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[3:])
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert defaults == {
        "discount": 0.999, "block_size": 4, "clip_log_ratio": (-0.08, 0.3),
        "clip_log_weight": (-10.0, 5.0),
    }  # fmt: skip
    assert list(inspect.signature(pear_ray.group_advantages).parameters) == ["rewards_G", "kind"]
    assert list(inspect.signature(pear_ray.pass_at_k).parameters) == [
        "num_samples", "num_correct", "k",
    ]  # fmt: skip
