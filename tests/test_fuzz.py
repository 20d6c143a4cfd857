"""What holds for any input: readers of damaged files, sets of any text, batches, sampling, beams."""

import itertools
import math
import random
from types import SimpleNamespace

import fuzz
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data import CaptionSet, epoch_batches
from decoding import DecodingConfig, beam_search, sample
from lib.prepared_set import clean_caption, write_images, write_set
from tokenizer import Tokenizer

EOS = 3
TEXTS = st.text(min_size=1, max_size=30).filter(clean_caption)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return fuzz.Readers(tmp_path_factory.mktemp("fuzz"))


def test_damaged_files_give_a_value_or_one_line(readers):
    """tests/fuzz.py goes on for as long as one likes; tests/corpus holds what it found."""
    rng, wrong = random.Random(0), []
    for name, (seeds, *_) in readers.readers.items():
        found = [file.read_bytes() for file in sorted((fuzz.CORPUS / name).glob("*"))]
        for content in [*found, *(fuzz.mutate(rng.choice(seeds), rng) for _ in range(8))]:
            if problem := readers.problem(name, content):
                wrong.append(f"{name} {content[:40]}: {problem}")
    assert not wrong, "\n".join(wrong)


def test_whole_files_are_read(readers):
    for seeds, file, reader in readers.readers.values():
        file.write_bytes(seeds[0])
        reader(file)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), TEXTS), min_size=1, max_size=9))
def test_captions_of_any_text_make_the_round_trip(tmp_path_factory, captions):
    folder = str(tmp_path_factory.mktemp("set"))
    write_images(folder, iter(np.zeros((4, 2, 2, 3), np.uint8)))
    tokenizer = Tokenizer.train(["a dog"], 257)
    assume(any(tokenizer.encode(clean_caption(text)) for _, text in captions))
    splits = dict(train=[0, 1], val=[2], test=[3])
    write_set(folder, list("abcd"), captions, splits, tokenizer, dict(image_size=2))
    data = CaptionSet(folder)
    assert data.captions == [text for _, text in captions]
    for image in range(4):
        wanted = [clean_caption(text) for i, text in captions if i == image]
        (rows,) = data.caption_tokens(np.array([image]))
        wanted = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in wanted]
        assert [tokenizer.decode(row.tolist()) for row in rows] == wanted


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=300),
    st.integers(1, 40),
    st.integers(0, 99),
    st.integers(0, 9),
)
def test_an_epoch_holds_every_image_once(lengths, batch_size, seed, epoch):
    data = SimpleNamespace(row_lengths=lambda images: np.array(lengths)[images])
    batches = epoch_batches(data, np.arange(len(lengths)), batch_size, seed, epoch)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in sorted(batches, key=len)[1:])


@settings(deadline=None)
@given(
    st.lists(st.floats(-20, 20), min_size=2, max_size=8),
    st.integers(1, 9),
    st.floats(0.01, 1),
    st.floats(0.01, 9),
)
def test_what_is_drawn_is_among_the_likeliest(logits, top_k, top_p, temperature):
    logits = torch.tensor([logits]).expand(64, -1).clone()
    drawn = sample(
        logits,
        DecodingConfig(top_k=top_k, top_p=top_p, temperature=temperature),
        torch.Generator().manual_seed(0),
    )
    scaled = (logits[0] / temperature).double()
    held = scaled >= scaled.sort(descending=True).values[:top_k][-1]
    probability = torch.where(held, scaled, -torch.inf).softmax(-1)
    for token in set(drawn.tolist()):
        assert held[token]
        assert probability[probability > probability[token] * (1 + 1e-4)].sum() < top_p + 1e-4


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 4), st.floats(-1, 2), st.integers(1, 3))
def test_beam_search_with_room_for_all_finds_the_best_text(seed, max_length, length_penalty, returned):
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)) * 3  # (last token, next token)

    def step(tokens):
        return table[tokens[:, -1:]].clone()

    logprobs, score_of = table.double().log_softmax(-1), {}
    for length in range(max_length + 1):
        for text in itertools.product(range(EOS), repeat=length):
            steps = list(itertools.pairwise((EOS, *text, EOS)[: max_length + 1]))
            score_of[text] = sum(logprobs[a, b].item() for a, b in steps) / len(steps) ** length_penalty
    config = DecodingConfig(
        num_beams=len(score_of),
        num_return_sequences=min(returned, len(score_of)),
        max_length=max_length,
        length_penalty=length_penalty,
    )
    cache = SimpleNamespace(select=lambda rows: None)
    texts, scores = beam_search(step, cache, torch.tensor([[EOS]]), config, EOS)
    best = sorted(score_of.values(), reverse=True)
    for text, score, wanted in zip(texts, scores, best):
        assert math.isclose(score, wanted, abs_tol=1e-4)
        assert math.isclose(score_of[tuple(text)], wanted, abs_tol=1e-4)
