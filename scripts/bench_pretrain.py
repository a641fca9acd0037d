"""Our pretrain stage beside nanoGPT and a plain transformers.Trainer on a CPU, and its use of a GPU.

    scripts/bench_pretrain shakespeare --nanogpt DIR --data DIR [--rounds 1] [key=value ...]
    scripts/bench_pretrain throughput --nanogpt DIR --data DIR [--peer hf_pretrain_peer.py] [--rounds 5] [key=value ...]
    scripts/bench_pretrain gpu [--batch 32] [--steps 30] [--peak TFLOPS] [--tiny]

nanoGPT is a checkout of karpathy/nanoGPT; nothing is written in it. The data folder has tinyshakespeare.train.txt and
tinyshakespeare.valid.txt; nanoGPT gets both as characters, split where the files are. It runs its own train.py with the
CPU setting of its README: 4 layers, 4 heads, width 128, rows of 64, 12 a step, 2,000 iterations, no dropout.

shakespeare: recipes/shakespeare.yaml. When is our loss on the whole validation text, in nats per byte, first at
nanoGPT's 1.886, and what is it after as many seconds as nanoGPT takes in all? Seconds begin before the first training
step; validations and checkpoints count, imports and data preparation don't: nanoGPT's from the line of its validation
before the first iteration to the line of that after the last, ours the `time` of the lines in metrics.jsonl that hold a
validation. nanoGPT's loss is that of its last checkpoint over the whole validation text, in windows of 64 characters
side by side; the text is ASCII, so a character is a byte. Ours trains a BPE beforehand, which isn't counted.

throughput: tokens a second at nanoGPT's shape and batch, the first steps left out: nanoGPT's loop; our stage with a
model of about as many parameters; the peer script's transformers.Trainer on our model's shape, tokenizer and data.

gpu: the stage's training step on a GPT-2 of 124 M parameters (vocabulary 50,304, 12 layers, width 768, rows of 1,024
random tokens) in bf16 under torch.compile. Model FLOPs utilisation is (6 x parameters + 12 x layers x width x length) x
tokens/s over the card's dense bf16 peak; the head is among the parameters, once, since it is the embedding.
"""

import argparse
import json
import math
import os
import pickle
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
TARGET = 1.886  # nats per byte: what nanoGPT's setting ends with
LAYERS, HEADS, WIDTH, LENGTH, ROWS, ITERATIONS = 4, 4, 128, 64, 12, 2000  # of nanoGPT's CPU setting
LEFT_OUT = 20  # steps of a throughput run, in which things are made that later ones use again
PEAKS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}  # TFLOP/s
console = Console(soft_wrap=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name, rounds in (("shakespeare", 1), ("throughput", 5)):
        part = parts.add_parser(name)
        part.add_argument("overrides", nargs="*", metavar="key=value", help="of our recipe")
        part.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
        part.add_argument("--data", type=Path, required=True, help="the folder of tinyshakespeare.*.txt")
        part.add_argument("--rounds", type=int, default=rounds, help=f"of both, in turns (default {rounds})")
        part.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
        part.add_argument("--json", type=Path, help="also append the result to this file")
    part.add_argument("--steps", type=int, default=300, help=f"of a round, the first {LEFT_OUT} not measured")
    part.add_argument("--architecture", choices=("llama", "qwen3", "gpt2"), default="llama")
    part.add_argument("--vocabulary", type=int, default=264, help="of our tokenizer (default 264; nanoGPT's is 65)")
    part.add_argument("--peer", type=Path, help="the script that runs transformers.Trainer; not given: nanoGPT alone")
    part.add_argument("--peer-python", default=sys.executable, help="of an environment with transformers")
    gpu = parts.add_parser("gpu")
    gpu.add_argument("--batch", type=int, default=32, help="rows of a step (default 32)")
    gpu.add_argument("--steps", type=int, default=30, help="that are measured, after 10 that aren't (default 30)")
    gpu.add_argument("--peak", type=float, help="the card's dense bf16 TFLOP/s; default: by its name")
    gpu.add_argument("--tiny", action="store_true", help="a tiny model, to try the script where no GPU is")
    gpu.add_argument("--json", type=Path, help="also append the result to this file")
    return parser.parse_args()


def environment(threads: int) -> dict[str, str]:
    """As a user would run each of them: how a thread waits is the program's own affair."""
    more = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **more}


def run(command: Sequence[str | Path], threads: int) -> str:
    """What a command says; leaves with its complaint where it fails."""
    done = subprocess.run(list(map(str, command)), env=environment(threads), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
    return done.stdout


# nanoGPT


def write_characters(data: Path, folder: Path) -> None:
    """train.bin, val.bin and meta.pkl, as nanoGPT's prepare.py makes them, but cut where the two files are."""
    files = {"train": "tinyshakespeare.train.txt", "val": "tinyshakespeare.valid.txt"}
    texts = {name: (data / file).read_text("ascii") for name, file in files.items()}
    characters = sorted(set("".join(texts.values())))
    number = {character: i for i, character in enumerate(characters)}
    for name, text in texts.items():
        np.array([number[character] for character in text], dtype=np.uint16).tofile(folder / f"{name}.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": number}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


class Said(NamedTuple):
    """A line of a program's output, and when it came."""

    seconds: float
    line: str


def nanogpt(checkout: Path, folder: Path, threads: int, **options: Any) -> list[Said]:
    """What train.py says in its README's CPU setting, changed by `options`; `folder` holds the data."""
    setting = {
        "device": "cpu",
        "compile": False,
        "eval_iters": 20,
        "log_interval": 1,
        "block_size": LENGTH,
        "batch_size": ROWS,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_embd": WIDTH,
        "max_iters": ITERATIONS,
        "lr_decay_iters": ITERATIONS,
        "dropout": 0.0,
        "dataset": folder.resolve(),  # joined to its folder of data, an absolute path stays as it is
        "out_dir": (folder / "out").resolve(),
        "always_save_checkpoint": True,
        **options,
    }
    command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py"]
    command += [f"--{name}={value}" for name, value in setting.items()]
    with (folder / "stderr").open("w+b") as complaints:
        process = subprocess.Popen(
            command, cwd=checkout, env=environment(threads), stdout=subprocess.PIPE, stderr=complaints, text=True
        )
        assert process.stdout is not None
        said = [Said(time.monotonic(), line) for line in process.stdout]
        if process.wait():
            complaints.seek(0)
            sys.exit(f"nanoGPT failed\n{complaints.read().decode()[-1500:]}")
    return said


def when(said: list[Said], beginning: str) -> float:
    """The time of the first line that begins so."""
    return next(each.seconds for each in said if each.line.startswith(beginning))


def whole_text_loss(checkout: Path, folder: Path) -> float:
    """Nats per character of nanoGPT's last checkpoint over the whole validation text, the first character apart."""
    import torch

    theirs = runpy.run_path(str(checkout / "model.py"))
    kept = torch.load(folder / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
    if kept["iter_num"] != ITERATIONS:
        sys.exit(f"nanoGPT's last checkpoint is of iteration {kept['iter_num']}, not {ITERATIONS}")
    model = theirs["GPT"](theirs["GPTConfig"](**kept["model_args"]))
    model.load_state_dict(kept["model"])
    model.eval()
    ids = torch.from_numpy(np.fromfile(folder / "val.bin", dtype=np.uint16).astype(np.int64))
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, LENGTH):
            window = ids[start : start + LENGTH + 1]
            _, loss = model(window[None, :-1], window[None, 1:])
            total += float(loss) * (len(window) - 1)
    return total / (len(ids) - 1)


# Ours


def stage_lines(recipe: str | Path, data: Path, folder: Path, threads: int, overrides: list[str]) -> list[Any]:
    """The pretrain stage's metrics, its summary behind them; the tokenizer's stage comes first."""
    options = ["--recipe", recipe, "--runs-dir", folder, f"data.root={data.resolve()}", f"threads={threads}"]
    for stage in ("tokenizer", "pretrain"):
        run([sys.executable, "-m", "rlhf", "run", stage, *options, *overrides], threads)
    stage_folder = next(folder.glob("*/pretrain"))
    lines = (stage_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [*map(json.loads, lines), json.loads((stage_folder / "summary.json").read_text(encoding="utf-8"))]


class Point(NamedTuple):
    """A validation: how many seconds after the first step's beginning it was done, and nats per byte."""

    seconds: float
    loss: float


def course(lines: list[Any]) -> list[Point]:
    """The validations on the way, and the last one, after the time of the last step: it has no line of its own."""
    key = "validation_bits_per_byte"
    points = [Point(line["time"], line[key] * math.log(2)) for line in lines[:-1] if key in line]
    end = max(line["time"] for line in lines[:-1])
    return [*points, Point(end, lines[-1][key] * math.log(2))]


def first_at(points: list[Point], loss: float) -> float:
    """When the loss is first so low; infinity for never."""
    return min((point.seconds for point in points if point.loss <= loss), default=math.inf)


def loss_after(points: list[Point], seconds: float) -> float:
    """The loss of the last validation that is done by then; infinity where none is."""
    done = [point.loss for point in points if point.seconds <= seconds]
    return done[-1] if done else math.inf


# The parts


def shakespeare(args: argparse.Namespace) -> dict[str, Any]:
    """Time to nanoGPT's loss, and loss at nanoGPT's time."""
    rounds: list[dict[str, Any]] = []
    for number in range(1, args.rounds + 1):
        with tempfile.TemporaryDirectory() as name:
            rounds.append(shakespeare_round(args, Path(name), [f"seed={number}", *args.overrides]))
        print(f"round {number}: {json.dumps(rounds[-1])}", flush=True)
    median = {key: statistics.median(found[key] for found in rounds) for key in rounds[0] if key != "course"}
    table = Table("medians", "ours", "nanoGPT", "ours / nanoGPT", "wanted")
    for what, mine, their, wanted in (
        (f"seconds to {TARGET} nats per byte", "seconds_to_target", "nanogpt_seconds", "0.333 at most"),
        ("nats per byte after nanoGPT's seconds", "loss_at_nanogpt_seconds", "nanogpt_loss", "ours 1.62 at most"),
        ("seconds in all", "seconds", "nanogpt_seconds", ""),
        ("nats per byte at the end", "loss", "nanogpt_loss", ""),
    ):
        a, b = median[mine], median[their]
        table.add_row(what, f"{a:.4g}", f"{b:.4g}", f"{a / b:.3f}", wanted)
    console.print(table)
    return {"rounds": rounds}


def shakespeare_round(args: argparse.Namespace, folder: Path, overrides: list[str]) -> dict[str, Any]:
    write_characters(args.data, folder)
    said = nanogpt(args.nanogpt, folder, args.threads)
    seconds = when(said, f"step {ITERATIONS}:") - when(said, "step 0:")
    points = course(stage_lines("shakespeare", args.data, folder / "runs", args.threads, overrides))
    return {
        "nanogpt_seconds": seconds,
        "nanogpt_loss": whole_text_loss(args.nanogpt, folder),
        "seconds": points[-1].seconds,
        "loss": points[-1].loss,
        "seconds_to_target": first_at(points, TARGET),
        "loss_at_nanogpt_seconds": loss_after(points, seconds),
        "course": points,
    }


def throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of the two or three, in turns."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_characters(args.data, folder)
        for number in range(args.rounds):
            found.setdefault("nanoGPT", []).append(nanogpt_rate(args, folder))
            found.setdefault("ours", []).append(our_rate(args, folder / str(number)))
            if args.peer:
                found.setdefault("transformers.Trainer", []).append(peer_rate(args, folder / str(number)))
            print(f"round {number + 1}: { ({name: rates[-1] for name, rates in found.items()}) }", flush=True)
    table = Table("tokens/s", "median", "least", "most", "ours / this, median", "least", "most", "wanted")
    wanted = {"nanoGPT": "1.00 at least", "transformers.Trainer": "1.05 at least"}
    for name, rates in found.items():
        ratios = [mine / other for mine, other in zip(found["ours"], rates, strict=True)]
        row = [f"{value:,.0f}" for value in (statistics.median(rates), min(rates), max(rates))]
        row += [f"{value:.3f}" for value in (statistics.median(ratios), min(ratios), max(ratios))]
        table.add_row(name, *row, wanted.get(name, ""))
    console.print(table)
    return {"tokens_per_second": found}


def nanogpt_rate(args: argparse.Namespace, folder: Path) -> float:
    never = 10**9
    said = nanogpt(args.nanogpt, folder, args.threads, max_iters=args.steps, eval_interval=never, eval_iters=1)
    seconds = when(said, f"iter {args.steps}:") - when(said, f"iter {LEFT_OUT}:")
    return (args.steps - LEFT_OUT) * ROWS * LENGTH / seconds


def our_rate(args: argparse.Namespace, folder: Path) -> float:
    """Between the lines of metrics.jsonl; the run stays in `folder`."""
    recipe = {
        "name": "bench",
        "stages": ["tokenizer", "pretrain"],
        "tokenizer": {"train": [{"path": "tinyshakespeare.train.txt"}], "vocab_size": args.vocabulary},
        "model": {
            "architecture": args.architecture,
            "layers": LAYERS,
            "width": WIDTH,
            "heads": HEADS,
            "context": LENGTH,
        },
        "pretrain": {
            "train": [{"path": "tinyshakespeare.train.txt"}],
            "validation": [{"path": "tinyshakespeare.valid.txt"}],
            "tokens": args.steps * ROWS * LENGTH,
            "tokens_per_step": ROWS * LENGTH,
            "sequence_length": LENGTH,
            "learning_rate": 1.0e-3,
            "validate_every": args.steps,
            "log_every": LEFT_OUT,
        },
    }
    folder.mkdir()
    file = folder / "bench.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    lines = [line for line in stage_lines(file, args.data, folder, args.threads, args.overrides) if "loss" in line]
    first, last = lines[0], lines[-1]
    return (last["step"] - first["step"]) * ROWS * LENGTH / (last["time"] - first["time"])


def peer_rate(args: argparse.Namespace, folder: Path) -> float:
    """The Trainer's, on the shape and with the tokenizer of the run in `folder`."""
    model = folder / "bench" / "pretrain" / "model"
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama":
        sys.exit("the peer trains a Llama only: --architecture llama")
    fields = folder / "fields.json"
    fields.write_text(json.dumps({"intermediate_size": config["intermediate_size"]}), encoding="utf-8")
    options = {
        "text": (args.data / "tinyshakespeare.train.txt").resolve(),
        "valid": (args.data / "tinyshakespeare.valid.txt").resolve(),
        "tokenizer": model,
        "config": fields,
        "layers": LAYERS,
        "dim": WIDTH,
        "heads": HEADS,
        "ctx": LENGTH,
        "batch": ROWS,
        "steps": args.steps,
        "threads": args.threads,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    said = run([args.peer_python, args.peer.resolve(), *words], args.threads)
    return float(json.loads(said.splitlines()[-1])["tokens_per_s"])


# On a GPU


class Shape(NamedTuple):
    """A model's, and the length of its rows."""

    vocabulary: int
    layers: int
    width: int
    heads: int
    length: int


GPT2_124M, TINY = Shape(50304, 12, 768, 12, 1024), Shape(512, 2, 64, 2, 32)


def flops_per_token(parameters: int, shape: Shape) -> int:
    """Of one forward and backward pass: Chowdhery et al. 2022 (PaLM), appendix B, counting no causality."""
    return 6 * parameters + 12 * shape.layers * shape.width * shape.length


def peak_of(card: str) -> float:
    """Dense bf16 TFLOP/s by the card's name; not a number for a card that isn't in the table."""
    return next((peak for name, peak in PEAKS.items() if name in card), math.nan)


class Trained(NamedTuple):
    """What the stage's own loop came to on random tokens."""

    parameters: int
    lines: list[dict[str, Any]]  # of metrics.jsonl, one a step


def train_on_random_tokens(shape: Shape, batch: int, steps: int, folder: Path) -> Trained:
    """The stage's loop (guard against spikes, clipping, figures and all) on a model of this shape, compiled."""
    from rlhf.data.tokens import PackedTokens
    from rlhf.job import Job
    from rlhf.model import count_parameters
    from rlhf.recipe import parse_recipe
    from rlhf.rundir import RunDir
    from rlhf.runtime import make_accelerator, seed_everything
    from rlhf.sharding import WholeModels
    from stages.pretrain.plan import Plan
    from stages.pretrain.training import Training

    nothing = [{"builtin": "tinyworld", "rows": 1}]
    recipe = parse_recipe(
        {
            "name": "gpu",
            "stages": ["tokenizer", "pretrain"],
            "tokenizer": {"train": nothing},
            "pretrain": {
                "train": nothing, "validation": nothing, "sequence_length": shape.length, "learning_rate": 6e-4,
                "tokens_per_step": batch * shape.length, "tokens": steps * batch * shape.length, "compile": True,
                "log_every": 1, "validate_every": 10**9,
            },
        },
        "scripts/bench_pretrain",
    )  # fmt: skip
    settings = recipe.pretrain
    assert settings is not None
    seed_everything(0)
    accelerator = make_accelerator()
    model = random_gpt2(shape).to(accelerator.device)
    tokens = np.random.default_rng(0).integers(0, shape.vocabulary, 4 * batch * shape.length + 1, dtype=np.uint16)
    tokens.tofile(folder / "tokens.bin")
    packed = PackedTokens(folder / "tokens.bin", shape.vocabulary, shape.length, seed=0)
    job = Job(recipe, RunDir(folder), "pretrain")
    job.directory.path.mkdir()
    holding = WholeModels(accelerator)
    training = Training(
        job, settings, model, packed, Plan(settings), batch, None, accelerator, holding, dict, compiled=True
    )
    training.run()
    return Trained(count_parameters(model), read_lines(job.directory.metrics))


def random_gpt2(shape: Shape) -> Any:
    from rlhf.model import build_causal_lm, causal_lm_config

    return build_causal_lm(
        causal_lm_config(
            "gpt2",
            vocab_size=shape.vocabulary,
            layers=shape.layers,
            width=shape.width,
            heads=shape.heads,
            kv_heads=None,
            mlp_width=None,
            context=shape.length,
            rope_theta=10000.0,
            initializer_range=0.02,
            sliding_window=None,
            sliding_layers=(),
            tie_embeddings=True,
            special={"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1},
        )
    )


def read_lines(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def gpu(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second and model FLOPs utilisation."""
    import torch

    on_card = torch.cuda.is_available()
    if not on_card and not args.tiny:
        sys.exit("no GPU here; --tiny tries the script without one")
    card = torch.cuda.get_device_name() if on_card else "CPU"
    shape, warm_up = TINY if args.tiny else GPT2_124M, 10
    with tempfile.TemporaryDirectory() as name:
        parameters, lines = train_on_random_tokens(shape, args.batch, warm_up + args.steps, Path(name))
    before, after = lines[warm_up - 1], lines[-1]
    seconds = after["time"] - before["time"]
    rate = (after["tokens"] - before["tokens"]) / seconds
    peak = args.peak or peak_of(card)
    used = flops_per_token(parameters, shape) * rate / (peak * 1e12)
    table = Table(card, "")
    table.add_row("parameters", f"{parameters:,}")
    table.add_row("tokens of a step", f"{args.batch} x {shape.length:,}")
    table.add_row("compilation and warm-up, seconds", f"{before['time']:.1f}")
    table.add_row("milliseconds a step", f"{1000 * seconds / args.steps:.1f}")
    table.add_row("tokens/s", f"{rate:,.0f}")
    table.add_row(f"model FLOPs utilisation, of {peak:g} TFLOP/s", f"{used:.1%} (wanted: 35 % at least)")
    table.add_row("of the matrix product's speed here", f"{after['model_flops_utilisation']:.1%} (last step)")
    if on_card:
        table.add_row("peak GPU memory, MiB", f"{torch.cuda.max_memory_allocated() / 2**20:,.0f}")
    console.print(table)
    return {
        "card": card,
        "parameters": parameters,
        "tokens_per_second": rate,
        "utilisation": used,
        "first_loss": lines[0]["loss"],
    }


def main() -> None:
    args = parse()
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "shakespeare": shakespeare,
        "throughput": throughput,
        "gpu": gpu,
    }
    result = parts[args.part](args)
    line = json.dumps({"args": {key: str(value) for key, value in vars(args).items()}, **result})
    print(line)
    if args.json:
        with args.json.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
