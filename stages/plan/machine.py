"""What a plan is for: GPUs or this machine's processors, and how fast named GPUs are.

Rates are the vendors' for dense bfloat16 products, without sparsity; bandwidths of the memory. What training reaches of
them is an assumption, told with every estimate.
"""

import os
from typing import NamedTuple

GIB = 2**30
TRAINING_SHARE = 0.4  # of the rated products, in forward and backward passes of well-filled microbatches
READING_SHARE = 0.5  # of the rated bandwidth, while responses are drawn a token at a time
KERNEL_SECONDS, KERNELS_A_LAYER = 8e-6, 25  # a decoding step of a small model waits for its kernels to be started


class Gpu(NamedTuple):
    """A kind of GPU."""

    name: str
    flops: float  # a second, bfloat16
    bandwidth: float  # bytes a second
    memory: int  # GiB


GPUS = (
    Gpu("RTX 3090 24 GB", 71e12, 0.94e12, 24),
    Gpu("RTX 4090 24 GB", 165e12, 1.01e12, 24),
    Gpu("A100 80 GB", 312e12, 2.04e12, 80),
    Gpu("H100 80 GB", 989e12, 3.35e12, 80),
    Gpu("H200 141 GB", 989e12, 4.8e12, 141),
    Gpu("B200 180 GB", 2250e12, 7.7e12, 180),
)


class Machine(NamedTuple):
    """Where the stages are to run."""

    processes: int
    gpu_memory: int  # bytes of each process's GPU; 0: on the CPU
    sharded: bool = False  # whether weights, gradients and optimiser are shared out among the processes
    bfloat16: bool = False  # whether passes compute in it
    attention: str | None = None  # the implementation; None: transformers' choice

    @property
    def on_gpus(self) -> bool:
        """Whether each process has a GPU."""
        return self.gpu_memory > 0

    @property
    def room(self) -> int:
        """Bytes that a process may take."""
        return self.gpu_memory or free_memory() // self.processes

    def __str__(self) -> str:
        if self.on_gpus:
            count = "one GPU" if self.processes == 1 else f"{self.processes} GPUs"
            how = ", weights and optimiser in pieces" if self.sharded else ""
            return f"{count} with {self.gpu_memory / GIB:.0f} GiB{' each' if self.processes > 1 else ''}{how}"
        count = "one process" if self.processes == 1 else f"{self.processes} processes"
        return f"{count} on this machine's processors, {free_memory() / GIB:.1f} GiB of memory free"

    def kinds(self) -> list[Gpu]:
        """The named GPUs that have so much memory."""
        return [gpu for gpu in GPUS if gpu.memory * GIB >= self.gpu_memory]


def free_memory() -> int:
    """Bytes that new processes can have here, what the system would free for them included."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = dict(line.split(":") for line in file)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Work(NamedTuple):
    """What a stage has to compute, over all processes."""

    flops: float  # in forward and backward passes
    steps: float = 0.0  # of decoding, one after the other, on each process
    step_bytes: float = 0.0  # that each of them reads
    layers: int = 0

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        steps = self.steps + other.steps
        read = (self.steps * self.step_bytes + other.steps * other.step_bytes) / steps if steps else 0.0
        return Work(self.flops + other.flops, steps, read, max(self.layers, other.layers))

    def hours(self, gpu: Gpu, count: int) -> float:
        """On so many GPUs of a kind."""
        started = self.layers * KERNELS_A_LAYER * KERNEL_SECONDS
        decoding = self.steps * max(started, self.step_bytes / (READING_SHARE * gpu.bandwidth))
        return (self.flops / (TRAINING_SHARE * gpu.flops * count) + decoding) / 3600

    def hours_here(self, flops_per_second: float) -> float:
        """On processors that multiply matrices so fast, all threads together; decoding reads no slower there."""
        return self.flops / (TRAINING_SHARE * flops_per_second) / 3600
