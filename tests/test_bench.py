"""The bench: operations are counted right, all contenders do the same work, arithmetic stays near float32."""

import copy
import json

import pytest
import torch
from test_model import tiny_config, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel

import bench
from bench import CPU, WORDS
from lib import baselines
from lib.cli import UserError
from tokenizer import pack_captions

CONFIG = tiny_config(40)


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    """Ceilings as if measured: 1 GFLOP/s, and 1 GB/s from memory."""
    found = {"fp32 F.linear": 1e9, "bf16 F.linear": 1e9, "read": 1e9}
    monkeypatch.setattr(bench, "ceilings", lambda device: found)


def test_training_flops_are_those_of_a_real_step():
    model = bench.random_model(CONFIG).train()
    features = torch.randn(1, CONFIG.vit.n_patch, CONFIG.vit.n_embd)
    tokens = torch.randint(39, (5, 13))
    with sdpa_kernel(SDPBackend.MATH):
        real = bench.count_flops(lambda: model.loss(tokens, model.encode(None, features), tokens).backward())
    assert real == 5 * bench.training_flops(CONFIG)


def test_floor_of_decoding_is_the_weights_of_int8_a_quarter_of_those_of_fp32():
    model = bench.random_model(CONFIG)
    fp32, int8 = (bench.caption_floor(model, kind, 0, 0, CPU) for kind in ("fp32", "int8"))
    gpt2 = sum(p.numel() for p in model.gpt2.h.parameters()) + 40 * 16
    cross = len(model.xattn) * 2 * (16 * 16 + 16)
    assert fp32 == pytest.approx(WORDS * 4 * (gpt2 + cross) / 1e9)
    assert fp32 == pytest.approx(4 * int8)
    assert bench.caption_floor(model, "fp32", 3e9, 5e9, CPU) == pytest.approx(8)


def test_original_way_writes_the_same_tokens():
    model = tiny_model()
    images = torch.randn(3, 3, 16, 16)
    tokens = bench.our_captions(model, images, 1)
    text = torch.full((3, 1), model.eos_id)
    for _ in range(WORDS):
        text = torch.cat([text, baselines.original_word(model, images, text)[:, None]], dim=1)
    assert text[:, 1:].tolist() == tokens
    assert len(set(map(tuple, tokens))) > 1                    # else the images would not matter


def test_original_way_has_the_gradients_of_ours_without_dropout():
    model, images = tiny_model(), torch.randn(2, 3, 16, 16)
    tokens, targets, _ = pack_captions([[[7, 3, 5, 2, 9]], [[4, 1]]], 39)
    gradients = []
    for logits in (model(tokens, model.encode(images))[0], baselines.original_logits(model, tokens, images)):
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        gradients.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    for ours, theirs in zip(*gradients):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def hugging_face():
    """A tiny one, of CONFIG's vocabulary and image size."""
    hf = pytest.importorskip("transformers")
    vit = hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                       image_size=16, patch_size=8)
    gpt2 = hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=39,
                         bos_token_id=39, add_cross_attention=True, is_decoder=True)
    return hf.VisionEncoderDecoderModel(encoder=hf.ViTModel(vit, add_pooling_layer=False),
                                        decoder=hf.GPT2LMHeadModel(gpt2)).eval()


@pytest.mark.parametrize("beams", [1, 3])
def test_hugging_face_writes_as_many_tokens_as_ours(beams):
    images = torch.randn(2, 3, 16, 16)
    assert [len(row) for row in bench.our_captions(bench.random_model(CONFIG), images, beams)] == [WORDS] * 2
    text = baselines.hugging_face_captions(WORDS, hugging_face(), images, beams)
    assert text.shape == (2, 1 + WORDS) and not (text[:, 1:] == 39).any()


def test_sections_run_and_tell_shares_of_the_floor(monkeypatch):
    model = bench.random_model(CONFIG)
    monkeypatch.setattr(bench, "random_model", lambda: copy.deepcopy(model))
    monkeypatch.setattr(bench, "hugging_face", hugging_face)
    names = ["fp32", "bf16", "int8", "HF fp32", "HF bf16"]
    (rows,) = bench.caption(CPU, quick=True).values()
    assert [row["what"] for row in rows] == [*names, "original", *names]
    assert all(row["share of floor"] > 0 for row in rows if row["what"] in bench.DTYPES)
    assert rows[0]["times HF"] == rows[3]["seconds"] / rows[0]["seconds"]
    monkeypatch.setattr(bench, "time_training", lambda *args: (0.25, 0.0))
    monkeypatch.setattr(bench, "VisionGPTConfig", lambda: CONFIG)
    monkeypatch.setattr(bench, "alone", lambda function, *args: function(*args))
    (rows,) = bench.busy(CPU, quick=True).values()
    assert rows[0]["s"] > 0 and list(rows[1].values())[1:] == [0.25, 0.25, 0.25, 1, 1]


@torch.inference_mode()
@pytest.mark.parametrize("kind, tolerance", [("fp32", 1e-5), ("bf16", 0.05), ("int8", 0.1)])
def test_each_kind_of_arithmetic_stays_near_plain_float32(kind, tolerance):
    model, images, tokens = bench.random_model(CONFIG), torch.randn(2, 3, 16, 16), torch.randint(39, (2, 9))
    exact, _ = model(tokens, model.encode(images))
    other = bench.variant(model, kind, CPU)
    logits, _ = other(tokens, other.encode(images))
    assert 0 < (logits.float() - exact).norm() / exact.norm() < tolerance
    if kind == "fp32":
        assert bench.our_captions(other, images, 3) == bench.our_captions(model, images, 3)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_training_steps_change_the_fusion_and_nothing_else(kind):
    model = bench.random_model(CONFIG)
    take = bench.fusion_training(model, CPU, kind, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.is_meta}
    losses = take(2)
    assert len(losses) == 2 and losses[0] != losses[1]
    changed = {name for name, p in before.items() if not torch.equal(p, model.get_parameter(name))}
    assert {name.split(".")[0] for name in changed} == {"resampler", "xattn"}
    assert model.gpt2.wte.weight.dtype == bench.DTYPES[kind]


def test_original_steps_pad_to_256_and_train_the_fusion():
    model = bench.random_model(tiny_config(40, n_positions=256))
    seen, before = [], copy.deepcopy(model.state_dict())
    model.gpt2.h[0].mlp.c_fc.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    baselines.original_training(model, CPU, 2)(1)
    assert seen == [(2, 256, 64)]
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert {name.split(".")[0] for name in changed} == {"resampler", "xattn"}


def test_contenders_run_in_turn_and_medians_are_taken(monkeypatch):
    calls, clock, seconds = [], [0], iter([9, 9, 5, 1, 2, 2, 3, 4])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def contender(name):
        calls.append(name)
        clock[0] += next(seconds)

    ways = {name: lambda name=name: contender(name) for name in "ab"}
    assert bench.time_interleaved(ways, 3, CPU, "test") == {"a": 3, "b": 2}
    assert "".join(calls) == "abababab"


def test_memory_of_a_process_is_its_own():
    ballast = torch.ones(2**27)                                   # half a gigabyte
    peak = bench.alone(bench.peak_memory, CPU)
    assert 0 < peak < bench.peak_memory(CPU) - ballast.nbytes / 2e9


def test_training_is_compared_by_captions(monkeypatch):
    """The original takes a second for a step of 16 captions, ours for one of 80."""
    calls = []
    monkeypatch.setattr(bench, "time_training", lambda *args: calls.append(args) or (1.0, 2.0))
    monkeypatch.setattr(bench, "alone", lambda function, *args: function(*args))
    (rows,) = bench.train(CPU, quick=False).values()
    assert [args[0] for args in calls] == ["original", "fp32", "bf16"]
    assert [row["captions/s"] for row in rows] == [16, 80, 80] and rows[1]["times original"] == 5


def test_json_is_all_that_goes_to_stdout(capsys):
    bench.main(["--only", "machine", "--json", "--device", "cpu"])
    out, err = capsys.readouterr()
    rows = json.loads(out)["Ceilings: billions of operations, or of bytes read, per second"]
    assert {"what": "read", "G/s": 1.0} in rows
    assert "| read " in err


def test_flags_are_checked_before_anything_is_measured(tmp_path, capsys):
    with pytest.raises(UserError, match="cannot be written"):
        bench.main(["--json", str(tmp_path / "no/where.json")])
    with pytest.raises(SystemExit):
        bench.main(["--only", "captoin"])
    assert "did you mean caption?" in capsys.readouterr().err
