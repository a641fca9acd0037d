"""How long preparing a corpus takes, with how much memory, and which planted copies it finds, at several sizes.

    scripts/bench_prepare FILE ... [--sizes 100,1000] [--work DIR]

The FILEs are texts (JSON Lines of `text`, plain text), of which sentences are taken: documents of 20 to 2,000 words are
made of them by a seed, until they are so many MB. 3 % of the documents are copied as they are and 5 % with 5 % of their
words changed (replaced, left out, put in), somewhere else in the file, some several times. Then `rlhf run tokenizer`
and `rlhf prepare` run on them with the standard preparation, in a process of their own each.

Prints for every size the seconds of each pass, MB a second, the largest memory of all processes together (PSS counts
once what they share, RSS in each), the share of copies that were found, and of documents of which nothing is left
because of duplicates, and what the filters took.
"""

import argparse
import gzip
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
EXACT, NEAR, CHANGED = 0.03, 0.05, 0.05
RECIPE = """\
name: mb{size}
stages: [tokenizer, pretrain]
data: {{root: {root}}}
tokenizer: {{vocab_size: 8192, train: [{{path: mb{size}.jsonl, rows: 5000}}]}}
model: {{layers: 2, width: 32, heads: 2, context: 64}}
pretrain:
  train: [{{path: mb{size}.jsonl}}]
  validation: [{{path: mb{size}.jsonl, rows: 10}}]
  prepare: {{}}
  tokens: 1024
  tokens_per_step: 1024
  sequence_length: 64
  learning_rate: 1.0e-3
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--sizes", default="100,1000", help="of the corpora in MB, with commas between")
    parser.add_argument("--work", type=Path, help="folder in which a temporary one is made; default: the system's")
    return parser.parse_args()


# The corpora

PIECES = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+|[\W]+")  # words and what is between them


def sentences(files: list[Path]) -> list[str]:
    """What is between full stops, of 4 to 60 words, each once."""
    found: dict[str, None] = {}
    for path in files:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8")
        if ".jsonl" in path.name:
            text = "\n".join(json.loads(line)["text"] for line in text.split("\n") if line)
        for sentence in re.split(r"(?<=[.!?])\s+|(?<=[。！？])", text):
            if 4 <= sum(word.isalnum() for word in PIECES.findall(sentence)) <= 60:
                found[" ".join(sentence.split())] = None
    return list(found)


def documents(pool: list[str], draw: random.Random) -> Iterator[str]:
    """Documents of random sentences in paragraphs, without end."""
    while True:
        wanted = min(2000, max(20, int(draw.lognormvariate(5.7, 0.8))))
        parts: list[str] = []
        words = 0
        while words < wanted or len(parts) < 4:  # a sentence alone would be there again and again
            parts.append(draw.choice(pool))
            words += len(parts[-1].split()) if parts[-1].isascii() else len(parts[-1])
        yield "".join(part + draw.choice([" ", " ", " ", "\n\n"]) for part in parts).strip()


def changed(text: str, pool: list[str], draw: random.Random) -> str:
    """The text with 5 % of its words replaced, left out or with another one before them."""
    words = PIECES.findall(text)
    places = [place for place, word in enumerate(words) if word.isalnum()]
    for place in draw.sample(places, max(1, round(CHANGED * len(places)))):
        other = draw.choice([word for word in PIECES.findall(draw.choice(pool)) if word.isalnum()])
        words[place] = draw.choice([other, "", f"{other} {words[place]}"])
    return "".join(words)


def make(path: Path, size: int, pool: list[str], seed: int) -> list[int]:
    """Writes a corpus of so many MB; the group of each row: copies of one document share it."""
    draw = random.Random(seed)
    groups: list[int] = []
    kept: list[tuple[int, str]] = []  # some earlier documents, to be copied
    written = 0
    with path.open("wb") as file:
        for text in documents(pool, draw):
            chance, group = draw.random(), len(groups)
            if kept and chance < EXACT + NEAR:
                group, text = draw.choice(kept)
                text = text if chance < EXACT else changed(text, pool, draw)
            elif len(kept) < 5000:
                kept.append((group, text))
            else:
                kept[draw.randrange(len(kept))] = (group, text)
            groups.append(group)
            written += file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            if written >= size * 10**6:
                return groups
    return groups


# The runs


class Memory(threading.Thread):
    """The largest memory of a process and its children, in MiB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root, self.pss, self.rss = psutil.Process(pid), 0.0, 0.0

    def run(self) -> None:
        while self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE:
            try:
                found = [p.memory_full_info() for p in (self._root, *self._root.children(recursive=True))]
            except psutil.Error:
                continue
            self.pss = max(self.pss, sum(one.pss for one in found) / 2**20)
            self.rss = max(self.rss, sum(one.rss for one in found) / 2**20)
            time.sleep(0.25)


def run(folder: Path, *words: str) -> tuple[float, Memory]:
    """Runs rlhf; seconds and memory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    started = time.monotonic()
    command = [sys.executable, "-m", "rlhf", *words, "--runs-dir", str(folder)]
    with subprocess.Popen(command, env=environment, cwd=folder) as process:
        memory = Memory(process.pid)
        memory.start()
    if process.returncode:
        sys.exit(process.returncode)
    return time.monotonic() - started, memory


def found_copies(corpus: Path, groups: list[int]) -> dict[str, float]:
    """Shares: of copies that are gone, of groups of which nothing is left, by duplicates and by filters."""
    gone: dict[int, str] = {}
    with (corpus / "removed.jsonl").open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            gone[line["line"] - 1] = line["why"]
    left = Counter(group for row, group in enumerate(groups) if row not in gone)
    judged = [row for row, why in gone.items() if not why.endswith("duplicates")]
    filtered = {groups[row] for row in judged}  # what filters took is nobody's find and nobody's loss
    sizes = {group: size for group, size in Counter(groups).items() if group not in filtered}
    copies = sum(size - 1 for size in sizes.values())
    lost = sum(left[group] == 0 for group in sizes)
    return {
        "found": sum(size - max(left[group], 1) for group, size in sizes.items()) / max(copies, 1),
        "lost": lost / len(sizes),
        "filtered": len(judged) / len(groups),
    }


def measure(size: int, folder: Path, pool: list[str]) -> dict[str, Any]:
    """Everything at one size."""
    groups = make(folder / f"mb{size}.jsonl", size, pool, seed=size)
    recipe = folder / f"mb{size}.yaml"
    recipe.write_text(RECIPE.format(size=size, root=json.dumps(str(folder))), encoding="utf-8")
    run(folder, "run", "tokenizer", "--recipe", str(recipe))
    seconds, memory = run(folder, "prepare", "--recipe", str(recipe))
    corpus = folder / f"mb{size}" / "corpus"
    card = json.loads((corpus / "card.json").read_text(encoding="utf-8"))
    found = {"documents": len(groups), "seconds": seconds, "passes": card["seconds"], "pss": memory.pss}
    return {**found, "rss": memory.rss, "tokens": card["out"]["tokens"], **found_copies(corpus, groups)}


def main() -> None:
    args = parse()
    pool = sentences(args.texts)
    console = Console(width=150)
    console.print(f"{len(pool):,} sentences")
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        rows = [(size, measure(size, Path(name), pool)) for size in map(int, args.sizes.split(","))]
    passes = list(rows[0][1]["passes"])
    table = Table("MB", "documents", "seconds", *passes, "MB/s", "PSS MiB", "RSS MiB", "found", "lost", "filtered")
    for size, found in rows:
        table.add_row(
            str(size), f"{found['documents']:,}", f"{found['seconds']:.0f}",
            *(f"{found['passes'][name]:.0f}" for name in passes), f"{size / found['seconds']:.1f}",
            f"{found['pss']:.0f}", f"{found['rss']:.0f}",
            f"{found['found']:.4f}", f"{found['lost']:.4f}", f"{found['filtered']:.4f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
