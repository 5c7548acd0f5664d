"""
A page in the browser that searches an index: `geosearch serve INDEX`, or, as `app.py` beside an index and with
`lrsclip[geosearch,map]` in its requirements, a Space (`GEOSEARCH_INDEX` names the folder; default `index`).
"""

import html
import os
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageDraw

from geosearch.exact_search import Hits, ReadText, read_text, search
from geosearch.hits import feature_table, summary, write_features
from geosearch.index_store import load_index_encoder, open_index
from geosearch.locate import SimilarityMap, similarity_map, write_map
from geosearch.page import MAP_SCRIPT, MAP_STYLE, HeatLayer, hit_lines, map_svg
from geosearch.pictures import ScenePictures


AROUND = 1024  # pixels of a scene shown around a hit, one for one
MOST_PLACES = 50
RAMP = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # dark to light, as similarity rises
FAINT = 20  # percent of a scene's cells, the least similar ones, that the heat map leaves clear

STYLE = (
    MAP_STYLE
    + """
#map { height: 620px; border: 1px solid #d7dde3; border-radius: 8px; overflow: hidden }
#map > div, #map .prose, #map .html-container { height: 100% }
svg.map .heat { opacity: var(--heat, 0.6) }
.tokens { font-size: 13px; line-height: 1.45; color: #54616e }
.tokens .beyond { background: #ffe9c4 }
.tokens .cut { text-decoration: line-through; color: #d0021b }
footer { display: none !important }
"""
)


class SearchPage:
    """Actions of the page: every method is called with the values of its inputs and returns those of its outputs."""

    def __init__(self, index_folder: str | Path, model: str | None = None, device: str = "cpu"):
        self.index = open_index(index_folder)
        self.encoder = load_index_encoder(self.index, model, device)
        self.pictures = ScenePictures(self.index)
        self._temporary = tempfile.TemporaryDirectory(prefix="geosearch-page-")  # goes with the page
        self.folder = Path(self._temporary.name)  # of downloads

    def tokens(self, text: str) -> str:
        """Count the tokens of a text, and say, where it is longer than 77, what lies beyond."""
        if not text or not text.strip():
            return '<div class="tokens">0 tokens</div>'
        return token_markup(read_text(self.encoder, text))

    def search(self, text: str, example: str | None, exclude: str, top: float) -> tuple[Any, ...]:
        """
        Looks for a question's places.

        Args:
            text: what is to be seen; empty: only the example counts.
            example: file of an image that it is to look like; None: none.
            exclude: what is not to be seen; may be empty.
            top: most places.

        Returns:
            Hits, map, remark, rows of the table, scene of the heat map, files (GeoJSON, GeoPackage, GeoTIFF), picture of
            the first hit and words about it.

        Raises:
            `gradio.Error`: with the sentence for a question that cannot be answered.
        """
        try:
            image = self.pictures.example(example) if example else None
            question = {"image": image, "exclude": exclude or None, "top": int(top)}
            hits = search(self.index, text or None, encoder=self.encoder, **question)
        except ValueError as problem:
            raise gr.Error(str(problem), duration=None) from problem
        scene = hits.rows["scene"][0].as_py()
        drawing, heat_file = self.heat(hits, scene)
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        paths, features = (folder / "hits.geojson", folder / "hits.gpkg"), feature_table(hits)
        files = [str(write_features(features, path, hits.coordinates)) for path in paths]
        picture, words = self.look(hits, 1)
        remark = " ".join(html.escape(line) for line in summary(hits))
        figures = zip(hits.similarity, hits.z_score, hits.rows.to_pylist(), strict=True)
        table = [
            [rank, f"{similarity:.4f}", f"{z_score:.1f}", *hit_lines(hits, row)[:2]]
            for rank, (similarity, z_score, row) in enumerate(figures, 1)
        ]
        return hits, drawing, remark, table, scene, *files, heat_file, picture, words

    def heat(self, hits: Hits | None, scene: str) -> tuple[str, str | None]:
        """The map with the similarity over a scene as a layer, and that layer as a GeoTIFF."""
        if hits is None:
            return map_svg(self.pictures, None, self.pictures.scenes, focus=scene), None
        heat = similarity_map(self.index, hits.vector, scene)
        shown = list(dict.fromkeys([scene, *hits.rows["scene"].to_pylist()]))
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        file = write_map(heat, folder / f"similarity-{Path(scene).stem}.tif")
        return map_svg(self.pictures, hits, shown, HeatLayer(scene, heat_picture(heat)), scene), str(file)

    def look(self, hits: Hits | None, rank: int) -> tuple[Image.Image | None, str]:
        """The scene at full size around a hit, its window outlined, and what is known of it."""
        if hits is None or not 1 <= rank <= len(hits):
            return None, ""
        row = hits.rows.slice(rank - 1, 1).to_pylist()[0]
        left, top, width, height = row["pixel_box"]
        facts = self.pictures.facts(row["scene"])
        across, down = (max(AROUND, 2 * side) for side in (width, height))
        x = max(0, min(left + width // 2 - across // 2, facts["width"] - across))
        y = max(0, min(top + height // 2 - down // 2, facts["height"] - down))
        picture = self.pictures.picture(row["scene"], (x, y, across, down), max(across, down))
        if picture is None:
            return None, f"**{rank}** {row['scene']} cannot be read any more."
        factor = picture.width / min(across, facts["width"] - x)
        box = [round(edge * factor) for edge in (left - x, top - y, left - x + width, top - y + height)]
        ImageDraw.Draw(picture).rectangle(box, outline=(255, 140, 0), width=4)
        words = " · ".join(hit_lines(hits, row))
        return picture, f"**{rank}** similarity {hits.similarity[rank - 1]:.4f} · {words}"


def token_markup(read: ReadText) -> str:
    """The number of tokens; of a text beyond 77 the text itself, with what a CLIP of 77 would not read marked."""
    line = f"{read.tokens} tokens of {read.limit}"
    if read.clip_cut_at == len(read.text):
        return f'<div class="tokens">{line}</div>'
    first, beyond = read.text[: read.clip_cut_at], read.text[read.clip_cut_at : read.cut_at]
    line += "; a CLIP of 77 tokens would not read what is marked" + ("; nobody reads the end" if read.cut else "")
    text = f'{html.escape(first)}<span class="beyond">{html.escape(beyond)}</span>'
    cut = html.escape(read.text[read.cut_at :])
    return f'<div class="tokens">{line}<br>{text}<span class="cut">{cut}</span></div>'


def heat_picture(heat: SimilarityMap) -> Image.Image:
    """RGBA picture of a map: clear where the scene is least similar, from dark to light where it is more."""
    known = heat.values[~np.isnan(heat.values)]
    low, high = np.percentile(known, FAINT), known.max()
    share = np.nan_to_num(np.clip((heat.values - low) / max(high - low, 1e-9), 0, 1))  # (H, W)
    stops = np.linspace(0, 1, len(RAMP))
    colours = [np.interp(share, stops, [colour[channel] for colour in RAMP]) for channel in range(3)]
    alpha = np.where(np.isnan(heat.values), 0, 255 * np.sqrt(share))
    return Image.fromarray(np.stack([*colours, alpha], axis=-1).round().astype(np.uint8), "RGBA")


def build_page(page: SearchPage) -> gr.Blocks:
    """The page's parts, and what happens when they are used."""
    with gr.Blocks(title="geosearch", analytics_enabled=False, fill_width=True) as blocks:
        hits, scenes = gr.State(None), page.pictures.scenes
        gr.Markdown(f"### Find a place by describing it · {len(page.index):,} windows of {len(scenes)} scenes")
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                text = gr.Textbox(label="What is to be seen", lines=5, max_lines=12, elem_id="text")
                tokens = gr.HTML(page.tokens(""), elem_id="tokens")
                with gr.Accordion("More", open=False):
                    looks = "What it is to look like (an image or GeoTIFF)"
                    example = gr.File(label=looks, type="filepath", height=110)
                    exclude = gr.Textbox(label="What is not to be seen", elem_id="exclude")
                    top = gr.Slider(1, MOST_PLACES, 12, step=1, label="Places")
                ask = gr.Button("Search", variant="primary", elem_id="ask")
                headers = ["rank", "similarity", "σ above", "place", "scene"]
                table = gr.Dataframe(headers=headers, interactive=False, elem_id="hits")
                remark = gr.HTML()
                with gr.Row():
                    files = [
                        gr.DownloadButton(name, size="sm", min_width=90, elem_id=f"download-{name.lower()}")
                        for name in ("GeoJSON", "GeoPackage", "GeoTIFF")
                    ]
            with gr.Column(scale=3, min_width=420):
                script = MAP_SCRIPT + "attachMap(element, rank => trigger('select', {rank}));"
                drawing = gr.HTML(page.heat(None, scenes[0])[0], js_on_load=script, elem_id="map")
                with gr.Row():
                    names = [(Path(path).name, path) for path in scenes]
                    scene = gr.Dropdown(names, value=scenes[0], label="Heat map over", scale=2)
                    opacity = gr.Slider(0, 1, 0.6, step=0.05, label="Its opacity", elem_id="opacity")
                words = gr.Markdown(elem_id="words")
                buttons, around = ["download", "fullscreen"], "The scene around the hit, at full size"
                picture = gr.Image(label=around, interactive=False, elem_id="around", buttons=buttons)
        text.change(page.tokens, text, tokens, show_progress="hidden", trigger_mode="always_last")
        outputs = [hits, drawing, remark, table, scene, *files, picture, words]
        ask.click(page.search, [text, example, exclude, top], outputs)
        scene.input(page.heat, [hits, scene], [drawing, files[2]])
        opacity.input(None, opacity, None, js="value => document.documentElement.style.setProperty('--heat', value)")

        def look_from_map(known: Hits | None, event: gr.EventData) -> tuple[Image.Image | None, str]:
            return page.look(known, int(event.rank))

        def look_from_table(known: Hits | None, event: gr.SelectData) -> tuple[Image.Image | None, str]:
            return page.look(known, event.index[0] + 1)

        drawing.select(look_from_map, hits, [picture, words])
        table.select(look_from_table, hits, [picture, words])
    return blocks


def serve(
    index_folder: str | Path,
    model: str | None = None,
    device: str = "cpu",
    host: str | None = None,
    port: int | None = None,
    **options: Any,
) -> Any:
    """
    Opens the page.

    Args:
        index_folder: of the index.
        model: where its model is now; None: where it was when the index was made.
        device: where the model runs.
        host: address to listen at; None: this machine only (127.0.0.1), or what `GRADIO_SERVER_NAME` says.
        port: None: the first free one from 7860 on.
        options: of `gradio.Blocks.launch`: `inbrowser`, `prevent_thread_lock`, ….

    Returns:
        What `launch` does.
    """
    blocks = build_page(SearchPage(index_folder, model, device))
    return blocks.launch(server_name=host, server_port=port, share=False, run_history=False, css=STYLE, **options)


if __name__ == "__main__":
    serve(os.environ.get("GEOSEARCH_INDEX", "index"))
