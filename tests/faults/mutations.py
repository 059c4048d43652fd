"""Mutations of files: bytes, values of JSON and YAML, headers of safetensors, fields of GGUF, rows of Parquet.

A `Mutation` is plain data that hypothesis draws without knowing the file; `mutate` applies it to whichever file it is.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st


class Raw(str):
    """JSON as it is written, valid or not."""


class Pairs(list[tuple[str, Any]]):
    """A JSON object, in which keys may repeat."""


class Mutation(NamedTuple):
    """One change of a file.

    Attributes:
        kind: a key of `_ENTRIES`, `_BYTES`, `_STRUCTURE`; one that the file does not have does not change it.
        place: which of all places in the file; any number.
        more: a second number.
        value: what is put there.
    """

    kind: str
    place: int
    more: int
    value: Any

    def __str__(self) -> str:
        return f"{self.kind} at {self.place}, {self.more}: {ascii(self.value)[:60]}"


_SURROGATE = Raw('"\\ud800"')
VALUES: tuple[Any, ...] = (
    *(None, True, False, [], Pairs(), "", {}, [[]], [None], Pairs([("", None)])),
    *(0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e-300, 1e308, -1e308),
    *(Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("[" * 5000), Raw("9" * 5000), Raw("[" * 200000)),
    *(
        _SURROGATE,
        Raw('{"\\udfff": 1}'),
        "\x00",
        "\x1b[31m",
        "a\nb",
        "../../etc/passwd",
        "/dev/zero",
        "~",
        "x" * 100000,
    ),
    *("auto", "none", "self", "model", "float16", "1", "0", "{{ 1 / 0 }}", "{% for x in y %}", "\u2028", "é"),
)
_SPOILS = (b"", b"\0" * 8, b"\xff" * 8, b"\xff\xfe", b"\xed\xa0\x80", b"\x80", b"\n", b"{", b'"', b"\0\0\0\x80")

_uniform = st.binary(min_size=4, max_size=4).map(lambda drawn: int.from_bytes(drawn, "big"))
_places = st.one_of(st.integers(0, 1000), _uniform)


def mutations() -> st.SearchStrategy[Mutation]:
    """Any change, of whatever kind of file; structure and entries more often than bytes."""
    kinds = st.sampled_from([*_BYTES, *_STRUCTURE, *_STRUCTURE, *_STRUCTURE, *_ENTRIES])
    return st.builds(Mutation, kinds, _places, _uniform, st.sampled_from(VALUES))


def drawn(random: Random, count: int = 100) -> Iterator[Mutation]:
    """Mutations without end; equal seeds give equal ones."""
    while True:
        batch: list[Mutation] = []

        @seed(random.getrandbits(64))
        @settings(
            max_examples=count,
            database=None,
            phases=[Phase.generate],
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(mutations())
        def draw(mutation: Mutation) -> None:
            batch.append(mutation)  # noqa: B023

        draw()
        yield from batch[1:]  # the first is always the simplest


def mutate(file: Path, mutation: Mutation) -> bool:
    """Change a file, or what its name stands for; whether that made a difference."""
    if mutation.kind in _ENTRIES:
        file.unlink()
        _ENTRIES[mutation.kind](file)
        return True
    content = file.read_bytes()
    try:
        changed = _changed(file, content, mutation)
    except (ValueError, LookupError, TypeError, RecursionError):  # what is there has no such place
        return False
    if changed == content:
        return False
    file.unlink()  # it may be a hard link
    file.write_bytes(changed)
    return True


def _changed(file: Path, content: bytes, mutation: Mutation) -> bytes:
    if mutation.kind in _BYTES:
        return _BYTES[mutation.kind](content, mutation)
    if file.suffix == ".json":
        return _json(content, mutation)
    if file.suffix == ".jsonl":
        lines = content.splitlines(keepends=True)
        number = mutation.more % len(lines)
        lines[number] = _json(lines[number], mutation) + b"\n"
        return b"".join(lines)
    if file.suffix == ".yaml":
        return _json(json.dumps(yaml.safe_load(content)).encode(), mutation)
    if file.suffix == ".safetensors":
        length = 8 + int.from_bytes(content[:8], "little")
        header = _json(content[8:length], mutation)
        return len(header).to_bytes(8, "little") + header + content[length:]
    if file.suffix == ".gguf":
        return _gguf(file, content, mutation)
    return _parquet(content, mutation) if file.suffix == ".parquet" else content


def _json(content: bytes, mutation: Mutation) -> bytes:
    value = json.loads(content, object_pairs_hook=Pairs)
    return _dumped(_walked(value, mutation.place, mutation)).encode("utf-8", "surrogatepass")


def _walked(value: Any, place: int, mutation: Mutation) -> Any:
    """`value` with a change inside; the digits of `place` choose the way, to all depths alike."""
    if not isinstance(value, list) or not value:
        return mutation.value
    place, index = divmod(place, len(value) + 1)
    if index == len(value):
        return mutation.value if mutation.more % 2 else [value]
    inside = value[index][1] if isinstance(value, Pairs) else value[index]
    if isinstance(inside, list) and inside and place % 4:
        changed = [_walked(inside, place // 4, mutation)]
        return _replaced(value, index, [(value[index][0], changed[0])] if isinstance(value, Pairs) else changed)
    return _STRUCTURE[mutation.kind](value, index, mutation)


def _replaced(value: Any, index: int, items: list[Any]) -> Any:
    return type(value)([*value[:index], *items, *value[index + 1 :]])


def _named(value: Any, index: int, new: Any) -> Any:
    """An item of an object under the key of another; of a list, itself."""
    return (value[index][0], new) if isinstance(value, Pairs) else new


def _rename(value: Any, index: int, mutation: Mutation) -> Any:
    if not isinstance(value, Pairs):
        return _replaced(value, index, [])
    names = (f"{value[index][0]}_", "", "\x1b", "__metadata__", value[mutation.more % len(value)][0])
    return _replaced(value, index, [(names[mutation.more % len(names)], value[index][1])])


def _exchange(value: Any, index: int, mutation: Mutation) -> Any:
    other = mutation.more % len(value)
    inside = [item[1] for item in value] if isinstance(value, Pairs) else value
    changed = _replaced(value, index, [_named(value, index, inside[other])])
    return _replaced(changed, other, [_named(value, other, inside[index])])


_STRUCTURE: dict[str, Callable[[Any, int, Mutation], Any]] = {
    "another value": lambda value, index, m: _replaced(value, index, [_named(value, index, m.value)]),
    "nothing": lambda value, index, _: _replaced(value, index, []),
    "another name": _rename,
    "one more": lambda value, index, m: type(value)(
        [*value, ("extra", m.value) if isinstance(value, Pairs) else m.value]
    ),
    "twice": lambda value, index, m: _replaced(value, index, [value[index], _named(value, index, m.value)]),
    "exchanged": _exchange,
}


def _flip(content: bytes, mutation: Mutation) -> bytes:
    place = mutation.place % len(content)
    return content[:place] + bytes([content[place] ^ 1 << mutation.more % 8]) + content[place + 1 :]


def _spoil(content: bytes, mutation: Mutation) -> bytes:
    place, spoil = mutation.place % len(content), _SPOILS[mutation.more % len(_SPOILS)]
    return content[:place] + spoil + content[place + len(spoil) :]


def _repeat(content: bytes, mutation: Mutation) -> bytes:
    place = mutation.place % len(content)
    return content[:place] + content[place : place + mutation.more % 64] + content[place:]


_BYTES: dict[str, Callable[[bytes, Mutation], bytes]] = {
    "bit": _flip,
    "bytes": _spoil,
    "end": lambda content, m: content[: m.place % len(content)],
    "gap": lambda content, m: content[: m.place % len(content)] + content[m.place % len(content) + m.more % 64 :],
    "repetition": _repeat,
    "empty": lambda content, _: b"",
}
_ENTRIES: dict[str, Callable[[Path], object]] = {
    "missing": lambda file: None,
    "folder": lambda file: file.mkdir(),
    "fifo": lambda file: os.mkfifo(file),
    "link to nothing": lambda file: file.symlink_to("nothing"),
    "link to itself": lambda file: file.symlink_to(file.name),
}


def _gguf(file: Path, content: bytes, mutation: Mutation) -> bytes:
    """A number, a length or a text of the metadata, or a name, a type, a shape of a tensor, becomes something else."""
    from gguf import GGUFReader

    reader: Any = GGUFReader(file)
    fields = [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]
    field = fields[mutation.place % len(fields)]
    part = field.parts[mutation.more % min(len(field.parts), 40)]
    start, length = part.ctypes.data - reader.data.ctypes.data, part.nbytes
    kinds = (b"\xff", b"\0", b"\x7f", b"\x80", b"\x01", b"9")
    spoil = kinds[mutation.more // 64 % len(kinds)] * length
    if mutation.more // 1024 % 2:  # a small other number
        spoil = (mutation.more // 2048 % 16).to_bytes(length, "little")
    changed: bytes = content[:start] + spoil[:length] + content[start + length :]
    return changed


def _parquet(content: bytes, mutation: Mutation) -> bytes:
    """The table with other values, columns or types."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    rows = json.dumps(pq.read_table(io.BytesIO(content)).to_pylist()).encode()
    changed = json.loads(_json(rows, mutation))
    buffer = pa.BufferOutputStream()
    try:
        pq.write_table(pa.Table.from_pylist(changed), buffer)
    except (pa.ArrowException, AttributeError, OverflowError, UnicodeError):
        return content
    return bytes(buffer.getvalue())


def _dumped(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {_dumped(inner)}" for key, inner in value) + "}"
    return "[" + ", ".join(map(_dumped, value)) + "]" if isinstance(value, list) else json.dumps(value)
