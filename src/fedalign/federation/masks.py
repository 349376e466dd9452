"""Masks that cancel in a sum: for each pair of clients a stream of integers that one adds and the other subtracts.

X25519 agrees on a secret of each pair. HKDF-SHA256 makes a key of it for each purpose, in which stand the run, what is
masked, what was seen, and among whom it is summed. The mask is that key's ChaCha20 stream. Clients that differ in any
of these have masks that do not cancel. The primitives are those of `cryptography`; the order of names says who adds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

CHUNK = 1 << 22  # bytes of a stream at a time


class Masks:
    """One client's keys of one run.

    Args:
        name: of the client.
        run: a text that no other run has.
    """

    def __init__(self, name: str, run: str) -> None:
        self.name, self._run = name, run
        self._key = X25519PrivateKey.generate()
        self._shared: dict[str, bytes] = {}

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def meet(self, keys: Mapping[str, bytes]) -> None:
        """Agree on a secret with each of the others, by their public keys."""
        for name, key in keys.items():
            if name != self.name:
                self._shared[name] = self._key.exchange(X25519PublicKey.from_public_bytes(key))

    def mask(self, values: Tensor, about: Sequence[object], among: Sequence[str]) -> Tensor:
        """Integers of any width plus this client's masks, modulo that width.

        Args:
            values: int16 or int64.
            about: what they are; no two tensors may be masked about the same.
            among: whose sum is made; masks cancel in it.
        """
        masked = values.clone().contiguous()
        flat = masked.view(-1)
        size = flat.element_size()
        for peer in among:
            if peer == self.name:
                continue
            stream = self._stream(peer, about, among)
            for start in range(0, len(flat), CHUNK // size):
                part = flat[start : start + CHUNK // size]
                noise = torch.frombuffer(bytearray(stream.update(bytes(part.nbytes))), dtype=flat.dtype)
                if self.name < peer:
                    part += noise
                else:
                    part -= noise
        return masked

    def _stream(self, peer: str, about: Sequence[object], among: Sequence[str]) -> CipherContext:
        info = json.dumps([self._run, [str(part) for part in about], sorted(among)]).encode()
        key = HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(self._shared[peer])
        return Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
