"""GPT-2 against Hugging Face's on the same weights, and its cache against no cache."""

import pytest
import torch

from gpt2 import GPT2, GPT2Config, KVCache, packed_mask
from lib.cli import UserError

TINY = dict(vocab_size=61, n_positions=24, n_layer=3, n_head=4, n_embd=32)


def random_gpt2(**config):
    """A GPT-2 whose every parameter, norms and biases too, is random: a swapped or forgotten one shows."""
    torch.manual_seed(0)
    gpt2 = GPT2(GPT2Config(**TINY | config)).eval()
    for p in gpt2.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return gpt2


def test_gpt2_parameter_count():
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT2().parameters()) == 124_439_808


@torch.no_grad()
@pytest.mark.parametrize("activation, theirs", [("gelu_tanh", "gelu_new"), ("gelu", "gelu")])
def test_gpt2_logits_and_cached_tokens_equal_hugging_face(activation, theirs):
    transformers = pytest.importorskip("transformers")
    ours = random_gpt2(activation=activation)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY, activation_function=theirs)).eval()
    weights = {f"transformer.{name}": t.T if t.ndim == 2 and name.startswith("h.") else t
               for name, t in ours.state_dict().items()}
    hf.load_state_dict(weights | {"lm_head.weight": ours.wte.weight})
    tokens = torch.randint(61, (3, 9))
    assert (ours(tokens) - hf(tokens).logits).abs().max() <= 2e-4

    cache, new = KVCache(ours.config, 3, 24), tokens
    text = tokens
    for _ in range(15):
        new = ours(new, cache)[:, -1:].argmax(-1)
        text = torch.cat([text, new], dim=1)
    theirs = hf.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=15, do_sample=False,
                         eos_token_id=None,
                         pad_token_id=0, use_cache=True)
    assert torch.equal(text, theirs)


@torch.no_grad()
def test_gpt2_does_not_see_later_tokens():
    gpt2, tokens = random_gpt2(), torch.randint(61, (2, 8))
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 61
    difference = (gpt2(tokens) - gpt2(other)).abs().amax((0, 2))
    assert difference[:5].max() < 1e-5 and difference[5:].min() > 1e-2


@torch.no_grad()
def test_cache_gives_the_logits_of_the_whole_text():
    """Prompts of several tokens, rows widened, reordered and left as they are, to the last position."""
    gpt2, text = random_gpt2(), torch.randint(61, (2, 6))
    cache = KVCache(gpt2.config, 2, 24)
    assert torch.allclose(gpt2(text, cache), gpt2(text), atol=1e-5)
    for step, rows in enumerate([[0, 0, 1, 1, 1], [3, 0, 0, 4, 1], [0, 1, 2, 3, 4], *[[4, 3, 2, 1, 0]] * 15]):
        cache.select(torch.tensor(rows))
        text = torch.cat([text[rows], torch.randint(61, (5, 1))], dim=1)
        assert torch.allclose(gpt2(text[:, -1:], cache)[:, 0], gpt2(text)[:, -1], atol=1e-5), step
    assert cache.length == text.shape[1] == 24


@torch.no_grad()
def test_several_tokens_after_a_cache_are_causal():
    gpt2, text = random_gpt2(), torch.randint(61, (2, 9))
    cache = KVCache(gpt2.config, 2, 24)
    logits = torch.cat([gpt2(part, cache) for part in text.split([3, 4, 2], dim=1)], dim=1)
    assert torch.allclose(logits, gpt2(text), atol=1e-5)


@torch.no_grad()
def test_packed_texts_equal_each_alone():
    gpt2, texts = random_gpt2(), [torch.randint(61, (n,)) for n in (5, 1, 7)]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    x = gpt2.embed(torch.cat(texts)[None], positions)
    for block in gpt2.h:
        x = block(x, packed_mask(positions))
    alone = torch.cat([gpt2(text[None])[0] for text in texts])
    assert torch.allclose(gpt2.logits(x)[0], alone, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_words_are_chosen_as_finely_in_16_bits(dtype):
    """In bfloat16 one caption in ten was another than in float32, for the two best words often tied."""
    gpt2 = random_gpt2(vocab_size=900).to(dtype)
    x = 5 * torch.randn(2, 300, 32, dtype=dtype)
    fine = gpt2.ln_f(x).float() @ gpt2.wte.weight.float().T
    assert (gpt2.exact_logits(x).argmax(-1) == fine.argmax(-1)).all()
    assert (gpt2.logits(x).argmax(-1) != fine.argmax(-1)).any()
    assert torch.equal(gpt2.float().exact_logits(x.float()), gpt2.logits(x.float()))


def test_gpt2_refuses_more_tokens_than_positions():
    gpt2, cache = random_gpt2(), KVCache(GPT2Config(**TINY), 1, 30)
    with pytest.raises(UserError, match="25 tokens are more than GPT-2's 24 positions"):
        gpt2(torch.zeros(1, 25, dtype=torch.long))
    gpt2(torch.zeros(1, 24, dtype=torch.long), cache)
    with pytest.raises(UserError, match="25 tokens"):
        gpt2(torch.zeros(1, 1, dtype=torch.long), cache)


@pytest.mark.parametrize("wrong, message", [(dict(n_head=5), "width 32 cannot be split over 5 heads"),
                                            (dict(activation="relu"), "'relu'; known: gelu, gelu_tanh")])
def test_gpt2_config_names_what_does_not_fit(wrong, message):
    with pytest.raises(UserError, match=message):
        GPT2Config(**TINY | wrong)
