"""What every stage runs in: seeds, threads, device, progress on the terminal, metrics in a file, time and memory.

Imports torch only inside functions, so that a process which merely shows progress stays light.
"""

import errno
import io
import json
import math
import os
import resource
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rlhf.errors import UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from rlhf.trackers import Trackers

PLAIN_LINE_SECONDS = 10.0  # how often a line is printed where the output is no terminal


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed below 2**31 that depends on (seed, purpose) alone, so that stages never share their draws."""
    return zlib.crc32("/".join(map(str, (seed, *purpose))).encode()) & 0x7FFFFFFF


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch, and asks torch for deterministic kernels where they exist."""
    import random

    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)


def make_accelerator(precision: str = "auto") -> "Accelerator":
    """The stage's Accelerator, in the recipe's `precision`.

    Raises UserError where the device lacks it, or a launcher asks for what the stages can't do.
    """
    import torch
    from accelerate import Accelerator

    refuse_sharding()
    mixed = "bf16" if uses_bfloat16(precision) else "no"
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=mixed)


class Sharding(NamedTuple):
    """How a launcher wants models to be cut into pieces, one for each process."""

    reshard_after_forward: bool = True  # a layer's weights are gathered again for its backward pass
    offload: bool = False  # pieces lie in the host's memory
    zero: bool = False  # DeepSpeed's ZeRO-3, where reshard_after_forward is true and offload false; else FSDP2


def take_over_sharding() -> Sharding | None:
    """What Accelerate's launcher has told this process of FSDP or DeepSpeed, which the libraries are not told any more.

    With it Accelerate would wrap models in its own way (on CPUs with DDP, without a word), and transformers would leave
    the weights of all ranks but the first empty. Raises UserError for what we don't do.
    """
    if _take_over_deepspeed():
        return Sharding(zero=True)
    told = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith("FSDP_")}
    if not _is_on(os.environ.pop("ACCELERATE_USE_FSDP", "")):
        return None
    if told.get("FSDP_VERSION") != "2":
        raise UserError("the launcher asks for FSDP version 1; only FSDP2 is followed: fsdp_version: 2")
    for name, key in (
        ("FSDP_ACTIVATION_CHECKPOINTING", "fsdp_activation_checkpointing"),
        ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "fsdp_activation_checkpointing_offload"),
    ):
        if _is_on(told.get(name, "")):
            raise UserError(f"the launcher asks for {key}, which no stage follows: the recipe says it")
    return Sharding(
        reshard_after_forward=_is_on(told.get("FSDP_RESHARD_AFTER_FORWARD", "true")),
        offload=_is_on(told.get("FSDP_OFFLOAD_PARAMS", "")),
    )


FOLLOWED_OF_DEEPSPEED = {  # what Accelerate's launcher may tell its ranks of DeepSpeed, and the values that we follow
    "zero_stage": "3",
    "offload_optimizer_device": "none",
    "offload_param_device": "none",
    "config_file": "none",
    "moe_layer_cls_names": "none",
}


def _take_over_deepspeed() -> bool:
    """Whether the launcher asks for ZeRO-3. Raises UserError where it asks for more, or for what isn't installed."""
    ours = ("ACCELERATE_DEEPSPEED_", "ACCELERATE_GRADIENT_", "ACCELERATE_CONFIG_DS_")
    told = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith(ours)}
    if not _is_on(os.environ.pop("ACCELERATE_USE_DEEPSPEED", "")):
        return False
    for key, must in FOLLOWED_OF_DEEPSPEED.items():
        value = told.get(f"ACCELERATE_DEEPSPEED_{key.upper()}", must)
        if value.lower() != must:
            raise UserError(f"the launcher asks for DeepSpeed with {key}: {value}, and only {key}: {must} is followed")
    check_deepspeed()
    return True


def check_deepspeed() -> None:
    """Raises UserError where DeepSpeed isn't installed; imports nothing."""
    if find_spec("deepspeed") is None:
        raise UserError(
            "ZeRO-3 needs the package deepspeed, which is not installed; it comes with pip install 'rlhf[deepspeed]' "
            "(from a checkout: pip install -e '.[deepspeed]'), and fsdp2 and fsdp2-cpu do without"
        )


def _is_on(value: str) -> bool:
    return value.lower() in ("1", "true", "yes", "y", "t", "on")


SHARDING = {  # what Accelerate's launcher sets for its ranks, and what it means
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def refuse_sharding() -> None:
    """Raises UserError where a launcher asks for sharded models in a way that isn't ours (see `take_over_sharding`)."""
    for name, what in SHARDING.items():
        if _is_on(os.environ.get(name, "")):
            raise UserError(
                f"the launcher asks for {what} ({name}), by which no stage shards models: take fsdp2 or zero3, or a "
                "launch file with distributed_type: FSDP and fsdp_version: 2"
            )


def uses_bfloat16(precision: str) -> bool:
    """Whether training computes in bfloat16: by itself where a GPU has it, never on a CPU (many times slower there).

    Raises UserError where the recipe asks for what the device has no hardware for.
    """
    import torch

    if torch.cuda.is_available():
        has, what = torch.cuda.is_bf16_supported(including_emulation=False), "this GPU"
        by_itself = has
    else:
        has, what = _cpu_has_bfloat16(), "this processor"
        by_itself = False
    if precision == "bfloat16" and not has:
        raise UserError(f"precision: {what} has no hardware for bfloat16, so it would be many times slower")
    return precision == "bfloat16" or (precision == "auto" and by_itself)


def _cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 (AVX-512 BF16, AMX, or what other kinds have for it)."""
    import torch

    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and any(
            sign in Path("/proc/cpuinfo").read_text() for sign in ("avx512_bf16", "amx_bf16", " bf16 ")
        )
    except (OSError, AttributeError, RuntimeError):
        return False


def device() -> "torch.device":
    """The device that a process without an Accelerator computes on."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def log(message: str) -> None:
    """Says one thing to the user. What models and files say can't move the cursor."""
    Console(highlight=False, soft_wrap=True).print(visible(message), markup=False, emoji=False)


def visible(text: str) -> str:
    """Model output made safe for a terminal: control characters but newline and tab are shown, not obeyed."""

    def shown(character: str) -> str:
        code = ord(character)
        control = (code < 32 and character not in "\n\t") or 127 <= code < 160 or 0x202A <= code <= 0x202E
        return f"\\x{code:02x}" if control or 0x2066 <= code <= 0x2069 else character

    return "".join(map(shown, text))


def format_seconds(seconds: float) -> str:
    """`75` is `1:15`."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_number(value: float) -> str:
    """Few digits, all that a progress line has room for."""
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) < 1e7 and abs(value) >= 1000 else f"{value:.2e}"


def print_anything() -> None:
    """Lets both streams take any text: what their encoding lacks is written as an escape, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Bar:
    """Progress of a loop: a bar with figures and the time left on a terminal, a line now and then elsewhere."""

    def __init__(self, what: str, total: int | None, done: int = 0, *, lines: bool = False) -> None:
        """`done` of the steps were done before, by a run that was interrupted. `lines`: every step leaves a line.

        `total` is None where nobody knows it before the end.
        """
        self._what, self._total, self._before, self._lines = what, total, done, lines
        self._console = Console(highlight=False, soft_wrap=True)
        self._started = self._printed = time.monotonic()
        self._shown = -1
        self._rich: Progress | None = None
        if self._console.is_terminal:
            self._rich = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]} left"),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._task = self._rich.add_task(what, total=total, completed=done, figures="", left="-:--")

    def __enter__(self) -> "Bar":
        if self._rich:
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich:
            self._rich.stop()

    def show(self, done: int, work: float | None = None, **figures: float) -> None:
        """Shows how far the loop is, with the figures that matter.

        `work`: the share of all work that is done, where steps are not equally long; the time left follows from it.
        """
        now = time.monotonic()
        left = "-:--"
        if self._total is not None:
            whole = done / max(self._total, 1) if work is None else work
            here = whole * (done - self._before) / max(done, 1)  # what this process has done of it
            left = format_seconds((now - self._started) / here * (1.0 - whole)) if here > 0 else left
        of = f"{done}/{self._total or '?'}"
        text = "  ".join(f"{name.replace('_', ' ')} {format_number(value)}" for name, value in figures.items())
        if self._rich:
            self._rich.update(self._task, completed=done, figures="" if self._lines else text, left=left)
            if self._lines:
                self._console.print(f"{self._what}  {of}  {text}", markup=False, soft_wrap=True)
        elif self._lines or now - self._printed >= PLAIN_LINE_SECONDS or (done == self._total and done > self._shown):
            self._printed, self._shown = now, done
            spent = format_seconds(now - self._started)
            self._console.print(f"{self._what}  {of}  {text}  {spent} gone, {left} left", markup=False, soft_wrap=True)


class MetricsLog:
    """metrics.jsonl: one object a logged step. Numbers that JSON can't hold become text, so every line parses.

    What is logged is passed on to the trackers.
    """

    def __init__(self, path: Path | None, trackers: "Trackers | None" = None) -> None:
        """Without a path (on a rank that doesn't write) nothing is kept. Raises UserError for a link or a folder."""
        self._trackers = trackers
        self._file: BinaryIO | None = None
        if path:
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
                self._file = os.fdopen(os.open(path, flags, 0o666), "ab")
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.EISDIR):
                    raise
                raise UserError(f"{path} is a link or a folder, and not a file; remove it") from None
        self._started = time.monotonic()

    def log(self, **values: Any) -> None:
        """Appends one line, in the file at once."""
        if self._file is None:
            return
        values["time"] = round(time.monotonic() - self._started, 3)
        line = json.dumps({k: _finite(v) for k, v in values.items()}, ensure_ascii=False) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        if self._trackers:
            self._trackers.log(values)

    def position(self) -> dict[str, Any]:
        """Where the file ends now, for a checkpoint; what stands there is on the disk."""
        if self._file is None:
            return {"bytes": 0, "time": 0.0}
        os.fsync(self._file.fileno())
        return {"bytes": self._file.tell(), "time": time.monotonic() - self._started}

    def cut_back(self, position: dict[str, Any] | None, step: int = -1) -> None:
        """Forgets what was logged after a checkpoint, that of this step, so that no step stands there twice.

        None: forgets everything. The trackers start behind it.
        """
        if self._file is None:
            return
        if self._trackers:
            self._trackers.start(step + 1)
        size = position["bytes"] if position else 0
        self._started = time.monotonic() - (position["time"] if position else 0.0)
        there = self._file.seek(0, os.SEEK_END)
        if there < size:
            log("metrics.jsonl is shorter than it was at the checkpoint: some of its lines are lost")
            size = os.pread(self._file.fileno(), there, 0).rfind(b"\n") + 1  # the end of the last whole line
        self._file.truncate(size)
        self._file.seek(size)


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def memory_now() -> float:
    """MiB that this process has in memory; 0 where the system doesn't tell."""
    try:
        fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0.0
    return int(fields[1]) * resource.getpagesize() / 2**20


class Meter:
    """Time, CPU time and memory of a stage's process, for its summary."""

    def __init__(self) -> None:
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._wall = time.monotonic()
        self._earlier = {"seconds": 0.0, "cpu_seconds": 0.0}
        self._libraries = 0.0  # MiB

    def begin_work(self) -> None:
        """Tells that all libraries are loaded and nothing else is: what the process has then is theirs."""
        self._libraries = memory_now()

    def spent(self) -> dict[str, Any]:
        """When the stage began and what it took until now, earlier runs that were interrupted included."""
        own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
        return {
            "seconds": round(self._earlier["seconds"] + time.monotonic() - self._wall, 2),
            "cpu_seconds": round(self._earlier["cpu_seconds"] + cpu, 2),
            "started": self._started,
        }

    def go_on(self, spent: dict[str, Any]) -> None:
        """Counts what an interrupted run had spent when the checkpoint was written that this one goes on from."""
        self._earlier = {key: float(spent[key]) for key in self._earlier}
        self._started = str(spent["started"])

    def summary(self, stage: str, processes: int) -> dict[str, Any]:
        """The keys that every stage's summary has, `parameters` apart; time and memory are this process's."""
        import torch

        where = device()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found: dict[str, Any] = {
            "stage": stage,
            **self.spent(),
            "device": str(where.type) if where.type == "cpu" else torch.cuda.get_device_name(where),
            "processes": processes,
            "threads": torch.get_num_threads(),
            "peak_memory_mib": round(memory, 1),
            "libraries_memory_mib": round(self._libraries, 1),
        }
        if where.type == "cuda":
            found["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated(where) / 2**20, 1)
        return found


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences the progress bars and advice of libraries: a stage shows its own."""
    import warnings

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def end_with_parent() -> None:
    """Asks Linux to kill this process when its parent ends, so that a killed run leaves nothing running."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == 1:
            sys.exit(1)


class Interrupts:
    """SIGINT and SIGTERM of a stage's process. Where they are deferred, the first one only asks: the training loop
    writes a checkpoint and leaves. Elsewhere it interrupts at once, and so does a second one everywhere.
    """

    def __init__(self) -> None:
        self.asked = False
        self._deferred = False

    def install(self) -> None:
        """Takes over both signals; only the main thread may."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._received)

    def _received(self, *_: object) -> None:
        if self.asked:
            os._exit(130)
        self.asked = True
        if not self._deferred:
            raise KeyboardInterrupt

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, the first signal only sets `asked`; one that nobody has answered interrupts at the end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.asked:
            raise KeyboardInterrupt
