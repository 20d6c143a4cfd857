"""Weights on disk: safetensors files with a config in their metadata, their hash, and checkpoint folders."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib.cli import UserError, atomic


def write_tensors(file, tensors, **metadata):
    """Write named tensors to a safetensors file; each keyword becomes a JSON string in its metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {key: json.dumps(value) for key, value in metadata.items()}
    try:
        with atomic(file) as temporary:
            Path(temporary).touch()
            mode = os.stat(temporary).st_mode             # the usual one; save_file's shuts all others out
            save_file(tensors, temporary, metadata)
            os.chmod(temporary, mode)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot write {file}: {error}") from None


def read_metadata(file):
    """What `write_tensors` took as metadata. Raises UserError if the file is missing, damaged or not ours."""
    with _open(file) as opened:
        try:
            return {key: json.loads(value) for key, value in (opened.metadata() or {}).items()}
        except ValueError:
            raise UserError(f"{file} was written by another program: "
                            "convert it with convert_weights.py") from None


def read_tensors(file):
    """{name: tensor} of a safetensors file, memory-mapped on the CPU. Raises what `read_metadata` does."""
    with _open(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}


def _open(file):
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; see python convert_weights.py --help") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}); "
                        "download or write it again") from None


def sha256(tensors):
    """SHA-256 over names and float32 bytes, in name order: the same whatever layout or dtype they came in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def save_module(module, file, **metadata):
    """Write a ViT or GPT-2 and its config as one safetensors file."""
    metadata = {"kind": type(module).__name__, "config": asdict(module.config), **metadata}
    write_tensors(file, module.state_dict(), **metadata)


def load_module(module_class, config_class, file):
    """Read what `save_module` wrote: built without storage, then given the file's tensors in their dtype."""
    metadata = read_metadata(file)
    if metadata.get("kind") != module_class.__name__:
        raise UserError(f"{file} does not hold a {module_class.__name__} written by convert_weights.py")
    module = build(module_class, config_class, metadata.get("config"), file)
    load_strict(module, read_tensors(file), file)
    return module.eval()


def build(module_class, config_class, settings, source):
    """A module without storage, of the config `settings` from `source`. Raises UserError for unknown ones."""
    try:
        config = config_class(**settings)
    except TypeError as error:
        raise UserError(f"the model config in {source} is damaged "
                        f"or newer than this code ({error})") from None
    with torch.device("meta"):
        return module_class(config)


def load_strict(module, tensors, source):
    """Give `module` its tensors, without a copy. Raises UserError unless all names and shapes agree."""
    wanted = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if wanted != found:
        missing, extra = sorted(wanted.keys() - found), sorted(found.keys() - wanted)
        shapes = [f"{n} {found[n]} instead of {wanted[n]}" for n in wanted.keys() & found
                  if wanted[n] != found[n]]
        what = [f"{label} {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}" for label, names in
                (("missing", missing), ("unknown", extra), ("of another shape", sorted(shapes))) if names]
        raise UserError(f"{source} does not fit the model: {'; '.join(what)}")
    module.load_state_dict(tensors, assign=True)


# --------------------------------------------------------------------------------------------------
# checkpoint folders: config.json, fusion.safetensors or model.safetensors, tokenizer.json

FORMAT_VERSION = 1
ROOT = Path(__file__).parents[1]


def read_config(folder):
    """config.json of a checkpoint folder. Raises UserError when there is none or it is of a newer format."""
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text())
        newer = config["format_version"] > FORMAT_VERSION
    except OSError:
        raise UserError(f"{folder} is no checkpoint folder: it has no config.json") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged") from None
    if newer:
        raise UserError(f"{folder} is of format {config['format_version']}, "
                        f"newer than the {FORMAT_VERSION} known here; update the code")
    return config


def find_checkpoint():
    """Where none is named: the newest under out/ that saw photographs, the published model, assets/mini."""
    trained = []
    for file in Path("out").glob("*/config.json"):
        try:
            summary = read_config(file.parent).get("training") or {}
        except UserError:
            continue
        if summary.get("photographs"):
            trained.append((file.stat().st_mtime, file.parent))
    if trained:
        return max(trained)[1]
    for folder in (Path("weights/vision-gpt"), ROOT / "weights/vision-gpt", ROOT / "assets/mini"):
        if (folder / "config.json").exists():
            return folder
    raise UserError("no checkpoint found: train one (python train.py) or convert the published one "
                    "(python convert_weights.py --help), or name one with --checkpoint")


def find_backbone(name, record, folder, weights=None):
    """The file of a frozen backbone of the checkpoint `folder`, by its `record` (file, path, sha256) there.

    Looked for at the recorded path, in `weights`, in weights/ beside the checkpoint and in the current
    folder; raises UserError when there is none, or only another than the checkpoint was trained on.
    """
    places = [Path(folder) / record["path"], *([Path(weights) / record["file"]] if weights else []),
              Path(folder).parent / "weights" / record["file"], Path("weights") / record["file"]]
    files = [place for place in places if place.exists()]
    damaged = None
    for file in files:
        try:
            if record["sha256"] and read_metadata(file).get("sha256") == record["sha256"]:
                return file
        except UserError as error:                                   # another place may hold a whole one
            damaged = error
    if damaged:
        raise damaged
    if files:
        raise UserError(f"{files[0]} is not the {name} that {folder} was trained on "
                        f"(sha256 {str(record['sha256'])[:12]}...); "
                        f"convert the same {name} again with "
                        "convert_weights.py, or name its folder with --weights")
    raise UserError(f"the {name} weights of {folder} are missing: looked for {', '.join(map(str, places))}; "
                    "make them with python convert_weights.py, or name their folder with --weights")


def describe(file, folder):
    """What config.json says of a frozen backbone: file name, path relative to the checkpoint, hash."""
    return {"file": Path(file).name, "path": os.path.relpath(file, folder),
            "sha256": read_metadata(file).get("sha256")}


def write_config(folder, model: dict, training: dict | None, backbones: dict) -> None:
    """Write config.json of a checkpoint folder."""
    config = {"format_version": FORMAT_VERSION, "model": model, "training": training, "backbones": backbones}
    with atomic(Path(folder) / "config.json") as temporary:
        Path(temporary).write_text(json.dumps(config, indent=1) + "\n")
