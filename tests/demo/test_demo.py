"""The shipped model: small, an ordinary Hugging Face folder, and really pretrained."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedalign import demo
from fedalign.data.docstrings import LIBRARIES


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fedalign"


def test_at_most_five_megabytes() -> None:
    assert sum(path.stat().st_size for path in demo.SHIPPED.iterdir()) <= 5_000_000


def test_unpacked_once(cache: Path) -> None:
    folder = demo.model_folder()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert demo.model_folder() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in cache.iterdir()] == [folder.name]  # nothing temporary stays


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    assert (demo.model_folder() / "config.json").is_file()


def test_plain_transformers_load_it_and_it_knows_the_language_of_docstrings(cache: Path) -> None:
    folder = demo.model_folder()
    assert folder.parent == cache
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    config = model.config
    assert (config.model_type, config.num_experts, config.num_experts_per_tok) == ("olmoe", 8, 2)
    assert config.num_hidden_layers >= 4

    # Written for this test, in the manner of docstrings, so that no installed version changes the number.
    text = (
        "Return a new array with the same shape and type as a given array. "
        "Raises a ValueError if the input is not a valid string. "
        "Compute the mean of the tensor along the given dimension."
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 0.5 * math.log(len(tokenizer))  # an untrained model is at log(vocabulary)


def test_each_class_is_one_token(cache: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.model_folder())
    assert cache.is_dir()
    ids = [tokenizer(f" {label}")["input_ids"] for label in LIBRARIES]
    assert all(len(one) == 1 for one in ids)
    assert len({one[0] for one in ids}) == len(LIBRARIES)
    assert tokenizer("text:\nLabel: PyTorch")["input_ids"][-1:] == tokenizer(" PyTorch")["input_ids"]
