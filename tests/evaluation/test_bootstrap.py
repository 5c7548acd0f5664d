"""Intervals against a slow loop that draws images one by one, and on cases that can be told by hand."""

import time

import numpy as np
import pytest

from evaluation.bootstrap import differences, draws, intervals, sums_of
from evaluation.classification import classification_metrics, confusion_matrix
from evaluation.retrieval import KS


def retrieval_result(seed, images=30, lift=0):
    generator = np.random.default_rng(seed)
    texts = generator.integers(1, 6, size=images)
    owners = generator.permutation(np.repeat(np.arange(images), texts))
    difficulty = generator.integers(0, 14, size=images)
    text_ranks = np.maximum(0, difficulty[owners] + generator.integers(-3, 4, size=len(owners)) - lift)
    image_ranks = np.maximum(0, difficulty - lift)
    ranks = {"text_to_image": text_ranks.tolist(), "image_to_text": image_ranks.tolist()}
    return {"model": f"m{lift}", "ranks": ranks, "image_of_text": owners.tolist()}


def classification_result(seed, images=40, classes=4, right=0.6):
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), generator.integers(0, classes, size=images - classes)])
    correct = generator.random(images) < right
    return {"model": "m", "labels": labels.tolist(), "correct": correct.astype(int).tolist()}


def localization_result(seed, queries=25):
    values = np.random.default_rng(seed).random((4, queries))
    return {"model": "m", "per_query": dict(zip(("Rsu", "Ras", "Rda", "Rmi"), values.tolist(), strict=True))}


def slow_metrics(result, chosen):
    """Metrics of the chosen items, which may come several times, by writing out what they bring along."""
    if "ranks" in result:
        owners, ranks = np.array(result["image_of_text"]), result["ranks"]
        texts = [rank for item in chosen for rank in np.array(ranks["text_to_image"])[owners == item]]
        images = [ranks["image_to_text"][item] for item in chosen]
        recall = {f"text_to_image_R@{k}": 100 * np.mean(np.array(texts) < k) for k in KS}
        recall |= {f"image_to_text_R@{k}": 100 * np.mean(np.array(images) < k) for k in KS}
        return recall | {"mR": np.mean(list(recall.values()))}
    if "correct" in result:
        labels, correct = np.array(result["labels"])[chosen], np.array(result["correct"])[chosen]
        wrong = np.where(correct, labels, (labels + 1) % 4)
        return classification_metrics(confusion_matrix(labels, wrong, 4))
    return {name: np.mean(np.array(values)[chosen]) for name, values in result["per_query"].items()}


def items_of(result):
    return sums_of(result).items


RESULTS = [retrieval_result(0), retrieval_result(1, images=7), classification_result(0), localization_result(0)]


@pytest.mark.parametrize("result", RESULTS, ids=["retrieval", "few images", "classification", "localization"])
def test_intervals_equal_those_of_a_slow_loop(result):
    drawn = [
        slow_metrics(result, np.repeat(np.arange(items_of(result)), counts.astype(int)))
        for counts in np.concatenate(list(draws(items_of(result), 200, seed=3)))
    ]
    fast = intervals(result, 200, seed=3)
    assert list(fast) == list(drawn[0])
    for name, ends in fast.items():
        slow = np.quantile([metrics[name] for metrics in drawn], [0.025, 0.975])
        assert ends == pytest.approx(slow, abs=1e-5)  # accuracy is a float32 there


def test_differences_equal_those_of_a_slow_loop():
    first, second = retrieval_result(0), retrieval_result(0, lift=2)
    pairs = []
    for counts in np.concatenate(list(draws(30, 200, seed=3))):
        chosen = np.repeat(np.arange(30), counts.astype(int))
        pairs.append((slow_metrics(first, chosen), slow_metrics(second, chosen)))
    fast, everything = differences(first, second, 200, seed=3), np.arange(30)
    for name, difference in fast.items():
        drawn = np.array([b[name] - a[name] for a, b in pairs])
        assert (difference.low, difference.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1e-9)
        assert (difference.first, difference.second) == pytest.approx(
            (slow_metrics(first, everything)[name], slow_metrics(second, everything)[name])
        )
        rarer = min((drawn <= 0).sum(), (drawn >= 0).sum())
        assert difference.p_value == pytest.approx(min(1, 2 * (rarer + 1) / 201))
    assert fast["mR"].significant and fast["mR"].difference > 0


def test_every_draw_has_as_many_items_as_there_are_and_every_item_the_same_chance():
    counts = np.concatenate(list(draws(50, 4000)))
    assert counts.shape == (4000, 50) and (counts.sum(axis=1) == 50).all()
    assert np.abs(counts.mean(axis=0) - 1).max() < 0.08  # 5 standard errors
    assert not (counts[0] == counts[1]).all()
    assert (np.concatenate(list(draws(50, 10))) == counts[:10]).all()  # seeded


def test_draws_in_blocks_are_complete(monkeypatch):
    monkeypatch.setattr("evaluation.bootstrap.BLOCK", 100)
    assert [len(block) for block in draws(30, 10)] == [3, 3, 3, 1]


def test_the_same_model_has_no_difference():
    for result in RESULTS:
        for difference in differences(result, result).values():
            assert (difference.low, difference.high, difference.difference, difference.p_value) == (0, 0, 0, 1)
            assert not difference.significant


def test_a_model_that_is_always_right_and_one_that_never_is():
    ranks = {"text_to_image": [0] * 20, "image_to_text": [0] * 20}
    right = {"model": "r", "ranks": ranks, "image_of_text": list(range(20))}
    wrong = right | {"ranks": {name: [99] * 20 for name in ranks}}
    assert set(map(tuple, intervals(right).values())) == {(100, 100)}
    for difference in differences(wrong, right).values():
        assert (difference.low, difference.high) == (100, 100) and difference.significant
        assert difference.p_value == pytest.approx(2 / 2001)


def test_texts_of_an_image_are_drawn_together():
    """Five copies of each text say nothing new: the interval stays that of one text an image."""
    hits = np.random.default_rng(0).integers(0, 2, size=100) * 50
    once = {"ranks": {"text_to_image": hits.tolist(), "image_to_text": [0] * 100}, "image_of_text": list(range(100))}
    five = once | {
        "ranks": {"text_to_image": np.repeat(hits, 5).tolist(), "image_to_text": [0] * 100},
        "image_of_text": np.repeat(np.arange(100), 5).tolist(),
    }
    assert intervals(five)["text_to_image_R@1"] == pytest.approx(intervals(once)["text_to_image_R@1"])


def test_width_is_that_of_the_normal_approximation():
    result = {"labels": [0] * 400, "correct": [1, 0] * 200}
    low, high = intervals(result)["accuracy"]
    assert (low, high) == pytest.approx((50 - 196 * 0.5 / 20, 50 + 196 * 0.5 / 20), abs=0.6)


def test_five_thousand_texts_take_a_second():
    result = retrieval_result(0, images=1093)
    started = time.process_time()
    intervals(result)
    assert time.process_time() - started < 5  # 0.3 where nothing else runs


def test_what_cannot_be_drawn_is_one_clear_sentence():
    with pytest.raises(ValueError, match="the result of m zcrl RSITMD holds no ranks with image_of_text"):
        intervals({"model": "m", "task": "zcrl", "dataset": "RSITMD", "ranks": {}})
    with pytest.raises(ValueError, match="30 and 7 items"):
        differences(RESULTS[0], RESULTS[1])
    with pytest.raises(ValueError, match="different metrics"):
        differences(classification_result(0, images=30), RESULTS[0])
