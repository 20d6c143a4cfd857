"""The bench: operations are counted right, both sides do the same work, nothing global stays changed."""

import copy
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_model import batch, tiny_config, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel

import bench
from bench import CPU, WORDS
from lib import baselines
from lib.cli import UserError

CONFIG = tiny_config(40)


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    """Ceilings as if measured: 1 GFLOP/s, and 1 GB/s from memory."""
    found = {"fp32 F.linear": 1e9, "bf16 F.linear": 1e9, "read": 1e9}
    monkeypatch.setattr(bench, "ceilings", lambda device: found)


@pytest.mark.parametrize("beams", [1, 3])
def test_caption_flops_are_those_of_a_real_run(beams):
    model, images = bench.build(CONFIG).requires_grad_(False), torch.randn(2, 3, 16, 16)
    with sdpa_kernel(SDPBackend.MATH):               # the only attention on the CPU that torch counts
        real = bench.count_flops(lambda: bench.ours(model, images, beams))
    assert real == sum(bench.caption_flops(CONFIG, 2, beams))


def test_training_flops_are_those_of_a_real_step():
    model, length = bench.build(CONFIG).train(), 7
    tokens = torch.randint(39, (15, length))
    features = torch.randn(3, CONFIG.vit.n_patch, CONFIG.vit.n_embd)

    def step():
        image = torch.arange(3).repeat_interleave(5)
        model.loss(tokens, model.encode(features=features), tokens, image).backward()

    with sdpa_kernel(SDPBackend.MATH):
        assert bench.count_flops(step) == bench.training_flops(CONFIG, 3, length)


def test_floor_of_small_batches_is_the_weights_of_int8_a_quarter_of_those_of_fp32():
    model = bench.build(CONFIG)
    fp32, int8 = (bench.caption_floor(model, kind, (0, 0), CPU) for kind in ("fp32", "int8"))
    gpt2 = sum(p.numel() for p in model.gpt2.h.parameters()) + 40 * 16
    cross = len(model.xattn) * 2 * (16 * 16 + 16)
    assert fp32 == pytest.approx(WORDS * 4 * (gpt2 + cross) / 1e9)
    assert fp32 == pytest.approx(4 * int8)
    assert bench.caption_floor(model, "fp32", (3e9, 5e9), CPU) == pytest.approx(8)


def test_original_way_writes_the_same_tokens():
    model = tiny_model()
    images = torch.randn(3, 3, 16, 16)
    tokens = bench.ours(model, images, 1)
    text = torch.full((3, 1), model.eos_id)
    for _ in range(WORDS):
        text = torch.cat([text, baselines.original_word(model, images, text)[:, None]], dim=1)
    assert text[:, 1:].tolist() == tokens
    assert len(set(map(tuple, tokens))) > 1                    # else the images would not matter


def test_original_way_has_the_gradients_of_ours_without_dropout():
    model, images = tiny_model(), torch.randn(2, 3, 16, 16)
    tokens, targets = batch((9, 4))
    gradients = []
    for logits in (model(tokens, model.encode(images))[0], baselines.original_logits(model, tokens, images)):
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        gradients.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    for ours, theirs in zip(*gradients):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("beams", [1, 3])
def test_both_sides_write_as_many_tokens_and_leave_the_precision_alone(beams):
    hf = pytest.importorskip("transformers")
    images = torch.randn(2, 3, 16, 16)
    assert [len(row) for row in bench.ours(bench.build(CONFIG), images, beams)] == [WORDS] * 2
    vit = hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                       image_size=16, patch_size=8)
    gpt2 = hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=39,
                         bos_token_id=39, add_cross_attention=True, is_decoder=True)
    other = hf.VisionEncoderDecoderModel(encoder=hf.ViTModel(vit, add_pooling_layer=False),
                                         decoder=hf.GPT2LMHeadModel(gpt2)).eval()
    for precision in (None, "medium"):
        text = baselines.hugging_face_captions(other, images, WORDS, beams, precision)
        assert text.shape == (2, 1 + WORDS) and not (text[:, 1:] == 39).any()
        assert torch.get_float32_matmul_precision() == "highest"


def test_exactness_finds_what_differs():
    plain = bench.build(CONFIG)
    other = copy.deepcopy(plain)
    other.gpt2.ln_f.weight.data.uniform_(-1, 1)
    rows = bench.exactness({"plain": plain, "equal": copy.deepcopy(plain), "other": other},
                           torch.randn(2, 3, 16, 16))
    assert [row["same greedy tokens"] for row in rows] == ["yes", "no"]
    assert rows[0]["error of logits"] == 0 < rows[1]["error of logits"]


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_training_steps_change_the_fusion_and_nothing_else(kind):
    model = bench.build(CONFIG)
    take = bench.fusion_steps(model, kind, CPU, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.is_meta}
    take(2)
    changed = {name for name, p in before.items() if not torch.equal(p, model.get_parameter(name))}
    assert {name.split(".")[0] for name in changed} == {"resampler", "xattn"}
    assert model.gpt2.wte.weight.dtype == bench.DTYPES[kind]


def test_original_steps_pad_to_256_and_train_the_fusion():
    model = bench.build(tiny_config(40, n_positions=256))
    seen, before = [], model.resampler.latents.detach().clone()
    model.gpt2.h[0].mlp.c_fc.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    baselines.original_steps(model, CPU, 2)(1)
    assert seen == [(2, 256, 64)]
    assert not torch.equal(model.resampler.latents, before)


def test_contenders_run_in_turn_and_medians_are_taken():
    calls, pauses = [], iter([0.03, 0.03, 0.02, 0, 0.001, 0, 0.001, 0])

    def contender(name):
        calls.append(name)
        time.sleep(next(pauses))

    runs = {name: lambda name=name: contender(name) for name in "ab"}
    seconds = bench.time_interleaved(runs, 3, CPU, "test")
    assert "".join(calls) == "abababab"
    assert 0.001 <= seconds["a"] < 0.02 and seconds["b"] < seconds["a"]
    pauses = iter([0.02, 0])
    assert bench.time_interleaved(runs, 1, CPU, "test", warm=True)["a"] >= 0.02 and calls[8:] == ["a", "b"]


def test_memory_of_a_process_is_its_own():
    ballast = torch.ones(2**27)                                  # half a gigabyte
    with bench.new_process() as process:
        peak = process.submit(bench.peak_memory, CPU).result()
    assert peak < bench.peak_memory(CPU) - ballast.nbytes / 2e9


def test_training_is_timed_in_processes_and_compared_by_captions(monkeypatch):
    """The original takes a second for a step of 16 captions, ours 4 for four steps of 80."""
    steps = []
    monkeypatch.setattr(bench, "contender", lambda name, device, size, resident:
                        lambda n: steps.append((name, size, n)))
    monkeypatch.setattr(bench, "new_process", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(bench, "time_interleaved", lambda ways, *rest: {
        name: way() or (1.0 if name == bench.ORIGINAL else 4.0) for name, way in ways.items()})
    (rows,) = bench.train(CPU, quick=False).values()
    assert steps == [(bench.ORIGINAL, 16, 1), ("fp32", 16, 4), ("bf16", 16, 4)]
    assert [row["captions/s"] for row in rows] == [16, 80, 80]
    assert rows[1]["times the original's"] == 5 and rows[0]["peak GB"] > 0


def test_scale_counts_every_stage(tmp_path):
    row = bench.scale_of(64, str(tmp_path))
    assert row["images"] == 64 and all(value > 0 for name, value in row.items() if name != "memory, bytes")
    assert row["disk, bytes"] > 16 * 16 * 3 + 4 * 16 * 2         # pixels and features


def test_json_is_all_that_goes_to_stdout(capsys):
    bench.main(["--only", "machine", "--json", "--device", "cpu"])
    out, err = capsys.readouterr()
    rows = json.loads(out)["Ceilings: billions of operations, or of bytes read, a second"]
    assert {"what": "read", "G/s": 1.0} in rows
    assert "| read " in err


def test_flags_are_checked_before_anything_is_measured(tmp_path, capsys):
    with pytest.raises(UserError, match="does not exist"):
        bench.main(["--json", str(tmp_path / "no/where.json")])
    with pytest.raises(SystemExit):
        bench.main(["--only", "captoin"])
    assert "did you mean caption?" in capsys.readouterr().err
