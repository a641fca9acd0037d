"""Recipes: one typed model a section, read from YAML with `key=value` overrides. Imports nothing heavy.

A field marked `changes_result=False` never makes a finished stage stale (a logging interval, a description).
"""

from rlhf.recipe.base import STAGES, Source, StageName, TrackerName, check_name
from rlhf.recipe.evaluate import EvaluateSection, FewShotSection, HarnessSection
from rlhf.recipe.follows import External, evaluating_sampling, externals, microbatches, training_sources, upstream
from rlhf.recipe.ppo import PpoSection
from rlhf.recipe.prepare import FiltersSection, PrepareSection
from rlhf.recipe.pretrain import PretrainSection, SpikesSection
from rlhf.recipe.reading import known_base, load_recipe, parse_recipe, read_yaml, shipped_recipes
from rlhf.recipe.reward import CollectSection, RequireSection, RewardSection, SamplerSection
from rlhf.recipe.sft import SftSection
from rlhf.recipe.shared import EarlyStoppingSection, JudgeSection, LoraSection, Sampling, TooLong
from rlhf.recipe.whole import Recipe, evaluating_judges
from rlhf.recipe.writing import dump_recipe, fields_at_default, newer_keys, result_fields

__all__ = [
    "STAGES",
    "CollectSection",
    "EarlyStoppingSection",
    "EvaluateSection",
    "External",
    "FewShotSection",
    "FiltersSection",
    "HarnessSection",
    "JudgeSection",
    "LoraSection",
    "PpoSection",
    "PrepareSection",
    "PretrainSection",
    "Recipe",
    "RequireSection",
    "RewardSection",
    "SamplerSection",
    "Sampling",
    "SftSection",
    "Source",
    "SpikesSection",
    "StageName",
    "TooLong",
    "TrackerName",
    "check_name",
    "dump_recipe",
    "evaluating_judges",
    "evaluating_sampling",
    "externals",
    "fields_at_default",
    "known_base",
    "load_recipe",
    "microbatches",
    "newer_keys",
    "parse_recipe",
    "read_yaml",
    "result_fields",
    "shipped_recipes",
    "training_sources",
    "upstream",
]
