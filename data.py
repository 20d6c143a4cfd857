"""A prepared set read from disk, the cache of ViT features, and batches. lib/prepared_set.py writes sets."""

import copy
import hashlib
import json
import os
from dataclasses import asdict

import numpy as np
import torch
from PIL import Image

import fast
from lib import checkpoint, cli, records
from lib.cli import UserError
from lib.images import normalize, resize
from lib.prepared_set import clean_caption, damaged, encode_captions, read_array, read_index, read_meta
from tokenizer import Tokenizer, pack_captions


class CaptionSet:
    """A prepared set: `images` (N, S, S, 3) uint8, memory-mapped; `captions`, texts; `splits`, image indices.

    Caption c has the tokens tokens[offset[c]:offset[c + 1]] and shows image image_of[c]. `tokenizer`, if
    it is not the set's, encodes the captions anew. Raises UserError when `folder` holds no complete set.
    """

    def __init__(self, folder, tokenizer=None):
        self.folder = folder
        try:
            meta = read_meta(folder)
            self.captions = records.read_json(list[str], os.path.join(folder, "captions.json"))
        except FileNotFoundError:
            raise UserError(f"{folder} is not a prepared dataset: make one with python prepare_flickr8k.py "
                            "or prepare_shapes.py, and name it with --data") from None
        self.names, self.image_ids = meta.images, meta.image_ids
        self.splits = {name: np.array(images, dtype=np.int64) for name, images in asdict(meta.splits).items()}
        self.preprocessing, size = asdict(meta.preprocessing), meta.preprocessing.image_size
        own, N = Tokenizer.load(folder), len(meta.images)
        pixels = read_array(folder, "images.bin", np.uint8, N * size * size * 3)
        self.images = pixels.reshape(N, size, size, 3)
        self.offset, self.image_of = read_index(folder, len(self.captions))
        self.tokens = np.array(read_array(folder, "tokens.bin", np.uint16, int(self.offset[-1])))
        split = np.concatenate([*self.splits.values(), np.empty(0, np.int64)])
        if len(np.unique(split)) < len(split) or not all(
                ((named >= 0) & (named < N)).all() for named in (split, self.image_of)):
            raise damaged(folder, "meta.json or index.npz names images that are not there, or one twice")
        if len(self.image_ids) != N:
            raise damaged(folder, "meta.json has another number of image_ids than of images")
        if self.tokens.max() >= own.eos_id:
            raise damaged(folder, "tokens.bin does not belong to tokenizer.json")
        self.tokenizer = tokenizer or own
        if self.tokenizer.ranks != own.ranks:                      # the model reads other tokens
            clean = self.preprocessing["clean_captions"]
            texts = [clean_caption(text) if clean else text for text in self.captions]
            self.tokens, self.offset = encode_captions(self.tokenizer, texts)
        order = np.argsort(self.image_of, kind="stable")
        bounds = np.searchsorted(self.image_of[order], np.arange(1, N))
        self.captions_of = np.split(order, bounds)                     # caption indices of each image

    def split(self, name):
        """Indices of a split's images that have captions. Raises UserError when there are none."""
        images = [i for i in self.splits[name] if len(self.captions_of[i])]
        if not images:
            raise UserError(f"{self.folder} has no {name} images with captions; prepare it again with "
                            "some in train and some in val (prepare_flickr8k.py --help says how)")
        return np.array(images)

    def check_lengths(self, images: np.ndarray, room: int) -> None:
        """Raise UserError if a caption of these images has more tokens than there is `room` for."""
        captions = np.concatenate([self.captions_of[image] for image in images])
        lengths = np.diff(self.offset)[captions]
        if lengths.max() > room:
            text = self.captions[captions[lengths.argmax()]]
            raise UserError(f"a caption of {lengths.max()} tokens is too long for GPT-2, which has room for "
                            f"{room}: {text[:60]!r}...; shorten it and prepare the set again")

    def fingerprint(self):
        """SHA-256 of what a run reads of the captions: their tokens, images and splits."""
        digest = hashlib.sha256(json.dumps({name: s.tolist() for name, s in self.splits.items()}).encode())
        for array in (self.tokens, self.offset, self.image_of):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def references(self, image):
        """The source captions of an image, as prepared."""
        return [self.captions[c] for c in self.captions_of[image]]

    def caption_tokens(self, images: np.ndarray, limit: int | None = None,
                       rng: np.random.Generator | None = None) -> list[list[np.ndarray]]:
        """The tokens of the captions of each image: of all of them, or of at most `limit`, drawn by `rng`."""
        captions = [self.captions_of[image] for image in images]
        if limit:
            captions = [rng.permutation(own)[:limit] for own in captions]
        return [[self.tokens[self.offset[c] : self.offset[c + 1]] for c in own] for own in captions]

    def row_lengths(self, images: np.ndarray) -> np.ndarray:
        """Tokens of all the captions of each image together, start tokens included."""
        lengths = np.diff(self.offset) + 1
        return np.array([lengths[self.captions_of[image]].sum() for image in images])


def epoch_batches(data: CaptionSet, images: np.ndarray, batch_size: int, seed: int, epoch: int,
                  at_least: int = 1) -> list[np.ndarray]:
    """The batches of an epoch, image indices each: an order that depends on (seed, epoch) alone.

    What is left over makes a smaller batch, or if it is less than `at_least`, joins the one before.

    Within batch_size / 4 shuffled batches, images are sorted by the length of their rows before they are cut,
    so that a batch pads little; small batches, which need images of all kinds, are sorted less or not at all.
    """
    rng = np.random.default_rng([seed, epoch])
    images = rng.permutation(images)
    lengths, pool = data.row_lengths(images), max(1, batch_size // 4) * batch_size
    order = np.concatenate([start + np.argsort(lengths[start : start + pool], kind="stable")
                            for start in range(0, len(images), pool)])
    batches = np.split(images[order], range(batch_size, len(images) - at_least + 1, batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def cached_features(vit, data, vit_hash, device, dtype, batch_size=32):
    """Patch tokens of a frozen ViT for all images, (N, patches, C) float16, from features-<hash>.bin.

    Computed once. The hash covers the ViT's weights and config, `dtype` and the content of images.bin. An
    interrupted run is continued from *.partial. The file ends with a sum of each image's bytes; some of them
    are compared, so that damage is noticed. Raises UserError while another run writes it.
    """
    config, N = vit.config, len(data.images)
    pictures = hashlib.sha256(data.images).hexdigest()
    key = json.dumps([vit_hash, asdict(config), str(dtype), pictures])           # heads, eps are no weights
    file = os.path.join(data.folder, f"features-{hashlib.sha256(key.encode()).hexdigest()[:16]}.bin")
    partial, row = file + ".partial", 2 * config.n_patch * config.n_embd         # bytes of an image
    if not is_whole(file, N, row):
        with cli.naming(partial), open(partial, "ab") as out:
            cli.lock(out, f"another run is writing {partial}; wait for it")
            done = max(0, out.tell() // (row * batch_size) - 1)    # whole batches: they round as if unbroken
            out.truncate(done * row * batch_size)
            starts = range(done * batch_size, N, batch_size)
            for start in cli.progress(starts, f"ViT features of {N} images: batch"):
                pixels = read_pixels(data, np.arange(start, min(start + batch_size, N)), config.image_size)
                with torch.inference_mode():
                    tokens = vit(normalize(pixels.to(device), config).to(dtype))[:, 1:].to(torch.float16)
                    if not tokens.isfinite().all():
                        raise UserError("the ViT's features overflow float16, in which they are cached; "
                                        "--augment trains without the cache")
                out.write(tokens.cpu().numpy().tobytes())
            out.flush()
            out.write(image_sums(np.memmap(partial, np.uint8, "r").reshape(N, row)).tobytes())
        os.replace(partial, file)
        if not is_whole(file, N, row):                              # what was in *.partial
            os.remove(file)
            return cached_features(vit, data, vit_hash, device, dtype, batch_size)
    shape = N, config.n_patch, config.n_embd
    return np.memmap(file, np.float16, "c", shape=shape)                         # "r" makes torch warn


def is_whole(file, N, row):
    """Whether a feature cache is there, of the right length, and none of its images is empty or changed."""
    if not os.path.isfile(file) or os.path.getsize(file) != N * (row + 8):
        return False
    content = np.memmap(file, np.uint8, "r")
    sums = content[N * row :].view(np.uint64)
    some = np.unique(np.linspace(0, N - 1, 256).astype(int))
    return bool(sums.all() and (image_sums(content[: N * row].reshape(N, row)[some]) == sums[some]).all())


def image_sums(features):
    """Each image's bytes (N, row), added up in words of two."""
    return features.view(np.uint16).sum(1, dtype=np.uint64)


def augment(pixels, size, rng):
    """Random crops of 50-100 % of the area, half flipped: uint8 (B, S, S, 3) -> (B, size, size, 3)."""
    out, S = [], pixels.shape[1]
    for picture in pixels:
        area, aspect = rng.uniform(0.5, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        wide, high = S * min(1, np.sqrt(area * aspect)), S * min(1, np.sqrt(area / aspect))
        left, top = rng.uniform(0, S - wide), rng.uniform(0, S - high)
        box = left, top, left + wide, top + high
        crop = Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR, box)
        out.append(np.asarray(crop)[:, :: rng.choice([1, -1])])
    return torch.from_numpy(np.stack(out))


def read_pixels(data, images, size):
    """The stored pictures of `images` at the model's size: uint8 (B, size, size, 3)."""
    pixels = data.images[images]
    if pixels.shape[1] != size:
        pixels = np.stack([np.asarray(resize(Image.fromarray(p), size)) for p in pixels])
    return torch.from_numpy(pixels)


class ImageInputs:
    """Image indices -> what the model takes: cached features if the ViT is frozen, else uint8 pixels."""

    def __init__(self, model, data: CaptionSet, cfg, device: torch.device, dtype: torch.dtype):
        self.data, self.cfg, self.device, self.size = data, cfg, device, model.config.vit.image_size
        self.features = None
        if cfg.blind or cfg.augment or cfg.train == "all":
            return
        vit_hash = checkpoint.sha256(model.vit.state_dict())
        vit = fast.pack(copy.deepcopy(model.vit).to(device, dtype))        # packed weights go with the copy
        self.features = torch.from_numpy(cached_features(vit, data, vit_hash, device, dtype))
        size = self.features.numel() * 2
        if device.type == "cuda" and torch.cuda.mem_get_info()[0] > size + 4e9:   # else streamed
            self.features = self.features.to(device)

    def __call__(self, images: np.ndarray, rng: np.random.Generator | None = None) -> dict[str, torch.Tensor]:
        """Given `rng`, random crops where cfg asks for them. Runs in the loader's thread."""
        if self.cfg.blind:                                                  # the mean colour, normalised
            return {"images": torch.zeros(len(images), 3, self.size, self.size)}
        if self.features is not None:
            return {"features": self.features[torch.from_numpy(images).to(self.features.device)]}
        if rng is not None and self.cfg.augment:
            return {"pixels": augment(self.data.images[images], self.size, rng)}
        return {"pixels": read_pixels(self.data, images, self.size)}


def collate(data: CaptionSet, images: np.ndarray, inputs: ImageInputs, rng: np.random.Generator | None = None,
            limit: int | None = None) -> dict:
    """Image indices -> a batch: pixels or features, and each image's captions packed into a row (B, T)."""
    captions = data.caption_tokens(images, limit, rng)
    # few different lengths: oneDNN compiles and keeps kernels for each
    tokens, targets, positions = pack_captions(captions, data.tokenizer.eos_id, multiple=4)
    return {**inputs(images, rng), "tokens": tokens, "targets": targets, "positions": positions,
            "numbers": images, "captions": sum(map(len, captions)), "count": int((targets != -100).sum())}


def pin(batch: dict) -> dict:
    """Page-locked memory for a batch on the CPU, from which it travels to a GPU while that computes."""
    return {name: t.pin_memory() if torch.is_tensor(t) and t.device.type == "cpu" else t
            for name, t in batch.items()}


def to_device(batch: dict, device: torch.device, config) -> dict:
    """Move a batch but its targets; its pixels become `images`, normalised there for the ViT of `config`."""
    batch = {name: t.to(device, non_blocking=True) if torch.is_tensor(t) and name != "targets" else t
             for name, t in batch.items()}
    if "pixels" in batch:
        batch["images"] = normalize(batch.pop("pixels"), config)
    return batch
