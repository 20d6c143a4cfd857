"""Where the model looked: its attention probabilities, computed again as in the forward pass.

Letters: B images, one caption each, T text positions, N = h * w patches, L latents, H heads, D head width.
"""

import torch

from lib.cli import UserError
from resampler import Groups


@torch.inference_mode()
def attention_maps(model, images, tokens, layer=None):
    """Images (B, 3, S, S), captions (B, T) after a start token -> maps (B, T, h, w) of sum 1, on the CPU.

    The map at position t is of the step that chose token t + 1: cross-attention to the latents times the last
    resampler layer's attention to the patches, heads averaged. `layer` is a block of GPT-2, None the mean of
    all; raises UserError when it has no cross-attention.
    """
    if layer is not None and layer not in model.config.cross_attention:
        blocks = ", ".join(map(str, model.config.cross_attention))
        raise UserError(f"GPT-2's block {layer} has no cross-attention; choose from {blocks}")
    features = model.vit(images.to(model.device, model.vit.cls_token.dtype))[:, 1:]
    visual, of_patches = resampler_attention(model.resampler, features)
    of_latents = cross_attention(model, tokens.to(model.device), visual)
    chosen = list(of_latents.values()) if layer is None else [of_latents[layer]]
    maps = torch.stack(chosen).mean((0, 2)) @ of_patches[-1].mean(1)                        # (B, T, N)
    side = model.config.vit.image_size // model.config.vit.patch_size
    return maps.unflatten(-1, (side, side)).cpu()


def probabilities(q, k):
    """Weights of scaled_dot_product_attention with q (..., T, D) and k (..., L, D): (..., T, L), float32."""
    return (q.float() @ k.float().transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)


def resampler_attention(resampler, features):
    """The loop of PerceiverResampler: visual tokens (B, L, C), each layer's probabilities (B, H, L, N)."""
    patches = resampler.project(features.to(resampler.latents.dtype))
    latents, of_patches = resampler.latents.expand(len(patches), -1, -1), []
    for layer in resampler.layers:
        q, k, _ = layer.attention_inputs(latents, patches)
        of_patches.append(probabilities(q, k))
        latents = layer(latents, patches)
    return latents, of_patches


def cross_attention(model, tokens, visual):
    """The loop of VisionGPT.hidden, a caption an image -> {block: probabilities (B, H, T, L)}."""
    cross_kv, groups, of_latents = model.cross_kv(visual), Groups(len(visual)), {}
    x = model.gpt2.embed(tokens)
    for i, block in enumerate(model.gpt2.h):
        if str(i) in cross_kv:
            layer, (k, _) = model.xattn[str(i)], cross_kv[str(i)]
            q = layer.queries(x).unflatten(-1, (layer.n_head, -1)).transpose(1, 2)          # (B, H, T, D)
            of_latents[i] = probabilities(q, k)
            x = layer(x, cross_kv[str(i)], groups)
        x = block(x)
    return of_latents


def words(tokenizer, tokens):
    """[(word, its positions in `tokens`)]; a word begins with a space or with one of . , ! ? : ;"""
    found = []
    for position, token in enumerate(tokens):
        text = tokenizer.encoding.decode_single_token_bytes(token)
        if not found or text[:1] in b" .,!?:;":
            found.append((b"", []))
        word, positions = found[-1]
        found[-1] = word + text, [*positions, position]
    return [(word.decode(errors="replace").strip(), positions) for word, positions in found]
