"""Fixtures of the tokenization tests."""

from __future__ import annotations

import json
import shutil
from functools import cache

import pytest

from pear_ray.config import Job
from pear_ray.score.tokenize import TokenizeRows


@pytest.fixture(scope="session")
def make_tokenizer(tiny_model, tmp_path_factory):
    """Makes a TokenizeRows with these keys of [corpus], or another context, chat template or number of embeddings."""

    @cache
    def make(template=None, num_embeddings=None, max_model_len=12, **corpus):
        path = tiny_model(False)
        if template is not None or num_embeddings is not None:
            path = shutil.copytree(path, tmp_path_factory.mktemp("changed") / "model")
        if template is not None:
            (path / "chat_template.jinja").write_text(template)
        if num_embeddings is not None:
            config = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(config | {"vocab_size": num_embeddings}))
        job = {
            "run": {"dir": "run"},
            "model": {"path": str(path)},
            "behavior": {source: {"path": str(path)} for source in ("teacher_plain", "teacher_cipher")},
            "generator": {"max_new_tokens": 1, "max_model_len": max_model_len},
            "corpus": {"heldout_fraction": 0.0} | corpus,
            "tasks": [{"name": "countdown"}],
        }
        return TokenizeRows(Job.model_validate(job))

    return make
