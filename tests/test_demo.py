"""The demo on tiny settings: what its text, model and training promise, and one run of all of it."""

from __future__ import annotations

import pytest
import torch

from demo import __main__ as demo
from demo.model import NGRAM_SIZES, ByteTransformer, Cache, ModelConfig, ngram_hash
from demo.progress import Progress
from demo.text import Corpus
from demo.train import TrainingConfig, learning_rate, train

KINDS = ("softmax", "entmax")
SMALL = {"num_layers": 2, "num_heads": 2, "head_dim": 16}
TEXT = b"She sells sea shells by the sea shore. The shells that she sells are sea shells, I am sure. "


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus({"verse": {f"copy {i}": TEXT * 5 for i in range(40)}})


@pytest.fixture
def model(request) -> ByteTransformer:
    torch.manual_seed(0)
    return ByteTransformer(ModelConfig(request.param, **SMALL))


def text_of(*size: int) -> torch.Tensor:
    return torch.randint(256, size, generator=torch.Generator().manual_seed(1))


def test_standard_library_text_is_split_by_document():
    corpus = Corpus.from_standard_library()
    assert "python" in corpus.pools
    for pool, documents in corpus.pools.items():
        train, validation = (bytes(split[pool].numpy()) for split in (corpus.train, corpus.validation))
        assert len(train) > 5 * len(validation) > 0
        assert all((text in train) != (text in validation) for text in set(documents.values()) if len(text) > 2000)
    assert not any(name.startswith(("test/", "site-packages/")) for name in corpus.pools["python"])
    assert corpus.validation_sentence(range(48, 72)).endswith(b".")


def test_batches_depend_on_the_generator_alone(corpus):
    first, second = (corpus.train_batch(0, 3, 50, torch.Generator().manual_seed(7)) for _ in range(2))
    assert first.shape == (3, 51)
    assert torch.equal(first, second)


def test_batches_take_the_pools_in_turn():
    corpus = Corpus(
        {pool: {f"copy {i}": letter * 100 for i in range(40)} for pool, letter in (("a", b"a"), ("b", b"b"))}
    )
    generator = torch.Generator().manual_seed(0)
    letters = [chr(row.median()) for step in range(2) for row in corpus.train_batch(step, 3, 20, generator)]
    assert letters == list("ababab")


def test_ngram_hash_sees_the_last_bytes_and_no_others():
    text = text_of(1, 40)
    for size in NGRAM_SIZES:
        changed = text.clone()
        changed[0, 20] ^= 1
        differs = (ngram_hash(text, size) != ngram_hash(changed, size))[0].nonzero().flatten()
        assert differs.tolist() == list(range(20, 20 + size))


@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_no_byte_sees_a_later_one(model):
    text = text_of(1, 40)
    changed = text.clone()
    changed[0, 25:] ^= 1
    before, after = model(text)[:, :25], model(changed)[:, :25]
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_reading_byte_by_byte_is_reading_at_once(model):
    text, cache = text_of(2, 30), Cache()
    pieces = [model(piece, cache) for piece in text.split([20, *[1] * 10], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(text), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_generation_is_repeatable(model):
    assert model.generate(b"ab", 12, 1.0, seed=3) == model.generate(b"ab", 12, 1.0, seed=3)
    assert len(model.generate(b"ab", 12, 1.0, seed=3)) == 12


def test_both_models_start_alike():
    states = []
    for kind in KINDS:
        torch.manual_seed(0)
        states.append(ByteTransformer(ModelConfig(kind, **SMALL)).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_and_records(kind, corpus):
    config = TrainingConfig(steps=24, context=64)
    run = train(ModelConfig(kind, **SMALL, learn_alpha=kind == "entmax"), config, corpus, kind)
    assert len(run.train_bits) == len(run.step_seconds) == 24
    assert {0, 24} < run.validation_bits.keys()
    assert run.validation_bits[24] < 0.7 * run.validation_bits[0] < 0.7 * 9.0
    assert run.final_bits.keys() == {"verse"}
    if kind == "softmax":
        assert not run.heads
    else:
        assert run.heads.keys() == run.validation_bits.keys()
        last = run.heads[24]
        assert last.support_size.shape == last.live_tile_fraction.shape == (2, 2)
        assert ((last.support_size >= 1) & (last.support_size <= 64)).all()
        alphas = run.model.alphas()
        assert ((alphas > 1) & (alphas < 2)).all()
        assert (alphas != 1.5).all()  # learned


def test_learning_rate_warms_up_and_decays():
    config = TrainingConfig(steps=100)
    rates = [learning_rate(step, config) for step in range(100)]
    top = rates.index(max(rates))
    assert rates[top] == config.learning_rate
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 0.1 * rates[top]


class Terminal:
    def __init__(self, *, is_terminal: bool) -> None:
        self.is_terminal, self.text = is_terminal, ""

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...


def test_progress_is_a_bar_on_a_terminal_and_ten_lines_elsewhere():
    terminal, file = Terminal(is_terminal=True), Terminal(is_terminal=False)
    for stream in (terminal, file):
        progress = Progress("softmax", 200, stream)
        for step in range(1, 201):
            progress.update(step, "note")
    assert terminal.text.count("\r") == 200
    assert terminal.text.count("\n") == 1
    assert [line.split()[1] for line in file.text.splitlines()] == [f"{20 * i}/200" for i in range(1, 11)]


def test_the_whole_demo(tmp_path, capsys):
    demo.main(["--steps", "3", "--context", "64", "--learn-alpha", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for text in ("L4H2", "alpha", "goes on after 'The '", "validation, mean (bits/byte)", "keys attended to, mean"):
        assert text in printed
    for name in ("training.png", "attention.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
