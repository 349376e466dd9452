"""Clients opened at a site and for a simulation, and what they say of themselves."""

from __future__ import annotations

import copy
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from fedalign import __version__
from fedalign.client.open import DealtClients, open_site
from fedalign.config.run import ClientLimits, Config
from fedalign.config.site import SiteFolder
from fedalign.config.toml import load_config
from fedalign.data.encode import tokenizer_hash
from fedalign.errors import DataError, ModelError, UserError
from fedalign.federation.in_process import prepare
from fedalign.maths.rounding import pack
from fedalign.moe.load import hardware
from fedalign.moe.model import MoEModel
from fedalign.protocol import PROTOCOL, SHARED, Broadcast
from tests.conftest import changed, make_site, site_toml


def test_a_site_says_what_it_is(site_config: Config, ward: SiteFolder, olmoe: Path) -> None:
    hello = open_site(ward, site_config, "night").hello()
    moe = MoEModel.load(olmoe)
    assert (hello.client, hello.protocol, hello.version) == ("ward 3", PROTOCOL, __version__)
    assert (hello.architecture, hello.weights) == (moe.fingerprint(), moe.weights_hash())
    assert (hello.layers, hello.experts) == (2, 4)
    assert (hello.examples, hello.held_out) == (32, 9)  # of 90; asked for at most 40, which is none of its sizes
    assert all(len(text) == 64 for text in (hello.architecture, hello.weights, hello.tokenizer, hello.chat_template))


def test_a_site_logs_where_its_model_is(
    site_config: Config, ward: SiteFolder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="fedalign")
    where = open_site(ward, site_config, "night").trainer.moe.device.type
    assert f"ward 3: the model is on {where}: {hardware(where)}" in caplog.messages


def test_opening_a_site_keeps_what_is_held_out_and_how_its_rows_were_read_alone(
    site_config: Config, ward: SiteFolder
) -> None:
    client = open_site(ward, site_config, "night")
    assert client.data.memory.folder == ward.path / "runs" / "night"
    assert {path.name for path in ward.path.iterdir()} == {"parts.json", "readings.json", ".readings.lock", "site.toml"}
    assert stat.S_IMODE((ward.path / "parts.json").stat().st_mode) == 0o600


def test_limits_are_handed_to_the_client_that_they_are_of(
    settings: list[str], site_config: Config, ward: SiteFolder, tmp_path: Path
) -> None:
    toml = (ward.path / "site.toml").read_text()
    small = make_site(tmp_path / "small", f"{toml}max_experts = 2\n")
    assert open_site(small, site_config, "night").data.limits == ClientLimits(max_experts=2)
    config = load_config(None, [*settings, "clients.limits.client-01.top_k=1"])
    dealt, prepared = DealtClients(config, tmp_path), prepare(config, tmp_path)
    expected = {name: ClientLimits(top_k=int(name == "client-01")) for name in dealt.names}
    assert {name: dealt.open(name).data.limits for name in dealt.names} == expected
    assert {name: client.limits for name, client in prepared.clients.items()} == expected
    with pytest.raises(UserError, match=r"clients\.limits\.nobody: no such client\. Choose one of: client-00"):
        DealtClients(load_config(None, [*settings, "clients.limits.nobody.top_k=1"]), tmp_path)


def test_what_is_wrong_with_the_data_stays_apart_from_what_is_wrong_with_the_rest(
    site_config: Config, ward: SiteFolder, tmp_path: Path, olmoe: Path
) -> None:
    nowhere = make_site(tmp_path / "lab", site_toml("lab", Path("nowhere.jsonl"), olmoe))
    with pytest.raises(DataError, match=r"nowhere.jsonl"):
        open_site(nowhere, site_config, "night")
    short = changed(site_config, "data", max_length=1, too_long="truncate")
    with pytest.raises(DataError, match="all of its examples are longer than 1 tokens"):
        open_site(ward, short, "night")
    without = make_site(tmp_path / "b", site_toml("b", Path(ward.config.data.train), Path("/nowhere")))
    with pytest.raises(ModelError, match=r"model = '/nowhere': no such folder"):
        open_site(without, site_config, "night")
    with pytest.raises(UserError, match=r"data.max_length = 999999: the model allows"):  # nothing of the site's
        open_site(ward, changed(site_config, "data", max_length=999_999), "night")


def test_a_simulation_deals_the_same_data_as_one_process(settings: list[str], tmp_path: Path) -> None:
    config = load_config(None, settings)
    dealt, prepared = DealtClients(config, tmp_path), prepare(config, tmp_path)
    assert dealt.names == list(prepared.clients)
    for name, expected in prepared.clients.items():
        client = dealt.open(name)
        assert client.data.train == expected.train
        assert client.data.held_out is not None
        assert expected.held_out is not None
        assert client.data.held_out.encoded == expected.held_out.encoded
        assert client.data.memory.folder == expected.memory.folder
        assert client.trainer.moe is dealt.bench.moe  # one model for all of them


def test_a_client_of_a_simulation_says_what_was_loaded_not_what_another_trained(
    settings: list[str], tmp_path: Path, olmoe: Path
) -> None:
    dealt = DealtClients(load_config(None, settings), tmp_path)
    first, second = (dealt.open(name) for name in dealt.names[:2])
    weights = {group: pack(value, "float32", 0) for group, value in dealt.bench.moe.read().items()}
    first.trainer.train(first.data, Broadcast(1, weights))
    assert not torch.equal(dealt.bench.moe.read([SHARED])[SHARED], weights[SHARED].values)
    assert second.hello().weights == MoEModel.load(olmoe).weights_hash()


def test_the_hash_of_a_tokenizer_is_of_what_it_makes_of_texts(olmoe: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(olmoe)
    mine = tokenizer_hash(tokenizer)
    tokenizer(["one", "two words"], padding=True, truncation=True, max_length=3)  # leaves settings behind
    assert tokenizer_hash(tokenizer) == mine
    tokenizer.chat_template = "{{ messages }}"  # has a hash of its own
    assert tokenizer_hash(tokenizer) == mine
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<new>"])
    assert tokenizer_hash(more) != mine
    tokenizer.eos_token = "<s>"  # another end of every answer
    assert tokenizer_hash(tokenizer) != mine


def test_a_tokenizer_without_a_definition_is_known_by_its_words() -> None:
    class Slow:
        def __init__(self, **words: int) -> None:
            self.words = words

        def get_vocab(self) -> dict[str, int]:
            return self.words

    assert tokenizer_hash(Slow(a=1, b=2)) == tokenizer_hash(Slow(b=2, a=1)) != tokenizer_hash(Slow(a=2, b=1))


def test_a_saved_model_has_the_same_hashes(site_config: Config, ward: SiteFolder) -> None:
    client = open_site(ward, site_config, "night")
    copied = ward.path / "copy"
    client.trainer.moe.save(copied)
    client.trainer.tokenizer.save_pretrained(copied)
    there = make_site(ward.path, site_toml("ward 3", Path(ward.config.data.train), copied))
    assert open_site(there, site_config, "night").hello() == client.hello()


def test_other_weights_have_another_hash(
    site_config: Config, ward: SiteFolder, model_folder: Callable[..., Path]
) -> None:
    hello = open_site(ward, site_config, "night").hello()
    other = make_site(ward.path, site_toml("ward 3", Path(ward.config.data.train), model_folder("olmoe", seed=5)))
    assert replace(open_site(other, site_config, "night").hello(), weights=hello.weights) == hello
    assert open_site(other, site_config, "night").hello().weights != hello.weights
