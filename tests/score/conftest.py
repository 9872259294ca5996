"""Fixtures of the tokenization tests."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache

import pytest

from pear_ray.config import Columns
from pear_ray.score.tokenize import TokenizeConfig, TokenizeRows

TOKENIZE_CONFIG = TokenizeConfig(
    columns=Columns(),
    sources=frozenset({"tutor", "coder"}),
    default_source=None,
    fallback_scorer=None,
    heldout_fraction=0.0,
    max_model_len=12,
    truncates=False,
    keeps_recorded=True,
    num_embeddings=128,
)


@pytest.fixture(scope="session")
def make_tokenizer(tiny_model, tmp_path_factory):
    """Makes a TokenizeRows with changes to the config or the chat template."""

    @cache
    def make(template=None, **changes):
        path = tiny_model(False)
        if template is not None:
            path = shutil.copytree(path, tmp_path_factory.mktemp("template") / "model")
            (path / "chat_template.jinja").write_text(template)
        return TokenizeRows(str(path), replace(TOKENIZE_CONFIG, **changes))

    return make
