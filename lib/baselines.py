"""What bench.py compares Vision-GPT with: the original notebook's way, and Hugging Face's captioner.

The original is the notebook that the published checkpoint comes from (Gurumurthy30/multimodal-gpt2-demo on
GitHub, v1), with what makes it slow: the ViT runs for every word and every caption, nothing is cached,
training pads captions to 256 tokens and computes all their logits, GPT-2 is made of elementwise operations,
and has dropout though it is frozen.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

PADDED = 256                           # text positions of a training step of the original


def original_logits(model, tokens, images, dropout=0.0):
    """Tokens (B, T), images (B, 3, S, S) -> logits (B, T, V): without dropout what VisionGPT computes."""
    drop = partial(F.dropout, p=dropout)
    heads, T = model.config.gpt2.n_head, tokens.shape[1]
    later = torch.ones(T, T, dtype=torch.bool, device=tokens.device).triu(1)
    visual = model.encode(images)
    x = drop(model.gpt2.embed(tokens))
    for i, block in enumerate(model.gpt2.h):
        if str(i) in model.xattn:
            layer = model.xattn[str(i)]
            q, (k, v) = layer.q(layer_norm(x, layer.ln)), project(visual, layer.kv, 2)
            x = x + drop(layer.out(attention(q, k, v, heads, drop)))
        q, k, v = project(layer_norm(x, block.ln_1), block.attn.c_attn, 3)
        x = x + drop(block.attn.c_proj(attention(q, k, v, heads, drop, later)))
        x = x + drop(block.mlp.c_proj(gelu(block.mlp.c_fc(layer_norm(x, block.ln_2)))))
    return F.linear(layer_norm(x, model.gpt2.ln_f), model.gpt2.wte.weight)


def project(x, linear, parts):
    """The parts of a fused linear layer's output, one after the other."""
    return [F.linear(x, w, b) for w, b in zip(linear.weight.chunk(parts), linear.bias.chunk(parts))]


def attention(q, k, v, heads, drop, hidden=None):
    """Queries (B, T, C) look at keys and values (B, N, C), but not where `hidden` (T, N) -> (B, T, C)."""
    q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))       # (B, H, T or N, D)
    scores = q @ k.transpose(2, 3)
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    weights = drop(torch.softmax(scores / q.shape[-1] ** 0.5, dim=-1))
    return (weights @ v).transpose(1, 2).flatten(2)


def layer_norm(x, norm):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return norm.weight * ((x - mean) / torch.sqrt(variance + norm.eps)) + norm.bias


def gelu(x):
    """The tanh approximation, as in GPT-2."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


@torch.inference_mode()
def original_word(model, images, text):
    """The likeliest word after text (B, T), the end token barred -> tokens (B,)."""
    logits = original_logits(model, text, images)[:, -1]
    logits[:, model.eos_id] = -torch.inf
    return logits.argmax(-1)


def original_training(model, device, batch_size):
    """A function that takes n optimizer steps, of `batch_size` captions each with an image of its own."""
    model, S = model.to(device).train(), model.config.vit.image_size
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, weight_decay=0.01)
    tokens = torch.randint(model.eos_id, (batch_size, PADDED), device=device)
    targets = tokens.where(torch.arange(PADDED, device=device) < 13, -100)               # the rest is padding
    images = torch.randn(batch_size, 3, S, S, device=device)

    def take(n):
        for _ in range(n):
            logits = original_logits(model, tokens, images, dropout=0.1)
            F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()          # without -100
            optimizer.step()
            optimizer.zero_grad()
    return take


def hugging_face():
    """Hugging Face's captioner; ViT-B/16 and GPT-2 are its defaults. Raises ImportError without it."""
    import transformers as hf
    encoder = hf.ViTModel(hf.ViTConfig(), add_pooling_layer=False)
    decoder = hf.GPT2LMHeadModel(hf.GPT2Config(add_cross_attention=True, is_decoder=True))
    return hf.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder).eval()


def hugging_face_captions(words, model, images, beams):
    """The start token and `words` more for each image."""
    end = model.decoder.config.eos_token_id
    return model.generate(images.to(model.dtype), num_beams=beams, do_sample=False, min_new_tokens=words,
                          max_new_tokens=words, decoder_start_token_id=end, eos_token_id=end, pad_token_id=0)
