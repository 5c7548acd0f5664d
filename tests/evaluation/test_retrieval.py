"""Recall on matrices counted by hand, against a slow reference, with ties and with bad input."""

import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from evaluation.benchmarks.retrieval_data import RetrievalData
from evaluation.retrieval import (
    RetrievalTask,
    check_indices,
    evaluate_retrieval,
    recall_from_ranks,
    retrieval_ranks,
    retrieval_recall,
    shorten,
    spread_evenly,
)
from modeling_lrsclip.encoding import Encoder, embed_images, embed_texts
from modeling_lrsclip.encoding.imagery import ImageFiles


def ranks_of(scores, text_to_image, **options):
    """Ranks for a matrix of scores (N texts, M images), by way of embeddings that have it as their product."""
    scores = torch.tensor(scores, dtype=torch.float32)
    text_ranks, image_ranks = retrieval_ranks(torch.eye(scores.shape[1]), scores, text_to_image, **options)
    return text_ranks.tolist(), image_ranks.tolist()


def slow_ranks(image_embeds, text_embeds, text_to_image):
    """Sorts everything; without ties the same as CLIP_benchmark's one-hot of the first k."""
    scores = text_embeds.double().numpy() @ image_embeds.double().numpy().T
    text_ranks = [list(np.argsort(-row)).index(image) for row, image in zip(scores, text_to_image, strict=True)]
    image_ranks = []
    for image, column in enumerate(scores.T):
        positives = [text for text, owner in enumerate(text_to_image) if owner == image]
        order = list(np.argsort(-column))
        image_ranks.append(min(order.index(text) for text in positives))
    return text_ranks, image_ranks


def random_embeds(seed, images=23, captions=(1, 5), width=8):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(captions[0], captions[1] + 1, (images,), generator=generator)
    owners = torch.repeat_interleave(torch.arange(images), counts)
    owners = owners[torch.randperm(len(owners), generator=generator)]
    image_embeds = F.normalize(torch.randn(images, width, generator=generator), dim=1)
    noise = torch.randn(len(owners), width, generator=generator)
    return image_embeds, F.normalize(image_embeds[owners] + 0.7 * noise, dim=1), owners.tolist()


def test_one_text_an_image():
    #            image 0    1    2
    text_ranks, image_ranks = ranks_of(
        [
            [0.9, 0.1, 0.2],  # its image first
            [0.8, 0.5, 0.6],  # its image last
            [0.1, 0.3, 0.2],  # its image second
        ],
        [0, 1, 2],
    )
    assert text_ranks == [0, 2, 1]
    assert image_ranks == [0, 0, 2]  # columns: 0.9 is best; 0.5 is best; 0.2 is behind 0.6 and ties with text 0's 0.2


def test_five_texts_an_image_count_once():
    scores = [[0.1, 0.9], [0.2, 0.1], [0.8, 0.3], [0.3, 0.2], [0.4, 0.1], [0.7, 0.6], [0.6, 0.5]]
    text_ranks, image_ranks = ranks_of(scores, [0, 0, 0, 0, 0, 1, 1])
    assert text_ranks == [1, 0, 0, 0, 0, 1, 1]
    # Image 0: its best text has 0.8, the others' 0.7 and 0.6 are below. Image 1: its best has 0.6, text 0 has 0.9.
    assert image_ranks == [0, 1]
    recall = recall_from_ranks(retrieval_ranks(torch.eye(2), torch.tensor(scores), [0, 0, 0, 0, 0, 1, 1]), ks=(1, 2))
    assert recall == pytest.approx(
        {
            "text_to_image_R@1": 400 / 7,
            "text_to_image_R@2": 100,
            "image_to_text_R@1": 50,
            "image_to_text_R@2": 100,
            "mR": (400 / 7 + 250) / 4,
        }
    )


def test_own_texts_do_not_stand_in_each_others_way():
    text_ranks, image_ranks = ranks_of([[0.9, 0.0], [0.9, 0.0], [0.8, 0.0], [0.0, 0.5]], [0, 0, 0, 1])
    assert text_ranks == [0, 0, 0, 0] and image_ranks == [0, 0]


def test_ties_count_against_the_model():
    text_ranks, image_ranks = ranks_of([[0.5, 0.5, 0.1], [0.5, 0.5, 0.5], [0.0, 0.2, 0.1]], [0, 1, 2])
    assert text_ranks == [1, 2, 1]
    assert image_ranks == [1, 1, 2]


@pytest.mark.parametrize("value", [0.0, 0.3, -1.0])
def test_a_model_that_cannot_tell_anything_apart_scores_nothing(value):
    image_embeds, text_embeds = torch.ones(12, 3) * value, torch.ones(24, 3)
    recall = retrieval_recall(image_embeds, text_embeds, [index // 2 for index in range(24)])
    assert set(recall.values()) == {0.0}


def test_equal_embeddings_tie_in_whatever_block_they_stand():
    image_embeds, _, _ = random_embeds(0, images=40, width=64)
    image_embeds = torch.cat([image_embeds, image_embeds])  # every image twice
    text_embeds = image_embeds.clone()
    for block_bytes in (1, 7 * 8 * 80, 2**28):
        text_ranks, image_ranks = retrieval_ranks(image_embeds, text_embeds, list(range(80)), block_bytes)
        assert text_ranks.tolist() == image_ranks.tolist() == [1] * 80


def test_last_bits_do_not_break_a_tie():
    boundary = 0.75 + 2.0**-25  # between two numbers of float32: one score below it, one above
    images = torch.tensor([[boundary - 1e-15], [boundary + 1e-15]], dtype=torch.float64)
    for image_embeds in (images, images.flip(0)):
        ranks = retrieval_ranks(image_embeds, torch.ones(2, 1), [0, 1])
        assert ranks.text_to_image.tolist() == ranks.image_to_text.tolist() == [1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_sorting_everything_in_blocks_of_any_size(seed):
    image_embeds, text_embeds, owners = random_embeds(seed)
    slow = slow_ranks(image_embeds, text_embeds, owners)
    for block_bytes in (1, 1000, 2**28):
        ranks = retrieval_ranks(image_embeds, text_embeds, owners, block_bytes)
        assert (ranks.text_to_image.tolist(), ranks.image_to_text.tolist()) == slow
    recall = retrieval_recall(image_embeds.numpy(), text_embeds.numpy(), np.array(owners), ks=(1, 3))
    assert recall["text_to_image_R@3"] == pytest.approx(100 * np.mean(np.array(slow[0]) < 3))
    assert recall["image_to_text_R@1"] == pytest.approx(100 * np.mean(np.array(slow[1]) < 1))


def test_shuffling_texts_and_images_changes_nothing():
    image_embeds, text_embeds, owners = random_embeds(7)
    new_place = torch.randperm(len(image_embeds), generator=torch.Generator().manual_seed(1))
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(2))
    shuffled = torch.empty_like(image_embeds)
    shuffled[new_place] = image_embeds
    expected = retrieval_recall(image_embeds, text_embeds, owners)
    assert retrieval_recall(shuffled, text_embeds[order], new_place[torch.tensor(owners)[order]]) == expected


def test_perfect_embeddings_score_100_and_k_may_exceed_the_candidates():
    recall = retrieval_recall(torch.eye(4), torch.eye(4), range(4), ks=(1, 50))
    assert set(recall.values()) == {100.0}
    assert set(retrieval_recall(torch.eye(1), torch.eye(1), [0]).values()) == {100.0}


def test_scores_are_held_in_blocks(monkeypatch):
    image_embeds, text_embeds, owners = random_embeds(3)
    held, plain = [], torch.Tensor.scatter_
    monkeypatch.setattr(
        torch.Tensor, "scatter_", lambda scores, *rest: held.append(len(scores)) or plain(scores, *rest)
    )
    retrieval_ranks(image_embeds, text_embeds, owners, block_bytes=3 * 8 * len(image_embeds))
    assert set(held[:-1]) == {3} and sum(held) == len(owners)


GOOD = torch.eye(3)


@pytest.mark.parametrize(
    "images, texts, owners, problem",
    [
        (GOOD[0], GOOD, [0, 1, 2], r"image_embeds has shape \(3,\)"),
        (GOOD, GOOD[:0], [], r"text_embeds has shape \(0, 3\)"),
        (GOOD, GOOD[:, :2], [0, 1, 2], "image_embeds are 3 wide, text_embeds 2"),
        (GOOD, GOOD / 0, [0, 1, 2], "text_embeds has NaN or infinite values in 3 of 3 rows, first: 0"),
        (GOOD, GOOD, [0, 1], "3 image indices"),
        (GOOD, GOOD, [0.0, 1.0, 2.0], "float32"),
        (GOOD, GOOD, [True, False, True], "3 image indices, one a text; got shape .3,. of bool"),
        (GOOD, GOOD, [0, 1, 3], r"text_to_image\[2\] is 3; with 3 images it must be from 0 to 2"),
        (GOOD, GOOD, [0, -1, 2], r"text_to_image\[1\] is -1"),
        (GOOD, GOOD, [0, 0, 1], "1 of 3 images have no text in text_to_image, first: image 2"),
    ],
)
def test_bad_input_is_one_clear_sentence(images, texts, owners, problem):
    with pytest.raises(ValueError, match=problem):
        retrieval_recall(images, texts, owners)


def test_indices_of_something_else():
    for labels, problem in (
        ([5], r"labels\[0\] is 5; with 3 classes it must be from 0 to 2"),
        ([], "one an image; got"),
    ):
        with pytest.raises(ValueError, match=problem):
            check_indices("labels", labels, 1, 3, "image", "class")


@pytest.mark.parametrize("ks", [(), (0,), (1.5,), (True,)])
def test_ks_must_be_positive_whole_numbers(ks):
    with pytest.raises(ValueError, match="ks="):
        retrieval_recall(GOOD, GOOD, [0, 1, 2], ks=ks)


def test_evaluating_a_model_takes_items_or_their_embeddings(tiny_model, tiny_processor, images, long_texts):
    owners = list(range(len(images)))
    recall = evaluate_retrieval(tiny_model, tiny_processor, images, long_texts, owners)
    embeds = embed_images(tiny_model, tiny_processor, images), embed_texts(tiny_model, tiny_processor, long_texts)
    assert recall == evaluate_retrieval(tiny_model, tiny_processor, *embeds, owners)
    assert recall == retrieval_recall(*embeds, owners)
    assert recall["text_to_image_R@10"] == 100  # four images


def test_a_task_measures_a_model(tiny_model, tiny_processor, images, long_texts, short_texts):
    rng, files = np.random.default_rng(1), []
    for picture in [*images, *(Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(3))]:
        files.append(io.BytesIO())
        picture.save(files[-1], "png")
    pictures = ImageFiles([file.getvalue() for file in files], [f"{number}.png" for number in range(7)])
    texts = [f"{long_texts[0]} " * 9, *long_texts[1:], *short_texts, "a lake"]
    owners = [0, 1, 2, 3, 4, 5, 6, 6, 0]
    encoder = Encoder(tiny_model.eval(), tiny_processor)
    result = RetrievalTask("long_text", (5, 20, 400)).evaluate(
        encoder, RetrievalData("tiles", pictures, texts, owners)
    )

    def tokens(text: str, most: int = 10**9) -> list[int]:
        return tiny_processor.tokenizer(text, truncation=True, max_length=most)["input_ids"]

    lengths = [len(tokens(text)) for text in texts]
    assert (result["images"], result["texts"], result["image_of_text"]) == (7, 9, owners)
    assert lengths[0] > 248 > max(lengths[1:]) and result["share_truncated"] == 1 / 9
    bars = [sum(length // 10 == bar for length in lengths) for bar in range(max(lengths) // 10 + 1)]
    assert result["tokens"] == {"mean": sum(lengths) / 9, "longest": lengths[0], "histogram": bars}

    image_embeds, text_embeds = embed_images(tiny_model, tiny_processor, list(pictures)), []
    for most in (5, 20, 248):
        with torch.no_grad():
            cut = [tiny_model.get_text_features(torch.tensor([tokens(text, most)])).pooler_output for text in texts]
        text_embeds.append(F.normalize(torch.cat(cut), dim=1))
    curve = [retrieval_recall(image_embeds, embeds, owners) for embeds in text_embeds]
    assert [point.pop("tokens") for point in result["curve"]] == [5, 20, 248]
    assert result["curve"] == curve and result["metrics"] == curve[-1] != curve[0]
    ranks = slow_ranks(image_embeds, text_embeds[-1], owners)
    assert (result["ranks"]["text_to_image"], result["ranks"]["image_to_text"]) == ranks

    assert len(result["examples"]) == 4
    for index, example in zip([1, 3, 5, 7], result["examples"]):
        words = texts[index].split()
        ends = [len(tokens(" ".join(words[: count + 1]))) - 2 for count in range(len(words))]
        assert (example["text"], example["word_tokens"]) == (texts[index], ends)
        assert (example["image"], example["rank"]) == (owners[index], ranks[0][index])
        scores = image_embeds.double() @ text_embeds[-1][index].double()
        assert example["found"] == scores.argsort(descending=True)[:5].tolist()


def test_a_task_loads_its_column(tmp_path, images):
    images[0].save(tmp_path / "a.png")
    rows = [{"image": name, "short_text": "A road."} for name in ("a.png", "b.png")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = RetrievalTask("short_text")
    with pytest.raises(ValueError, match=r"b\.png"):
        task.load(str(tmp_path / "rows.jsonl"))
    assert task.load(str(tmp_path / "rows.jsonl"), 1).texts == ["A road."]


def test_long_texts_are_shown_shortened():
    assert shorten("x" * 3000) == "x" * 3000 and shorten("x" * 3001) == "x" * 3000 + " …"


def test_examples_are_spread_evenly():
    assert spread_evenly(3) == [0, 1, 2]
    assert spread_evenly(40) == [5, 15, 25, 35]
