"""What is wrong with a source is said before anything is trained, and rows found unusable later are counted and capped."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import tarfile

import pytest
import torch.distributed as dist
from accelerate import PartialState

from training import train
from training.data.line_index import line_index
from training.data.pairs import CaptionedImages, DataConfig, load_pairs
from training.data.rows import LineRows
from training.data.skipped import SkippedFile, SkippedRows, check_share
from training.data.tars import MOST_SUFFIXES, tar_index
from training.train import parse_config


KINDS = ["long", "short"]


def write_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    return [row | {"image": str(folder / row["image"])} for row in rows]


def load(*sources, **fields):
    sources = [source if isinstance(source, dict) else str(source) for source in sources]
    return load_pairs(DataConfig(train=sources, **fields), KINDS)


@pytest.mark.parametrize("streaming", [False, True])
class TestColumns:
    def test_the_nearest_name(self, streaming, captioned_folder, tmp_path):
        rows = [{"img": row["image"], "longtext": "a", "short_text": "b"} for row in rows_of(captioned_folder)]
        with pytest.raises(
            ValueError, match="no column 'image', 'long_text'; .*did you mean 'img' for 'image', 'longtext' for"
        ):
            load(write_rows(tmp_path / "a.jsonl", rows), streaming=streaming)

    def test_all_sources_at_once(self, streaming, captioned_folder, tmp_path):
        write_rows(tmp_path / "a.jsonl", [{"image": "x"}])
        with pytest.raises(ValueError) as error:
            load(tmp_path / "a.jsonl", captioned_folder, tmp_path / "none.csv", streaming=streaming)
        assert len(str(error.value).splitlines()) == 2
        assert "no column 'long_text', 'short_text'" in str(error.value) and "none.csv does not exist" in str(
            error.value
        )

    def test_columns_of_a_source(self, streaming, captioned_folder, tmp_path):
        rows = [{"img": row["image"], "text": row["long_text"], "title": "b"} for row in rows_of(captioned_folder)]
        source = {"path": str(write_rows(tmp_path / "a.jsonl", rows))}
        source["columns"] = {"image": "img", "long": "text", "short": "title"}
        pairs = load(captioned_folder, source, streaming=streaming)
        assert len(pairs) == 24 and pairs.read([12, 0, 23])[0].id == "a.jsonl:0"
        assert pairs.read([13])[0].long == pairs.read([1])[0].long

    def test_tar_columns(self, streaming, tmp_path):
        write_tar(tmp_path / "a.tar", {"0.jpg": b"x", "0.json": b'{"caption_long": "a"}'})
        with pytest.raises(ValueError, match="no column 'long_text', 'short_text'; it has jpg, json, caption_long"):
            load(tmp_path / "a.tar", streaming=streaming)


def write_tar(path, members: dict[str, bytes], **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


class TestConfig:
    def explain(self, capsys, value):
        with pytest.raises(SystemExit) as error:
            parse_config(["--output_dir", "x", "--data.train", value])
        return str(error.value)

    def test_unknown_fields(self, capsys):
        assert "source 1 has an unknown field wieght; it may have path, split, weight" in self.explain(
            capsys, "[{path: a}, {path: b, wieght: 1}]"
        )
        assert "columns of a names img; it may name image, long, short" in self.explain(
            capsys, "[{path: a, columns: {img: b}}]"
        )

    def test_weights(self, capsys):
        assert "source 0 weight: Input should be greater than 0" in self.explain(capsys, "[{path: a, weight: -1}]")
        assert "either all sources have a weight" in self.explain(capsys, "[{path: a, weight: 1}, b]")
        assert "needs at least one" in self.explain(capsys, "[]")

    def test_sources_on_the_command_line(self):
        config = parse_config(["--output_dir", "x", "--data.train", "[{path: a, weight: 8}, {path: b, weight: 2}]"])
        assert [source.weight for source in config.data.train] == [8, 2]


class TestFiles:
    def test_patterns(self, captioned_folder, tmp_path):
        for number in range(3):
            write_rows(tmp_path / f"part-{number:02d}.jsonl", rows_of(captioned_folder)[4 * number : 4 * number + 4])
        for pattern in ("part-*.jsonl", "part-{00..02}.jsonl", "part-{00,01,02}.jsonl", "{part-00,part-0[12]}.jsonl"):
            assert len(load(tmp_path / pattern)) == 12, pattern
        with pytest.raises(ValueError, match="2 files that do not exist, the first: .*part-03.jsonl, .*part-04.jsonl"):
            load(tmp_path / "part-{00..04}.jsonl")
        with pytest.raises(ValueError, match="files of several kinds"):
            shutil.copy(tmp_path / "part-00.jsonl", tmp_path / "part-00.csv")
            load(tmp_path / "part-00.*")

    def test_damaged_tars(self, tmp_path):
        whole = write_tar(tmp_path / "whole.tar", {"0.jpg": bytes(2000), "0.txt": b"a"})
        (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:1500])
        with pytest.raises(
            ValueError, match="cut.tar cannot be read as a tar .it ends in the middle of a member, after 1500"
        ):
            tar_index(tmp_path / "cut.tar")
        (tmp_path / "none.tar").write_bytes(b"x" * 2000)
        with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
            tar.add(whole, "0.jpg")
        for name in ("none.tar", "packed.tar"):
            with pytest.raises(
                ValueError, match=f"{name} cannot be read as a tar .*only plain ones are, unpack .tar.gz"
            ):
                tar_index(tmp_path / name)

    def test_tables_of_contents_that_have_no_end(self, tmp_path, monkeypatch):
        monkeypatch.setenv("LRSCLIP_CACHE", str(tmp_path / "kept"))
        many = write_tar(tmp_path / "many.tar", {f"{number}.s{number}": b"x" for number in range(MOST_SUFFIXES + 1)})
        with pytest.raises(ValueError, match="many.tar has members with more than 64 suffixes, such as s0, s1, s2"):
            tar_index(many)
        names = [
            f"{number}.{'s' * 240}{number}" for number in range(MOST_SUFFIXES)
        ]  # too long for numpy to read again
        allowed = write_tar(tmp_path / "a.tar", dict.fromkeys(names, b"x"))
        assert len(tar_index(allowed).dtype) == MOST_SUFFIXES
        files = {"a.csv": "image,long_text\n1,a\n2,b\n", "a.jsonl": "{}\n\n{}\n"}
        for name, text in files.items():
            (tmp_path / name).write_text(text)
            for most, fits in ((2, False), (3, True)):
                monkeypatch.setattr("training.data.line_index.MOST_ROWS", most)
                with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=f"{name}.* more than 2"):
                    line_index(tmp_path / name, quoted=name == "a.csv")
        monkeypatch.setattr("modeling_lrsclip.files.tables.LONGEST_LOOK", -1)
        (tmp_path / "a.csv").write_text(files["a.csv"] + "3,c\n")
        for path in (many, tmp_path / "a.csv"):
            with pytest.raises(ValueError, match=f"{path}.*more than -1 s to look it through; split it into shards"):
                tar_index(path) if path == many else line_index(path, quoted=True)

    def test_a_line_that_no_memory_holds_is_one_row(self, captioned_folder, tmp_path, monkeypatch):
        rows = rows_of(captioned_folder)
        rows[1]["long_text"] *= 99
        path = write_rows(tmp_path / "a.jsonl", rows)
        monkeypatch.setattr("training.data.rows.LARGEST_ROW", 2000)
        read = LineRows(path, {"image": "image", "long": "long_text"}).read([0, 1, 2])
        assert [row.fault is None for row in read] == [True, False, True]
        assert "bytes, and 2000 bytes are allowed" in read[1].fault

    @pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_tar_index_equals_tarfile(self, format, tmp_path):
        folder = "" if format == tarfile.USTAR_FORMAT else "d" * 90 + "/"
        names = ["a/1.jpg", "a/1.Long.txt", "b/1.jpg", "b/ü.json", f"{folder}2.jpg", f"{folder}2.txt", "README"]
        path = write_tar(tmp_path / "a.tar", {name: name.encode() * 300 for name in names}, format=format)
        index = tar_index(path)
        assert index.dtype.names == ("jpg", "long.txt", "json", "txt") and len(index) == 4
        spans = [
            index[0]["jpg"],
            index[0]["long.txt"],
            index[1]["jpg"],
            index[2]["json"],
            index[3]["jpg"],
            index[3]["txt"],
        ]
        with tarfile.open(path) as tar:
            for name, span in zip(names, spans):
                assert span.item() == (tar.getmember(name).offset_data, tar.getmember(name).size)

    def test_an_index_is_kept_until_the_file_changes(self, tmp_path, monkeypatch):
        monkeypatch.setenv("LRSCLIP_CACHE", str(tmp_path / "kept"))
        path = write_tar(tmp_path / "a.tar", {"0.jpg": b"x"})
        assert len(tar_index(path)) == 1 and len(list((tmp_path / "kept" / "indices").iterdir())) == 1
        monkeypatch.setattr("training.data.tars.tar_members", lambda path: pytest.fail("read again"))
        assert len(tar_index(path)) == 1
        monkeypatch.undo()
        write_tar(path, {"0.jpg": b"x", "1.jpg": b"y"})
        assert len(tar_index(path)) == 2
        for kept in (tmp_path / "kept" / "indices").iterdir():
            for content in (b"", kept.read_bytes()[:20], b"x" * 100):  # as a crash or a full disk left it
                kept.write_bytes(content)
                assert len(tar_index(path)) == 2


class TestSkipped:
    @pytest.fixture
    def spoilt(self, captioned_folder, tmp_path):
        """12 rows: 3 has a broken image, 4 none, 7 an empty caption, 9 is no JSON."""
        rows = rows_of(captioned_folder)
        (tmp_path / "broken.png").write_bytes((captioned_folder / "3.png").read_bytes()[:200])
        rows[3]["image"], rows[4]["image"] = str(tmp_path / "broken.png"), str(tmp_path / "absent.png")
        rows[7]["short_text"] = ""
        lines = list(map(json.dumps, rows))
        lines[9] = lines[9][:30]
        (tmp_path / "spoilt.jsonl").write_text("\n".join(lines))
        return tmp_path / "spoilt.jsonl"

    def test_the_next_usable_row_takes_the_place(self, spoilt):
        pairs = load(spoilt, streaming=True)
        data = CaptionedImages(pairs, DataConfig(train="x"), 0)
        items = data.__getitems__([(0, number) for number in range(12)])
        ids = [int(item["id"].split(":")[1]) for item in items]
        assert ids == [0, 1, 2, 5, 5, 5, 6, 8, 8, 10, 10, 11]
        reasons = {row["id"]: row["reason"] for item in items for row in item["skipped"]}
        assert [reasons[f"spoilt.jsonl:{number}"] for number in (4, 7)] == [
            f"{spoilt.parent}/absent.png cannot be read as an image (the file does not exist); replace it or remove its row.",
            "The short caption is missing or empty.",
        ]
        assert "truncated" in reasons["spoilt.jsonl:3"] and "line cannot be read" in reasons["spoilt.jsonl:9"]
        again = data.__getitems__([(0, 9), (0, 3)])
        assert [item["long_text"] for item in again] == [items[9]["long_text"], items[3]["long_text"]]

    def test_the_last_row_is_followed_by_the_first_of_its_source(self, spoilt, captioned_folder):
        pairs = load(captioned_folder, spoilt, captioned_folder, streaming=True)
        assert [pairs.following(number) for number in (10, 11, 12, 23, 35)] == [11, 0, 13, 12, 24]

    def test_nothing_usable(self, tmp_path, captioned_folder, run_arguments):
        rows = [row | {"image": "no.png"} for row in rows_of(captioned_folder)]
        source = write_rows(tmp_path / "none.jsonl", rows)
        with pytest.raises(
            SystemExit, match="None of 100 rows from none.jsonl:.* on can be used; the first: .*no.png"
        ):
            train.main(
                [*run_arguments, "--data.train", str(source), "--data.streaming", "--data.max_skipped_fraction", "1"]
            )

    def test_a_run_names_each_row_once(self, spoilt, run_arguments, tmp_path, capsys):
        train.main([*run_arguments, "--data.train", str(spoilt), "--data.streaming", "--loop.steps", "6"])
        listed = tmp_path / "run" / "skipped.jsonl"
        closing = rf"\n[1-9]\d* visits of rows that could not be used went to the row after; see {listed}\n"
        assert re.search(closing, capsys.readouterr().out)
        named = [json.loads(line) for line in listed.read_text().splitlines()]
        assert {row["id"] for row in named} == {f"spoilt.jsonl:{number}" for number in (3, 4, 7, 9)} and len(
            named
        ) == 4
        assert {row["file"] for row in named} == {
            str(spoilt),
            str(spoilt.parent / "broken.png"),
            str(spoilt.parent / "absent.png"),
        }

    def test_too_many(self, spoilt, run_arguments, tmp_path):
        arguments = [*run_arguments, "--data.train", str(spoilt), "--data.streaming", "--loop.save_every", "1"]
        with pytest.raises(
            SystemExit, match="1[1-4] of .* rows visited cannot be used .*max_skipped_fraction=0.01 allows"
        ):
            train.main([*arguments, "--loop.steps", "60"])
        assert list((tmp_path / "run" / "checkpoints").iterdir()) and not (tmp_path / "run" / "final").exists()
        resumed = [*arguments, "--loop.steps", "60", "--resume", "--data.max_skipped_fraction", "1"]
        train.main(resumed)
        assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 4

    def test_validation_leaves_them_out(self, spoilt, captioned_folder, run_arguments, tmp_path):
        rows = rows_of(captioned_folder)
        rows[2]["image"] = str(spoilt.parent / "broken.png")
        held_out = write_rows(tmp_path / "held_out.jsonl", rows)
        train.main([*run_arguments, "--data.validation", str(held_out)])
        (named,) = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
        assert json.loads(named)["id"] == "held_out.jsonl:2"

    def test_the_share_allowed(self):
        last = {"id": "a:1", "reason": "It is broken."}
        for skipped, visited, allowed in ((10, 20, 0.01), (11, 1100, 0.01), (0, 5, 0), (500, 500, 1)):
            check_share(skipped, visited, allowed, last)
        for skipped, visited, allowed in ((11, 1099, 0.01), (1, 10_000, 0)):
            with pytest.raises(
                ValueError, match="rows visited cannot be used .* a:1: It is broken. All of them are in"
            ):
                check_share(skipped, visited, allowed, last)

    @pytest.mark.parametrize(
        "spoilt, reason",
        [
            ('{"image": "\\ud800.png", "long_text": "a", "short_text": "b"}', "half a character"),
            ('{"image": "0.png", "long_text": "\\ud800", "short_text": "b"}', "half a character"),
            ('{"image": {"path": 5}, "long_text": "a", "short_text": "b"}', "cannot be read as an image"),
            ('{"image": 5, "long_text": "a", "short_text": "b"}', "cannot be read as an image"),
            ('{"image": ' + "[" * 300 + "]" * 300 + ', "long_text": "a", "short_text": "b"}', "levels deep"),
        ],
    )
    def test_a_strange_row_is_one_row(self, captioned_folder, tmp_path, spoilt, reason):
        """It used to end the run, streamed or, by a segmentation fault in Arrow, in memory."""
        lines = list(map(json.dumps, rows_of(captioned_folder)))
        lines[3] = spoilt
        path = tmp_path / "strange.jsonl"
        path.write_text("\n".join(lines))
        data = CaptionedImages(load(path, streaming=True), DataConfig(train="x"), 0)
        (item,) = data.__getitems__([(0, 3)])
        assert item["id"] == "strange.jsonl:4"
        SkippedFile(tmp_path).add(item["skipped"])
        (named,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
        assert named["id"] == "strange.jsonl:3" and reason in named["reason"]
        with pytest.raises(ValueError, match=r"strange.jsonl(, line 4|.* in row 3)"):
            load(path)

    def test_samples_of_a_tar(self, captioned_folder, tmp_path, monkeypatch):
        """Of empty members, and of one that no memory holds."""
        text = json.dumps({"long_text": "a", "short_text": "b"}).encode()
        image = (captioned_folder / "0.png").read_bytes()
        members = {"0.png": image, "0.json": text, "1.png": b"", "1.json": b""}
        members |= {"2.png": image * 2, "2.json": text, "3.png": image, "3.json": text}
        write_tar(tmp_path / "a.tar", members)
        monkeypatch.setattr("training.data.tars.LARGEST_MEMBER", len(image) + 1)
        data = CaptionedImages(load(tmp_path / "a.tar"), DataConfig(train="x"), 0)
        (item,) = data.__getitems__([(0, 1)])
        assert item["id"] == "a.tar:3"
        assert [row["id"] for row in item["skipped"]] == ["a.tar:1", "a.tar:2"]
        assert "bytes are allowed" in item["skipped"][1]["reason"]

    def test_any_reason_can_be_written_and_read(self, tmp_path):
        rows = [{"id": f"a:{number}", "file": "\ud800", "reason": "x\u2028y"} for number in range(2)]
        SkippedFile(tmp_path).add(rows[:1])
        SkippedFile(tmp_path).add(rows)
        written = SkippedFile(tmp_path).path.read_text().removesuffix("\n").split("\n")
        assert list(map(json.loads, written)) == rows

    def test_a_line_cut_by_a_kill(self, tmp_path):
        file = SkippedFile(tmp_path)
        file.add([{"id": "a:1", "file": "a", "reason": "x"}])
        with file.path.open("a") as half:
            half.write('{"id": "a:2", "fi')
        SkippedFile(tmp_path).add([{"id": name, "file": "a", "reason": "x"} for name in ("a:1", "a:2", "a:3")])
        assert [json.loads(line)["id"] for line in file.path.read_text().splitlines()] == ["a:1", "a:2", "a:3"]

    def test_one_process(self, tmp_path):
        rows = SkippedRows(tmp_path, 0.5, writes=True)
        assert rows.take({"skipped": []}, before=3, used=8) == 3 and not rows.file.path.exists()
        row = {"id": "a:1", "file": "a", "reason": "x"}
        assert rows.take({"skipped": [row, row]}, before=3, used=8) == 5


def test_mixture_and_augmentation_in_a_run(captioned_folder, run_arguments, tmp_path):
    """Also what `run.json` says of several sources."""
    write_rows(tmp_path / "more.jsonl", rows_of(captioned_folder)[:5])
    sources = json.dumps(
        [{"path": str(captioned_folder), "weight": 1}, {"path": str(tmp_path / "more.jsonl"), "weight": 3}]
    )
    train.main(
        [
            *run_arguments,
            "--data.train",
            sources,
            "--data.augment",
            "dihedral",
            "--data.workers",
            "1",
            "--loop.log_ids",
        ]
    )
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["pairs"] == 17 and record["data"]["kind"] == "local"
    assert [source["weight"] for source in record["data"]["sources"]] == [1, 3]
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for batch in (line["ids"] for line in log if line["kind"] == "batch"):
        assert sum(name.startswith("more.jsonl:") for name in batch) == 3 and len(batch) == 4


def take_as(rank: int, folder, answers) -> None:
    """One of two processes; only the second meets unusable rows."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # asked for, not used: the group is there
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    PartialState._reset_state()
    PartialState(cpu=True)
    rows = SkippedRows(folder, 0.1, writes=rank == 0)
    outcome, skipped = [], 0
    try:
        for step in range(9):
            unusable = [{"id": f"a:{step}-{number}", "file": "a", "reason": "x"} for number in range(rank * step)]
            skipped = rows.take({"skipped": unusable}, skipped, used=8 * (step + 1))
            outcome.append(skipped)
    except ValueError as error:
        outcome.append(str(error))
    answers.put((rank, outcome))
    dist.destroy_process_group()


def test_two_processes_stop_together(tmp_path):
    context = multiprocessing.get_context("fork")  # nothing is imported anew
    answers = context.Queue()
    workers = [context.Process(target=take_as, args=(rank, tmp_path, answers)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    outcomes = dict(answers.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][:5] == [0, 1, 3, 6, 10] and "15 of 63 rows visited" in outcomes[0][5]
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 15
