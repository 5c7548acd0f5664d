"""Semantic localization as a HuggingFace `evaluate` module; complete in this folder, so it loads from anywhere."""

import datasets
import evaluate
import numpy as np

from .measures import localization_metrics


_DESCRIPTION = """
Rsu, Ras, Rda and Rmi of semantic localization: whether a map of attention over a large aerial image agrees with the
regions that a query describes. Equal to the published implementation, github.com/xiaoyuan1996/SemanticLocalizationMetrics
(evaluations/SLM.py).
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: one probability map a query: a 2-D uint8 array (H, W), 255 the highest, a grey PIL image, or the path of
        a grey image file. JPEG is not lossless; the published code writes its maps as JPEG all the same.
    references: per query its regions, each a polygon of at least three corners [x, y] in pixels.

Returns:
    Rsu: share of the attention within the regions, 0 to 1, higher is better.
    Ras: distance of the attention from the middles of the regions, 0 to 1, lower is better.
    Rda: how concentrated the attention is there, 0 to 1, higher is better.
    Rmi: 0.4 Rsu + 0.35 (1 - Ras) + 0.25 Rda, higher is better. Each is the mean over the queries.

Examples:
    >>> import evaluate, numpy
    >>> metric = evaluate.load("evaluation/metrics/semantic_localization")
    >>> heat = numpy.zeros((600, 800), numpy.uint8)
    >>> heat[200:400, 300:500] = 255
    >>> result = metric.compute(predictions=[heat], references=[[[[300, 200], [500, 200], [500, 400], [300, 400]]]])
    >>> {name: round(value, 3) for name, value in result.items()}
    {'Rsu': 1.0, 'Ras': 0.002, 'Rda': 1.0, 'Rmi': 0.999}
"""

_CITATION = """\
@article{yuan2022learning,
    title   = {Learning to Evaluate Performance of Multimodal Semantic Localization},
    author  = {Yuan, Z. and Zhang, W. and Li, C. and Pan, Z. and Mao, Y. and Chen, J. and Li, S. and Wang, H. and Sun, X.},
    journal = {IEEE Transactions on Geoscience and Remote Sensing},
    year    = {2022},
    doi     = {10.1109/TGRS.2022.3207171},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SemanticLocalization(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Image(), "references": [[[datasets.Value("float64")]]]}  # polygons, corners
            ),
            reference_urls=["https://github.com/xiaoyuan1996/SemanticLocalizationMetrics"],
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        queries = zip(predictions, references, strict=True)
        values = [localization_metrics(np.asarray(heat), regions) for heat, regions in queries]
        return {name: float(np.mean([value[name] for value in values])) for name in values[0]}
