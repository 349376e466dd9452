"""What a coordinator names, a site opens only if the site has named it as well: columns, models, folders, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedalign.client import open as opening
from fedalign.client.log import SiteLog
from fedalign.client.memory import ClientMemory
from fedalign.client.open import open_site
from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.protocol import Failure, Hello, Start
from tests.conftest import changed, make_site, rows, write_jsonl
from tests.hostile.conftest import Attack, Coordinator

SECRET = "Erika Mustermann"


def with_patients() -> list[dict[str, str]]:
    return [{"patient": SECRET, "client": "ward 9", **row} for row in rows()]


# --------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("column", ["patient", "owner", "client", "nowhere"])
def test_a_template_reads_no_column_that_the_site_did_not_name(attack: Attack, column: str) -> None:
    site = attack(with_patients())
    for verb in ("hello", "train", "evaluate"):
        reason = site.refused(verb, template=f"{{text}} {{{column}}}")
        assert reason == f"data.template: {{{column}}} is no column that this site lets a template read."


def test_a_template_reads_what_the_site_named_whatever_it_calls_it(attack: Attack) -> None:
    site = attack([{"note": row["text"], "label": row["label"], "text": SECRET} for row in rows()])
    toml = (site.site.path / "site.toml").read_text().replace("[model]", '[data.columns]\ntext = "note"\n[model]')
    site.site = make_site(site.site.path, toml)
    for template in ("Say {text}: {{{label}}}", "Say {note}: {{{label}}}"):  # the coordinator's word, and the site's
        client = open_site(site.site, changed(site.config, "data", template=template), "night")
        read = client.trainer.tokenizer.decode(client.data.train[0].input_ids)
        assert SECRET not in read
        assert any(read.startswith(f"Say {row['text']}: {{{row['label']}}}") for row in rows())


@pytest.mark.parametrize("template", ["{text:>2000000000}", "{text!r}", "{text.__class__}", "{text[0]}", "{}", "{0}"])
def test_templates_hold_plain_names_alone(attack: Attack, template: str) -> None:
    with pytest.raises(UserError, match=r"data.template = "):
        load_config(None, [f"data.template={json.dumps(template)}"])
    reason = attack().refused("hello", template=template)
    assert reason.startswith("data.template = ")


def test_the_coordinators_columns_are_not_the_sites(attack: Attack) -> None:
    site = attack(with_patients())
    columns = site.config.data.columns.model_copy(update={"text": "patient"})
    client = open_site(site.site, changed(site.config, "data", columns=columns), "night")
    assert SECRET not in client.trainer.tokenizer.decode(client.data.train[0].input_ids)
    renamed = changed(site.config, "data", columns=columns, template="{patient}")  # which is what it calls texts
    client = open_site(site.site, renamed, "night")
    assert SECRET not in client.trainer.tokenizer.decode(client.data.train[0].input_ids)


# ---------------------------------------------------------------------------------------------- models and folders


def asked_for(site: Coordinator, model: str, verb: str) -> Failure:
    answer = site.ask_with(changed(site.config, "model", path=model), verb)
    assert isinstance(answer, Failure), answer
    return answer


@pytest.mark.parametrize("verb", ["hello", "start", "train", "evaluate"])
def test_a_folder_that_the_site_did_not_name_is_not_opened_and_not_known_to_be_there(
    attack: Attack, verb: str, olmoe: Path, tmp_path: Path
) -> None:
    site = attack(model=False)
    (tmp_path / "file").touch()
    places = [olmoe, tmp_path, tmp_path / "nowhere", tmp_path / "file", "./x", "../x/y", "~/models", "a/b/c", "..", ""]
    reasons = {asked_for(site, str(place), verb).reason for place in places}
    assert len(reasons) == 1
    assert reasons.pop().startswith("model.path: not a model that this site opens for others")


def test_a_folder_that_is_called_as_a_model_on_the_hub_is_not_opened(
    attack: Attack, monkeypatch: pytest.MonkeyPatch, olmoe: Path, tmp_path: Path
) -> None:
    site = attack(model=False)
    (tmp_path / "srv").mkdir()
    (tmp_path / "srv" / "private").symlink_to(olmoe)
    monkeypatch.chdir(tmp_path)
    asked = []

    def hub(name: str, **_: object) -> str:
        asked.append(name)
        raise OSError(f"{name} is not on the hub, and {tmp_path} is where you are")

    monkeypatch.setattr(opening, "snapshot_download", hub)
    reasons = {asked_for(site, name, "start").reason for name in ("srv/private", "srv/nowhere")}
    assert len(reasons) == 1
    assert str(tmp_path) not in reasons.pop()
    assert asked == ["srv/private", "srv/nowhere"]


def test_a_model_of_the_hub_is_sent(attack: Attack, monkeypatch: pytest.MonkeyPatch, olmoe: Path) -> None:
    site = attack(model=False)
    given: dict[str, object] = {}

    def hub(name: str, **options: object) -> str:
        given.update(options)
        return str(olmoe)

    monkeypatch.setattr(opening, "snapshot_download", hub)
    site.config = changed(site.config, "model", path="allenai/tiny")
    assert isinstance(site.ask("start"), Start)
    assert given["token"] is False  # what this account may read and others may not is not sent on
    assert given["cache_dir"] == site.site.path / "hub"  # nor what it has read already


def test_a_model_that_the_site_names_is_the_one_that_is_sent(attack: Attack, olmoe: Path) -> None:
    site = attack()
    site.config = changed(site.config, "model", path="/srv/private")
    assert isinstance(site.ask("start"), Start)


def test_reasons_do_not_tell_where_the_sites_own_things_lie(attack: Attack, tmp_path: Path) -> None:
    site = attack()
    toml = (site.site.path / "site.toml").read_text()
    site.site = make_site(site.site.path, toml.replace('path = "', 'path = "/srv/secret'))
    assert site.refused("start") == "its model cannot be loaded; the reason is in the client's own log"
    site.site = make_site(site.site.path, toml.replace("data.jsonl", "/srv/secret.jsonl"))
    assert site.refused("hello") == "its data cannot be used; the reason is in the client's own log"


def test_no_reason_says_where_the_site_is(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    site = attack()

    def damaged(memory: ClientMemory, *_: object) -> None:
        raise UserError(f"{str(memory.folder)!r}: damaged. Start the run anew.")

    monkeypatch.setattr(ClientMemory, "before", damaged)
    reason = site.refused("train")
    assert reason == "something at the site is not in order; the reason is in the client's own log"
    assert [entry.refused for entry in SiteLog(site.site.path).entries()] == [reason]


def test_the_coordinator_does_not_say_which_files_are_read(attack: Attack) -> None:
    """A site whose data is a folder: its parts have the names that the site says."""
    site = attack()
    data, private = site.site.path / "data", site.site.path / "private"
    for folder, lines in ((data, rows()), (private, with_patients()[:80])):
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", lines)
        write_jsonl(folder / "other.jsonl", lines[:70])
    toml = (site.site.path / "site.toml").read_text().replace("data.jsonl", "data")
    site.site = make_site(site.site.path, toml)
    usual = site.ask("hello")
    assert isinstance(usual, Hello)
    for asked in ({"train_split": "other"}, {"train_split": "../private"}, {"test": str(data)}, {"subset": "x"}):
        assert site.ask("hello", **asked) == usual


@pytest.mark.parametrize("role", ["history", "system", "tools", "input", "messages", "prompt", "response", "question"])
def test_a_column_that_a_site_does_not_name_is_not_read_by_the_name_that_it_would_have(
    role: str, tmp_path: Path
) -> None:
    """A site that names text and label has said so of no other column, though others have names by default."""
    site = make_site(tmp_path, f'name = "a"\n[data]\ntrain = "{tmp_path}"\n[data.columns]\ntext = "note"\n')
    with pytest.raises(UserError, match="is no column that this site lets a template read"):
        site.localise(load_config(None, [f"data.template={{text}} {{{role}}}"]))
    here = site.localise(load_config(None, ["data.template={text} {label}"])).data
    assert here.template == "{note} {label}"
    assert getattr(here.columns, role) == f"{role}: named by no site.toml"


def test_whose_code_runs_and_which_is_the_sites_own_to_say(tmp_path: Path) -> None:
    least = f'name = "a"\n[data]\ntrain = "{tmp_path}"\n[model]\n'
    with pytest.raises(UserError, match="trust_remote_code needs path"):
        make_site(tmp_path, least + "trust_remote_code = true\n")
    asked = load_config(None, ["model.path=allenai/x", "model.revision=refs/pr/7"])
    own = make_site(tmp_path, least + 'path = "org/ours"\ntrust_remote_code = true\n')
    assert own.localise(asked).model.revision is None
    pinned = make_site(tmp_path, least + 'path = "org/ours"\nrevision = "v1"\n')
    assert pinned.localise(asked).model.revision == "v1"
    assert make_site(tmp_path, least).localise(asked).model.revision == "refs/pr/7"


def test_an_answer_is_generated_no_longer_than_a_site_allows(tmp_path: Path) -> None:
    site = make_site(tmp_path, f'name = "a"\n[data]\ntrain = "{tmp_path}"\n')
    for asked, given in ((10**9, 256), (20, 20)):
        config = load_config(None, ["evaluation.generate=true", f"evaluation.max_new_tokens={asked}"])
        assert site.localise(config).evaluation.max_new_tokens == given
