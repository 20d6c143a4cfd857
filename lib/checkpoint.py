"""Weights on disk: safetensors files with a config in their metadata, their hash, and checkpoint folders."""

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lib import records
from lib.cli import UserError, atomic, relative, write_text
from lib.hub import local_or_hub

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = 65504                    # float16 holds no more; the weights of a sound model stay far below


def write_tensors(file: str | Path, tensors: dict[str, Tensor], **metadata):
    """Write named tensors to a safetensors file, each keyword as JSON in its metadata. UserError for NaN."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    check_finite(tensors, f"cannot write {file}")
    metadata = {key: json.dumps(value) for key, value in metadata.items() if key != "checksum"}
    metadata["checksum"] = json.dumps(checksum(tensors, metadata))
    try:
        with atomic(file) as temporary:
            Path(temporary).touch()
            mode = os.stat(temporary).st_mode             # the usual one; save_file makes it private
            save_file(tensors, temporary, metadata)
            os.chmod(temporary, mode)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot write {file}: {error}") from None


def open_safetensors(file: str | Path):
    """A safetensors file opened for reading. Raises UserError if it is missing or damaged."""
    if not os.path.isfile(file):                                     # a pipe would never end
        what = "is not a file" if os.path.exists(file) else "does not exist"
        raise UserError(f"{file} {what}; see python convert_weights.py --help")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}); "
                        "download or write it again") from None


def read_metadata(file: str | Path) -> dict:
    """What `write_tensors` took as metadata. Raises UserError if another program wrote the file."""
    with open_safetensors(file) as opened:
        try:
            metadata = opened.metadata() or {}
            return {key: records.parse_json(object, value, file) for key, value in metadata.items()}
        except UserError:
            raise UserError(f"{file} was written by another program: "
                            "convert it with convert_weights.py") from None


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, memory-mapped on the CPU.

    Raises UserError if they do not match the checksum, or, in older files without one, are not finite.
    """
    with open_safetensors(file) as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata() or {}
    if "checksum" not in metadata:
        check_finite(tensors, f"cannot use {file}")
    elif metadata.pop("checksum") != json.dumps(checksum(tensors, metadata)):
        raise UserError(f"{file} is damaged: it does not match its checksum; copy or write it again")
    return tensors


def checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """A hash of names, types, shapes, metadata and the sum of each tensor's bytes in words of eight.

    Adding is 15 times as fast as SHA-256: it finds damage at every start, but no forgery.
    """
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        whole = len(data) // 8 * 8
        total = np.add.reduce(data[:whole].view(np.uint64))
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {total} ".encode() + bytes(data[whole:]))
    return digest.hexdigest()


def check_finite(tensors: dict[str, Tensor], problem: str):
    """Raise UserError that begins with `problem` for NaN, infinite or absurdly large values."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor)
            if not -LARGEST <= low <= high <= LARGEST:               # NaN fails too
                raise UserError(f"{problem}: {name} holds NaN, infinite or absurdly large values")


def sha256(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names and float32 bytes, in name order: the same whatever format or dtype they came in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().float().contiguous().cpu().numpy())
    return digest.hexdigest()


def save_module(module: nn.Module, file: str | Path, **metadata):
    """Write a ViT or GPT-2 and its config as one safetensors file."""
    metadata = {"kind": type(module).__name__, "config": asdict(module.config), **metadata}
    write_tensors(file, module.state_dict(), **metadata)


def load_module(module_class, config_class, file: str | Path) -> nn.Module:
    """Read what `save_module` wrote: built without storage, then given the file's tensors in their dtype."""
    metadata = read_metadata(file)
    if metadata.get("kind") != module_class.__name__:
        raise UserError(f"{file} does not hold a {module_class.__name__} written by convert_weights.py")
    module = build_empty(module_class, config_class, metadata.get("config"), file)
    load_strict(module, read_tensors(file), file)
    return module.eval()


def build_empty(module_class, config_class, settings: dict, source) -> nn.Module:
    """A module without storage, by the config `settings` from `source`. Raises UserError for a wrong one."""
    for held in (settings, settings.get("vit")) if isinstance(settings, dict) else ():
        if isinstance(held, dict):
            held.pop("patch_dropout", None)                          # a setting of training that is gone
    config = records.convert(config_class, settings, f"the model config of {source}")
    with torch.device("meta"):
        return module_class(config)


def load_strict(module: nn.Module, tensors: dict[str, Tensor], source):
    """Give `module` its tensors, without a copy. Raises UserError unless all names and shapes agree."""
    if other := [f"{name} {t.dtype}" for name, t in tensors.items() if t.dtype not in DTYPES]:
        raise UserError(f"{source} holds unsupported dtypes: {', '.join(other[:4])}")
    expected = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != found:
        shapes = [f"{name} {found[name]} instead of {expected[name]}"
                  for name in sorted(expected.keys() & found) if found[name] != expected[name]]
        problems = {"missing": sorted(expected.keys() - found), "unknown": sorted(found.keys() - expected),
                    "of another shape": shapes}
        lists = (f"{problem} {', '.join(names[:4])[:300]}{' ...' if len(names) > 4 else ''}"
                 for problem, names in problems.items() if names)
        raise UserError(f"{source} does not fit the model: {' '.join('; '.join(lists).split())}")
    module.load_state_dict(tensors, assign=True)


FORMAT_VERSION = 1
ROOT = Path(__file__).parents[1]


@dataclass
class BackboneRecord:
    file: str
    path: str
    sha256: str | None


@dataclass
class CheckpointConfig:
    """config.json of a checkpoint folder."""
    format_version: int = field(metadata=dict(min=1))
    model: dict
    training: dict[str, str | int | float | bool | None] | None
    backbones: dict[Literal["vit", "gpt2"], BackboneRecord]


def read_config(folder: str | Path) -> dict:
    """config.json of a checkpoint folder, a CheckpointConfig as dict. Raises UserError unless it is one."""
    file = Path(folder) / "config.json"
    try:
        config = records.read_json(dict, file)
    except FileNotFoundError:
        raise UserError(f"{folder} is not a checkpoint folder: it has no config.json") from None
    if isinstance(version := config.get("format_version"), int) and version > FORMAT_VERSION:
        raise UserError(f"{folder} has format {version}, newer than the {FORMAT_VERSION} known here; "
                        "update the code")
    records.convert(CheckpointConfig, config, file)
    return config


def find_checkpoint(name: str | Path | None = None) -> Path:
    """The folder of that name, or the download of that repository; by default the newest in out/ trained on
    photographs, the published model, or assets/mini."""
    if name:
        return local_or_hub(name)
    for file in sorted(Path("out").glob("*/config.json"), key=os.path.getmtime, reverse=True):
        with contextlib.suppress(UserError):
            if (read_config(file.parent)["training"] or {}).get("photographs"):
                return file.parent
    for folder in (Path("weights/vision-gpt"), ROOT / "weights/vision-gpt", ROOT / "assets/mini"):
        if (folder / "config.json").exists():
            return folder
    raise UserError("no checkpoint found: train one (python train.py), convert the published one "
                    "(python convert_weights.py --help), or name one with --checkpoint")


def find_backbone(name: str, record: dict, folder: str | Path, weights: str | Path | None = None) -> Path:
    """The file of a frozen backbone of the checkpoint `folder`, by its `record` (file, path, sha256) there.

    Looked for at the recorded path, in `weights`, in weights/ beside the checkpoint and in the current
    folder; raises UserError if there is none, or only one that the checkpoint was not trained on.
    """
    places = [Path(folder) / record["path"], *([Path(weights) / record["file"]] if weights else []),
              Path(folder).parent / "weights" / record["file"], Path("weights") / record["file"]]
    problem = None
    for file in filter(os.path.isfile, places):
        try:
            if record["sha256"] and read_metadata(file).get("sha256") == record["sha256"]:
                return file
            problem = problem or UserError(
                f"{file} is not the {name} that {folder} was trained on (sha256 {str(record['sha256'])[:12]}"
                "...): convert that one again with convert_weights.py, or name its folder with --weights")
        except UserError as error:                                   # another place may hold a whole one
            problem = error
    if problem:
        raise problem
    raise UserError(f"the {name} weights of {folder} are missing: looked for {', '.join(map(str, places))}; "
                    "make them with python convert_weights.py, or name their folder with --weights")


def write_config(folder: Path, model: dict, training: dict | None, backbones: dict[str, str | Path]) -> None:
    """Write config.json of a checkpoint folder whose frozen `backbones` lie in these files."""
    records = {name: {"file": Path(file).name, "path": relative(file, folder),
                      "sha256": read_metadata(file).get("sha256")} for name, file in backbones.items()}
    config = {"format_version": FORMAT_VERSION, "model": model, "training": training, "backbones": records}
    write_text(folder / "config.json", json.dumps(config, indent=1))
