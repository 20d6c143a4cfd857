"""Vision-GPT: a ViT sees, a Perceiver Resampler compresses, cross-attention lets GPT-2 look while it writes.

Letters: B batch of images, R caption rows, T text positions, N patches, L latents, C GPT-2's width,
V vocabulary.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fast
from decoding import DecodingConfig, decode
from gpt2 import GPT2, GPT2Config, KVCache, Ragged
from lib import checkpoint
from lib.cli import UserError, atomic, nearest, pick_device
from lib.images import preprocess
from resampler import CrossAttention, Groups, PerceiverResampler, ResamplerConfig
from tokenizer import Tokenizer, pad_captions
from vit import ViT, ViTConfig

FROZEN = ("vit.", "gpt2.")      # prefixes of what comes pretrained; `resampler.` and `xattn.` are the fusion
CHUNK = 1024                    # targets whose logits are held at once in `loss`; on a CPU an eighth of it


@dataclass
class VisionGPTConfig:
    vit: ViTConfig = field(default_factory=ViTConfig)
    gpt2: GPT2Config = field(default_factory=GPT2Config)
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    cross_attention: tuple | None = None          # before these blocks of GPT-2; None: at 1/4, 1/2 and 3/4

    def __post_init__(self):
        for name, kind in (("vit", ViTConfig), ("gpt2", GPT2Config), ("resampler", ResamplerConfig)):
            if isinstance(getattr(self, name), dict):       # as read from JSON
                setattr(self, name, kind(**getattr(self, name)))
        at, depth = self.cross_attention, self.gpt2.n_layer
        if at is None:
            at = depth // 4, depth // 2, depth * 3 // 4
        self.cross_attention = tuple(sorted(set(at)))
        if not all(0 <= i < depth for i in self.cross_attention):
            raise UserError(f"cross_attention {list(at)} names a block outside GPT-2's 0 to {depth - 1}")


class VisionGPT(nn.Module):
    """The captioner. ViT and GPT-2 are frozen unless `freeze(False)` is called."""

    def __init__(self, config=None, tokenizer=None, vit=None, gpt2=None):
        super().__init__()
        self.config = config = config or VisionGPTConfig()
        self.tokenizer = tokenizer
        self.backbones = {}                 # {"vit": file, "gpt2": file} where they were loaded from files
        self.recorded = None                # CUDA graphs of decoding, after fast.record
        width, dropout = config.gpt2.n_embd, config.resampler.dropout
        self.vit = vit or ViT(config.vit)
        self.gpt2 = gpt2 or GPT2(config.gpt2)
        self.resampler = PerceiverResampler(config.resampler, config.vit.n_embd, width)
        self.xattn = nn.ModuleDict({str(i): CrossAttention(width, config.gpt2.n_head, dropout)
                                    for i in config.cross_attention})
        self.freeze()

    def freeze(self, frozen=True):
        """Train the fusion alone (True) or everything (False)."""
        self.frozen = frozen
        for backbone in (self.vit, self.gpt2):
            backbone.requires_grad_(not frozen)
        return self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:                     # frozen parts always run in eval mode: no dropout in them
            self.vit.eval()
            self.gpt2.eval()
        return self

    @property
    def eos_id(self):
        """The token that starts and ends every caption: the last of the vocabulary, 50256 in GPT-2's."""
        return self.config.gpt2.vocab_size - 1

    @property
    def device(self):
        return self.resampler.latents.device

    # ----------------------------------------------------------------------------------------------
    # images and text to logits and loss

    def encode(self, images=None, features=None):
        """Images (B, 3, S, S), or cached ViT patch tokens (B, N, C_vit), -> visual tokens (B, L, C)."""
        if features is None:
            features = self.vit(images.to(self.vit.cls_token.dtype))[:, 1:]      # without the class token
        return self.resampler(features.to(self.resampler.latents.dtype))

    def cross_kv(self, visual):
        """Visual tokens (B, L, C) -> {block: (k, v)} of every cross-attention, each (B, H, L, D)."""
        return {name: layer.cross_kv(visual) for name, layer in self.xattn.items()}

    def hidden(self, tokens, cross_kv, groups, cache=None, ragged=None):
        """Where the two worlds meet: GPT-2's blocks, with cross-attention before some -> (R, T, C).

        With `ragged` only what it keeps of the tokens is computed -> (M, C).
        """
        x = self.gpt2.embed(tokens, cache.length if cache else 0)
        x = x if ragged is None else ragged.unpad(x)
        for layer, block in enumerate(self.gpt2.h):
            if str(layer) in cross_kv:
                x = self.xattn[str(layer)](x, cross_kv[str(layer)], groups, ragged)
            x = block(x, cache, layer, ragged)
        if cache:
            cache.length += tokens.shape[1]
        return x

    def look(self, tokens, visual, image, ragged=None):
        """`hidden` of whole captions: row i looks at visual[image[i]], by default visual[i], if any."""
        if visual is None:
            return self.hidden(tokens, {}, None, ragged=ragged)
        if len(visual if image is None else image) != len(tokens):
            raise UserError(f"{len(tokens)} caption rows and {len(visual)} images: "
                            "name each row's image with image=")
        return self.hidden(tokens, self.cross_kv(visual), Groups(len(visual), image), ragged=ragged)

    def forward(self, tokens, visual=None, targets=None, image=None):
        """Tokens (R, T) -> logits (R, T, V), and the mean cross-entropy over targets but -100, or None.

        `targets[r, t]` is the token after `tokens[r, t]`. `image` (R,) says which row of `visual` (B, L, C)
        each caption looks at (default: row i at i). Without `visual` this is plain GPT-2.
        """
        logits = self.gpt2.logits(self.look(tokens, visual, image))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    def loss(self, tokens, visual=None, targets=None, image=None, label_smoothing=0.0, reduction="mean"):
        """`forward`'s loss without its logits: no padding, and only real targets reach the head, by chunks.

        `reduction` "sum" leaves the division by the number of targets to the caller.
        """
        if targets is None:
            raise UserError("loss needs targets (R, T): the token after each, -100 where there is none")
        real = targets != -100
        ragged = Ragged(real)                               # padding is computed nowhere but in attention
        chosen, targets = real.flatten()[ragged.index].nonzero()[:, 0], targets[real]
        x = self.look(tokens, visual, image, ragged).index_select(0, chosen)
        x, head = self.gpt2.ln_f(x), self.gpt2.wte.weight
        if self.frozen:
            total = HeadLoss.apply(x.to(head.dtype), head, targets, label_smoothing, self.gpt2.linear)
        else:
            total = head_loss(x, head, targets, label_smoothing)
        return total if reduction == "sum" else total / len(targets)

    def score(self, images, captions):
        """Mean log-probability per token, end token counted, of a caption for each image -> (B,) float32."""
        if len(images) != len(captions):
            raise UserError(f"{len(captions)} captions for {len(images)} images: give one for each")
        rows = [self.require_tokenizer().encode(text) for text in captions]
        tokens, targets = pad_captions(rows, self.eos_id)
        with torch.inference_mode():
            logits, _ = self(tokens.to(self.device), self.encode(images.to(self.device)))
            targets = targets.to(self.device)
            logits = logits.float().transpose(1, 2)                              # (B, V, T)
            losses = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
            return -losses.sum(1) / (targets != -100).sum(1)

    # ----------------------------------------------------------------------------------------------
    # captions

    def preprocess(self, images):
        """Paths or PIL images -> (B, 3, S, S) float32 on the CPU."""
        return preprocess(images, self.config.vit)

    def caption(self, images, batch_size=16, **decoding):
        """A path or PIL image -> its caption; a list of them -> a list. Takes what `generate` takes."""
        if not isinstance(images, (list, tuple)):
            texts = self.generate(self.preprocess([images]), **decoding)
            return texts[0] if len(texts) == 1 else texts
        batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
        return [text for batch in batches for text in self.generate(self.preprocess(batch), **decoding)]

    @torch.inference_mode()
    def generate(self, images=None, visual=None, generator=None, return_scores=False, **decoding):
        """Preprocessed images (B, 3, S, S), or visual tokens -> captions as texts, image after image.

        Takes the fields of DecodingConfig; without images or visual tokens it continues the prompt as plain
        GPT-2. `generator` seeds sampling. With `return_scores` also log-probability / length**length_penalty
        of each text. Raises UserError when prompt and max_length do not fit GPT-2's positions.
        """
        for name in decoding:
            if name not in DecodingConfig.__dataclass_fields__:
                hint = nearest(name, DecodingConfig.__dataclass_fields__)
                raise UserError(f"unknown decoding setting {name}{hint}")
        config = DecodingConfig(**decoding)
        prompt = self.require_tokenizer().encode(config.prompt)
        tokens, scores = self.generate_tokens(config, prompt, images, visual, generator)
        texts = [self.tokenizer.decode(prompt + row).strip() for row in tokens]
        return (texts, scores) if return_scores else texts

    @torch.inference_mode()
    def generate_tokens(self, config, prompt=(), images=None, visual=None, generator=None):
        """`generate` in token ids: num_return_sequences lists of new tokens an image, and their scores."""
        room = self.config.gpt2.n_positions - 1 - len(prompt)
        if config.max_length > room:
            raise UserError(f"max_length {config.max_length} is more than the {room} positions that "
                            f"GPT-2 has left after a prompt of {len(prompt)} tokens")
        if images is not None:
            visual = self.encode(images.to(self.device))
        cross_kv, B = ({}, 1) if visual is None else (self.cross_kv(visual), len(visual))
        start = torch.tensor([[self.eos_id, *prompt]], device=self.device).expand(B, -1)
        dtype, length = self.gpt2.wpe.weight.dtype, start.shape[1] + config.max_length
        cache, groups = KVCache(self.config.gpt2, B, length, self.device, dtype), Groups(B)

        def step(tokens):
            return self.gpt2.logits(self.hidden(tokens, cross_kv, groups, cache)[:, -1])

        select = cache.select
        if self.recorded is not None:
            rows = B * max(config.num_beams, config.num_return_sequences)
            step, select = fast.replay(self, step, cache, cross_kv, groups, rows, length)
        return decode(step, select, start, config, self.eos_id, generator)

    def require_tokenizer(self):
        """The tokenizer. Raises UserError when there is none, or one of another size than the vocabulary."""
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer: put a tokenizer.json into its folder, "
                            "or set model.tokenizer")
        if self.tokenizer.vocab_size != self.eos_id + 1:
            raise UserError(f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model "
                            f"{self.eos_id + 1}: they do not belong together")
        return self.tokenizer

    # ----------------------------------------------------------------------------------------------
    # save and load

    @classmethod
    def from_backbones(cls, files, tokenizer, dropout=0.1):
        """An untrained fusion round the pretrained ViT and GPT-2 in files = {"vit": file, "gpt2": file}."""
        vit, gpt2 = ViT.from_pretrained(files["vit"]), GPT2.from_pretrained(files["gpt2"])
        config = VisionGPTConfig(vit.config, gpt2.config, ResamplerConfig(dropout=dropout))
        model = cls(config, tokenizer, vit.float(), gpt2.float())
        model.backbones = dict(files)
        return model

    @classmethod
    def from_pretrained(cls, folder=None, device="auto", dtype=None, weights=None):
        """A checkpoint folder, by default the one that sample.py would choose -> the model in eval mode.

        `dtype` None is float32 on the CPU and the stored one on a GPU; `weights` is a further folder to look
        for frozen backbones in. Raises UserError when something is missing, damaged, or not what the fusion
        was trained with.
        """
        folder = Path(folder or checkpoint.find_checkpoint())
        device = pick_device(device)
        config = checkpoint.read_config(folder)
        model = checkpoint.build_empty(cls, VisionGPTConfig, config.get("model"), folder)
        if (folder / "tokenizer.json").exists():
            model.tokenizer = Tokenizer.load(folder)
        if config.get("backbones"):
            tensors = checkpoint.read_tensors(folder / "fusion.safetensors")
            for name, record in config["backbones"].items():
                file = checkpoint.find_backbone(name, record, folder, weights)
                model.backbones[name] = file
                tensors |= {f"{name}.{key}": tensor for key, tensor in checkpoint.read_tensors(file).items()}
        else:
            tensors = checkpoint.read_tensors(folder / "model.safetensors")
        checkpoint.load_strict(model, tensors, folder)
        if dtype is None:               # one for all: backbones may be stored in another than the fusion
            dtype = torch.float32 if device.type == "cpu" else model.resampler.latents.dtype
        return model.to(device=device, dtype=dtype).eval()

    def save_pretrained(self, folder, dtype=None, backbones=None, training=None):
        """Write a checkpoint folder: everything, or, given where the frozen backbones lie, the fusion alone.

        `dtype` casts what is written (None: as it is); `backbones` is {"vit": file, "gpt2": file};
        `training` is a summary kept in config.json.
        """
        folder, backbones = Path(folder), backbones or {}
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.to(dtype or t.dtype) for name, t in self.state_dict().items()
                   if not (backbones and name.startswith(FROZEN))}
        file = folder / ("fusion.safetensors" if backbones else "model.safetensors")
        checkpoint.write_tensors(file, tensors)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        backbones = {name: checkpoint.describe(file, folder) for name, file in backbones.items()}
        config = {"format_version": checkpoint.FORMAT_VERSION, "model": asdict(self.config),
                  "training": training, "backbones": backbones}
        with atomic(folder / "config.json") as temporary:
            Path(temporary).write_text(json.dumps(config, indent=1) + "\n")


def head_loss(x, weight, targets, label_smoothing=0.0):
    """Summed cross-entropy of hidden states (M, C) against targets (M,), with a trainable head (V, C)."""
    logits = F.linear(x, weight).float()
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)


class HeadLoss(torch.autograd.Function):
    """`head_loss` with a frozen head: the gradient to x is formed chunk by chunk in the forward pass.

    No more than a chunk of logits ever exists. d loss / d logits = softmax(logits) - target distribution.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, label_smoothing, linear):
        total, V = x.new_zeros((), dtype=torch.float32), len(weight)
        grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        chunk = CHUNK if x.is_cuda else CHUNK // 8                          # of a CPU's cache
        buffer = x.new_empty(chunk, V, dtype=torch.float32)                     # new memory is slow on a CPU
        for i in range(0, len(x), chunk):
            with torch.enable_grad():
                part = x[i : i + chunk].detach().requires_grad_(grad is not None)
                out = linear(part, weight)                                                 # (chunk, V)
            target, logits = targets[i : i + chunk, None], out.detach()
            p = buffer[: len(logits)].copy_(logits)
            p.sub_(p.amax(-1, keepdim=True))
            picked, mean = p.gather(1, target), p.mean(-1, keepdim=True)
            norm = p.exp_().sum(-1, keepdim=True)
            total += (norm.log() - (1 - label_smoothing) * picked - label_smoothing * mean).sum()
            if grad is not None:
                p.div_(norm).sub_(label_smoothing / V)                                     # softmax - target
                p.scatter_add_(1, target, torch.full_like(norm, label_smoothing - 1))
                grad[i : i + chunk] = torch.autograd.grad(out, part, logits.copy_(p))[0]
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (grad,) = ctx.saved_tensors
        return grad * upstream.to(grad.dtype), None, None, None, None
