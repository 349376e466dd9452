from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedalign.errors import UserError
from fedalign.files import SUMS, replacing
from fedalign.protocol import EMBEDDINGS, HEAD, SHARED, ParameterGroup, parse_group
from fedalign.server.checkpoint import Checkpoints, ServerState
from tests.maths.test_tensor_file import mapped_from

EXPERT = ParameterGroup("expert", 1, 2)
IDENTITY = {"model": "m", "configuration": "c"}


def state(round: int) -> ServerState:
    weights = {SHARED: torch.full((3,), float(round)), EXPERT: torch.arange(2.0)}
    return ServerState(round, weights, {"target_L_E": torch.ones(1, 2)}, ({"round": round, "accuracy": 0.25},))


@pytest.mark.parametrize("group", [SHARED, EMBEDDINGS, HEAD, EXPERT, ParameterGroup("gate", 0, 11)])
def test_group_names_round_trip(group: ParameterGroup) -> None:
    assert parse_group(str(group)) == group


def test_the_latest_round_comes_back_and_two_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    assert checkpoints.load() is None
    for round in range(4):
        checkpoints.save(state(round))
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded.round == 3
    assert loaded.history == ({"round": 3, "accuracy": 0.25},)
    assert loaded.weights[SHARED].tolist() == [3.0, 3.0, 3.0]
    assert loaded.weights[EXPERT].tolist() == [0.0, 1.0]
    assert loaded.algorithm["target_L_E"].tolist() == [[1.0, 1.0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00002", "round-00003"]


def file_at(address: int) -> str:
    """The file that is mapped to this place of the process's memory; empty if none is."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if int(first, 16) <= address < int(last, 16):
            return " ".join(line.split()[5:])
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells")
def test_weights_that_were_saved_are_mapped_from_their_file(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    before = replace(state(1), weights={EXPERT: torch.arange(3.0), SHARED: torch.ones(5)})
    checkpoints.save(before)
    after = checkpoints.mapped(before)
    assert list(after.weights) == list(before.weights)
    for group, values in after.weights.items():
        assert torch.equal(values, before.weights[group])
        assert file_at(values.data_ptr()).endswith("round-00001/weights.safetensors")


@pytest.mark.parametrize("name", ["model", "configuration"])
def test_another_model_or_configuration_is_refused(tmp_path: Path, name: str) -> None:
    Checkpoints(tmp_path, IDENTITY).save(state(1))
    with pytest.raises(UserError, match=f"made with another {name}"):
        Checkpoints(tmp_path, IDENTITY | {name: "other"}).load()


FILES = ["weights.safetensors", "algorithm.safetensors", "moments.safetensors", "state.json", SUMS]


def flip(file: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_is_noticed_and_the_round_before_is_used(
    tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    for round in (1, 2):
        checkpoints.save(state(round))
    flip(tmp_path / "round-00002" / file)
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded.round == 1
    (told,) = [record.getMessage() for record in caplog.records]
    assert "round-00002': damaged (" in told
    assert told.endswith("Going on from round 1.")
    assert checkpoints.weights_after(2) is None
    assert checkpoints.weights_after(1) is not None
    flip(tmp_path / "round-00001" / file)
    with pytest.raises(UserError, match=r"round-00002': damaged .*round-00001': damaged .*No other round is kept"):
        checkpoints.load()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", [b"\x07rubbish", b"", None])
def test_a_damaged_file_is_a_clear_error(tmp_path: Path, file: str, content: bytes | None) -> None:
    Checkpoints(tmp_path, IDENTITY).save(state(1))
    damaged = tmp_path / "round-00001" / file
    damaged.unlink() if content is None else damaged.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        Checkpoints(tmp_path, IDENTITY).load()


def test_a_folder_that_somebody_put_there_is_no_round(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    checkpoints.save(state(1))
    (tmp_path / "round-00001-copy").mkdir()
    (tmp_path / "round-best").mkdir()
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded.round == 1


def test_a_write_that_breaks_off_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with replacing(target) as folder:
        (folder / "a").write_text("old")

    def breaks_off() -> None:
        with replacing(target) as folder:
            (folder / "a").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        breaks_off()
    assert (target / "a").read_text() == "old"
    with replacing(target) as folder:
        (folder / "b").write_text("new")
    assert sorted(path.name for path in target.iterdir()) == [SUMS, "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_moves_is_used_from_the_file_that_was_saved(tmp_path: Path) -> None:
    first, second = state(1), state(2)
    before = {group: weight.clone() for group, weight in second.weights.items()}
    Checkpoints(tmp_path, IDENTITY).save(first)
    assert str(tmp_path) not in mapped_from(first.weights[SHARED])
    checkpoints = Checkpoints(tmp_path, IDENTITY, moving=True)
    checkpoints.save(second)
    places = {mapped_from(weight) for weight in second.weights.values()}
    assert places == {str(tmp_path / "round-00002" / "weights.safetensors")}
    assert all(torch.equal(second.weights[group], weight) for group, weight in before.items())
    found = checkpoints.load()
    assert found is not None
    assert all(torch.equal(found.weights[group], weight) for group, weight in before.items())
