"""The captioner: shared images, the lean loss, freezing, captions of pictures, what must stay as it was."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import model as model_module
from gpt2 import GPT2Config
from lib.cli import UserError
from model import VisionGPT, VisionGPTConfig
from resampler import ResamplerConfig
from tokenizer import Tokenizer, pack_captions
from vit import ViTConfig

TEXTS = ["a dog runs on the grass", "a dog sleeps on the red sofa", "two dogs run", "it's a cat."] * 2


def tiny_config(vocab_size, n_positions=64, **gpt2):
    return VisionGPTConfig(ViTConfig(image_size=16, patch_size=8, n_layer=2, n_head=2, n_embd=12, n_mlp=16),
                           GPT2Config(vocab_size, n_positions, n_layer=4, n_head=2, n_embd=16, **gpt2),
                           ResamplerConfig(n_latent=3, n_layer=2, n_head=2, head_width=4, n_mlp=8))


def tiny_model(vocab_size=40, tokenizer=None, seed=0, std=0.3, **gpt2):
    """A captioner whose every parameter is random, its cross-attention's output too; in eval mode."""
    vocab_size = tokenizer.vocab_size if tokenizer else vocab_size
    model = VisionGPT(tiny_config(vocab_size, **gpt2), tokenizer).eval()
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


def captioner(**config):
    return tiny_model(tokenizer=Tokenizer.train(TEXTS, 300), **config)


def batch(rows=(4, 1, 7, 0, 3), vocab_size=40):
    """Captions of these lengths, one a row, padded: tokens and targets (R, T)."""
    captions = [[torch.randint(vocab_size - 1, (length,)).tolist()] for length in rows]
    return pack_captions(captions, vocab_size - 1)[:2]


@torch.no_grad()
def test_untrained_fusion_leaves_gpt2_exactly_as_it_was():
    model = tiny_model()
    for cross in model.xattn.values():
        torch.nn.init.zeros_(cross.out.weight)
        torch.nn.init.zeros_(cross.out.bias)
    fresh = VisionGPT(tiny_config(40))
    assert not any(p.any() for cross in fresh.xattn.values() for p in cross.out.parameters())
    tokens, images = batch()[0], torch.randn(5, 3, 16, 16)
    assert torch.equal(model(tokens, model.encode(images))[0], model.gpt2(tokens))
    for cross in model.xattn.values():
        torch.nn.init.normal_(cross.out.weight)
    one, other = (model(tokens, model.encode(x))[0] for x in (images, images.flip(0)))
    assert (one - other).abs().amax((1, 2))[[0, 1, 3, 4]].min() > 1e-3        # row 2 has the same image twice


def test_default_cross_attention_is_at_a_quarter_a_half_and_three_quarters():
    with torch.device("meta"):
        model = VisionGPT()
    assert list(model.xattn) == ["3", "6", "9"] and model.eos_id == 50256
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    assert trained == 11_084_288 and everything == trained + 85_798_656 + 124_439_808
    assert VisionGPTConfig(gpt2=GPT2Config(n_layer=8)).cross_attention == (2, 4, 6)
    assert VisionGPTConfig(gpt2=GPT2Config(n_layer=1)).cross_attention == (0,)
    assert VisionGPTConfig(cross_attention=[11, 0]).cross_attention == (0, 11)
    with pytest.raises(UserError, match="outside GPT-2's 0 to 11"):
        VisionGPTConfig(cross_attention=(12,))


@torch.no_grad()
def test_cross_attention_runs_before_its_blocks():
    model, tokens, visual = tiny_model(), batch()[0], torch.randn(5, 3, 16)
    x = model.gpt2.embed(tokens)
    for layer, block in enumerate(model.gpt2.h):
        if layer in (1, 2, 3):
            cross = model.xattn[str(layer)]
            x, _ = cross(x, cross.cross_kv(visual))
        x = block(x)
    assert torch.allclose(model(tokens, visual)[0], model.gpt2.logits(x), atol=1e-5)


@torch.no_grad()
def test_encode_takes_cached_patch_tokens():
    model, images = tiny_model(), torch.randn(3, 3, 16, 16)
    tokens = model.vit(images)
    assert tokens.shape == (3, 5, 12)
    visual = model.encode(images)
    assert visual.shape == (3, 3, 16)
    assert torch.equal(visual, model.encode(features=tokens[:, 1:]))
    assert torch.allclose(visual, model.encode(features=tokens[:, 1:].half()), atol=0.05)
    assert not torch.allclose(visual, model.encode(features=tokens[:, :-1]), atol=0.05)   # no class token


# --------------------------------------------------------------------------------------------------
# loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [("vit", "gpt2"), ("vit",), ()])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 3, 5), (5, 5)])
def test_packed_loss_and_gradients_equal_the_plain_forward_pass(frozen, smoothing, counts, monkeypatch):
    """Images with so many captions each, packed; against a row a caption, its image copied, full logits."""
    monkeypatch.setattr(model_module, "CHUNK", 32)
    model = tiny_model(std=0.2).freeze(*frozen)
    captions = [[torch.randint(39, (int(n),)).tolist() for n in torch.randint(8, (count,))]
                for count in counts]
    images = torch.randn(len(counts), 3, 16, 16)
    tokens, targets, positions = pack_captions(captions, 39)
    lean = model.loss(tokens, model.encode(images), targets, positions, label_smoothing=smoothing)
    lean_gradients = gradients(model, lean)
    _, packed = model(tokens, model.encode(images), targets, positions)

    tokens, targets, _ = pack_captions([[caption] for of_image in captions for caption in of_image], 39)
    copies = images.repeat_interleave(torch.tensor(counts), 0)
    logits, loss = model(tokens, model.encode(copies), targets)
    full = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing)
    assert abs(lean - full) <= 1e-5 * full and abs(packed - loss) <= 1e-5 * loss
    full_gradients = gradients(model, full)
    assert lean_gradients.keys() == full_gradients.keys()
    a, b = (torch.cat([g[name].flatten() for name in full_gradients])
            for g in (lean_gradients, full_gradients))
    assert (a - b).norm() <= 1e-5 * b.norm() and b.norm() > 0
    trained = {name.split(".")[0] for name in full_gradients}
    assert trained == {"vit", "gpt2", "resampler", "xattn"} - set(frozen)


@torch.no_grad()
def test_a_captions_loss_does_not_depend_on_its_batch():
    model = tiny_model()
    captions = [[[3, 1, 4], []], [[5, 9, 2, 6, 5, 3, 5]], [[1], [39, 39]]]  # 39, the end token, too
    images, alone = torch.randn(3, 3, 16, 16), []
    for image, of_image in zip(images, captions):
        for caption in of_image:
            tokens, targets, _ = pack_captions([[caption]], 39)
            assert tokens.tolist() == [[39, *caption]] and targets.tolist() == [[*caption, 39]]
            alone.append(model.loss(tokens, model.encode(image[None]), targets, reduction="sum"))
    batch = pack_captions(captions, 39)
    visual, (tokens, targets, positions) = model.encode(images), batch
    together = model.loss(tokens, visual, targets, positions, reduction="sum")
    assert torch.allclose(together, sum(alone), rtol=1e-5) and (targets != -100).sum() == 18
    assert torch.allclose(model.loss(tokens, visual, targets, positions), sum(alone) / 18, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layer", [None, 1, 3])
def test_attention_maps_are_the_products_of_the_weights(layer):
    model, images, tokens = tiny_model(), torch.randn(2, 3, 16, 16), batch((3, 3))[0]
    maps = model.attention_maps(images, tokens, layer)
    assert maps.shape == (2, 4, 2, 2) and torch.allclose(maps.sum((2, 3)), torch.ones(2, 4))
    visual, to_patches = model.resampler(model.vit(images)[:, 1:], return_weights=True)
    hidden, to_latents = model.hidden(tokens, model.cross_kv(visual), return_weights=True)
    assert torch.allclose(model.gpt2.logits(hidden), model(tokens, model.encode(images))[0], atol=1e-4)
    blocks = [1, 2, 3] if layer is None else [layer]
    expected = sum(to_latents[i].mean(1) for i in blocks) / len(blocks) @ to_patches.mean(1)
    assert torch.allclose(maps.flatten(2), expected, atol=1e-6)
    with pytest.raises(UserError, match="block 0 has no cross-attention; choose from 1, 2, 3"):
        model.attention_maps(images, tokens, 0)


def test_new_weights_start_as_the_table_says():
    model = VisionGPT(tiny_config(2000))
    for name, p in model.named_parameters():
        if name.startswith(("vit.", "gpt2.")) and name.endswith("bias") or ".out." in name:
            assert not p.any(), name
        elif name.endswith("bias"):
            assert p.abs().max() < 0.6, name
        elif p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            assert p.std() > 0.01, name
    assert 0.9 < model.gpt2.wte.weight.std() * 4 < 1.1                    # 16**-0.5


@torch.no_grad()
def test_without_images_it_is_plain_gpt2():
    model, (tokens, targets) = tiny_model(), batch()
    logits, loss = model(tokens, targets=targets)
    assert torch.equal(logits, model.gpt2(tokens))
    assert torch.allclose(model.loss(tokens, None, targets), loss)


# --------------------------------------------------------------------------------------------------
# what is trained


def test_frozen_parts_stay_in_eval_mode():
    model = VisionGPT(tiny_config(40, dropout=0.5))
    assert not model.vit.training and not model.gpt2.training and model.resampler.training
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in model.state_dict() if name.startswith(("resampler.", "xattn."))}
    assert {name.split(".")[0] for name in model.state_dict()} == {"vit", "gpt2", "resampler", "xattn"}
    model.freeze()
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())
    model.eval()
    assert not any(m.training for m in model.modules())
    model.freeze("vit", "gpt2").train()
    assert not any(m.training for part in (model.vit, model.gpt2) for m in part.modules())
    assert model.xattn.training and not model.gpt2.wte.weight.requires_grad


def test_a_training_step_changes_the_fusion_alone():
    model, (tokens, targets) = tiny_model(std=0.2).train(), batch()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.loss(tokens, model.encode(torch.randn(5, 3, 16, 16)), targets).backward()
    optimizer.step()
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name]) == name.startswith(("vit.", "gpt2.")), name


# --------------------------------------------------------------------------------------------------
# captions


@pytest.fixture
def photos(tmp_path):
    """Five picture files."""
    rng = np.random.default_rng(0)
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(file)
    return files


def test_caption_takes_a_path_or_a_picture_or_a_list_of_them(photos):
    model = captioner()
    texts = [model.caption(str(file), max_length=9) for file in photos]
    assert all(isinstance(text, str) for text in texts) and len(set(texts)) > 1
    assert model.caption(photos, max_length=9) == texts
    assert model.caption([Image.open(file) for file in photos], batch_size=2, max_length=9) == texts
    assert model.generate(model.preprocess(photos), max_length=9) == texts
    assert model.caption([]) == []
    assert model.caption(photos[0], max_length=9, num_beams=3, num_return_sequences=2) == \
        model.caption(photos[:1], max_length=9, num_beams=3, num_return_sequences=2)


def test_a_picture_that_cannot_be_read_can_be_skipped(photos, tmp_path):
    model, bad = captioner(), tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    texts = model.caption(photos, max_length=6)
    mixed = [photos[0], bad, bad, *photos[1:], bad]
    for size in (1, 2, 16):
        expected = [texts[0], None, None, *texts[1:], None]
        assert model.caption(mixed, batch_size=size, errors="skip", max_length=6) == expected
    assert model.caption(bad, errors="skip") is None
    several = dict(num_beams=2, num_return_sequences=2, max_length=6)
    both = [None, None, *model.caption(photos[0], **several)]
    assert model.caption([bad, photos[0]], 1, "skip", **several) == both
    with pytest.raises(UserError, match="bad.jpg"):
        model.caption(mixed, max_length=6)


def test_captions_hold_the_prompt_and_neither_blanks_round_it_nor_special_tokens(photos):
    model = captioner()
    for prompt in ("", "a dog", " a dog", "<|endoftext|>"):
        for text in model.caption(photos, prompt=prompt, max_length=6):
            assert text.startswith(prompt.strip()) and text == text.strip()
            assert prompt == "<|endoftext|>" or "<|endoftext|>" not in text
    text, = model.generate(prompt="the cat", max_length=5)                   # no image: GPT-2 goes on
    tokens = [model.eos_id, *model.tokenizer.encode("the cat")]
    for _ in range(5):
        tokens.append(model.gpt2(torch.tensor([tokens]))[0, -1].argmax().item())
    assert model.eos_id not in tokens[1:] and text == model.tokenizer.decode(tokens).strip()


def test_generate_refuses_more_tokens_than_positions_before_any_work():
    model = captioner()
    not_even_images = torch.zeros(1)
    with pytest.raises(UserError, match="max_length 64 is more than the 63 positions"):
        model.generate(not_even_images, max_length=64)
    with pytest.raises(UserError, match="max_length 60 .* prompt of 6 tokens"):
        model.generate(not_even_images, max_length=60, prompt="abcdef")
    longest = model.generate_tokens(model_module.DecodingConfig(max_length=63, min_length=63))[0][0]
    assert len(longest) == 63


def test_model_without_its_tokenizer_says_so():
    with pytest.raises(UserError, match="no tokenizer"):
        tiny_model().generate(torch.zeros(1, 3, 16, 16))
    model = tiny_model(vocab_size=40)
    model.tokenizer = Tokenizer.train(TEXTS, 300)
    with pytest.raises(UserError, match="294 tokens, the model 40"):
        model.generate(torch.zeros(1, 3, 16, 16))


@torch.no_grad()
def test_score_is_the_mean_log_probability_of_a_caption(photos):
    model = captioner()
    images, captions = model.preprocess(photos[:3]), ["a dog", "the cat sits on it's sofa", ""]
    scores = model.score(images, captions)
    for image, caption, score in zip(images, captions, scores.tolist()):
        row = model.tokenizer.encode(caption)
        logits, _ = model(torch.tensor([[model.eos_id, *row]]), model.encode(image[None]))
        logprob = logits[0].log_softmax(-1)[range(len(row) + 1), [*row, model.eos_id]]
        assert abs(score - logprob.mean().item()) < 1e-4
    with pytest.raises(UserError, match="more than GPT-2's [0-9]+ positions"):
        model.score(images[:1], ["a dog " * 500])


def test_nothing_global_changes(photos, tmp_path):
    def state():
        return (torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.get_num_threads(),
                torch.get_rng_state().tolist(), torch.backends.cudnn.benchmark,
                torch.backends.cudnn.allow_tf32,
                torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), random.getstate(),
                np.random.get_state()[1].tolist(), torch.get_default_device())

    model = captioner()
    before = state()
    model.caption(photos, max_length=5)
    model.caption(photos, max_length=5, num_beams=3, no_repeat_ngram=2)
    model.caption(photos, max_length=5, temperature=1.0, generator=torch.Generator().manual_seed(1))
    model.score(model.preprocess(photos[:1]), ["a dog"])
    model.save_pretrained(tmp_path)
    VisionGPT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert state() == before


def test_unknown_decoding_settings_and_missing_inputs_are_the_users_error():
    model = tiny_model()
    with pytest.raises(UserError, match="did you mean num_beams"):
        model.generate(None, num_beam=3)
    with pytest.raises(UserError, match="5 rows of text .* 3 images"):
        model(batch()[0], torch.randn(3, 3, 16))
