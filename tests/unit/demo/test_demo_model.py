"""The cached model: the same weights for the same settings, whole or not there."""

import json

import pytest

from bench.demo.config import ModelConfig
from bench.demo.corpus import Corpus, Split
from bench.demo.model import cached_model

_TEXT = "The import statement combines two operations; it searches for the named module, then binds the result.\n" * 12
_CORPUS = Corpus(
    docs=Split((_TEXT,), (_TEXT,), (_TEXT,), (_TEXT,)),
    code=Split((), (_TEXT,), (_TEXT,), (_TEXT,)),
)
_CONFIG = ModelConfig(hidden=32, layers=1, pretrain_steps=3, pretrain_batch=2, pretrain_length=32)


def _model(cache, config=_CONFIG, progress=lambda done, total: None):
    return cached_model(config, _CORPUS, max_context_tokens=128, cache=cache, progress=progress)


def test_a_second_call_trains_nothing(tmp_path):
    steps = []
    path, facts = _model(tmp_path, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert _model(tmp_path, progress=lambda done, total: pytest.fail("trained again")) == (path, facts)
    assert facts["parameters"] > 10_000
    assert 3.0 < facts["heldout_loss"]["docs"] < 7.0
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {file.name for file in path.iterdir()}


def test_the_same_settings_give_the_same_weights(tmp_path):
    first, _ = _model(tmp_path / "a")
    second, _ = _model(tmp_path / "b")
    assert first.name == second.name
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_other_settings_are_another_model(tmp_path):
    longer = ModelConfig(hidden=32, layers=1, pretrain_steps=4, pretrain_batch=2, pretrain_length=32)
    assert _model(tmp_path)[0] != _model(tmp_path, longer)[0]


def test_an_interruption_leaves_nothing(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _model(tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_cache_is_trained_again(tmp_path):
    path, facts = _model(tmp_path)
    (path / "demo.json").unlink()
    assert _model(tmp_path) == (path, facts)
    assert json.loads((path / "demo.json").read_text()) == facts
