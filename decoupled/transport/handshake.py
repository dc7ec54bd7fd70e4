"""Opening an edge: the two processes prove to each other that they know the run's token, then agree on the edge.

    source                                            target
    nonce, version              ------------------>   (a few seconds until the proof)
                                <------------------   nonce
    proof, wish                 ------------------>
                                <------------------   proof, or why not
    ... what the way of large tensors needs ...
                                <------------------   open

Sentences are JSON of bounded length. The proof is an HMAC of the token over both nonces: the token never travels, and
an overheard proof is of no use.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import socket
import struct
import time
from dataclasses import asdict, dataclass
from typing import Any

from decoupled.errors import ProtocolError
from decoupled.transport.frame import VERSION

_LENGTH = struct.Struct("!I")
_LIMIT = 1 << 14  # bytes of a sentence
_RING_LIMIT = 1 << 34  # bytes
_PATIENCE = 600.0  # seconds
BULKS = ("shared_memory", "gloo", "stream", "rendezvous", "shared_device")  # how large tensors can travel


class Conversation:
    """Sentences over a socket; every wait ends at `deadline` (of `time.monotonic`) with a TimeoutError."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.socket, self.deadline = sock, deadline

    def say(self, **words: Any) -> None:
        """Send one sentence."""
        text = json.dumps(words).encode()
        self._hurry()
        self.socket.sendall(_LENGTH.pack(len(text)) + text)

    def hear(self) -> dict[str, Any]:
        """Receive one sentence.

        Raises:
            OSError: too late, or the other one is gone. ProtocolError: that was no sentence.
        """
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > _LIMIT:
            raise ProtocolError(f"a sentence of {length} bytes while an edge was being opened")
        try:
            words = json.loads(self._read(length))
        except (ValueError, RecursionError):
            words = None
        if type(words) is not dict:
            raise ProtocolError("nonsense arrived while an edge was being opened")
        return words

    def remaining(self) -> float:
        """Seconds until the deadline; a TimeoutError when there are none."""
        if (left := self.deadline - time.monotonic()) <= 0:
            raise TimeoutError("too late")
        return left

    def close(self) -> None:
        """End it; whoever waits in it is woken."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def _hurry(self) -> None:
        self.socket.settimeout(self.remaining())

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            self._hurry()
            more = self.socket.recv(size - len(data))
            if not more:
                raise ConnectionResetError("the other process hung up")
            data += more
        return data


@dataclass(frozen=True)
class Wish:
    """What the source asks for: `edge` in the `run`, with this capacity; large tensors by `bulk`, a ring of so many
    bytes; the rest should take `seconds` at most. `gpu`: the UUID of its own, if it would meet the target's."""

    edge: str
    run: int
    capacity: int
    bulk: str
    ring: int
    seconds: float
    gpu: str = ""

    @classmethod
    def read(cls, words: Any) -> Wish:
        """Check what arrived.

        Raises:
            ProtocolError: that is no wish.
        """
        try:
            wish = cls(**words)
        except TypeError as error:
            raise ProtocolError(f"no wish: {error}") from None
        kinds = (str, int, int, str, int, int | float, str)
        if not all(isinstance(value, kind) for value, kind in zip(vars(wish).values(), kinds, strict=True)):
            raise ProtocolError(f"no wish: {wish}")
        if wish.capacity < 1 or wish.bulk not in BULKS or not 0 < wish.ring <= _RING_LIMIT:
            raise ProtocolError(f"impossible: {wish}")
        return wish


def ask(talk: Conversation, token: bytes, wish: Wish) -> None:
    """As the source: prove the token and ask for `wish`; returns when the target has agreed.

    Raises:
        OSError: no answer in time. ProtocolError: the target refuses, or does not know the token.
    """
    nonce = os.urandom(16).hex()
    talk.say(nonce=nonce, version=VERSION)
    answer = _heed(talk.hear())
    other = _text(answer, "nonce")
    talk.say(proof=_proof(token, "source", nonce, other), wish=asdict(wish))
    answer = _heed(talk.hear())
    if not hmac.compare_digest(_text(answer, "proof"), _proof(token, "target", nonce, other)):
        raise ProtocolError("the target does not know the token of this run")


def hear_out(talk: Conversation, token: bytes) -> Wish:
    """As the target: hear the proof and the wish of a source, and agree; extends the deadline as it wishes.

    Raises:
        OSError: it is too slow. ProtocolError: it has no proof, or no wish; it has been told.
    """
    words = talk.hear()
    try:
        if words.get("version") != VERSION:
            raise ProtocolError(f"protocol version {str(words.get('version'))[:20]} where {VERSION} is spoken")
        nonce, other = os.urandom(16).hex(), _text(words, "nonce")
        talk.say(nonce=nonce)
        words = talk.hear()
        if not hmac.compare_digest(_text(words, "proof"), _proof(token, "source", other, nonce)):
            raise ProtocolError("wrong token")
        wish = Wish.read(words.get("wish"))
    except ProtocolError as error:
        talk.say(refused=str(error))
        raise
    talk.deadline = time.monotonic() + min(wish.seconds, _PATIENCE)
    talk.say(proof=_proof(token, "target", other, nonce))
    return wish


def _heed(answer: dict[str, Any]) -> dict[str, Any]:
    if "refused" in answer:
        raise ProtocolError(f"refused: {str(answer['refused'])[:200]}")
    return answer


def _text(words: dict[str, Any], key: str) -> str:
    value = words.get(key)
    if type(value) is not str or len(value) > 128 or not value.isascii():
        raise ProtocolError(f"no {key} arrived while an edge was being opened")
    return value


def _proof(token: bytes, side: str, *nonces: str) -> str:
    return hmac.new(token, " ".join([side, *nonces]).encode(), hashlib.sha256).hexdigest()
