"""Rows of tables are those of Python's own readers; what cannot be read is named by file and line."""

import csv
import gzip
import io
import json
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_lrsclip.files import tables
from modeling_lrsclip.files.tables import (
    iter_rows,
    json_list_name,
    read_rows,
    tar_members,
    tar_samples,
    text_encoding,
)
from training.data.line_index import line_index
from training.data.rows import LineRows


CELLS = st.text(alphabet='ab5 "\n\r,;\t\u2028é港', max_size=8)
FILES = st.text(alphabet='a5 "\n\r,\té', max_size=60)


def by_csv(text: str) -> list[list[str]]:
    """The rows that `csv` has; a stream with `newline=""`, as its documentation asks."""
    return [fields for fields in csv.reader(io.StringIO(text, newline="")) if fields]


def streamed(path) -> list[dict]:
    rows = LineRows(path, {"image": "image", "long": "text"})
    return [rows.values(number) for number in range(len(rows.spans))]


@settings(max_examples=150, deadline=None)
@given(
    table=st.lists(st.tuples(CELLS, CELLS), max_size=6), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
)
@pytest.mark.parametrize("suffix, delimiter", [(".csv", ","), (".csv", ";"), (".tsv", "\t")])
def test_written_tables_come_back(tmp_path_factory, suffix, delimiter, table, quoting):
    path = tmp_path_factory.mktemp("table") / f"a{suffix}"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter, quoting=quoting).writerows([("image", "text"), *table])
    expected = [{"image": image, "text": text} for image, text in table]
    assert list(read_rows(path)) == expected
    assert streamed(path) == expected


@settings(max_examples=300, deadline=None)
@given(body=FILES, mark=st.sampled_from(["", "\ufeff"]))
def test_any_file_has_the_rows_that_csv_has(tmp_path_factory, body, mark):
    """Quotes in the middle, quotes that never close, all line ends, short rows and long ones."""
    path = tmp_path_factory.mktemp("table") / "a.csv"
    text = "image,text\n" + body
    path.write_bytes((mark + text).encode())
    try:
        expected = by_csv(text)[1:]
    except csv.Error:
        with pytest.raises(ValueError, match="a.csv, line [0-9]+ cannot be read as CSV"):
            list(iter_rows(path))
        with pytest.raises(ValueError, match="a.csv, line [0-9]+ cannot be read as CSV"):
            streamed(path)
        return
    rows = list(iter_rows(path))
    assert len(rows) == len(expected) == len(line_index(path, quoted=True)) - 1
    lines = LineRows(path, {"image": "image", "long": "text"})
    for number, (row, fields) in enumerate(zip(rows, expected)):
        if any(fields[2:]):
            assert f"has {len(fields)} fields, and the header 2" in row.fault
            assert f"has {len(fields)} fields, and the header 2" in lines.read([number])[0].fault
        else:
            assert row.values == {"image": None, "text": None} | dict(zip(("image", "text"), fields))
            assert lines.values(number) == row.values


HALF, DEEP = '{"text": "a \\ud800 b"}', '{"text": ' + "[" * 300 + "]" * 300 + "}"


@pytest.mark.parametrize(
    "row, reason", [(HALF, r"holds half a character, '\\ud800'"), (DEEP, "is nested more than 32 levels deep")]
)
def test_lines_that_would_end_a_reader_are_named(tmp_path, row, reason):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + row + '\n{"text": "\\ud83d\\ude00"}\n')
    assert [row.values.get("text") for row in iter_rows(path)] == ["a", None, "\U0001f600"]
    with pytest.raises(ValueError, match=f"a.jsonl, line 2 {reason}"):
        list(read_rows(path))


def test_deep_lists_take_no_time(tmp_path):
    """`ijson` takes the square of the depth, hours for this file."""
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"text": ' + "[" * 200_000 + "]" * 200_000 + "}]")
    with pytest.raises(ValueError, match="a.json, entry 2 is not valid JSON: nested more than 32 levels deep"):
        list(iter_rows(path))


def test_an_inch_mark_swallows_no_rows(tmp_path):
    """Of 1,000 unquoted rows, one caption has an odd number of quotes."""
    captions = [f"Tile {number}." for number in range(1000)]
    captions[400] = 'A pipe of 5" diameter'
    path = tmp_path / "captions.csv"
    path.write_text("image,text\n" + "".join(f"{n}.png,{text}\n" for n, text in enumerate(captions)))
    assert [row["text"] for row in read_rows(path)] == captions == [row["text"] for row in streamed(path)]


@pytest.mark.parametrize(
    "name, content, problem",
    [
        (
            "a.csv",
            "image,text\n0.png,A road, a river\n",
            r"a\.csv, row 1 \(line 2\) has 3 fields, and the header 2; put",
        ),
        ("a.jsonl", '{"a": 1}\n\n{"a": ', r"a\.jsonl, line 3 is not valid JSON"),
        ("a.jsonl", "[" * 100_000 + "]" * 100_000, "line 1 is nested more than 32 levels deep"),
        ("a.jsonl", "3\n", "line 1 is not an object; it is int"),
        ("a.json", '[{"a": 1}, 5]', "entry 2 is not an object; it is int"),
        ("a.json", '[{"a": 1}, {"a": }]', "entry 2 is not valid JSON"),
        ("a.json", '{"rows": [1]}', "must hold a list of objects, or an object with such a list under images, data"),
        ("a.parquet", "PAR1", r"a\.parquet is not a readable parquet file"),
        ("a.txt", "", r"a\.txt is not a table; its name must end in one of \.parquet, \.jsonl"),
        ("a.csv", b"image\n\xff\xff\xff", "neither UTF-8 nor GB18030"),
        ("a.csv", 'a\n"' + "x" * (1 << 24) + "x\n", "a.csv, line 2 cannot be read as CSV: field larger"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=problem):
        list(read_rows(path))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("name", ["", "images", "annotations"])
def test_json_lists(tmp_path, encoding, name):
    rows = [{"image": f"{number}.png", "text": "飞机 \u2028 " + "x" * 3000, "size": [1.5, 2]} for number in range(400)]
    path = tmp_path / "a.json"
    document = {"info": {"images": [3]}, "data": [], name: rows} if name else rows
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding=encoding)
    assert list(read_rows(path)) == rows and json_list_name(path) == name
    assert [row.where for row in iter_rows(path)][:2] == ["entry 1", "entry 2"]
    assert text_encoding(path) == ("gb18030" if encoding == "gb18030" else "utf-8-sig")


def test_a_forced_encoding_marks_what_is_not_of_it(tmp_path):
    (tmp_path / "a.csv").write_bytes("text\nfa\xe7ade\n".encode("latin-1"))
    assert list(read_rows(tmp_path / "a.csv", "utf-8-sig")) == [{"text": "fa\ufffdade"}]
    assert list(read_rows(tmp_path / "a.csv", "latin-1")) == [{"text": "fa\xe7ade"}]


def tar_of(members: dict[str, bytes], **options) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize("packed", [False, True])
def test_tar_members(tmp_path, packed):
    content = tar_of({"a/1.JPG": b"x" * 700, "a/1.long.txt": b"ab", "a/.hidden": b"z", "README": b"", "2.json": b"{}"})
    path = tmp_path / "a.tar"
    path.write_bytes(gzip.compress(content) if packed else content)
    members = list(tar_members(path, contents=True))
    assert [(member.key, member.suffix) for member in members] == [("a/1", "jpg"), ("a/1", "long.txt"), ("2", "json")]
    assert [member.content for member in members] == [b"x" * 700, b"ab", b"{}"]
    assert [content[member.offset :][: member.size] for member in members] == [b"x" * 700, b"ab", b"{}"]


def negative_size(content: bytes, member: int) -> bytes:
    """A tar whose header number `member` says it has -1024 bytes, with a checksum that is right."""
    start = member * 1024
    header = bytearray(content[start : start + 512])
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"  # base 256, two's complement
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:start] + bytes(header) + content[start + 512 :]


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda tar: tar[:1600], "ends in the middle of a member, after 1600 bytes"),
        (lambda tar: tar[:1024] + b"x" * 512 + tar[1536:], "no tar header at byte 1024"),
        (lambda tar: tar[:1024] + tar[1024:1100], "no tar header at byte 1024"),
        (lambda tar: negative_size(tar, 0), "no tar header|invalid|offset"),
        (lambda tar: negative_size(tar, 1), "no tar header|invalid|offset"),
        (lambda tar: b"x" * 600, "invalid header"),
        (lambda tar: b"", "empty file"),
    ],
)
def test_damaged_tars(tmp_path, damage, problem):
    path = tmp_path / "a.tar"
    path.write_bytes(damage(tar_of({"1.jpg": b"x" * 500, "2.jpg": b"y" * 500})))
    with pytest.raises(ValueError, match=f"a.tar cannot be read as a tar .*({problem})"):
        list(tar_members(path))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_that_no_name_needs_are_not_read(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(tables, "LONGEST_HEADER", 1000)
    info = tarfile.TarInfo("header")
    for size, problem in ((999, None), (1001, "a header of 1001 bytes, 1000 are read")):
        info.size, info.type = size, kind
        length = b"%d comment=" % size  # a pax record says its length first
        content = (length + b"x" * size)[: size - 1] + b"\n"
        path = tmp_path / "a.tar"
        path.write_bytes(info.tobuf() + content.ljust(1024, b"\0") + tar_of({"1.jpg": b"x"}))
        if problem is None:
            assert len(list(tar_members(path))) <= 1
            continue
        with pytest.raises(ValueError, match=problem):
            list(tar_members(path))


def test_members_that_no_memory_holds_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LARGEST_MEMBER", 100)
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(tar_of({"1.jpg": b"x" * 100, "2.jpg": b"y" * 101})))
    with pytest.raises(ValueError, match="2.jpg has 101 bytes, 100 are read"):
        list(tar_members(path, contents=True))


def test_the_json_of_a_sample_neither_renames_it_nor_takes_its_image(tmp_path):
    mean = b'{"image": "/etc/passwd", "__key__": "zz", "caption": "A."}'
    (tmp_path / "a.tar").write_bytes(tar_of({"1.jpg": b"x", "1.json": mean, "1.txt": b"B.", "2.json": mean}))
    assert list(tar_samples(tmp_path / "a.tar", ["jpg"])) == [
        {"__key__": "1", "image": b"x", "caption": "A.", "txt": "B."},
        {"__key__": "2", "caption": "A."},
    ]


def test_the_members_of_a_tar_are_counted(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(tar_of({"1.jpg": b"x", "2.jpg": b"y"}))
    monkeypatch.setattr(tables, "MOST_MEMBERS", 2)
    assert len(list(tar_members(tmp_path / "a.tar"))) == 2
    monkeypatch.setattr(tables, "MOST_MEMBERS", 1)
    with pytest.raises(
        ValueError, match=r"a.tar cannot be read as a tar \(more than 1 entries; split it into shards\)"
    ):
        list(tar_members(tmp_path / "a.tar"))
