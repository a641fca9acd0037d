"""scripts/bench_pretrain: what it hands to nanoGPT, and what it reads off both runs."""

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.bench_pretrain import (
    ITERATIONS,
    Point,
    Shape,
    course,
    first_at,
    flops_per_token,
    loss_after,
    nanogpt,
    peak_of,
    when,
    whole_text_loss,
    write_characters,
)

# what stands for nanoGPT's two files: a model whose odds are always the same, a training that only talks
MODEL = """
import torch
class GPTConfig:
    def __init__(self, vocab_size): self.vocab_size = vocab_size
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.odds = torch.nn.Parameter(torch.zeros(config.vocab_size))
    def forward(self, ids, targets):
        assert ids.shape == targets.shape and ids.shape[1] <= 64
        logits = self.odds.expand(*ids.shape, -1)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""
TRAIN = """
import os, sys
given = dict(word[2:].split("=", 1) for word in sys.argv[2:])
assert os.path.exists(given["dataset"] + "/train.bin") and given["max_iters"] == "3"
print("step 0: val loss 4.2"); print("iter 0: loss 4.2"); print("step 3: val loss 4.1")
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "tinyshakespeare.train.txt").write_text("to be\nor not", "ascii")
    (tmp_path / "tinyshakespeare.valid.txt").write_text("to be zz" * 20, "ascii")
    return tmp_path


def test_both_texts_become_characters_cut_where_the_files_are(data: Path) -> None:
    write_characters(data, data)
    meta = pickle.loads((data / "meta.pkl").read_bytes())
    assert meta["vocab_size"] == len(set("to be\nor notz"))
    for name, file in (("train", "train"), ("val", "valid")):
        ids = np.fromfile(data / f"{name}.bin", dtype=np.uint16)
        assert "".join(meta["itos"][i] for i in ids.tolist()) == (data / f"tinyshakespeare.{file}.txt").read_text()


def test_the_whole_text_is_scored_once(data: Path) -> None:
    """A model that knows how often each character occurs: its loss is the text's entropy, the first one apart."""
    write_characters(data, data)
    (data / "model.py").write_text(MODEL)
    (data / "out").mkdir()
    text = (data / "tinyshakespeare.valid.txt").read_text()
    meta = pickle.loads((data / "meta.pkl").read_bytes())
    shares = {character: text.count(character) / len(text) for character in meta["stoi"]}
    odds = torch.tensor([math.log(max(shares[meta["itos"][i]], 1e-9)) for i in range(meta["vocab_size"])])
    kept = {"iter_num": ITERATIONS, "model_args": {"vocab_size": meta["vocab_size"]}, "model": {"odds": odds}}
    torch.save(kept, data / "out" / "ckpt.pt")
    expected = -sum(math.log(shares[character]) for character in text[1:]) / (len(text) - 1)
    assert whole_text_loss(data, data) == pytest.approx(expected, rel=1e-5)


def test_nanogpt_is_run_where_it_lies(data: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    write_characters(data, data)
    checkout = tmp_path_factory.mktemp("checkout")
    (checkout / "train.py").write_text(TRAIN)
    said = nanogpt(checkout, data, 1, max_iters=3)
    assert when(said, "step 3:") >= when(said, "step 0:")
    assert {path.name for path in checkout.iterdir()} == {"train.py"}
    (checkout / "train.py").write_text("raise SystemExit('no such setting')")
    with pytest.raises(SystemExit, match="no such setting"):
        nanogpt(checkout, data, 1)


def test_what_is_read_off_our_run() -> None:
    lines = [
        {"step": 10, "loss": 4.0, "time": 1.0},
        {"step": 10, "validation_bits_per_byte": 3.0, "time": 1.5},
        {"step": 20, "loss": 3.0, "time": 2.5},
        {"step": 20, "validation_bits_per_byte": 2.0, "time": 3.0},
        {"step": 30, "loss": 2.0, "time": 4.0},
        {"validation_bits_per_byte": 1.0, "seconds": 99.0},  # the summary
    ]
    points = course(lines)
    assert points == [Point(1.5, 3 * math.log(2)), Point(3.0, 2 * math.log(2)), Point(4.0, math.log(2))]
    assert first_at(points, 1.5) == 3.0 and first_at(points, 0.1) == math.inf
    assert loss_after(points, 3.5) == 2 * math.log(2) and loss_after(points, 1.0) == math.inf


def test_utilisation_by_hand() -> None:
    """GPT-2 of 124,475,904 parameters with 50,304 tokens: 6 x that, and 12 x 12 x 768 x 1,024."""
    assert flops_per_token(124_475_904, Shape(50304, 12, 768, 12, 1024)) == 746_855_424 + 113_246_208
    assert peak_of("NVIDIA H100 80GB HBM3") == 989.0 and math.isnan(peak_of("CPU"))
