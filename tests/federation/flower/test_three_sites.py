"""The demo of sites, as far as it starts no process."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedalign.config.site import SiteFolder
from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.federation.flower import three_sites
from fedalign.federation.flower.three_sites import CONFIG, KIND, SITES, WRITTEN, demo
from fedalign.files import take


def test_its_configuration_is_there_and_is_one() -> None:
    assert load_config(CONFIG).federation.engine == "flower"


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "sites").mkdir()  # many a project has one
    (tmp_path / "sites" / "index.html").write_text("mine")
    with pytest.raises(UserError, match="holds no demo of sites"):
        demo(tmp_path, rounds=1)
    assert (tmp_path / "sites" / "index.html").read_text() == "mine"


def test_its_sites_consent_in_so_many_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(three_sites, "EXAMPLES", 60)
    three_sites.deal_data(tmp_path)
    for site in SITES:
        told = SiteFolder.load(tmp_path / site).config.consent.told
        assert told.startswith("embeddings and head are trained here if the coordinator has them trained: ")
        assert told.endswith("how often each stands here, and how many examples each label has, is sent if asked for")


def test_what_was_added_to_an_earlier_demo_is_named(tmp_path: Path) -> None:
    take(tmp_path, KIND, WRITTEN)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, which no demo of sites wrote"):
        demo(tmp_path, rounds=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"
