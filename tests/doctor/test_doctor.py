"""A site and a coordinator examined: what is well, and every kind of trouble with what to do about it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedalign.config.run import Config
from fedalign.config.site import SiteConfig, SiteFolder
from fedalign.config.toml import load_config
from fedalign.doctor import examine_coordinator, examine_site, machine
from fedalign.doctor.report import Check, Examination
from fedalign.federation.flower.keys import make_node_key
from fedalign.moe.model import MoEModel, load_model
from tests.doctor.server import serving

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def config(olmoe: Path) -> Config:
    return load_config(
        None,
        [
            f"model.path={olmoe}",
            'data.labels=["animals", "weather", "food", "sport"]',
            "federation.engine=flower",
            "data.max_length=64",
        ],
    )


@pytest.fixture
def site(tmp_path: Path, texts: Path, olmoe: Path) -> SiteFolder:
    make_node_key(tmp_path / "site" / "key")
    tables = {"name": "ward", "data": {"train": str(texts / "train.jsonl")}, "model": {"path": str(olmoe)}}
    return SiteFolder(tmp_path / "site", SiteConfig.model_validate(tables))


def changed(site: SiteFolder, section: str, **values: object) -> SiteFolder:
    tables = site.config.model_dump()
    tables[section] |= values
    return SiteFolder(site.path, SiteConfig.model_validate(tables))


def with_(config: Config, section: str, **values: object) -> Config:
    tables = config.model_dump()
    tables[section] |= values
    return Config.model_validate(tables)


def by_name(found: Examination) -> dict[str, Check]:
    return {check.name: check for check in found.checks}


def troubles(found: Examination) -> dict[str, str]:
    return {check.name: check.verdict for check in found.checks if check.verdict != "ok"}


def test_a_site_that_is_well(site: SiteFolder, config: Config) -> None:
    with serving() as address:
        found = examine_site(changed(site, "coordinator", superlink=address), config)
    assert not troubles(found)
    assert not found.failed
    checks = by_name(found)
    assert "90 examples" in checks["data"].found
    assert "animals 30" in checks["labels"].found
    assert "none of sport" in checks["labels"].found
    assert "olmoe, found by table" in checks["model"].found
    assert "2 MoE layers x 4 experts, top-2" in checks["layout"].found
    assert "all fit" in checks["lengths"].found
    assert "58 examples to train on, 32 held out" in checks["parts"].found
    assert "activations" in checks["memory"].found
    assert "one measured pass" in checks["time a round"].found
    assert not (site.path / "runs").exists()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_all_that_a_run_would_note_of_the_model_is_told(
    site: SiteFolder, config: Config, kind: str, model_folder: Callable[..., Path]
) -> None:
    path = str(model_folder("deepseek_v32"))
    tuned = with_(with_(config, "model", path=path), "tuning", kind=kind)
    found = examine_site(changed(site, "model", path=path), tuned)
    told = [check.found for check in found.checks if check.name == "note"]
    assert told == load_model(path, tuning=tuned.tuning).notes
    assert any("indexer" in note for note in told) == (kind == "lora")
    assert any("sparse attention depends on padding" in note for note in told)


def test_the_hashes_are_those_that_sites_send(site: SiteFolder, config: Config, olmoe: Path) -> None:
    moe = MoEModel.load(olmoe)
    found = examine_site(site, config)
    assert found.hashes["weights"] == moe.weights_hash()
    assert found.hashes["architecture"] == moe.fingerprint()
    assert set(found.hashes) == {"architecture", "weights", "tokenizer", "chat template"}
    here = examine_coordinator(config, site.path / "runs")
    assert {name: value for name, value in found.hashes.items() if name != "weights"} == here.hashes


@pytest.mark.parametrize(
    ("run", "verdict", "said"),
    [
        ({}, "ok", "run.workers = 3 trains so many clients side by side; the results are the same"),
        ({"workers": 3}, "ok", "4 cores, run.workers = 3, run.threads = 0"),
        ({"workers": 5}, "warning", "4 cores, run.workers = 5, run.threads = 0"),
    ],
)
def test_idle_cores_are_told(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: dict[str, int], verdict: str, said: str
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 4)
    here = with_(
        with_(with_(config, "federation", engine="in_process"), "clients", count=3), "run", device="cpu", **run
    )
    check = by_name(examine_coordinator(here, tmp_path / "runs"))["cores"]
    assert check.verdict == verdict
    assert said in check.found
    assert ("trains so many clients" in check.found) == (not run)
    assert ("at most 4" in check.remedy) == (verdict == "warning")
    assert "cores" not in by_name(examine_coordinator(config, tmp_path / "runs"))


def test_other_weights_than_the_coordinators_fail(site: SiteFolder, config: Config, olmoe: Path) -> None:
    mine = MoEModel.load(olmoe).weights_hash()
    assert by_name(examine_site(site, with_(config, "model", weights_hash=mine)))["weights"].verdict == "ok"
    other = by_name(examine_site(site, with_(config, "model", weights_hash="5f0c")))["weights"]
    assert other.verdict == "failed"
    assert "model.weights_hash = 5f0c" in other.found
    assert "revision" in other.remedy


def test_the_preview_is_the_first_example_as_the_model_reads_it(site: SiteFolder, config: Config) -> None:
    preview = examine_site(site, config).preview
    assert [is_answer for _, is_answer in preview] == [False, True]
    assert preview[0][0].endswith("\nLabel:")
    assert preview[1][0] == " animals</s>"  # a class is learnt with the end token


def test_encoder_and_decoder_are_shown_both(
    site: SiteFolder, config: Config, model_folder: Callable[..., Path]
) -> None:
    found = examine_site(changed(site, "model", path=str(model_folder("switch_transformers"))), config)
    assert [is_answer for _, is_answer in found.preview] == [False, True]
    assert found.preview[1][0].startswith(" animals")


def test_what_tells_of_the_data_is_marked(site: SiteFolder, config: Config) -> None:
    private = {check.name for check in examine_site(site, config).checks if check.private}
    assert private == {"labels", "lengths"}
    broken = by_name(examine_site(site, with_(config, "data", labels=["animals"])))["data"]
    assert broken.private
    assert "weather" in broken.found


@pytest.mark.parametrize(
    ("too_long", "verdict", "told"),
    [("error", "failed", "longer, refused"), ("truncate", "warning", "longer, cut")],
)
def test_too_long_examples(site: SiteFolder, config: Config, too_long: str, verdict: str, told: str) -> None:
    lengths = by_name(examine_site(site, with_(config, "data", max_length=14, too_long=too_long)))["lengths"]
    assert lengths.verdict == verdict
    assert told in lengths.found
    assert "data.max_length" in lengths.remedy


def test_nothing_left_to_train_on_fails(site: SiteFolder, config: Config) -> None:
    found = examine_site(site, with_(config, "data", max_length=1, too_long="truncate"))
    assert "all of its examples are longer than 1 tokens" in by_name(found)["parts"].found


def test_what_the_limits_of_the_site_refuse_fails(site: SiteFolder, config: Config) -> None:
    found = examine_site(site, with_(config, "data", max_train=1))
    assert "this site trains on 32 examples or more" in by_name(found)["limits"].found
    assert found.failed


def test_too_few_examples_fail(site: SiteFolder, config: Config, tmp_path: Path) -> None:
    rows = [{"text": f"word {i}", "label": "food"} for i in range(10)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = examine_site(changed(site, "data", train=str(tmp_path / "few.jsonl")), config)
    assert by_name(found)["parts"].verdict == "failed"
    assert "limits.min_train and limits.min_held_out" in by_name(found)["parts"].found
    assert not (site.path / "parts.json").exists()  # nothing was drawn for good


def test_data_that_cannot_be_read_fails_and_the_rest_is_looked_at(site: SiteFolder, config: Config) -> None:
    found = examine_site(changed(site, "data", train="none.jsonl"), config)
    assert "no such file" in by_name(found)["data"].found
    assert by_name(found)["weights"].verdict == "ok"
    assert "parts" not in by_name(found)


def test_a_model_that_is_not_there_fails(site: SiteFolder, config: Config) -> None:
    found = examine_site(changed(site, "model", path="./none"), config)
    assert "no such folder" in by_name(found)["model"].found
    assert found.failed
    assert "weights" not in by_name(found)


def test_chat_needs_a_template(
    site: SiteFolder, config: Config, tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    turns = [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": "runs"}]
    (tmp_path / "chat.jsonl").write_text(20 * (json.dumps({"messages": turns}) + "\n"))
    talks = changed(site, "data", train=str(tmp_path / "chat.jsonl"))
    task = with_(config, "data", kind="chat", labels=[])
    without = by_name(examine_site(talks, task))["tokenizer"]
    assert without.verdict == "failed"
    assert "no chat template" in without.found
    folder = model_folder("olmoe")
    (folder / "chat_template.jinja").write_text(CHAT)
    found = examine_site(changed(talks, "model", path=str(folder)), task)
    assert by_name(found)["tokenizer"].verdict == by_name(found)["lengths"].verdict == "ok"
    assert [text for text, is_answer in found.preview if is_answer] == [
        "<assistant>runs<user>"
    ]  # the next turn's marker is what ends it


def test_weights_are_not_loaded_where_they_would_not_fit(
    site: SiteFolder, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_in", lambda _: 1000)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(MoEModel, "load", never)
    checks = by_name(examine_site(site, config))
    assert checks["memory"].verdict == "failed"
    assert "1.0 kB free" in checks["memory"].found
    assert "not loaded" in checks["weights"].found


def test_a_pass_that_does_not_fit_is_told(site: SiteFolder, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("fedalign.doctor.model.measure_step", full)
    memory = by_name(examine_site(site, config))["memory"]
    assert memory.verdict == "failed"
    assert "batch_tokens" in memory.remedy


def test_a_round_longer_than_the_timeout_is_a_warning(site: SiteFolder, config: Config, tmp_path: Path) -> None:
    slow = with_(with_(config, "federation", timeout_seconds=1), "training", epochs=100_000)
    patient = changed(site, "limits", epochs=100_000)
    check = by_name(examine_site(patient, slow))["time a round"]
    assert check.verdict == "warning"
    assert "timeout_seconds = 1" in check.found


def test_a_site_without_the_coordinators_configuration(site: SiteFolder) -> None:
    found = examine_site(site, None)
    checks = by_name(found)
    assert checks["configuration"].verdict == "warning"
    assert "'classification' guessed" in checks["configuration"].found
    assert "90 examples" in checks["data"].found
    assert found.hashes["weights"]
    blind = by_name(examine_site(changed(site, "model", path=None), None))
    assert blind["model"].verdict == "warning"
    assert "CONFIG.toml" in blind["model"].remedy
    assert "weights" not in blind


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [{"role": "assistant", "content": "yes"}]}, "chat"),
        ({"question": "a?", "choices": ["b", "c"], "answer": 1}, "multiple_choice"),
        ({"prompt": "a", "response": "b"}, "instruction"),
        ({"text": "a", "label": "b"}, "classification"),
        ({"text": "a"}, "text"),
        ({"note": "a"}, "text"),
    ],
)
def test_the_kind_of_data_is_guessed(site: SiteFolder, tmp_path: Path, row: dict[str, object], kind: str) -> None:
    (tmp_path / "rows.jsonl").write_text(20 * (json.dumps(row) + "\n"))
    found = examine_site(changed(site, "data", train=str(tmp_path / "rows.jsonl")), None)
    assert f"'{kind}' guessed" in by_name(found)["configuration"].found


def test_a_coordinator_that_is_well(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as address:
        pass

    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(MoEModel, "load", never)
    found = examine_coordinator(with_(config, "federation", superlink=address), tmp_path / "runs" / "a")
    assert not troubles(found)
    checks = by_name(found)
    assert "at least 2 sites within 10:00, 1:00:00 a stage" in checks["policy"].found
    assert "is free" in checks["SuperLink"].found
    assert "2 MoE layers x 4 experts" in checks["layout"].found
    assert "can be written" in checks["output folder"].found
    assert not (tmp_path / "runs").exists()


def test_a_coordinator_in_trouble(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wrong = with_(config, "data", labels=[], test="none.jsonl")
    wrong = with_(wrong, "federation", superlink="fl.example.org:8000")
    found = examine_coordinator(with_(wrong, "model", path="./none"), tmp_path / "file" / "a")
    expected = ("data.labels", "TLS", "test set", "model", "output folder")
    assert troubles(found) == dict.fromkeys(expected, "failed")
    assert "all classes must be named" in by_name(found)["data.labels"].found


def test_another_engine_is_a_warning(config: Config, site: SiteFolder, tmp_path: Path) -> None:
    alone = with_(config, "federation", engine="in_process")
    for found in (examine_coordinator(alone, tmp_path), examine_site(site, alone)):
        assert by_name(found)["configuration"].verdict == "warning"
    assert "SuperLink" not in by_name(examine_coordinator(alone, tmp_path))
