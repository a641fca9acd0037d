"""What a stage took of electricity: an estimate from its CPU and GPU time, good within a factor of about two."""

from typing import Any, NamedTuple

from evaluation.report.reading import number

WATTS_OF_A_CPU_CORE = 10.0  # while it computes, its share of memory and power supply included
WATTS_OF_A_GPU = 500.0  # what a large accelerator may take at most
SHARE_IN_USE = 0.7  # of that, while it trains

ASSUMPTIONS = (
    f"Energy is an estimate, good within a factor of about 2: {WATTS_OF_A_CPU_CORE:g} W for each busy CPU core (CPU-"
    f"seconds), {SHARE_IN_USE:g} × {WATTS_OF_A_GPU:g} W for each GPU for as long as the stage ran, unless it was "
    "measured; cooling and idle machines are not counted."
)


class Energy(NamedTuple):
    """Watt-hours of a stage."""

    cpu: float
    gpu: float

    @property
    def total(self) -> float:
        """Both."""
        return self.cpu + self.gpu


def energy(summary: dict[str, Any]) -> Energy | None:
    """The estimate for a stage's summary; None where it doesn't say how long it took."""
    seconds, cpu_seconds = number(summary, "seconds"), number(summary, "cpu_seconds")
    if seconds is None or cpu_seconds is None:
        return None
    gpu = number(summary, "gpu_energy_wh")
    if gpu is None:
        gpus = 0.0 if summary.get("device") == "cpu" else number(summary, "processes") or 1.0
        gpu = gpus * WATTS_OF_A_GPU * SHARE_IN_USE * seconds / 3600
    return Energy(WATTS_OF_A_CPU_CORE * cpu_seconds / 3600, gpu)
