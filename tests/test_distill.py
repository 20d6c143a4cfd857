"""distill.py without its teacher: what the student is given, where it begins, how it is compared."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.checkpoint import ROOT
from model import VisionGPT
from vit import ViT

spec = importlib.util.spec_from_file_location("distill", ROOT / "assets/mini/distill.py")
distill = importlib.util.module_from_spec(spec)
spec.loader.exec_module(distill)


def test_crop_is_as_large_as_the_teacher_wants_and_follows_the_generator():
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    first, again, other = (distill.draw_crop(picture, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.size == (224, 224) and first.mode == "RGB"
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_learning_rate_rises_then_falls_to_zero():
    cfg = distill.DistillConfig(samples=100_000, learning_rate=1.0)
    rates = [distill.get_lr(samples, cfg) for samples in (0, 2_500, 5_000, 50_000, 100_000)]
    assert rates == pytest.approx([0, 0.4992, 0.9938, 0.5, 0], abs=1e-4)


def test_student_begins_with_the_bundled_vit():
    bundled, vit = VisionGPT.from_pretrained(ROOT / "assets/mini", "cpu").vit, ViT(distill.STUDENT)
    distill.begin_with(vit, ROOT / "assets/mini/model.safetensors")
    side = bundled.config.image_size // bundled.config.patch_size
    place = 1 + torch.arange(side**2).view(side, side)[:7, :7].flatten()
    assert torch.equal(vit.pos_embed[:, 1:], bundled.pos_embed[:, place])
    assert torch.equal(vit.blocks[5].mlp.fc2.weight, bundled.blocks[5].mlp.fc2.weight)


class Answers(SimpleNamespace):
    """A student whose answer is given."""

    def __call__(self, seen):
        return self.answer


def test_a_student_that_says_what_the_teacher_says_has_no_error():
    features, classes = torch.randn(3, 49, 320), torch.randn(3, 1000).log_softmax(-1)
    mean, std = features.mean((0, 1)), features.std((0, 1))
    student = Answers(mean=mean, std=std, answer=((features - mean) / std, classes))
    found = distill.compare(SimpleNamespace(classify=lambda features: classes), student, None, features)
    assert found["error"] < 1e-6 and abs(found["kl"]) < 1e-6
    assert found["cosine"] > 1 - 1e-5 and found["same_class"] == 1
