"""A data set on a Hub, over HTTP: downloaded into memory, or streamed row group by row group."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset
from huggingface_hub import HfApi

from tests import processes
from tests.hub_server import HubServer
from tests.training.data.test_data_streaming import ROWS, TABLE, picture, row


ROOT = Path(__file__).parents[3]
READ = """
import json
from training.data.pairs import DataConfig, load_pairs
told = {}
for streaming in (True, False):
    pairs = load_pairs(DataConfig(train="you/pairs", streaming=streaming), ["long", "short"])
    rows = pairs.read([0, 14, 49])
    told[streaming] = [len(pairs), len(pairs.parts), [row.id for row in rows], [row.long for row in rows]]
    told[streaming].append(len(rows[1].image["bytes"]))
    told[streaming].append(pairs.parts[0].__class__.__name__)
try:
    load_pairs(DataConfig(train="you/lines", streaming=True), ["long"])
except ValueError as error:
    told["refused"] = str(error)
print(json.dumps(told))
"""


def test_a_data_set_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for shard, numbers in enumerate((range(13), range(13, ROWS))):
        embedded = [{"image": {"bytes": picture(number), "path": None}} | row(number) for number in numbers]
        table = Dataset.from_list(embedded, features=TABLE).data.table
        pq.write_table(table, tmp_path / "data" / f"train-{shard:05d}-of-00002.parquet", row_group_size=5)
    with HubServer() as hub:
        hub.connect(monkeypatch)
        api = HfApi(endpoint=hub.url, token="hf_you")
        for name in ("you/pairs", "you/lines"):
            api.create_repo(name, repo_type="dataset")
        api.upload_folder(
            repo_id="you/pairs", repo_type="dataset", folder_path=tmp_path, allow_patterns="data/*.parquet"
        )
        line = json.dumps({"image": "a.png", "long_text": "b"}).encode()
        api.upload_file(path_or_fileobj=line, path_in_repo="train.jsonl", repo_id="you/lines", repo_type="dataset")
        environment = hub.environment(tmp_path / "home")
        run = processes.run([sys.executable, "-c", READ], cwd=ROOT, env=environment)
        assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    count, parts, ids, long, size, kind = result["true"]
    assert (count, parts, kind) == (ROWS, 2, "ParquetRows") and size == len(picture(14))
    assert long == [row(number)["long_text"] for number in (0, 14, 49)] == result["false"][3]
    assert ids == [
        "train-00000-of-00002.parquet:0",
        "train-00001-of-00002.parquet:1",
        "train-00001-of-00002.parquet:36",
    ]
    assert result["false"][2] == ["you/pairs:0", "you/pairs:14", "you/pairs:49"]
    assert "you/lines cannot be streamed" in result["refused"]
