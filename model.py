"""Vision-GPT: a ViT sees, a Perceiver Resampler compresses, cross-attention lets GPT-2 look while it writes.

Letters: B images, G rows of text per image, T text positions, N patches, L latents, C width, V vocabulary.
"""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoding import DecodingConfig, decode
from gpt2 import GPT2, GPT2Config, KVCache, packed_mask
from lib import checkpoint
from lib.cli import UserError, nearest, pick_device
from lib.drafts import read_drafts, write_drafts
from lib.images import load_image, preprocess
from resampler import CrossAttention, PerceiverResampler, ResamplerConfig
from tokenizer import Tokenizer, pack_captions
from vit import ViT, ViTConfig

FROZEN = ("vit.", "gpt2.")      # prefixes of what comes pretrained; `resampler.` and `xattn.` are the fusion
CHUNK = 1024                    # targets whose logits are held at once in `loss`; on a CPU an eighth of it


@dataclass
class VisionGPTConfig:
    vit: ViTConfig = field(default_factory=ViTConfig)
    gpt2: GPT2Config = field(default_factory=GPT2Config)
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    cross_attention: tuple[int, ...] | None = None # before these blocks of GPT-2; None: 1/4, 1/2, 3/4

    def __post_init__(self):
        at, depth = self.cross_attention, self.gpt2.n_layer
        if at is None:
            at = depth // 4, depth // 2, depth * 3 // 4
        self.cross_attention = tuple(sorted(set(at)))
        if not all(0 <= i < depth for i in self.cross_attention):
            raise UserError(f"cross_attention {list(at)} names a block outside GPT-2's 0 to {depth - 1}")


class VisionGPT(nn.Module):
    """The captioner. ViT and GPT-2 are frozen unless `freeze` says otherwise."""

    def __init__(self, config: VisionGPTConfig | None = None, tokenizer: Tokenizer | None = None,
                 vit: ViT | None = None, gpt2: GPT2 | None = None):
        super().__init__()
        self.config = config = config or VisionGPTConfig()
        self.tokenizer = tokenizer
        self.backbones = {}                 # {"vit": file, "gpt2": file} where they were loaded from files
        self.drafts = None                  # lib/drafts.py's table of the training captions
        width, dropout = config.gpt2.n_embd, config.resampler.dropout
        self.vit = vit or ViT(config.vit)
        self.gpt2 = gpt2 or GPT2(config.gpt2)
        self.resampler = PerceiverResampler(config.resampler, config.vit.n_embd, width)
        self.xattn = nn.ModuleDict({str(i): CrossAttention(width, config.gpt2.n_head, dropout)
                                    for i in config.cross_attention})
        given = tuple(name for name, part in (("vit.", vit), ("gpt2.", gpt2)) if part)
        init_weights({name: p for name, p in self.named_parameters() if not name.startswith(given)}, config)
        self.freeze("vit", "gpt2")

    def freeze(self, *frozen: str) -> "VisionGPT":
        """Train all but the backbones named: freeze("vit", "gpt2") the fusion alone, freeze() everything."""
        self.frozen = frozen
        for name in ("vit", "gpt2"):
            getattr(self, name).requires_grad_(name not in frozen)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "VisionGPT":
        super().train(mode)
        for name in self.frozen:            # frozen parts always run in eval mode: no dropout in them
            getattr(self, name).eval()
        return self

    @property
    def eos_id(self) -> int:
        """The token that starts and ends every caption: the last of the vocabulary, 50256 for GPT-2."""
        return self.config.gpt2.vocab_size - 1

    @property
    def device(self) -> torch.device:
        return self.resampler.latents.device

    def encode(self, images: Tensor | None = None, features: Tensor | None = None,
               return_weights: bool = False):
        """Images (B, 3, S, S), or cached ViT patch tokens (B, N, C_vit), -> visual tokens (B, L, C).

        With `return_weights` also what the latents looked at, (B, H, L, N).
        """
        if features is None:
            features = self.vit(images.to(self.device, self.vit.cls_token.dtype))[:, 1:]   # no class token
        return self.resampler(features.to(self.device, self.resampler.latents.dtype), return_weights)

    def cross_kv(self, visual: Tensor | None) -> dict[str, Tensor]:
        """Visual tokens (B, L, C) -> {block: k and v (2, B, H, L, D)} for each cross-attention."""
        return {} if visual is None else {name: layer.cross_kv(visual) for name, layer in self.xattn.items()}

    def hidden(self, tokens: Tensor, cross_kv: dict[str, Tensor], positions: Tensor | None = None,
               cache: KVCache | None = None, return_weights: bool = False):
        """GPT-2's blocks, with cross-attention before some of them: tokens (B * G, T) -> (B * G, T, C).

        With `return_weights` also {block: what each position looked at, (B, H, G * T, L)}.
        """
        x = self.gpt2.embed(tokens, positions, cache.length if cache else 0)
        mask, weights = None if positions is None else packed_mask(positions), {}
        for i, block in enumerate(self.gpt2.h):
            if str(i) in cross_kv:
                x, weights[i] = self.xattn[str(i)](x, cross_kv[str(i)], return_weights)
            x = block(x, mask, cache)
        if cache:
            cache.length += tokens.shape[1]
        return (x, weights) if return_weights else x

    def forward(self, tokens: Tensor, visual: Tensor | None = None, targets: Tensor | None = None,
                positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens (B * G, T) -> logits (B * G, T, V), and the mean cross-entropy over targets, or None.

        Rows b * G to b * G + G - 1 look at visual[b], of (B, L, C); without `visual` this is plain GPT-2.
        `targets[r, t]` is the token after `tokens[r, t]`, -100 if it does not count. `positions` (B * G, T)
        restart at 0 with each of the captions packed into a row.
        """
        if visual is not None and len(tokens) % len(visual):
            raise UserError(f"{len(tokens)} rows of text cannot be split evenly over {len(visual)} images")
        logits = self.gpt2.logits(self.hidden(tokens, self.cross_kv(visual), positions))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    def loss(self, tokens: Tensor, visual: Tensor | None, targets: Tensor, positions: Tensor | None = None,
             label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
        """`forward`'s loss without all logits: only targets reach the head. `reduction`: "mean" or "sum".

        A GPU need not be waited for when `targets` are still on the CPU.
        """
        x, targets = self.hidden(tokens, self.cross_kv(visual), positions).flatten(0, 1), targets.flatten()
        kept = (targets != -100).nonzero().squeeze(1)
        if "gpt2" in self.frozen:
            x = self.gpt2.ln_f(x.index_select(0, kept.to(x.device))).to(self.gpt2.wte.weight.dtype)  # (M, C)
            total = ChunkedLoss.apply(x, self.gpt2.wte.unembed, targets[kept].to(x.device), label_smoothing)
        else:
            total = F.cross_entropy(self.gpt2.logits(x).float(), targets.to(x.device), reduction="sum",
                                    label_smoothing=label_smoothing)
        return total if reduction == "sum" else total / len(kept)

    @torch.inference_mode()
    def score(self, images: Tensor, captions: list[str]) -> Tensor:
        """Mean log-probability per token, end token counted, of a caption per image -> (B,) float32."""
        if len(images) != len(captions):
            raise UserError(f"{len(captions)} captions for {len(images)} images: give one for each")
        rows = [[self.require_tokenizer().encode(text)] for text in captions]
        tokens, targets, _ = (t.to(self.device) for t in pack_captions(rows, self.eos_id))
        logits, _ = self(tokens, self.encode(images))                                              # (B, T, V)
        losses = F.cross_entropy(logits.float().mT, targets, ignore_index=-100, reduction="none")
        return -losses.sum(1) / (targets != -100).sum(1)

    @torch.inference_mode()
    def attention_maps(self, images: Tensor, tokens: Tensor, layer: int | None = None) -> Tensor:
        """Images (B, 3, S, S), captions (B, T) after a start token -> maps (B, T, h, w), each of sum 1.

        The map at position t is of the step that chose token t + 1: cross-attention to the latents times the
        last resampler layer's attention to the patches, heads averaged. `layer` is a block of GPT-2, None the
        mean of all. Raises UserError when that block has no cross-attention.
        """
        if layer not in (None, *self.config.cross_attention):
            blocks = ", ".join(map(str, self.config.cross_attention))
            raise UserError(f"GPT-2's block {layer} has no cross-attention; choose from {blocks}")
        visual, to_patches = self.encode(images, return_weights=True)
        _, to_latents = self.hidden(tokens.to(self.device), self.cross_kv(visual), return_weights=True)
        chosen = torch.stack([w for i, w in to_latents.items() if layer in (None, i)])  # (blocks, B, H, T, L)
        maps = chosen.mean((0, 2)) @ to_patches.mean(1)                                     # (B, T, N)
        side = self.config.vit.image_size // self.config.vit.patch_size
        return maps.unflatten(-1, (side, side)).cpu()

    def preprocess(self, images: list) -> Tensor:
        """Paths or PIL images -> (B, 3, S, S) float32 on the CPU."""
        return preprocess(images, self.config.vit)

    def caption(self, images, batch_size: int = 16, errors: str = "raise", **decoding):
        """A path or PIL image -> its caption; a list of them -> a list. Takes what `generate` takes.

        With errors="skip" a picture that cannot be read gives None in its place.
        """
        if not isinstance(images, (list, tuple)):
            texts = self.caption([images], batch_size, errors, **decoding)
            return texts[0] if len(texts) == 1 else texts
        texts = []
        for start in range(0, len(images), batch_size):
            batch, read = images[start : start + batch_size], {}
            for i, image in enumerate(batch):
                try:
                    read[i] = load_image(image, self.config.vit.image_size)
                except UserError:
                    if errors != "skip":
                        raise
            found = self.generate(self.preprocess([*read.values()]), **decoding) if read else []
            found, n = iter(found), decoding.get("num_return_sequences", 1)
            texts += [next(found) if i in read else None for i in range(len(batch)) for _ in range(n)]
        return texts

    @torch.inference_mode()
    def generate(self, images: Tensor | None = None, visual: Tensor | None = None,
                 generator: torch.Generator | None = None, **decoding) -> list[str]:
        """Preprocessed images (B, 3, S, S), or visual tokens -> captions as texts, image after image.

        Takes the fields of DecodingConfig; without images or visual tokens it continues the prompt as plain
        GPT-2. `generator` seeds sampling. Raises UserError when GPT-2 has too few positions for max_length.
        """
        for name in decoding.keys() - (known := DecodingConfig.__dataclass_fields__):
            raise UserError(f"unknown decoding setting {name}{nearest(name, known)}")
        config = DecodingConfig(**decoding)
        prompt = self.require_tokenizer().encode(config.prompt)
        rows, _ = self.generate_tokens(config, prompt, images, visual, generator)
        return [self.tokenizer.decode(prompt + row).strip() for row in rows]

    @torch.inference_mode()
    def generate_tokens(self, config: DecodingConfig, prompt: list[int] = (), images: Tensor | None = None,
                        visual: Tensor | None = None, generator: torch.Generator | None = None):
        """`generate` in token ids: num_return_sequences lists of new tokens per image, and their scores."""
        room = self.config.gpt2.n_positions - 1 - len(prompt)
        if config.max_length > room:
            raise UserError(f"max_length {config.max_length} is more than the {max(0, room)} positions that "
                            f"GPT-2 has left after a prompt of {len(prompt)} tokens")
        visual = visual if images is None else self.encode(images)
        cross_kv, B = self.cross_kv(visual), 1 if visual is None else len(visual)
        start = torch.tensor([[self.eos_id, *prompt]], device=self.device).expand(B, -1)
        dtype, length = self.gpt2.wpe.weight.dtype, start.shape[1] + config.max_length
        cache = KVCache(self.config.gpt2, B, length, self.device, dtype)

        def step(tokens: Tensor, last: int = 1) -> Tensor:
            return self.gpt2.exact_logits(self.hidden(tokens, cross_kv, cache=cache)[:, -last:])

        return decode(step, cache, start, config, self.eos_id, generator, self.drafts)

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError when there is none, or one of another size than the vocabulary."""
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer: put a tokenizer.json into its folder")
        if self.tokenizer.vocab_size != self.eos_id + 1:
            size = self.tokenizer.vocab_size
            raise UserError(f"the tokenizer has {size} tokens, the model {self.eos_id + 1}")
        return self.tokenizer

    @classmethod
    def from_backbones(cls, files: dict, tokenizer: Tokenizer) -> "VisionGPT":
        """An untrained fusion round the pretrained ViT and GPT-2 in files = {"vit": file, "gpt2": file}."""
        vit, gpt2 = ViT.from_pretrained(files["vit"]), GPT2.from_pretrained(files["gpt2"])
        model = cls(VisionGPTConfig(vit.config, gpt2.config), tokenizer, vit.float(), gpt2.float())
        model.backbones = dict(files)
        return model

    @classmethod
    def from_pretrained(cls, folder=None, device="auto", dtype: torch.dtype | None = None,
                        weights=None) -> "VisionGPT":
        """A checkpoint folder or hub name, by default what sample.py would choose -> the model in eval mode.

        `dtype` None is float32 on the CPU and the stored one on a GPU; `weights` is a further folder to look
        for frozen backbones in. Raises UserError if they are missing, damaged or not those of training.
        """
        folder, device = checkpoint.find_checkpoint(folder), pick_device(device)
        config = checkpoint.read_config(folder)
        model = checkpoint.build_empty(cls, VisionGPTConfig, config["model"], folder)
        if os.path.lexists(folder / "tokenizer.json"):
            model.tokenizer = Tokenizer.load(folder)
        model.drafts = read_drafts(folder, model.eos_id + 1)
        if config["backbones"]:
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

    def save_pretrained(self, folder, dtype: torch.dtype | None = None, backbones: dict | None = None,
                        training: dict | None = None) -> None:
        """Write a checkpoint folder, cast to `dtype`; `training` is a summary kept in config.json.

        Given the files of the frozen parts, `backbones` = {"vit": file, "gpt2": file}, the fusion alone.
        """
        folder, backbones = Path(folder), backbones or {}
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.to(dtype or t.dtype) for name, t in self.state_dict().items()
                   if not (backbones and name.startswith(FROZEN))}
        file = folder / ("fusion.safetensors" if backbones else "model.safetensors")
        checkpoint.write_tensors(file, tensors)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        write_drafts(folder, self.drafts)
        checkpoint.write_config(folder, asdict(self.config), training, backbones)


def init_weights(named: dict[str, Tensor], config: VisionGPTConfig) -> None:
    """Initialise new parameters; LayerNorms and the fusion's linear layers keep PyTorch's own start.

    With GPT-2's 0.02 in place of fan_in**-0.5, models narrower than 768 train slowly.
    """
    table = {                                        # end of the name: standard deviation
        "vit.pos_embed": 3.0,                        # so large that a model learns where things are
        "resampler.latents": 0.02,
        "c_proj.weight": (2 * config.gpt2.n_layer * config.gpt2.n_embd) ** -0.5,    # deeper: smaller
        "out.weight": 0.0,                           # untrained cross-attention changes nothing
        "out.bias": 0.0,
    }
    for name, p in named.items():
        std = next((std for end, std in table.items() if name.endswith(end)), None)
        if std is not None:
            nn.init.normal_(p, std=std)
        elif name.startswith(FROZEN) and name.endswith("bias"):
            nn.init.zeros_(p)
        elif name.startswith(FROZEN) and p.ndim > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)       # fan-in; an embedding's is its width


class ChunkedLoss(torch.autograd.Function):
    """Summed loss under a frozen head, in chunks: the gradient to x is formed in the forward pass."""

    @staticmethod
    def forward(ctx, x, head, targets, label_smoothing):
        total = x.new_zeros((), dtype=torch.float32)
        grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        chunk = CHUNK if x.is_cuda else CHUNK // 8                                # fits a CPU's cache
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                hidden = x[part].detach().requires_grad_(grad is not None)
                loss = F.cross_entropy(head(hidden).float(), targets[part], reduction="sum",
                                       label_smoothing=label_smoothing)
            total += loss.detach()
            if grad is not None:
                (grad[part],) = torch.autograd.grad(loss, hidden)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (grad,) = ctx.saved_tensors
        return grad * upstream.to(grad.dtype), None, None, None
