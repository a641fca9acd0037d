"""What a stage is given to do its work: the recipe, the run's directory, its team, and how it is interrupted."""

from dataclasses import dataclass, field
from functools import cached_property

from rlhf.recipe import Recipe, StageName
from rlhf.rundir import RunDir, StageDir
from rlhf.runtime import Interrupts, Meter, MetricsLog, Sharding
from rlhf.team import PeerWatch, Team
from rlhf.trackers import Trackers


@dataclass(frozen=True)
class Job:
    """One stage of one run, as one of its processes sees it."""

    recipe: Recipe
    run: RunDir
    stage: StageName
    team: Team = field(default_factory=Team)
    watch: PeerWatch | None = None
    sharding: Sharding | None = None  # None: every process holds whole models
    meter: Meter = field(default_factory=Meter)
    interrupts: Interrupts = field(default_factory=Interrupts)

    @property
    def directory(self) -> StageDir:
        """Where the stage writes."""
        return self.run.stage(self.stage)

    @cached_property
    def trackers(self) -> Trackers:
        """Who gets the stage's metrics as well; to be closed at the stage's end."""
        return Trackers(self.recipe, self.stage, self.run.trackers)

    def metrics(self) -> MetricsLog:
        """The stage's metrics.jsonl, written by rank 0 alone."""
        return MetricsLog(self.directory.metrics, self.trackers) if self.team.is_main else MetricsLog(None)
