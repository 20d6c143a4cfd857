"""Drafts are counted as defined, read back and checked, and change the steps of a caption, not its tokens."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from test_decoding import lively_model

from decoding import DecodingConfig
from lib import drafts
from lib.checkpoint import write_tensors
from lib.cli import UserError
from model import VisionGPT

END = 9


def test_counts_are_those_of_the_definition():
    """The token after the longest context that was seen with it twice; of equals any."""
    rng = np.random.default_rng(0)
    captions = [rng.choice(END, rng.integers(1, 9), p=[0.6, *[0.05] * 8]) for _ in range(300)]
    table = drafts.count_drafts([captions[:9], captions[9:]], END)
    counts = defaultdict(Counter)
    for caption in captions:
        text = [END, *caption.tolist(), END]
        for end in range(1, len(text)):
            for start in range(max(0, end - drafts.CONTEXT), end):
                counts[tuple(text[start:end])][text[end]] += 1
    longest = 0
    for context in list(counts):
        known = next(c for n in range(len(context)) if max((c := counts[context[n:]]).values()) > 1)
        longest += known is counts[context] and len(context) == drafts.CONTEXT
        (guess,) = drafts.guess_next(table, list(context), 1, END)
        assert max(known.values()) == known[guess]
    assert longest > 20 and len(table) < len(counts) / 2


def steps_of(model, visual, config, prompt=()):
    """Tokens, score, and how often GPT-2 ran."""
    steps, hidden = [], model.hidden
    model.hidden = lambda tokens, *args, **kw: steps.append(tokens) or hidden(tokens, *args, **kw)
    try:
        (tokens,), (score,) = model.generate_tokens(config, prompt, visual=visual)
    finally:
        model.hidden = hidden
    return tokens, score, len(steps)


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_captions_are_those_without_drafts(wrong):
    """Whether guesses are right, wrong at random, or never; at every length, with and without a prompt."""
    saved = 0
    for seed in range(1):
        model, visual = lively_model(seed=seed)
        rng = np.random.default_rng(seed)
        for prompt in [(), (7, 3)]:
            rows, _ = model.generate_tokens(DecodingConfig(drafts=False), prompt, visual=visual)
            texts = [[*prompt, *row] for row in rows]
            table = drafts.count_drafts([[np.array(text, np.uint16) for text in texts]] * 2, END)
            model.drafts = {key: (token + 1) % END if rng.random() < wrong else token
                            for key, token in table.items()}
            for one, text in zip(visual.split(1), texts):
                for length in {1, 4, len(text) + 1, 50}:
                    config = dict(max_length=length, length_penalty=0.7)
                    plain, score, count = steps_of(model, one, DecodingConfig(drafts=False, **config), prompt)
                    tokens, quick_score, quick = steps_of(model, one, DecodingConfig(**config), prompt)
                    assert tokens == plain and quick_score == pytest.approx(score, abs=1e-5)
                    assert quick <= count
                    saved += count - quick
    assert saved > 50 if wrong < 1 else saved < 50


@pytest.mark.parametrize("allowance", [0.0, 1.001])
def test_near_ties_are_decided_as_without_drafts(allowance, monkeypatch):
    """A step over several tokens rounds otherwise, here by up to 0.5: near ties are not for it to decide."""
    monkeypatch.setattr(drafts, "NEAR_TIE", allowance / torch.finfo(torch.float32).eps)
    model, visual = lively_model()
    noise, logits = torch.Generator().manual_seed(0), model.gpt2.exact_logits
    monkeypatch.setattr(model.gpt2, "exact_logits", lambda x: logits(x) + (
        torch.rand(*x.shape[:2], 10, generator=noise) - 0.5 if x.shape[1] > 1 else 0))
    plain, _ = model.generate_tokens(DecodingConfig(drafts=False), visual=visual)
    model.drafts = drafts.count_drafts([[np.array(row, np.uint16) for row in plain]] * 2, END)
    found = [model.generate_tokens(DecodingConfig(), visual=one)[0][0] for one in visual.split(1)]
    assert (found == plain) == (allowance > 0)


@pytest.mark.parametrize("other", [dict(min_length=3), dict(repetition_penalty=1.5), dict(no_repeat_ngram=2),
                                   dict(num_beams=2), dict(temperature=0.7), dict(drafts=False)], ids=str)
def test_other_ways_of_decoding_take_no_guesses(other):
    model, visual = lively_model()
    config, seed = DecodingConfig(max_length=8, **other), torch.Generator().manual_seed
    found = []
    for model.drafts in (None, {drafts.extend(0, token): 0 for token in range(10)}):
        found.append(model.generate_tokens(config, visual=visual[:1], generator=seed(0)))
    assert found[0] == found[1]


def test_a_checkpoint_keeps_its_table_and_one_without_has_none(tmp_path):
    model, _ = lively_model()
    for model.drafts in ({3: 4, drafts.PRIME - 1: END}, {}, None):
        model.save_pretrained(tmp_path)
        assert VisionGPT.from_pretrained(tmp_path, "cpu").drafts == model.drafts


ROWS = torch.tensor([[5, 6, 7], [0, 1, 2]], dtype=torch.int32)


@pytest.mark.parametrize("tensors", [
    {}, dict(other=ROWS), dict(drafts=ROWS[1]), dict(drafts=ROWS[None]), dict(drafts=ROWS.T.contiguous()),
    dict(drafts=ROWS.float()), dict(drafts=ROWS.long()), dict(drafts=ROWS + 1), dict(drafts=ROWS - 1),
    dict(drafts=torch.tensor([[drafts.PRIME], [0]], dtype=torch.int32))], ids=str)
def test_a_table_of_another_kind_is_refused(tensors, tmp_path):
    write_tensors(tmp_path / drafts.FILE, {"drafts": ROWS})
    assert drafts.read_drafts(tmp_path, 3) == {5: 0, 6: 1, 7: 2}
    write_tensors(tmp_path / drafts.FILE, tensors)
    with pytest.raises(UserError, match="drafts.safetensors is of another model: delete it"):
        drafts.read_drafts(tmp_path, 3)
    (tmp_path / drafts.FILE).write_bytes(b"no table")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        drafts.read_drafts(tmp_path, 3)
