"""Tokenizers: GPT-2's own against tiktoken's, a trained one against a plain trainer, and their file."""

import base64
import json
from collections import Counter

import pytest
import regex
import tiktoken
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.cli import UserError
from tokenizer import PATTERN, Tokenizer, pack_captions

CACHE = SHARED / "tiktoken_cache"
TEXTS = ["aaaa aaa aa", "the dog and the other dogs", "naïve café \U0001f415\U0001f415", "it's the dog's",
         "  two   spaces\n\n", ""]


@pytest.fixture
def gpt2(monkeypatch):
    if not CACHE.is_dir():
        pytest.skip("GPT-2's tables are not at hand")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    return Tokenizer.gpt2()


def plain_trainer(texts, vocab_size):
    """The tokens of a byte-level BPE as they form, all pairs counted anew before each merge."""
    words = [[bytes([b]) for b in piece.encode()] for text in texts for piece in regex.findall(PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) + 1 < vocab_size:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts or max(counts.values()) < 2:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if best[0] + best[1] not in tokens:
            tokens.append(best[0] + best[1])
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [word[i] + word[i + 1]]
                i += 1
    return tokens


@pytest.mark.parametrize("vocab_size", [257, 260, 270, 400])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[::-1], ["abababab abab ab"] * 2, [""]])
def test_trained_bpe_equals_a_plain_trainer(texts, vocab_size):
    trained = Tokenizer.train(texts, vocab_size)
    assert sorted(trained.ranks, key=trained.ranks.get) == plain_trainer(texts, vocab_size)
    assert list(trained.ranks.values()) == list(range(len(trained.ranks)))
    assert trained.eos_id == len(trained.ranks) and trained.vocab_size == trained.eos_id + 1 <= vocab_size
    assert Tokenizer.train(texts, vocab_size).ranks == trained.ranks


def test_training_needs_room_for_every_byte():
    with pytest.raises(UserError, match="256.*257"):
        Tokenizer.train(TEXTS, 256)


def test_training_takes_half_a_surrogate_pair():
    """As JSON may hold one; no UTF-8 spells it."""
    assert Tokenizer.train(["\ud83d dog", "\ud83d dog"], 300).encode("dog")


TRAINED = Tokenizer.train(TEXTS * 2, 300)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40)
       | st.lists(st.sampled_from(["<|endoftext|>", "dog", " ", "'s", "\n", "é", "\0"])).map("".join))
def test_any_text_makes_the_round_trip(text):
    tokens = TRAINED.encode(text)
    assert TRAINED.eos_id not in tokens and TRAINED.decode(tokens) == text
    assert TRAINED.encode_batch([text, "a"]) == [tokens, TRAINED.encode("a")]


def test_the_end_token_is_no_text():
    tokens = TRAINED.encode("<|endoftext|>")
    assert len(tokens) > 1 and TRAINED.eos_id not in tokens
    assert TRAINED.decode([TRAINED.eos_id, *TRAINED.encode("a dog"), TRAINED.eos_id]) == "a dog"
    assert TRAINED.decode(TRAINED.encode("日")[:1] + TRAINED.encode("a")) == "\ufffda"   # cut in two


def test_gpt2_equals_tiktokens(gpt2):
    theirs = tiktoken.get_encoding("gpt2")
    assert gpt2.eos_id == theirs.eot_token == 50256 and gpt2.vocab_size == theirs.n_vocab == 50257
    more = ["A man's 3 dogs, I'll bet <|endoftext|>!", "\ttab \r\n line", "日本語 \U0001f600"]
    for text in TEXTS + more:
        assert gpt2.encode(text) == theirs.encode_ordinary(text)
        assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.encode("Hello world") == [15496, 995]


def test_gpt2_reads_every_kind_of_table(gpt2, tmp_path):
    merges = (CACHE / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").read_text(encoding="utf-8")
    ranks = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in gpt2.ranks.items())
    for name, content in [("vocab.bpe", merges), ("merges.txt", merges.rstrip("\n")), ("a.tiktoken", ranks)]:
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert Tokenizer.gpt2(tmp_path / name).ranks == gpt2.ranks


def test_merges_that_look_like_comments_are_read(tmp_path):
    """Made-up merges, as many as GPT-2 has: pairs of bytes, the unprintable ones as the signs for them."""
    printable = [b for b in range(256) if chr(b).isprintable() and b != 32]
    order = printable + [b for b in range(256) if b not in printable]
    sign = {b: chr(b) if b in printable else chr(256 + i - len(printable)) for i, b in enumerate(order)}
    pairs = [(35, 35), (35, 32), *[(a, b) for a in range(256) for b in range(256) if a != 35]][:50_000]
    text = "#version: 0.2\n" + "".join(f"{sign[a]} {sign[b]}\n" for a, b in pairs)
    for name, content in [("merges.txt", text), ("no-version-line.txt", text.split("\n", 1)[1])]:
        (tmp_path / name).write_text(content, encoding="utf-8")
        ranks = Tokenizer.gpt2(tmp_path / name).ranks
        assert sorted(ranks, key=ranks.get) == [bytes([b]) for b in order] + [bytes(pair) for pair in pairs]


@pytest.mark.parametrize("name, content, message", [
    ("merges.txt", "#version: 0.2\na b\n", "257 tokens, GPT-2 has 50256"),
    ("merges.txt", "a b c\n", "is not a merges.txt"),
    ("merges.txt", "日 本\n", "is not a merges.txt"), ("a.tiktoken", "!!! x\n", "is not a merges.txt"),
    ("merges.txt", b"\xff\xfe", "cannot read"), ("merges.txt", None, "cannot read")])
def test_a_wrong_table_is_one_line(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.gpt2(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_gpt2_without_network_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)                                     # where no weights/ holds the tables
    def unreachable(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(UserError, match=r"downloaded \(ConnectionError\).*TIKTOKEN_CACHE_DIR") as caught:
        Tokenizer.gpt2()
    assert "\n" not in str(caught.value)


def test_tokenizer_file_gives_the_same_tokenizer(tmp_path):
    TRAINED.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.name, loaded.ranks, loaded.eos_id) == (TRAINED.name, TRAINED.ranks, TRAINED.eos_id)
    assert all(loaded.encode(text) == TRAINED.encode(text) for text in TEXTS)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert set(content) == {"name", "pattern", "specials", "ranks"}
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("content, message", [
    (None, "is missing"), ("{", "is damaged"), ("[]", "must be an object"), ("{}", "lacks the field"),
    (dict(ranks=["YQ", "!"]), "is damaged"), (dict(ranks=["YQ==", "YQ=="]), "is damaged"),
    (dict(pattern="."), "is damaged"),
    (dict(specials={}), "is damaged"), (dict(ranks=3), "ranks is 3")])
def test_a_damaged_tokenizer_file_is_one_line(content, message, tmp_path):
    TRAINED.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    if content is None:
        file.unlink()
    else:
        changed = content if isinstance(content, str) else json.dumps(json.loads(file.read_text()) | content)
        file.write_text(changed)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_captions_of_an_image_are_packed_into_a_row_and_padded_by_length():
    """The end token, which is also the padding, starts and ends each; its last place is a target."""
    tokens, targets, positions = pack_captions([[[5, 6], []], [[9, 5, 9]], []], 9)
    assert tokens.tolist() == [[9, 5, 6, 9], [9, 9, 5, 9], [9, 9, 9, 9]]
    assert targets.tolist() == [[5, 6, 9, 9], [9, 5, 9, 9], [-100] * 4]
    assert positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0] * 4]
