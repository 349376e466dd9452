"""What is the site's own, and what it lets the coordinator decide."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedalign.config.run import ClientLimits, Config, DataConfig, FileConfig
from fedalign.config.site import SiteFolder
from fedalign.config.toml import load_config
from fedalign.errors import UserError
from tests.conftest import make_site

LEAST = 'name = "ward"\n[data]\ntrain = "data.jsonl"\n'
MODEL = '[model]\npath = "model"\n'


def test_name_and_data_are_all_that_a_site_must_say(tmp_path: Path) -> None:
    site = make_site(tmp_path, LEAST)
    assert site.path == tmp_path.resolve()
    assert site.config.name == "ward"
    assert site.config.model.path is None
    assert not site.config.model.trust_remote_code
    assert (site.config.limits.min_tokens, site.config.limits.min_examples) == (32, 4)
    assert SiteFolder.load(tmp_path / "site.toml") == site


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("", r"site.toml: name: missing"),
        ('name = "ward"', r"site.toml: data: missing"),
        ('name = ""\n[data]\ntrain = "x"', r'name = "": must be 1 to 64 printable characters'),
        (f'name = "{"w" * 65}"\n[data]\ntrain = "x"', r"must be 1 to 64 printable characters"),
        (LEAST + '[coordinator]\nsuperlink = "here"', r'coordinator.superlink = "here": must be HOST:PORT'),
        ('name = "ward"\n[data]\ntrian = "x"', r"data.train: missing"),
        (
            LEAST + "[limits]\nmin_token = 3",
            r"key = 'limits.min_token': unknown. Choose one of: .*Did you mean 'limits.min_tokens'",
        ),
        (LEAST + "[limits]\nmin_tokens = 0", r"limits.min_tokens = 0: input should be greater than or equal to 1"),
        (LEAST + '[limits]\nthreads = "2"', r'limits.threads = "2"'),
        (
            LEAST + "[training]\nepochs = 3",
            r"section = 'training': unknown. Choose one of: consent, coordinator, data, limits",
        ),
        (LEAST + "[model]\ntrust_remote_code = 1", r"model.trust_remote_code = 1"),
        ("name = ward", r"not valid TOML: Invalid value"),
    ],
)
def test_what_is_wrong_with_a_site_file_is_said(tmp_path: Path, toml: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_site(tmp_path, toml)


def test_a_site_file_that_is_not_there_or_no_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no site.toml there. Make one with: fedalign site init NAME --data FILE"):
        SiteFolder.load(tmp_path)
    with pytest.raises(UserError, match=r"no site.toml there"):
        SiteFolder.load(tmp_path / "nowhere")
    (tmp_path / "site.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot be read"):
        SiteFolder.load(tmp_path)


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        make_site(tmp_path, 'name = ""\n[data]\ntrain = 3')
    assert len(str(caught.value).splitlines()) == 2


def test_each_run_has_a_place_of_its_own_inside_the_site(tmp_path: Path) -> None:
    site = make_site(tmp_path, LEAST)
    places = [site.memory(run) for run in ("2026-01-01 night", "2026-01-02", "../../etc", "..", "a/b", "x" * 300)]
    assert len(set(places)) == len(places)
    assert all(place.parent == tmp_path.resolve() / "runs" for place in places)
    assert not (tmp_path / "runs").exists()


def test_paths_are_seen_from_the_site_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site(tmp_path / "site", LEAST)
    (tmp_path / "site" / "data.jsonl").touch()
    (tmp_path / "elsewhere.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert site.resolve("data.jsonl") == str(site.path / "data.jsonl")
    assert site.resolve(str(tmp_path / "elsewhere.jsonl")) == str(tmp_path / "elsewhere.jsonl")
    assert site.resolve("../elsewhere.jsonl") == str(site.path / "../elsewhere.jsonl")
    assert site.resolve("elsewhere.jsonl") == "elsewhere.jsonl"  # left as it is, like a hub id
    assert site.resolve("ag_news") == "ag_news"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert site.resolve("~/elsewhere.jsonl") == str(tmp_path / "elsewhere.jsonl")


COORDINATOR = [
    "run.seed=7",
    "run.device=cuda:3",
    "run.threads=9",
    "model.path=their/model",
    "model.trust_remote_code=true",
    "model.revision=main",
    "data.train=/their/data",
    'data.labels=["a", "b"]',
    "data.template='{{}} Say: {theirs}'",
    "data.columns.text=theirs",
    "data.test=/their/test",
    "data.subset=secrets",
    "data.train_split=../elsewhere",
    "data.test_split=theirs",
    "clients.held_out=0.7",
    "training.batch_tokens=4096",
    "training.epochs=3",
    "statistics.min_tokens=8",
    "statistics.min_examples=9",
    "wire.dtype=int8",
]
OWN = """name = "ward"
[data]
train = "mine.jsonl"
columns = {text = "report"}
[model]
path = "model"
[limits]
device = "cpu"
threads = 2
batch_tokens = 1024
min_tokens = 64
min_examples = 5
"""


def localised(folder: Path, toml: str, *more: str) -> tuple[Config, Config]:
    asked = load_config(None, [*COORDINATOR, *more])
    return asked, make_site(folder, toml).localise(asked)


def test_what_is_the_sites_own_is_not_the_coordinators_to_say(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").touch()
    (tmp_path / "model").mkdir()
    _, here = localised(tmp_path, OWN)
    assert (here.run.device, here.run.threads) == ("cpu", 2)
    assert here.model.path == str(tmp_path.resolve() / "model")
    assert here.model.trust_remote_code is False
    assert here.data.train == str(tmp_path.resolve() / "mine.jsonl")
    assert (here.data.columns.text, here.data.columns.label) == ("report", "label")
    assert here.data.template == "{{}} Say: {report}"  # {theirs} is what the coordinator calls the column of texts
    assert (here.data.test, here.data.subset, here.data.train_split, here.data.test_split) == (
        None,
        None,
        "train",
        "test",
    )
    assert here.clients.held_out == 0.1
    assert here.training.batch_tokens == 1024
    assert (here.statistics.min_tokens, here.statistics.min_examples) == (64, 9)


def test_how_a_sites_files_are_written_is_its_own_to_say(tmp_path: Path) -> None:
    theirs = [
        "data.encoding=utf-7",
        "data.delimiter=x",
        'data.files."mine.jsonl".columns.text=secret',
        'data.files."mine.jsonl".template={secret}',
    ]
    assert localised(tmp_path / "a", LEAST, *theirs)[1].data.files == {}
    own = 'encoding = "cp1252"\ndelimiter = ";"\n[data.files."north.csv"]\ndelimiter = "|"\ncolumns = {text = "note"}\n'
    here = localised(tmp_path / "b", LEAST + own, *theirs)[1].data
    assert (here.encoding, here.delimiter) == ("cp1252", ";")
    assert here.files == {"north.csv": FileConfig(delimiter="|", columns={"text": "note"})}
    plain = localised(tmp_path / "c", LEAST, *theirs)[1].data
    assert (plain.encoding, plain.delimiter) == ("auto", "auto")


def test_a_site_maps_no_kind_or_template_of_a_file(tmp_path: Path) -> None:
    for line in ('kind = "text"', 'template = "{note}"'):
        with pytest.raises(UserError, match=r"site\.toml: key = 'data\.files\.a\.csv\.(kind|template)': unknown"):
            localised(tmp_path / line[:4], f'{LEAST}[data.files."a.csv"]\n{line}\n')


def test_no_program_of_the_coordinators_runs_over_a_sites_data(tmp_path: Path) -> None:
    site = make_site(tmp_path, LEAST)
    for more in ("{{ messages[0].content }}", "/etc/passwd", "chat.jinja"):
        theirs = Config().model_copy(update={"data": DataConfig(chat_template=more)})
        with pytest.raises(
            UserError, match=r"could choose among the examples of this site. Choose one of: model, chat"
        ):
            site.localise(theirs)
        if "{" in more:
            with pytest.raises(UserError, match="sites run no template of another's over their data"):
                load_config(None, [f"data.chat_template={more}", "federation.engine=flower"])
    packaged = DataConfig().model_copy(update={"kind": "ward"})
    with pytest.raises(UserError, match=r"may read any column, and this site reads those of its site.toml"):
        site.localise(Config().model_copy(update={"data": packaged}))
    chatml = Config().model_copy(update={"data": DataConfig(chat_template="chatml")})
    assert site.localise(chatml).data.chat_template == "chatml"


def test_alpaca_across_sites_reads_the_columns_that_a_site_names(tmp_path: Path) -> None:
    site = make_site(tmp_path, LEAST + '[data.columns]\nprompt = "task"\ninput = "note"\n')
    here = site.localise(load_config(None, ["data.kind=alpaca"])).data
    assert here.template == "{task}\n{note}\nResponse:"


def test_all_else_is_as_the_coordinator_says(tmp_path: Path) -> None:
    asked, here = localised(tmp_path, LEAST)
    assert here.model.path == "their/model"  # a site without a copy of its own
    assert here.training.batch_tokens == 4096
    assert here.statistics.min_tokens == 32
    own = {
        "run": {"device", "threads"},
        "model": {"path", "trust_remote_code"},
        "data": {"train", "test", "subset", "train_split", "test_split", "template", "columns"},
        "clients": {"held_out"},
        "statistics": {"min_tokens", "min_examples"},
    }
    for section in Config.model_fields:
        mine, theirs = getattr(here, section).model_dump(), getattr(asked, section).model_dump()
        assert {key for key in theirs if mine[key] != theirs[key]} <= own.get(section, set()), section


def test_a_site_may_trust_its_own_model_code(tmp_path: Path) -> None:
    trusting = LEAST + '[model]\npath = "own/model"\ntrust_remote_code = true\n'
    assert localised(tmp_path, trusting, "model.trust_remote_code=false")[1].model.trust_remote_code is True


def test_a_site_can_only_make_limits_stricter(tmp_path: Path) -> None:
    asked, here = localised(tmp_path, LEAST + "[limits]\nbatch_tokens = 99999\nmin_tokens = 1\nmin_examples = 1\n")
    assert here.training.batch_tokens == asked.training.batch_tokens
    assert here.statistics == asked.statistics


def test_what_a_site_can_do_is_its_own_to_say(tmp_path: Path) -> None:
    site = make_site(tmp_path, LEAST + "[limits]\ntop_k = 1\nmax_experts = 2\nrank = 9\n")
    assert site.client_limits(load_config()) == ClientLimits(top_k=1, max_experts=2)
    exact = ["tuning.kind=lora", "tuning.average=exact", "tuning.rank=4"]  # ranks may differ, up to the run's
    assert site.client_limits(load_config(None, exact)) == ClientLimits(top_k=1, max_experts=2, rank=4)
    assert make_site(tmp_path, LEAST).client_limits(load_config()) == ClientLimits()
    bound = make_site(tmp_path, LEAST + "[limits]\nmax_norm = 2.5\n")
    assert bound.client_limits(load_config()) == ClientLimits(max_norm=2.5)


def test_the_supernode_of_a_site(tmp_path: Path) -> None:
    site = make_site(tmp_path, LEAST)
    command = site.supernode_command(4711)
    assert command[:2] == ["flower-supernode", "--insecure"]
    assert command[command.index("--superlink") + 1] == "127.0.0.1:8000"
    assert command[command.index("--port") + 1] == "4711"
    assert command[-1] == f'site="{tmp_path.resolve() / "site.toml"}"'
    link = '[coordinator]\nsuperlink = "hub.example:8000"\nroot_certificates = "ca.crt"\n'
    for name in ("ca.crt", "key"):
        (tmp_path / name).touch()
    command = make_site(tmp_path, LEAST + link).supernode_command()
    assert command[1:3] == ["--root-certificates", str(tmp_path.resolve() / "ca.crt")]
    assert command[command.index("--auth-supernode-private-key") + 1] == str(tmp_path.resolve() / "key")
    assert "--insecure" not in command
    assert "--port" not in command
