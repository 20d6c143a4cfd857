"""Scores by hand, properties, and coco-caption's own results on captions written for the purpose."""

import json
import math
import random
import string
import time
import zipfile
from itertools import combinations
from pathlib import Path

import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import metrics
from lib.metrics import score, tokenize

COCO = json.loads((Path(__file__).parent / "fixtures/metrics/coco.json").read_text("utf-8"))
NAMES = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
WORDS = st.lists(st.sampled_from(["a", "dog", "cat", "man", "runs", "on", "red"]), min_size=1, max_size=9)
CAPTIONS = WORDS.map(" ".join)
PEOPLE = {"Bleu_1": 0.61882529, "Bleu_2": 0.41995364, "Bleu_3": 0.27939376, "Bleu_4": 0.18654085,
          "ROUGE_L": 0.46060928, "CIDEr": 0.78755986}


# --------------------------------------------------------------------------------------------------
# against coco-caption


@pytest.mark.parametrize("caption, expected", COCO["tokenize"], ids=range(len(COCO["tokenize"])))
def test_tokenize_equals_the_java_tokenizer(caption, expected):
    assert tokenize(caption) == expected.split()


def test_score_equals_coco_caption():
    corpus, per_image = score(COCO["candidates"], COCO["references"])
    assert corpus == pytest.approx(COCO["corpus"], abs=1e-9)
    for name in NAMES:
        assert per_image[name] == pytest.approx(COCO["per_image"][name], abs=1e-9)


def test_score_of_flickr8k_people_equals_coco_caption():
    """The fifth caption of each test image against the other four; figures from the Java pipeline."""
    if not SHARED.exists():
        pytest.skip("needs Flickr8k")
    with zipfile.ZipFile(SHARED / "flickr8k/Flickr8k_text.zip") as z:
        lines = z.read("Flickr8k.token.txt").decode().splitlines()
        images = z.read("Flickr_8k.testImages.txt").decode().split()
    captions = {}
    for line in lines:
        name, text = line.split("\t")
        captions.setdefault(name.split("#")[0], []).append(text)
    corpus, _ = score([captions[i][4] for i in images], [captions[i][:4] for i in images])
    assert corpus == pytest.approx(PEOPLE, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# tokens


@given(st.text(st.characters(codec="utf-8")))
def test_tokenize_any_text_gives_lower_case_words(caption):
    for word in tokenize(caption):
        assert word and word == word.lower() and not word.isspace()
        assert word not in {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


@given(WORDS, st.data())
def test_tokenize_ignores_case_and_punctuation(words, data):
    marks = data.draw(st.lists(st.sampled_from(["", ",", ";", "!", "?", " -", "..."]),
                               min_size=len(words), max_size=len(words)))
    marks = ["" if len(word) == 1 else mark for word, mark in zip(words, marks)]      # "a..." is an initial
    shouted = " ".join('"' + word.upper() + '"' + mark for word, mark in zip(words, marks))
    assert tokenize(shouted) == words


def test_tokenize_time_is_bounded_on_long_captions():
    start = time.process_time()
    for piece in ("a", "a,", "a-", "'", "n't", "<a ", "_", "1,", "A&", "é.", "a@"):
        tokenize(piece * 2000)
    assert time.process_time() - start < 2


# --------------------------------------------------------------------------------------------------
# scores by hand


def one(candidate, *references):
    return {name: values[0] for name, values in score([candidate], [list(references)])[1].items()}


def test_bleu_clips_repeated_words():
    """Papineni's example: seven times "the", of which a reference has two at the most."""
    assert one("the the the the the the the", "The cat is on the mat.",
               "There is a cat on the mat.")["Bleu_1"] == pytest.approx(2 / 7)


def test_bleu_punishes_short_captions():
    scores = one("a dog", "a dog runs fast")
    assert scores["Bleu_1"] == pytest.approx(math.exp(1 - 4 / 2))
    assert scores["Bleu_2"] == pytest.approx(math.exp(1 - 4 / 2))
    assert scores["Bleu_3"] < 0.01               # no trigram: (1e-15 / 1e-9) ** (1 / 3), not 0


def test_bleu_takes_the_shorter_of_two_equally_close_references():
    assert one("a dog runs", "a dog runs very fast", "a")["Bleu_1"] == pytest.approx(1)


def test_bleu_of_the_corpus_sums_counts_before_dividing():
    corpus, per_image = score(["a dog", "one two three four five six"], [["a dog"], ["x x x x x x"]])
    assert corpus["Bleu_1"] == pytest.approx(2 / 8)
    assert per_image["Bleu_1"] == pytest.approx([1, 0])


def test_bleu_4_is_a_geometric_mean():
    scores = one("a b c d e", "a b c d f")                     # 4/5, 3/4, 2/3, 1/2
    assert scores["Bleu_4"] == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_rouge_l_of_lins_example():
    assert one("police kill the gunman", "police killed the gunman")["ROUGE_L"] == pytest.approx(3 / 4)


def test_rouge_l_weighs_recall_by_beta():
    assert one("a dog", "a dog runs fast")["ROUGE_L"] == pytest.approx(2.44 * 0.5 / (0.5 + 1.44))


def test_rouge_l_takes_precision_and_recall_from_different_references():
    assert one("a dog runs", "a dog runs very fast", "dog")["ROUGE_L"] == pytest.approx(1)


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_longest_common_equals_brute_force(a, b):
    def subsequences(words):
        return {c for n in range(len(words) + 1) for c in combinations(words, n)}
    assert metrics.longest_common(a, b) == max(map(len, subsequences(a) & subsequences(b)))


def test_cider_by_hand():
    """"red" is in every image and weighs nothing; "dog" and "red dog" agree; there are no longer n-grams."""
    corpus, per_image = score(["red dog", "red bird"], [["red dog"], ["red cat"]])
    assert per_image["CIDEr"] == pytest.approx([10 * 2 / 4, 0])
    assert corpus["CIDEr"] == pytest.approx(2.5)


def test_cider_punishes_other_lengths():
    _, per_image = score(["dog", "x"], [["red dog"], ["red cat"]])
    assert per_image["CIDEr"][0] == pytest.approx(10 / 4 * math.exp(-1 / 72))


def test_cider_clips_repeated_words():
    """"dog dog" has tf-idf 2 log 2 where the reference has log 2, and cosine 1 all the same."""
    _, per_image = score(["dog dog", "x"], [["red dog"], ["red cat"]])
    assert per_image["CIDEr"][0] == pytest.approx(10 / 4 / 2)


def test_cider_of_one_image_is_zero():
    assert one("a dog runs on grass", "a dog runs on grass")["CIDEr"] == 0


@settings(max_examples=30)
@given(st.lists(st.lists(CAPTIONS, min_size=1, max_size=3), min_size=2, max_size=5), st.data())
def test_cider_scorer_scores_any_captions_as_score_does(references, data):
    """As a reward in training: document frequencies counted once, several captions of any of the images."""
    scorer = metrics.CiderScorer([[tokenize(caption) for caption in image] for image in references])
    samples = data.draw(st.lists(CAPTIONS, min_size=len(references), max_size=len(references)))
    _, per_image = score(samples, references)
    for image, sample in enumerate(samples):
        others = [tokenize(caption) for caption in samples]
        assert scorer.score([tokenize(sample), *others], image)[0] == per_image["CIDEr"][image]
        assert scorer.score(others, image)[image] == per_image["CIDEr"][image]


# --------------------------------------------------------------------------------------------------
# properties


def test_score_of_perfect_captions_is_the_maximum():
    captions = ["a brown dog runs fast", "two men play with ball", "the girl climbs stone stairs"]
    corpus, per_image = score(captions, [[c] for c in captions])
    assert corpus == pytest.approx(dict.fromkeys(NAMES[:5], 1.0) | {"CIDEr": 10.0})
    assert per_image["CIDEr"] == pytest.approx([10.0] * 3)


def test_score_of_empty_captions_is_zero():
    corpus, per_image = score(["", "..."], [["a dog runs"], ["a cat"]])
    assert corpus == pytest.approx(dict.fromkeys(NAMES, 0.0), abs=1e-12)
    assert per_image["ROUGE_L"] == [0, 0]


@settings(max_examples=30)
@given(st.lists(st.tuples(CAPTIONS, st.lists(CAPTIONS, min_size=1, max_size=3)), min_size=2, max_size=5))
def test_score_follows_the_order_of_images_and_ignores_that_of_references(images):
    candidates, references = zip(*images)
    corpus, per_image = score(candidates, references)
    turned, turned_per_image = score(candidates[::-1], [r[::-1] for r in references[::-1]])
    assert turned == pytest.approx(corpus)
    for name in NAMES:
        assert turned_per_image[name][::-1] == pytest.approx(per_image[name])
        assert all(0 <= value <= 10 + 1e-9 for value in per_image[name])


def test_score_ignores_case_and_punctuation():
    plain = score(["a dog runs", "two men play"], [["the dog runs"], ["men play ball"]])
    assert plain == score(["A dog runs.", 'TWO MEN "play"!'], [["The dog, runs..."], ["Men play ball"]])


def test_score_of_1000_images_takes_under_5_seconds():
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices(string.ascii_lowercase, k=5)) for _ in range(500)]
    vocabulary += ["a", "the", "on"] * 100

    def caption():
        return " ".join(rng.choices(vocabulary, k=11)).capitalize() + " ."
    references = [[caption() for _ in range(5)] for _ in range(1000)]
    candidates = [image[0] for image in references]
    start = time.process_time()
    score(candidates, references)
    assert time.process_time() - start < 5
