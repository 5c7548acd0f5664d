"""
Text-image recall as a HuggingFace `evaluate` module. It calls `evaluation.retrieval`, so it is used in a clone (or with
the clone on PYTHONPATH): `evaluate.load` copies this file away, and recall is computed in one place only.
"""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
Recall at k of text-image retrieval in both directions, and its mean mR. An image may have several texts: image to text
counts a hit if any of them is among the first k. Ties count against the model. Without ties it equals
github.com/LAION-AI/CLIP_benchmark (metrics/zeroshot_retrieval.py).
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: (N, D) embeddings of the texts, unit rows.
    references: (N,) index of the image that text j describes; every image needs a text.
    image_embeds: (M, D) embeddings of the images, unit rows.
    ks: places that count as a hit; (1, 5, 10) by default.

Returns:
    text_to_image_R@k, image_to_text_R@k for every k, and mR, the mean of them all; in percent.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("evaluation/metrics/retrieval_recall")
    >>> images = [[1.0, 0.0], [0.0, 1.0]]
    >>> texts = [[0.8, 0.6], [0.6, 0.8], [0.8, 0.6]]
    >>> metric.compute(predictions=texts, references=[0, 1, 1], image_embeds=images, ks=[1])
    {'text_to_image_R@1': 66.66666666666667, 'image_to_text_R@1': 50.0, 'mR': 58.333333333333336}
"""

_CITATION = """\
@article{chen2025lrsclip,
    title   = {{LRSCLIP}: A Vision-Language Foundation Model for Aligning Remote Sensing Image with Longer Text},
    author  = {Chen, Weizhi and Chen, Jingbo and Deng, Yupeng and Chen, Jiansheng and Feng, Yuman and Xi, Zhihao and
               Liu, Diyou and Li, Kai and Meng, Yu},
    journal = {arXiv preprint arXiv:2503.19311},
    year    = {2025},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RetrievalRecall(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": [datasets.Value("float32")], "references": datasets.Value("int64")}
            ),
            reference_urls=["https://arxiv.org/abs/2503.19311"],
        )

    def _compute(self, predictions, references, image_embeds, ks=(1, 5, 10)) -> dict[str, float]:
        try:
            from evaluation.retrieval import retrieval_recall  # indented: evaluate would tell to pip install it
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "retrieval_recall needs the folder evaluation/ of the LRSCLIP clone it came from: run in the clone, or "
                f"put the clone on PYTHONPATH ({error})."
            ) from error
        images, texts = (np.asarray(rows, dtype=np.float32) for rows in (image_embeds, predictions))
        return retrieval_recall(images, texts, np.asarray(references), tuple(ks))
