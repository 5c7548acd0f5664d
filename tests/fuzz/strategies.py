"""Bytes that were a whole file once: cut, repeated, overwritten, or with another value in a place of their document."""

import copy
import io
import json
import struct
import zipfile
from typing import Any

from hypothesis import strategies as st


# What breaks readers: ends and limits of numbers, lengths that lie, text that is none, code for an unpickler.
PIECES = [
    b"",
    b"\0",
    b"\xff" * 4,
    b"\0" * 512,
    b"\n",
    b'"',
    b",",
    b"\t",
    b"{",
    b"[" * 100_000,
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
]
PIECES += [
    struct.pack("<I", 2**31 - 1),
    struct.pack("<Q", 2**63),
    b"99999999999",
    b"-1",
    b"1e999",
    b"NaN",
    b"\\ud800",
    b"x" * 200_000,
]
PIECES += [
    b"cposix\nsystem\n(S'echo'\ntR.",
    b"cbuiltins\neval\n(S'1'\ntR.",
    b"ctorch\nfrom_file\n",
    b"../../../etc/passwd",
    b"!!python/object/apply:os.system ['echo']",
]
VALUES = [
    None,
    True,
    -1,
    0,
    7,
    2**70,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    "../../etc/passwd",
    "x" * 100_000,
]
VALUES += [[], {}, [[]], {"a": {}}, [None], ["x", 1], "@deep"]
DEEP = '"@deep"'


def one_of_these(values: list[Any]) -> st.SearchStrategy[Any]:
    """One of the values, which hypothesis need not write out."""
    return st.integers(0, len(values) - 1).map(values.__getitem__)


class Whole(bytes):
    """A whole file's bytes, which hypothesis need not write out."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with one to three pieces of it cut out, repeated, overwritten or put in; or cut short."""
    content = whole
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.sampled_from([1, 4, 16, 600])))
        change = draw(st.sampled_from(["short", "cut", "repeat", "insert", "overwrite", "flip"]))
        piece = draw(st.one_of(one_of_these(PIECES), st.binary(min_size=1, max_size=8)))
        content = {
            "short": lambda at=at, content=content: content[:at],
            "cut": lambda at=at, end=end, content=content: content[:at] + content[end:],
            "repeat": lambda at=at, end=end, content=content: content[:end] + content[at:],
            "insert": lambda at=at, piece=piece, content=content: content[:at] + piece + content[at:],
            "overwrite": lambda at=at, piece=piece, content=content: content[:at] + piece + content[at + len(piece) :],
            "flip": lambda at=at, content=content: (
                content[:at] + bytes(b ^ 0xFF for b in content[at : at + 1]) + content[at + 1 :]
            ),
        }[change]()
    return content


@st.composite
def altered(draw: st.DrawFn, document: Any) -> str:
    """A JSON document with one or two of its values others, of another type or absent."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        node = document
        while node:
            key = draw(st.sampled_from(sorted(node)) if isinstance(node, dict) else st.integers(0, len(node) - 1))
            if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 3)):
                node = node[key]
                continue
            if draw(st.integers(0, 3)):
                node[key] = copy.deepcopy(draw(one_of_these(VALUES)))
            else:
                del node[key]
            break
    return json.dumps(document).replace(DEEP, "[" * 100_000 + "]" * 100_000)


def damaged_json(document: Any) -> st.SearchStrategy[bytes]:
    """A document with other values, or its text with damaged bytes."""
    whole = Whole(json.dumps(document, indent=1).encode())
    return st.one_of(altered(document).map(lambda text: text.encode("utf-8", "surrogatepass")), damaged(whole))


def damaged_lines(documents: list[Any]) -> st.SearchStrategy[bytes]:
    """JSON lines of which one has other values, or damaged bytes."""
    lines = [json.dumps(document).encode() for document in documents]
    one = altered(documents[-1]).map(lambda text: b"\n".join([*lines, text.encode("utf-8", "surrogatepass"), b""]))
    return st.one_of(one, damaged(Whole(b"\n".join([*lines, b""]))))


@st.composite
def damaged_zip(draw: st.DrawFn, whole: bytes) -> bytes:
    """A zip archive one member of which is damaged, with the checksums of its new content; or damaged as it lies."""
    if not draw(st.integers(0, 3)):
        return draw(damaged(whole))
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw(st.sampled_from(sorted(members)))
    members[name] = draw(damaged(members[name]))
    if not draw(st.integers(0, 9)):
        del members[draw(st.sampled_from(sorted(members)))]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@st.composite
def damaged_tar(draw: st.DrawFn, whole: bytes) -> bytes:
    """A tar with damaged bytes whose headers have the checksums of what is in them now."""
    content = bytearray(draw(damaged(whole)))
    for at in range(0, len(content) - 511, 512):
        if content[at + 257 : at + 262] == b"ustar":
            total = sum(content[at : at + 148]) + 8 * 32 + sum(content[at + 156 : at + 512])
            content[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(content)


@st.composite
def damaged_parquet(draw: st.DrawFn, whole: bytes) -> bytes:
    """A parquet file with a damaged footer, whose length is told rightly; or damaged as it lies."""
    if not draw(st.integers(0, 2)):
        return draw(damaged(whole))
    start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    footer = draw(damaged(whole[start:-8]))
    return whole[:start] + footer + len(footer).to_bytes(4, "little") + whole[-4:]


@st.composite
def damaged_safetensors(draw: st.DrawFn, whole: bytes) -> bytes:
    """A safetensors file with other values in its header, whose length is told rightly; or damaged as it lies."""
    if not draw(st.integers(0, 2)):
        return draw(damaged(whole))
    length = int.from_bytes(whole[:8], "little")
    header = draw(altered(json.loads(whole[8 : 8 + length]))).encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + whole[8 + length :]
