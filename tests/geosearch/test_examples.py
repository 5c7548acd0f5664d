"""The notebook runs as it stands, and the demo's count of what was found is right, with a tiny model in the demo's place."""

import json
import shutil
from pathlib import Path

import geopandas
import nbformat
import numpy as np
import rasterio
from nbclient import NotebookClient

from geosearch.demo import main, rank_of
from geosearch.exact_search import nearest_places


NOTEBOOK = Path(__file__).parents[2] / "examples" / "find_a_place.ipynb"


def test_the_notebook_runs(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    monkeypatch.setenv("MPLBACKEND", "agg")
    shutil.copytree(checkpoint, tmp_path / "runs/demo/lrsclip/final")
    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(not cell.get("outputs") for cell in nbformat.read(NOTEBOOK, 4).cells)  # stored without outputs
    folder = tmp_path / "runs/demo/find_a_place"
    assert len(geopandas.read_file(folder / "hits.gpkg")) == 5
    with rasterio.open(folder / "heat.tif") as heat:
        assert heat.crs is not None and np.isfinite(heat.read(1)).any()


def test_the_demo_counts_what_was_found(archive_index, tmp_path, capsys):
    query = archive_index.vectors()[9].astype(np.float32)
    hits = nearest_places(archive_index, query, top=8)
    rows = hits.rows.to_pylist()
    for rank, row in enumerate(rows, 1):
        left, top, width, height = row["pixel_box"]
        name = "/".join(row["scene"].split("/")[-2:])
        assert rank_of(hits, name, [left + 60, top + 60, width, height]) == rank  # 58 % of it
        assert rank_of(hits, name, [left + 100, top + 100, width, height]) is None  # 37 %
        assert rank_of(hits, "other.tif", row["pixel_box"]) is None
    places = [
        {"text": f"place {number}", "scene": row["scene"], "pixel_box": row["pixel_box"]}
        for number, row in enumerate(archive_index.rows(["scene", "pixel_box"]).to_pylist()[:20])
    ]
    (tmp_path / "places.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in places))
    command = [str(archive_index.folder), str(tmp_path / "places.jsonl"), str(tmp_path / "out")]
    assert main(command) == 0
    assert "Of 10 descriptions" in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["heat.tif", "hits.html"]
