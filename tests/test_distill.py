"""distill.py without its teacher: what the student is given, what becomes of it, how it is compared."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.checkpoint import ROOT

spec = importlib.util.spec_from_file_location("distill", ROOT / "assets/mini/distill.py")
distill = importlib.util.module_from_spec(spec)
spec.loader.exec_module(distill)


def test_crop_is_as_large_as_the_teacher_wants_and_follows_the_generator():
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    first, again, other = (distill.draw_crop(picture, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (224, 224, 3) and first.dtype == np.uint8
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_learning_rate_rises_then_falls_to_zero():
    cfg = distill.DistillConfig(learning_rate=1.0)
    rates = [distill.get_lr(done, cfg) for done in (0, 0.01, 0.02, 0.5, 1)]
    assert rates == pytest.approx([0, 0.4999, 0.9990, 0.5, 0], abs=1e-4)


def test_finished_vit_sees_as_the_student_did():
    """The student's inputs are standardised; the ViT that is saved has this in its patch embedding."""
    torch.manual_seed(0)
    features, stem = torch.randn(4, 49, 320), distill.ConvStem()
    seen = torch.randn(4, 192, 7, 7) * torch.linspace(0.1, 9, 192)[:, None, None] + 3
    student = distill.Student(seen, features).eval()
    standardised = (seen - student.stem_mean[:, None, None]) / student.stem_std[:, None, None]
    vit = student.finished(stem).eval()
    assert torch.allclose(vit.encode(seen), student.vit.encode(standardised), atol=1e-4)
    assert torch.equal(vit.stem[0][1].weight, stem[0][1].weight)


def test_a_student_that_says_what_the_teacher_says_has_no_error():
    features, classes = torch.randn(3, 49, 320), torch.randn(3, 1000).log_softmax(-1)
    student = distill.Student(torch.randn(2, 192, 7, 7), features)
    answer = (features - student.features_mean) / student.features_std, classes
    student.forward = lambda stem: answer
    found = distill.compare(SimpleNamespace(classify=lambda features: classes), student, None, features)
    assert found["error"] < 1e-6 and abs(found["kl"]) < 1e-6
    assert found["cosine"] > 1 - 1e-5 and found["same_class"] == 1
