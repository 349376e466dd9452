"""Masks that cancel in a sum: for each pair of clients a stream of integers that one adds and the other subtracts.

**Keys.** Each client has an X25519 key, fresh in each run, signed with the node key that it has already. Public halves
and signatures are relayed by the coordinator. A client verifies them by the public node keys that it was given
otherwise. In one process nobody is in between, and nothing is signed.

**Streams.** X25519 agrees on a secret of each pair. HKDF-SHA256 (RFC 5869) makes a key of it for each purpose. Its info
names the run, what is masked (round, broadcast and totals as hashes, name), all among whom it is summed, and both
public keys. The mask is that key's ChaCha20 stream, read as integers in little-endian order, modulo their width; the
client whose name is lower adds it. A part of a tensor has the part of the stream that belongs to it. Clients that
differ in anything of this have masks that do not cancel.

**Argument.** Of two clients that tell nobody their key, one adds a stream and the other subtracts it. To whoever knows
neither key it is as good as random, so each message by itself is uniform, and their sum is all that is left. That holds
for any number of others, if they follow the protocol, put together what they know, and do not work with the
coordinator.

**Once.** Two messages under one mask tell their difference; sums of one thing over two sets of clients tell that of
whoever is in one of them. So a client conceals one content under one mask, and in a round each thing for at most two
sets, the second within the first. It cannot see whether all others have sent their parts of the first sum: that a
coordinator asks for no second one then is its word, until a later round has begun. What a client can hold by itself is
in `Once`.

**Not claimed:** anything about what sums tell, about a coordinator that says that a client is gone which is not, about
clients that work with it, or about values that a client makes up.

The primitives are those of `cryptography`, of the extra `flower`, imported when they are first needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedalign.errors import TrainingFailedError, UserError
from fedalign.files import append_private, write_private

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import CipherContext

CHUNK = 1 << 17  # bytes of a stream at a time, so that they stay in cache
STREAM_BLOCK, MOST_STREAM = 64, 1 << 38  # bytes that ChaCha20 counts, and of a stream


class Masks:
    """One client's masks in one run.

    Args:
        name: of the client.
        run: a text that no other run has.
        key: its private X25519 key, 32 bytes, which no other run has had.
        least: of how many clients a sum is at least.
    """

    def __init__(self, name: str, run: str, key: bytes, least: int = 2) -> None:
        self.name, self._run, self._key, self._least = name, run, key, max(least, 2)
        self._public: dict[str, bytes] = {name: public_key(key)}
        self._shared: dict[str, bytes] = {}

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._public[self.name]

    def meet(self, keys: Mapping[str, bytes]) -> None:
        """Agree on a secret with each of the others, by their public keys.

        Raises:
            ValueError: A key is none, is another's, too, or is another one than before; the message names its owner.
        """
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

        owner = {key: name for name, key in self._public.items()}
        for name, key in keys.items():
            if self._public.get(name, key) != key:
                raise ValueError(f"{name}: has another mask key than before")
            if owner.setdefault(key, name) != name:
                raise ValueError(f"{name}: has the mask key of {owner[key]}")
            if name in self._public:
                continue
            try:
                shared = X25519PrivateKey.from_private_bytes(self._key).exchange(X25519PublicKey.from_public_bytes(key))
            except ValueError:  # of another length, or of a point that has the same secret with everybody
                raise ValueError(f"{name}: its mask key is no X25519 public key") from None
            self._public[name], self._shared[name] = key, shared

    def mask(self, values: Tensor, about: Sequence[object], among: Sequence[str], first: int = 0) -> Tensor:
        """Integers of any width plus this client's masks, modulo that width.

        Args:
            values: int16, int32 or int64.
            about: what they are; no two tensors may be masked about the same.
            among: whose sum is made, in any order; masks cancel in it.
            first: the index of the first value in its tensor, where that is masked part by part.

        Raises:
            ValueError: There would be no mask: it is not among them, they are too few, or one was not met.
        """
        self._check(among)
        masked = values.clone(memory_format=torch.contiguous_format)
        flat = masked.view(-1)
        size = flat.element_size()
        streams = [
            (self._stream(self._pair(peer, about, among), first * size, flat.nbytes), self.name < peer)
            for peer in among
            if peer != self.name
        ]
        zeros, room = bytes(CHUNK), bytearray(CHUNK)
        noise = torch.frombuffer(room, dtype=flat.dtype)
        for part in flat.split(CHUNK // size):
            for stream, adds in streams:
                stream.update_into(memoryview(zeros)[: part.nbytes], room)
                part.add_(noise[: len(part)], alpha=1 if adds else -1)
        return masked

    def noise(self, shape: Sequence[int], dtype: torch.dtype, about: Sequence[object]) -> Tensor:
        """Uniform integers that this client alone knows, the same for the same `about`."""
        drawn = torch.zeros(math.prod(shape), dtype=dtype)
        if len(drawn):
            key = _derived(self._key, ["noise", self._run, [str(part) for part in about]])
            stream = self._stream(key, 0, drawn.nbytes)
            drawn = torch.frombuffer(bytearray(stream.update(bytes(drawn.nbytes))), dtype=dtype)
        return drawn.view(*shape)

    def _check(self, among: Sequence[str]) -> None:
        strangers = set(among) - self._public.keys()
        if self.name not in among or len(set(among)) != len(among) or len(among) < self._least or strangers:
            raise ValueError(
                f"a sum among {_listed(among)}: {self.name} masks for {self._least} clients at least, each named once, "
                f"itself among them, whose keys it has ({_listed(self._public)})"
            )

    def _pair(self, peer: str, about: Sequence[object], among: Sequence[str]) -> bytes:
        keys = [self._public[name].hex() for name in sorted((self.name, peer))]
        return _derived(self._shared[peer], [self._run, [str(part) for part in about], sorted(among), keys])

    @staticmethod
    def _stream(key: bytes, start: int, nbytes: int) -> CipherContext:
        """A key's stream from byte `start` on."""
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

        if start + nbytes > MOST_STREAM:
            raise ValueError(f"{start + nbytes:,} bytes under one key: ChaCha20 counts {MOST_STREAM:,}")
        counter = (start // STREAM_BLOCK).to_bytes(4, "little")
        stream = Cipher(ChaCha20(key, counter + bytes(12)), mode=None).encryptor()
        stream.update(bytes(start % STREAM_BLOCK))
        return stream


def fresh_key() -> bytes:
    """A new private X25519 key."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.generate().private_bytes_raw()


def public_key(key: bytes) -> bytes:
    """The public half of a private X25519 key."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw()


def _derived(secret: bytes, info: object) -> bytes:
    """A key of 32 bytes for one purpose: HKDF-SHA256 without salt. JSON of lists and texts tells where each ends."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), 32, None, json.dumps(info).encode()).derive(secret)


def is_public_key(key: bytes) -> bool:
    """Whether others can agree on a secret with who has this key; with some points everybody has the same one."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(key))
    except ValueError:
        return False
    return True


class Once:
    """A client's record of a run: what it has concealed, so that nothing is concealed twice in a way that tells of it.

    It keeps the client's private key of the run, too: who forgets what was concealed with a key forgets the key. The
    other way round the record outlives the key: see `forget`.

    Args:
        name: of the client.
        run: a text that no other run has.
        least: of how many clients a sum is at least.
        most: of how many it is at most.
        file: where it is kept, for its owner's eyes alone; None: nowhere, and it ends with this process.

    Raises:
        UserError: The file cannot be read.
    """

    def __init__(self, name: str, run: str, least: int, most: int, file: Path | None = None) -> None:
        self.name, self.run, self.least, self.most, self._file = name, run, least, most, file
        self._round = 0
        self._seen: dict[str, str] = {}  # of that round
        self._among: dict[str, list[frozenset[str]]] = {}
        self._lines = list[str]()  # of the file, but for the first
        known = self._load()
        self.key = known or fresh_key()
        if not known:
            self._write()

    def forget(self) -> None:
        """Forget the key, for nobody may unmask what was sent; who goes on with the run has another.

        What was concealed in the last round stays noted, so that no further sum of it is made under another key either.
        """
        self.key = b""
        self._write()

    def bind(self, round: int, what: str, seen: str) -> None:
        """Note that something of a round is `seen`, a hash, or refuse where it was another.

        Raises:
            TrainingFailedError: It was another, or a later round has begun.
        """
        self._enter(round)
        if self._seen.get(what, seen) != seen:
            raise TrainingFailedError(f"other {what} of round {round} before: its masks are used up")
        if what not in self._seen:
            self._note({"round": round, "what": what, "seen": seen})
            self._seen[what] = seen

    def knows(self, round: int, what: str) -> bool:
        """Whether something of a round was noted."""
        return round == self._round and what in self._seen

    def allow(self, round: int, names: Iterable[str], among: Sequence[str]) -> None:
        """Note that things of a round are about to be concealed among these clients, or refuse all of them.

        The last may be asked for again. Else it is asked for twice at most, the second time among some of the first.

        Raises:
            TrainingFailedError: It would tell of one client, these clients are too few, or a later round has begun.
        """
        asked = frozenset(among)
        if self.name not in asked or len(asked) != len(among) or not self.least <= len(among) <= self.most:
            raise TrainingFailedError(
                f"a masked sum of {len(among)} clients: it takes part in sums of {self.least} to {self.most}, itself "
                "among them"
            )
        self._enter(round)
        new = [name for name in dict.fromkeys(names) if asked not in self.among(round, name)[-1:]]
        for name in new:
            before = self._among.get(name, [])
            if len(before) == 2 or (before and not asked < before[0]):
                raise TrainingFailedError(
                    f"{name} of round {round} was concealed already: a further sum would tell of one client"
                )
        if new:
            self._note({"round": round, "names": new, "among": sorted(asked)})
            for name in new:
                self._among.setdefault(name, []).append(asked)

    def among(self, round: int, name: str) -> Sequence[frozenset[str]]:
        """Among whom something was concealed, first and second."""
        return self._among.get(name, []) if round == self._round else []

    def _enter(self, round: int) -> None:
        """Close all rounds before: whoever goes on has the sums that it needed."""
        if round < self._round:
            raise TrainingFailedError(f"round {round}: round {self._round} has begun, no earlier one is summed again")
        if round > self._round:
            self._begin(round)

    def _begin(self, round: int) -> None:
        self._round, self._seen, self._among, self._lines = round, {}, {}, []
        self._write()

    def _write(self) -> None:
        """Replace the file; return when the disk has it."""
        if self._file is not None:
            head = {"client": self.name, "run": self.run, "key": self.key.hex(), "round": self._round}
            write_private(self._file, "".join(f"{line}\n" for line in (json.dumps(head), *self._lines)).encode())

    def _note(self, line: Mapping[str, object]) -> None:
        """Return when the disk has it: it must be known before anything leaves."""
        self._lines.append(json.dumps(line))
        if self._file is not None:
            append_private(self._file, [line])

    def _load(self) -> bytes | None:
        """The key, if the file is of this run and has one; what was concealed is known then in either case."""
        try:
            if self._file is None or not self._file.exists():
                return None
            first, *texts = self._file.read_text("utf-8").split("\n")[:-1]
            head = json.loads(first)
            if (head["client"], head["run"]) != (self.name, self.run):
                return None
            for line in map(json.loads, texts):
                if "what" in line:
                    self._seen[line["what"]] = line["seen"]
                for name in line.get("names", ()):
                    self._among.setdefault(name, []).append(frozenset(line["among"]))
            self._round, self._lines = head["round"], texts
            return bytes.fromhex(head["key"]) or None
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"{str(self._file)!r}: tells what was concealed in this run, and cannot be read. Remove it: the client "
                "then has another key, and takes part once keys have been exchanged again."
            ) from None


def signed(run: str, name: str, public: bytes, sign: Callable[[bytes], bytes]) -> bytes:
    """A client's signature of its public mask key of a run.

    Args:
        run: as in `Masks`.
        name: of the client.
        public: the key, 32 bytes.
        sign: of its node key; see `signer`.
    """
    return sign(_vouched(run, name, public))


def verify(run: str, keys: Mapping[str, tuple[bytes, bytes]], known: Mapping[str, str]) -> dict[str, bytes]:
    """The public mask keys of clients, each vouched for by its node key.

    Args:
        run: as in `Masks`.
        keys: what the coordinator relays: of each client the key and its signature.
        known: of each client the public node key in OpenSSH's form, come by otherwise.

    Raises:
        TrainingFailedError: A client is not known, or did not sign this; the message names it.
    """
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.hashes import SHA384
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    for name, (public, signature) in keys.items():
        if name not in known:
            raise TrainingFailedError(f"mask key of {name!r}: its node key is not among those that are known here")
        try:
            node = load_ssh_public_key(known[name].encode())
        except (ValueError, UnsupportedAlgorithm):
            node = None
        if not isinstance(node, EllipticCurvePublicKey):
            raise TrainingFailedError(
                f"node key of {name!r}: what is known here is no elliptic-curve key in OpenSSH form"
            )
        try:
            node.verify(signature, _vouched(run, name, public), ECDSA(SHA384()))
        except InvalidSignature:
            raise TrainingFailedError(f"mask key of {name!r}: not signed with its node key for this run") from None
    return {name: public for name, (public, _) in keys.items()}


def signer(file: Path) -> Callable[[bytes], bytes]:
    """A function that signs with a node key: a private elliptic-curve key in OpenSSH form, without a password.

    Raises:
        UserError: It is none, or cannot be read.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.hashes import SHA384
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        key = load_ssh_private_key(file.read_bytes(), None)
    except OSError as error:
        raise UserError(f"node key {str(file)!r}: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise UserError(f"node key {str(file)!r}: not a private elliptic-curve key in OpenSSH form without a password")
    return lambda text: key.sign(text, ECDSA(SHA384()))


def _vouched(run: str, name: str, public: bytes) -> bytes:
    """The text that is signed; nothing else that a node key signs begins like this."""
    return json.dumps(["fedalign mask key", run, name, public.hex()]).encode()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
