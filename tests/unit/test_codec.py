"""The codec: what goes in comes out, bit for bit; what did not come from it is refused before anything is allocated."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from decoupled.errors import ProtocolError
from decoupled.messages import Data, Down, End, Message, Up
from decoupled.transport import codec, dense, frame
from decoupled.transport.frame import Frame, Kind

EDGE = "block0.up->block1.up"
DTYPES = sorted(dense.NAMES, key=str)


@codec.register
@dataclass(frozen=True)
class Note(Message):
    """A message kind from outside the library."""

    text: str
    nested: Any = None


def roundtrip(message: Message) -> Message:
    encoded = codec.encode(message, EDGE)
    draft = codec.Draft(encoded.meta, len(encoded.pieces), sum(p.nbytes for p in encoded.pieces), EDGE)
    for target, source in zip(draft.pieces, encoded.pieces, strict=True):
        np.copyto(np.asarray(target), np.asarray(source))
    return draft.message()


def same(a: Any, b: Any) -> bool:
    """Equality to the last bit, of values and of memory layout."""
    if isinstance(a, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or not a.numel():
            return a.dtype == b.dtype and a.shape == b.shape
        bits = [torch.empty(t.shape, dtype=t.dtype).copy_(t).view(-1).view(torch.uint8).tolist() for t in (a, b)]
        return bits[0] == bits[1] and (a.stride() == b.stride() or not dense.is_dense(a.shape, a.stride()))
    if isinstance(a, tuple):
        return type(b) is tuple and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=20))
keys = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=8,
)
shapes = st.lists(st.integers(0, 4), max_size=4)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape, dtype = draw(shapes), draw(st.sampled_from(DTYPES))
    raw = draw(st.binary(min_size=1, max_size=16))
    size = math.prod(shape) * dtype.itemsize
    flat = torch.tensor(list((raw * size)[:size]), dtype=torch.uint8)
    if dtype == torch.bool:
        flat = flat % 2
    tensor = flat.view(dtype).reshape(shape)
    layout = draw(st.sampled_from(["usual", "transposed", "step", "expanded"]))
    if layout == "transposed":
        tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
    elif layout == "step" and tensor.dim():
        tensor = tensor[::2]
    elif layout == "expanded":
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    return tensor


@settings(max_examples=150)
@given(keys, st.lists(tensors(), max_size=3), st.integers(0, 10**9), st.booleans())
def test_messages_arrive_bit_for_bit(key: Any, payload: list[Tensor], number: int, void: bool) -> None:
    indices = torch.arange(number % 5)
    up = Up(key=key, batch=number, round=1, indices=indices, version=number, payload=tuple(payload), void=void)
    down = Down(key=key, batch=number, round=0, indices=None, version=0, payload=tuple(payload), hops=3)
    data = Data(key=key, batch=number, inputs=payload[0] if payload else None, share=0.1 + 0.2)
    for message in (up, down, data, End(key), Message(key), Note(key, "x", (1, (payload[0] if payload else 2, "y")))):
        found = roundtrip(message)
        assert type(found) is type(message)
        for field in dataclasses.fields(message):
            assert same(getattr(message, field.name), getattr(found, field.name)), field.name


def test_received_tensors_are_leaves_with_memory_of_their_own() -> None:
    sent = nn.Parameter(torch.ones(2, 3)).detach()
    found = roundtrip(Data(0, batch=0, inputs=sent)).inputs  # type: ignore[attr-defined]
    assert found.is_leaf
    assert not found._is_view()
    assert found.data_ptr() != sent.data_ptr()
    found.requires_grad_().sum().backward()


def test_conjugate_and_negative_views_arrive_as_their_values() -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    for lazy in (z.conj(), z.conj().imag):
        assert lazy.is_conj() or lazy.is_neg()
        found = roundtrip(Data(0, batch=0, inputs=lazy))
        assert torch.equal(found.inputs, lazy.clone())  # type: ignore[attr-defined]


def test_memory_format_is_kept() -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    found = roundtrip(Data(0, batch=0, inputs=image)).inputs  # type: ignore[attr-defined]
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, image)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ([1, 2], "list"),
        ({"a": 1}, "dict"),
        (b"bytes", "bytes"),
        (object(), "object"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "meta"),
        (10**5000, "digits"),
    ],
    ids=["list", "dict", "bytes", "object", "sparse", "meta", "huge"],
)
def test_what_cannot_be_sent_is_named(value: Any, what: str) -> None:
    with pytest.raises(ProtocolError, match=f"{EDGE}.*{what}"):
        codec.encode(Note(0, "x", value), EDGE)


def test_endless_nesting_is_refused() -> None:
    key: Any = ()
    for _ in range(5000):
        key = (key,)
    with pytest.raises(ProtocolError, match="cannot be sent"):
        codec.encode(Message(key), EDGE)
    with pytest.raises(ProtocolError, match="does not describe"):
        codec.Draft(b'[1]\n{"kind":"End","fields":{"key":' + b"[" * 100_000, 0, 0, EDGE)
    with pytest.raises(ProtocolError, match="does not describe"):
        codec.Draft(b"[" * 100_000 + b'\n{"kind":"End","fields":{"key":null}}', 0, 0, EDGE)


def test_kinds_must_be_registered_once() -> None:
    @dataclass(frozen=True)
    class Unknown(Message):
        pass

    with pytest.raises(ProtocolError, match=r"'Unknown' are unknown; codec\.register"):
        codec.encode(Unknown(0), EDGE)
    Unknown.__name__ = "Up"
    with pytest.raises(ProtocolError, match="already registered as 'Up'"):
        codec.register(Unknown)
    with pytest.raises(ProtocolError, match="already registered as 'Up'"):  # of the same name, but another kind
        codec.register(Unknown)
    with pytest.raises(ProtocolError, match="unknown"):
        codec.encode(Unknown(0), EDGE)


def description(**changes: Any) -> bytes:
    values = changes.pop("values", [1, "a", 2])
    fields = {"key": None, "text": None, "nested": None, **changes.pop("fields", {})}
    return json.dumps(values).encode() + b"\n" + json.dumps({"kind": "Note", "fields": fields, **changes}).encode()


HUGE = 1 << 40
BAD = [
    (b"", "describe"),
    (b"\xff\xfe", "describe"),
    (b"[]", "describe"),
    (b"7", "describe"),
    (b'[]\n{"kind": "Note"}', "describe"),
    (description(values=7), "3 plain values"),
    (description(values=[1, "a"]), "3 plain values"),
    (description(values=[1, "a", [2]]), "3 plain values"),
    (description(values={"a": 1, "b": 2, "c": 3}), "3 plain values"),
    (description(kind="os.system"), "describe"),
    (description(kind=["Note"]), "describe"),
    (description(fields={"nested": [1]}), "unknown value"),
    (description(fields={"nested": 1}), "unknown value"),
    (description(fields={"nested": {"z": []}}), "unknown value"),
    (description(fields={"nested": {"f": [{"f": 1}]}}), "unknown value"),
    (description(fields={"extra": None}, values=[1, "a", 2, 3]), "with the fields"),
    (description(fields={"nested": {"x": ["float31", [2]]}}), "unknown dtype"),
    (description(fields={"nested": {"x": [["float32"], [2]]}}), "unknown dtype"),
    (description(fields={"nested": {"x": ["float32", [HUGE]]}}), "impossible"),
    (description(fields={"nested": {"x": ["float32", [-1]]}}), "impossible"),
    (description(fields={"nested": {"x": ["float32", [True]]}}), "impossible"),
    (description(fields={"nested": {"x": ["float32", [1.5]]}}), "impossible"),
    (description(fields={"nested": {"x": ["float32", [1] * 65]}}), "impossible"),
    (description(fields={"nested": {"x": ["float32", [1 << 30, 1 << 30]]}}), "more than the limit"),
    (description(fields={"nested": {"x": ["float32", [2, 2], [1, 1]]}}), "do not fit"),
    (description(fields={"nested": {"x": ["float32", [2, 2], [2]]}}), "do not fit"),
    (description(fields={"nested": {"x": ["float32", [2, 3], [HUGE, 1]]}}), "impossible"),
    (description(fields={"nested": {"x": ["float32", [4], [0]]}}), "do not fit"),
    (description(fields={"nested": {"x": []}}), "describe"),
    (description(fields={"nested": {"x": ["float32", [1 << 32]]}}, values=[1, "a"]), "header announced"),
]


@pytest.mark.parametrize(("meta", "what"), BAD)
def test_bad_descriptions_are_refused_before_anything_is_allocated(
    meta: bytes, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty_strided", None)
    with pytest.raises(ProtocolError, match=f"edge {EDGE}.*{what}"):
        codec.Draft(meta, 1, 16, EDGE)


def test_a_kind_that_refuses_its_fields_is_a_protocol_error() -> None:
    names = [f.name for f in dataclasses.fields(Up)]
    meta = json.dumps([1] * len(names)).encode() + b"\n"
    meta += json.dumps({"kind": "Up", "fields": dict.fromkeys(names)}).encode()
    with pytest.raises(ProtocolError, match="that is not one"):
        codec.Draft(meta, 0, 0, EDGE).message()


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_descriptions_raise_protocol_errors_only(meta: bytes) -> None:
    with pytest.raises(ProtocolError):
        codec.Draft(meta, 0, 0, EDGE).message()


@given(
    st.recursive(scalars, lambda x: st.lists(x) | st.dictionaries(st.sampled_from("tfxkz"), x), max_leaves=10),
    st.lists(scalars, max_size=6),
)
def test_random_layouts_and_values_raise_protocol_errors_only(nested: Any, values: list[Any]) -> None:
    try:
        message = codec.Draft(description(fields={"nested": nested}, values=values), 0, 0, EDGE).message()
    except ProtocolError:
        return
    assert roundtrip(message) == message


# --- headers ---------------------------------------------------------------------------------------------------------

NUMBER = frame.number(EDGE, 3)


@given(
    st.sampled_from(Kind),
    st.integers(0, frame.PAYLOAD_LIMIT),
    st.floats(allow_nan=False),
    st.binary(max_size=99),
    st.integers(0, 9),
)
def test_headers_come_back(kind: Kind, amount: int, sent: float, meta: bytes, tensors: int) -> None:
    given_ = Frame(kind, amount, sent, meta, tensors)
    data = frame.pack(given_, NUMBER, 5)
    assert len(data) == frame.SIZE == 48
    header = frame.unpack(data, NUMBER, 5, EDGE)
    assert header.meta_bytes == len(meta)
    assert header.frame(meta, EDGE) == given_
    with pytest.raises(ProtocolError, match="checksum"):
        header.frame(meta + b"x", EDGE)


def test_every_wrong_field_of_a_header_is_named() -> None:
    def check(what: str, data: bytes, number: int = NUMBER, sequence: int = 5) -> None:
        with pytest.raises(ProtocolError, match=f"edge {EDGE}.*{what}"):
            frame.unpack(data, number, sequence, EDGE)

    good = frame.pack(Frame(Kind.CREDIT, 1), NUMBER, 5)
    check("magic", b"HTTP" + good[4:])
    check("protocol version 3", good[:4] + b"\3" + good[5:])
    check("sequence number", good, sequence=6)
    check("edge number", good, number=frame.number(EDGE, 4))
    check("edge number", good, number=frame.number("block1.down->block0.down", 3))
    check("unknown kind 77", frame.pack(Frame(77), NUMBER, 5))  # type: ignore[arg-type]
    check("bytes of tensors", frame.pack(Frame(Kind.MESSAGE, frame.PAYLOAD_LIMIT + 1), NUMBER, 5))
    check("tensors", frame.pack(Frame(Kind.MESSAGE, tensors=frame.TENSORS_LIMIT + 1), NUMBER, 5))
    check("description", frame.pack(Frame(Kind.MESSAGE, meta=bytes(frame.META_LIMIT + 1)), NUMBER, 5))


@given(st.integers(0, 47), st.integers(1, 255))
def test_any_changed_byte_of_a_header_is_noticed(place: int, change: int) -> None:
    data = bytearray(frame.pack(Frame(Kind.MESSAGE, 10, 1.5, b"{}", 1), NUMBER, 5))
    data[place] ^= change
    with pytest.raises(ProtocolError):
        frame.unpack(data, NUMBER, 5, EDGE)


@given(st.binary(min_size=48, max_size=48))
def test_random_headers_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        frame.unpack(data, NUMBER, 5, EDGE)


def test_nothing_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("loads", "load", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert roundtrip(Note(("a", 1), "b", (torch.ones(2),))).key == ("a", 1)


def test_a_number_with_something_attached_travels_as_the_number() -> None:
    class Numbered(int):
        about = "x"

    message = Message((Numbered(3), 1))
    arrived = roundtrip(message)
    assert arrived == message
    assert type(arrived.key[0]) is int  # pyright: ignore[reportIndexIssue]


def test_layouts_that_are_large_are_not_kept() -> None:
    """A few thousand of them would fill the memory."""
    before = codec._read_layout.cache_info().currsize, codec._layout_text.cache_info().currsize
    ids = tuple(range(codec._SMALL))
    assert roundtrip(Message(ids)) == Message(ids)
    assert (codec._read_layout.cache_info().currsize, codec._layout_text.cache_info().currsize) == before
    roundtrip(Message(ids[:3]))
    assert codec._read_layout.cache_info().currsize > 0 < codec._layout_text.cache_info().currsize


def test_only_what_stays_on_a_device_is_waited_for(monkeypatch):
    """The last message, or one without tensors, made the block's thread wait for all that it had queued."""
    marked = []
    monkeypatch.setattr(codec.cuda, "computed", lambda device: marked.append(device) or codec.cuda.nothing)
    keep = torch.device("cpu")
    void = Up(key=1, batch=1, round=0, indices=None, version=0, payload=(), void=True)
    for message in (End(1), void):
        codec.encode(message, "edge", keep)
    assert marked == []
    codec.encode(Data(1, batch=1, inputs=torch.ones(3)), "edge", keep)
    assert marked == [keep]
