"""What every section is made of: names of stages, strictness, sources of data."""

from __future__ import annotations

import re
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

StageName = Literal["tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate"]
STAGES: tuple[StageName, ...] = typing.get_args(StageName)

TrackerName = Literal[
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]  # those of accelerate.tracking

LARGEST_NUMBER = 10**15
NO_RESULT: dict[str, Any] = {"changes_result": False}


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_sane(cls, values: Any) -> Any:
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > LARGEST_NUMBER:
                raise ValueError(f"{key}: {str(value)[:20]} is larger than anything here can be")
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field and field.annotation in (int, float, int | None, float | None):
                raise ValueError(f"{key}: a number is expected, not {str(value).lower()}")
        return values


class Source(Section):
    """One source of data: exactly one of `builtin`, `path` and `hub`."""

    builtin: Literal["tinyworld"] | None = Field(None, description="data that the package makes itself")
    path: str | None = Field(
        None, description="file or glob below data.root: .jsonl .json .txt, each also .gz or .zst, .parquet"
    )
    hub: str | None = Field(
        None, description="id of a data set on the Hugging Face hub, or a folder that holds one, which goes first"
    )
    split: str = Field("train", description="which split of the hub's data set, or part of it: train[5000:]")
    subset: str | None = Field(None, description="which configuration of the hub's data set")
    streaming: bool = Field(False, description="read the hub's data set row by row, without downloading it whole")
    format: Literal["trl", "alpaca", "sharegpt", "chatml", "hh"] = Field(
        "trl", description="the shape of the rows; the others are converted to TRL's"
    )
    rows: int | None = Field(None, ge=1, description="take this many rows (needed for builtin: it never ends)")
    weight: float = Field(
        1.0, gt=0, le=1000, description="how often each row is used: 2 is twice, 0.5 is a random half"
    )
    name: str | None = Field(None, min_length=1, max_length=60, description="what figures call it; default: after it")

    @model_validator(mode="after")
    def _exactly_one(self) -> Source:
        if sum(x is not None for x in (self.builtin, self.path, self.hub)) != 1:
            raise ValueError("a source has exactly one of the keys builtin, path, hub")
        return self

    def __str__(self) -> str:
        return self.name or self.path or (f"hub:{self.hub}" if self.hub else f"builtin:{self.builtin}")


Sources = Annotated[tuple[Source, ...], Field(min_length=1)]


class DataSection(Section):
    """How data files are found and read."""

    root: str = Field(".", description="where relative paths of sources start", json_schema_extra=NO_RESULT)
    on_bad_row: Literal["error", "skip"] = Field("error", description="stop at a bad row, or count it and go on")


def check_name(name: str) -> str:
    """The name of a run or a person, if it can be a file's. Raises ValueError where it can't."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name.endswith("."):
        raise ValueError("a name has letters, digits, '.', '_' and '-', begins with a letter or digit, no '/'")
    return name
