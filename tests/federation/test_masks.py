"""Masks: they cancel in the sum of all, and in no other; nothing is concealed twice in a way that tells of one."""

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from fedalign.errors import TrainingFailedError, UserError
from fedalign.federation.flower.keys import make_node_key
from fedalign.federation.masks import Masks, Once, public_key, signed, signer, verify

NAMES = ("a", "b", "c", "d")
ABOUT = (1, "update", "hash", "expert[0,1]")


def key_of(name: str, turn: int = 0) -> bytes:
    return hashlib.sha256(f"{name} {turn}".encode()).digest()


def met(run: str = "run", names: Iterable[str] = NAMES, turn: int = 0) -> dict[str, Masks]:
    masks = {name: Masks(name, run, key_of(name, turn)) for name in names}
    for one in masks.values():
        one.meet({name: other.public for name, other in masks.items()})
    return masks


def summed(told: Iterable[Tensor]) -> Tensor:
    every = list(told)
    total = torch.zeros_like(every[0])
    for one in every:
        total += one
    return total


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_they_cancel_in_the_sum_of_all(dtype: torch.dtype) -> None:
    values = {name: torch.arange(6).view(2, 3).to(dtype) * turn for turn, name in enumerate(NAMES)}
    masks = met()
    told = {name: masks[name].mask(values[name], ABOUT, NAMES) for name in NAMES}
    assert torch.equal(summed(told.values()), summed(values.values()))
    for name in NAMES:
        assert not torch.equal(told[name], values[name])
        rest = [other for other in NAMES if other != name]
        assert not torch.equal(summed(told[other] for other in rest), summed(values[other] for other in rest))


@settings(max_examples=25, deadline=None)
@given(
    names=st.sets(st.text(max_size=6), min_size=2, max_size=7),
    bits=st.sampled_from([torch.int16, torch.int32, torch.int64]),
    size=st.integers(0, 200),
    chance=st.randoms(use_true_random=False),
)
def test_they_cancel_whatever_clients_are_called_and_in_any_order(
    names: set[str], bits: torch.dtype, size: int, chance: object
) -> None:
    masks = met(names=names)
    most = torch.iinfo(bits).max
    among = list(names)
    told = []
    for one in masks.values():
        chance.shuffle(among)  # type: ignore[attr-defined] # hypothesis' stand-in for random.Random
        told.append(one.mask(torch.full((size,), most, dtype=bits), ABOUT, list(among)))
    assert torch.equal(summed(told), summed([torch.full((size,), most, dtype=bits)] * len(names)))


@pytest.mark.parametrize(
    ("about", "among"),
    [
        ((2, "update", "hash", "expert[0,1]"), NAMES),  # another round
        ((1, "counts", "hash", "expert[0,1]"), NAMES),  # purpose
        ((1, "update", "another", "expert[0,1]"), NAMES),  # broadcast or totals
        ((1, "update", "hash", "expert[0,2]"), NAMES),  # group
        ((1, "update", "hashexpert[0,1]"), NAMES),  # the same letters, cut elsewhere
        ((1, "update", "hash", "expert[0,1]", ""), NAMES),
        (ABOUT, ("a", "b", "c")),  # participants
    ],
)
def test_who_masks_anything_else_does_not_cancel(about: tuple[object, ...], among: tuple[str, ...]) -> None:
    masks, zeros = met(), torch.zeros(8, dtype=torch.int64)
    told = [masks[name].mask(zeros, ABOUT, NAMES) for name in NAMES[1:]]
    assert torch.equal(summed([*told, masks["a"].mask(zeros, ABOUT, NAMES)]), zeros)
    assert bool((summed([*told, masks["a"].mask(zeros, about, among)]) != 0).all())


def test_who_is_in_another_run_does_not_cancel() -> None:
    zeros = torch.zeros(8, dtype=torch.int64)
    one, other = met(), met("another run")
    told = [one[name].mask(zeros, ABOUT, NAMES) for name in NAMES[1:]]
    assert bool((summed([*told, other["a"].mask(zeros, ABOUT, NAMES)]) != 0).all())


def test_names_are_told_apart_however_they_are_put_together() -> None:
    zeros = torch.zeros(8, dtype=torch.int64)
    masks = met(names=("a", "b", 'c", "d', "c", "d"))
    among, joined = ("a", "b", "c", "d"), ("a", "b", 'c", "d')
    assert not torch.equal(masks["a"].mask(zeros, ABOUT, among), masks["a"].mask(zeros, ABOUT, joined))
    pair = met(names=("a", "b"))["a"]
    assert not torch.equal(pair.mask(zeros, ("x", "y"), ("a", "b")), pair.mask(zeros, ('x", "y',), ("a", "b")))


def test_the_stream_is_that_of_the_standards() -> None:
    """The keys of RFC 7748, section 6.1, HKDF-SHA256 (RFC 5869) written out, and ChaCha20 of its key."""
    bob = Masks("b", "run", bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    alice = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    bob.meet({"a": bytes.fromhex(alice)})
    info = f'["run", ["1", "load"], ["a", "b"], ["{alice}", "{bob.public.hex()}"]]'.encode()
    key = hmac.digest(hmac.digest(bytes(32), shared, hashlib.sha256), info + b"\x01", hashlib.sha256)
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(32))
    expected = torch.frombuffer(bytearray(stream), dtype=torch.int64)
    zeros = torch.zeros(4, dtype=torch.int64)
    assert torch.equal(bob.mask(zeros, (1, "load"), ("b", "a")), -expected)
    bob.meet({"c": public_key(key_of("c"))})
    rest = bob.mask(zeros, (1, "load"), ("a", "b", "c")) - bob.mask(zeros, (1, "load"), ("b", "c"))
    assert not torch.equal(rest, -expected)  # among others it is another stream


def test_a_piece_is_masked_as_in_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = met()["b"]
    for dtype in (torch.int16, torch.int32, torch.int64):
        values = torch.arange(1000).to(dtype)
        whole = masks.mask(values, ABOUT, NAMES)
        for first, stop in ((0, 1), (1, 2), (31, 33), (32, 64), (333, 1000), (999, 1000), (500, 500)):
            assert torch.equal(masks.mask(values[first:stop], ABOUT, NAMES, first), whole[first:stop])
        with monkeypatch.context() as patch:
            patch.setattr("fedalign.federation.masks.CHUNK", 128)
            assert torch.equal(masks.mask(values, ABOUT, NAMES), whole)
    with pytest.raises(ValueError, match="under one key"):
        masks.mask(values, ABOUT, NAMES, 1 << 35)
    masks.mask(values[:8], ABOUT, NAMES, (1 << 35) - 8)


def test_what_one_client_sends_is_uniform_and_says_nothing_of_its_values() -> None:
    """Of the same values under other keys, and of two clients' values under the same: bytes of all kinds alike."""
    values = torch.arange(5000).remainder(7).short()
    for kind in ("one", "difference"):
        seen = torch.zeros(256, dtype=torch.int64)
        for turn in range(20):
            masked = met(turn=turn)["b"].mask(values, ABOUT, NAMES)
            if kind == "difference":
                masked = masked - met(turn=100 + turn)["b"].mask(values + 1, ABOUT, NAMES)
            seen += torch.bincount(masked.view(torch.uint8).long(), minlength=256)
        assert chisquare(seen.numpy()).pvalue > 1e-3, kind
    bare = torch.bincount(values.view(torch.uint8).long(), minlength=256)
    assert chisquare(bare.numpy()).pvalue < 1e-3  # the test can fail


def test_all_but_two_together_do_not_unmask_either() -> None:
    """Of a, c and d, d knows all its streams: what is left of a's message is still as good as random."""
    masks, zeros = met(), torch.zeros(20_000, dtype=torch.int16)
    left = masks["a"].mask(zeros, ABOUT, NAMES)
    for name in ("c", "d"):  # what they share with a
        key = masks[name]._pair("a", ABOUT, NAMES)
        noise = torch.frombuffer(bytearray(Masks._stream(key, 0, 40_000).update(bytes(40_000))), dtype=torch.int16)
        left = left - noise
    seen = torch.bincount(left.view(torch.uint8).long(), minlength=256)
    assert chisquare(seen.numpy()).pvalue > 1e-3
    last = torch.frombuffer(
        bytearray(Masks._stream(masks["b"]._pair("a", ABOUT, NAMES), 0, 40_000).update(bytes(40_000))),
        dtype=torch.int16,
    )
    assert torch.equal(left, last)  # and nothing but what it shares with b


def test_values_stay_as_they_were() -> None:
    values = torch.arange(4)
    met()["a"].mask(values, ABOUT, NAMES)
    assert values.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("among", "said"),
    [
        (("a",), "a sum among a: a masks for 3 clients at least"),
        (("a", "b"), "for 3 clients at least"),
        ((), "a sum among none"),
        (("b", "c", "d"), "itself among them"),
        (("a", "b", "b", "c"), "each named once"),
        (("a", "b", "c", "e"), r"whose keys it has \(a, b, c, d\)"),
    ],
)
def test_there_is_no_sum_without_a_mask(among: Sequence[str], said: str) -> None:
    masks = met()
    one = Masks("a", "run", key_of("a"), least=3)
    one.meet({name: other.public for name, other in masks.items()})
    with pytest.raises(ValueError, match=said):
        one.mask(torch.zeros(2, dtype=torch.int16), ABOUT, among)
    with pytest.raises(ValueError, match="for 2 clients at least"):
        Masks("a", "run", key_of("a"), least=0).mask(torch.zeros(2, dtype=torch.int16), ABOUT, ("a",))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"b": bytes(32)}, "b: its mask key is no X25519 public key"),  # the same secret with everybody
        ({"b": (1).to_bytes(32, "little")}, "b: its mask key is no X25519 public key"),
        ({"b": bytes(31)}, "b: its mask key is no X25519 public key"),
        ({"b": public_key(key_of("a"))}, "b: has the mask key of a"),
        ({"b": public_key(key_of("b")), "c": public_key(key_of("b"))}, "c: has the mask key of b"),
        ({"a": public_key(key_of("b"))}, "a: has another mask key than before"),
    ],
)
def test_a_key_that_is_none_or_anothers_is_refused(keys: Mapping[str, bytes], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Masks("a", "run", key_of("a")).meet(keys)


def test_a_key_stays_what_it_was() -> None:
    one = met()["a"]
    one.meet({"b": public_key(key_of("b"))})
    with pytest.raises(ValueError, match="b: has another mask key than before"):
        one.meet({"b": public_key(key_of("another"))})


def test_noise_of_ones_own_is_the_same_again_and_nobody_elses() -> None:
    masks = met()
    one = masks["a"].noise((3, 5), torch.int32, ("x",))
    assert torch.equal(one, met()["a"].noise((3, 5), torch.int32, ("x",)))
    assert not torch.equal(one, masks["a"].noise((3, 5), torch.int32, ("y",)))
    assert not torch.equal(one, masks["b"].noise((3, 5), torch.int32, ("x",)))
    assert not torch.equal(one, Masks("a", "another run", key_of("a")).noise((3, 5), torch.int32, ("x",)))
    assert masks["a"].noise((0, 5), torch.int32, ("x",)).shape == (0, 5)


def once(file: Path | None = None, run: str = "run") -> Once:
    return Once("a", run, 3, 6, file)


ALL = ("a", "b", "c", "d", "e")


@pytest.mark.parametrize("kept", [False, True])
def test_a_client_answers_twice_at_most_and_for_fewer_of_the_same(tmp_path: Path, kept: bool) -> None:
    file = tmp_path / "site" / "once" if kept else None
    held = once(file)

    def again() -> Once:
        return once(file) if kept else held

    again().allow(1, ["x", "y"], ALL)
    again().allow(1, ["x", "y"], ALL[::-1])  # the same
    for other in (("a", "b", "c", "f"), (*ALL, "f")):
        with pytest.raises(TrainingFailedError, match="x of round 1 was concealed already: a further sum"):
            again().allow(1, ["x"], other)
    again().allow(1, ["x"], ("a", "b", "c", "d"))
    again().allow(1, ["x"], ("d", "c", "b", "a"))
    with pytest.raises(TrainingFailedError, match="x of round 1 was concealed already"):
        again().allow(1, ["x"], ALL)  # both sums together would tell of e
    with pytest.raises(TrainingFailedError, match="x of round 1 was concealed already"):
        again().allow(1, ["x"], ("a", "b", "c"))
    with pytest.raises(TrainingFailedError, match="x of round 1"):
        again().allow(1, ["y", "x"], ("a", "b", "c"))
    again().allow(1, ["y"], ("a", "b", "e"))  # nothing of what was refused has been noted
    again().allow(2, ["x"], ("a", "b", "c"))
    with pytest.raises(TrainingFailedError, match="round 1: round 2 has begun"):
        again().allow(1, ["y"], ALL)
    with pytest.raises(TrainingFailedError, match="round 1: round 2 has begun"):
        again().bind(1, "totals", "hash")
    assert again().among(2, "x") == [frozenset("abc")]
    assert again().among(1, "x") == []


@pytest.mark.parametrize(
    "among", [("a", "b"), ("b", "c", "d"), ("a", "b", "b"), ("a", "b", "c", "d", "e", "f", "g"), ()]
)
def test_a_client_takes_part_in_sums_of_itself_and_enough_others(among: Sequence[str]) -> None:
    with pytest.raises(TrainingFailedError, match="it takes part in sums of 3 to 6, itself among them"):
        once().allow(1, ["x"], among)


@pytest.mark.parametrize("kept", [False, True])
def test_one_content_a_mask(tmp_path: Path, kept: bool) -> None:
    file = tmp_path / "once" if kept else None
    held = once(file)
    held.bind(1, "update", "one")
    held.bind(1, "update", "one")
    for again in (held, *([once(file)] if kept else [])):
        with pytest.raises(TrainingFailedError, match="other update of round 1 before: its masks are used up"):
            again.bind(1, "update", "two")
    held.bind(2, "update", "two")


def test_a_restart_keeps_the_key_and_another_run_has_another(tmp_path: Path) -> None:
    file = tmp_path / "once"
    first = once(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert once(file).key == first.key
    first.allow(7, ["x"], ALL)
    assert once(file).key == first.key
    with file.open("a", encoding="utf-8") as opened:
        opened.write('{"round": 7, "names": ["y"], "am')  # a kill
    last = once(file)
    last.allow(7, ["y"], ("a", "b", "c"))
    assert once(file).among(7, "y") == [frozenset("abc")]
    assert once(file).among(7, "x") == [frozenset(ALL)]
    copied = tmp_path / "copied"
    copied.write_bytes(file.read_bytes())
    assert Once("b", "run", 3, 6, copied).key != first.key  # nor has another client
    other = once(file, "another run")
    assert other.key != first.key
    assert other.among(7, "x") == []
    assert once(file).key not in (first.key, other.key)  # who comes back to a run has forgotten it, and its key


def test_who_forgets_its_key_has_another_and_what_was_concealed_stays_noted(tmp_path: Path) -> None:
    """Else whoever says that the run is over could ask for further sums of the same round."""
    file = tmp_path / "once"
    first = once(file)
    first.bind(7, "update", "one")
    first.allow(7, ["x"], ALL)
    key = first.key
    first.forget()
    assert key.hex() not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    second = once(file)
    assert second.key not in (key, b"")
    assert once(file).key == second.key
    assert second.among(7, "x") == [frozenset(ALL)]
    second.allow(7, ["x"], ("a", "b", "c"))
    for again in (second, once(file)):
        with pytest.raises(TrainingFailedError, match="a further sum would tell of one client"):
            again.allow(7, ["x"], ("a", "b", "d"))
        with pytest.raises(TrainingFailedError, match="other update of round 7 before"):
            again.bind(7, "update", "two")
        with pytest.raises(TrainingFailedError, match="no earlier one is summed again"):
            again.allow(6, ["x"], ALL)


@pytest.mark.parametrize(
    "text", ["", "{}\n", "[1]\n", "none\n", '{"client": "a", "run": "run", "key": "z", "round": 1}\n']
)
def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "once"
    file.write_text(text)
    with pytest.raises(UserError, match=r"cannot be read\. Remove it") as told:
        once(file)
    assert "\n" not in str(told.value)
    assert file.read_text() == text


def node(folder: Path, name: str) -> tuple[Path, str]:
    private = folder / name
    return private, make_node_key(private).read_text()


def test_mask_keys_are_signed_with_node_keys(tmp_path: Path) -> None:
    nodes = {name: node(tmp_path, name) for name in ("a", "b", "c")}
    known = {name: public for name, (_, public) in nodes.items()}
    publics = {name: public_key(key_of(name)) for name in nodes}
    keys = {name: (publics[name], signed("run", name, publics[name], signer(nodes[name][0]))) for name in nodes}
    assert verify("run", keys, known) == publics
    said = "not signed with its node key for this run"
    for wrong in (
        keys | {"b": (publics["c"], keys["b"][1])},  # another key
        keys | {"b": keys["c"]},  # another's key and signature
        keys | {"b": (publics["b"], signed("run", "b", publics["b"], signer(nodes["c"][0])))},  # signed by another
        keys | {"b": (publics["b"], b"")},
        keys | {"b": (publics["b"], signed("earlier", "b", publics["b"], signer(nodes["b"][0])))},
    ):
        with pytest.raises(TrainingFailedError, match=f"mask key of 'b': {said}"):
            verify("run", wrong, known)
    with pytest.raises(TrainingFailedError, match=f"mask key of 'c': {said}"):  # one node key of two names
        verify("run", {"c": keys["b"]}, {"c": known["b"]})
    with pytest.raises(TrainingFailedError, match="mask key of 'b': its node key is not among those that"):
        verify("run", keys, {name: known[name] for name in ("a", "c")})
    for none in ("", "ssh-ed25519 AAAA", known["b"][:40]):
        with pytest.raises(TrainingFailedError, match="node key of 'b': what is known here is no elliptic-curve key"):
            verify("run", keys, known | {"b": none})


def test_what_signs_is_a_node_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        signer(tmp_path / "gone")
    (tmp_path / "none").write_text("none")
    with pytest.raises(UserError, match="not a private elliptic-curve key"):
        signer(tmp_path / "none")
