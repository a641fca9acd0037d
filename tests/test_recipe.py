"""Recipes: what is refused and how it is said, overrides, and which fields decide staleness."""

from pathlib import Path

import pytest
import yaml

from rlhf.errors import RecipeError
from rlhf.recipe import (
    dump_recipe,
    fields_at_default,
    load_recipe,
    newer_keys,
    parse_recipe,
    result_fields,
    shipped_recipes,
)

MINIMAL = {
    "name": "mini",
    "stages": ["tokenizer"],
    "tokenizer": {"train": [{"builtin": "tinyworld", "rows": 10}], "vocab_size": 300},
}


def write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_every_shipped_recipe_parses_says_what_it_needs_and_shows_its_command(path: Path) -> None:
    recipe = load_recipe(path.stem)
    assert recipe.description
    assert recipe.needs
    assert recipe.takes
    assert f"rlhf run all --recipe {path.stem}" in path.read_text(encoding="utf-8")


def test_the_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", ["seed=7", "ppo.kl.coefficient=0.1", "name=other"])
    again = load_recipe(write(tmp_path / "resolved.yaml", dump_recipe(recipe)))
    assert again == recipe


@pytest.mark.parametrize("off", ["off", "false", "null"])
def test_what_is_off_stays_off_in_the_resolved_recipe(tmp_path: Path, off: str) -> None:
    given = [f"pretrain.prepare.{key}={off}" for key in ("near_duplicates", "filters.hashes")]
    recipe = load_recipe("quickstart", given)
    assert recipe.pretrain and recipe.pretrain.prepare and recipe.pretrain.prepare.filters
    assert recipe.pretrain.prepare.near_duplicates is None
    assert recipe.pretrain.prepare.filters.hashes is None
    assert recipe.pretrain.prepare.filters.ellipses == 0.1
    assert load_recipe(write(tmp_path / "resolved.yaml", dump_recipe(recipe))) == recipe


def test_a_section_that_somebody_wrote_is_not_at_its_default() -> None:
    with_adapters = load_recipe("quickstart", ["sft.lora={}"]).sft
    assert with_adapters is not None
    assert not any(key.startswith("lora") for key in fields_at_default(with_adapters))
    keys = {"prepare.filters.hashes", "prepare.near_duplicates.min_words", "spikes.rise", "lora"}
    assert newer_keys(keys, {"prepare.near_duplicates": None, "lora": None, "spikes.action": "stop"}) == {
        "prepare.filters.hashes",
        "spikes.rise",
    }


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ppo.kl={target: 6, horizon: 100}", ["kl.horizon 100 is less than an update's 128 episodes"]),
        ("ppo.kl.coeficient=0.1", ["ppo.kl.coeficient", "did you mean 'coefficient'"]),
        ("pretrain.prepare={personal_data: on}", ["prepare.personal_data", "keys such as email, phone", "'on'"]),
        ("sede=3", ["sede", "did you mean 'seed'"]),
        ("sft.learning_rate=fast", ["sft.learning_rate", "number", "'fast'"]),
        ("ppo.updates=0", ["ppo.updates", "greater than or equal to 1", "0"]),
        ("ppo.minibatches=5", ["ppo", "128 is not a multiple of minibatches 5"]),
        ("model.architecture=lama", ["model.architecture", "did you mean 'llama'"]),
        ("model.width=130", ["width 130 is not a multiple of heads 4"]),
        ("stages=[ppo, sft]", ["each once, and in this order"]),
        ("stages=[ppo]", ["`base` names the model to begin with"]),
        ("pretrain=null", ["pretrain", "no section"]),
        ("name=../x", ["name", "letters, digits"]),
        ("name=!!python/object/apply:os.system [ls]", ["name", "not a YAML value"]),
        ("name=a/b", ["name", "letters, digits"]),
        ("seed", ["expected key=value"]),
        ("=3", ["expected key=value"]),
        ("seed.deep=1", ["seed is not a section"]),
        ("seed=[", ["not a YAML value"]),
        ("data.root=3", ["data.root", "string"]),
        ("tokenizer.train=[]", ["tokenizer.train", "at least 1"]),
        ("tokenizer.train=[{path: a, hub: b}]", ["exactly one of the keys builtin, path, hub"]),
        ("ppo.learning_rate=.nan", ["ppo.learning_rate", "finite"]),
        ("evaluate.fewshot.shots=[0, 2, 0]", ["evaluate.fewshot.shots", "one of the numbers is there twice"]),
    ],
)
def test_a_wrong_override_is_named_with_what_was_expected(override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", [override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty"),
        ("- a\n- b\n", "a mapping"),
        ("name: [", "not valid YAML"),
        ("name: a\nname: b\n", "comes twice"),
        ("1: 2\n", "not text"),
        ("[" * 5000, "not valid YAML"),
        ("name: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("date: 2026-99-99\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = write(tmp_path / "r.yaml", content)
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(path)
    assert path in str(caught.value)


def test_binary_missing_directory_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\x80\x81\xff\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(str(tmp_path / "binary.yaml"))
    with pytest.raises(RecipeError, match="directory"):
        load_recipe(str(tmp_path))
    with pytest.raises(RecipeError, match="did you mean 'quickstart'"):
        load_recipe("quikstart")
    (tmp_path / "large.yaml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe(str(tmp_path / "large.yaml"))


def test_numbers_with_an_exponent_are_numbers() -> None:
    """YAML 1.1 takes 1e-4 for text."""
    assert load_recipe("quickstart", ["ppo.learning_rate=1e-4"]).ppo.learning_rate == 1e-4  # type: ignore[union-attr]


def test_settings_are_frozen() -> None:
    recipe = parse_recipe(MINIMAL, "here")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 2  # type: ignore[misc]


def test_logging_and_descriptions_do_not_decide_staleness() -> None:
    first = load_recipe("quickstart")
    second = load_recipe("quickstart", ["pretrain.log_every=7", "pretrain.validate_every=9", "ppo.log_every=3"])
    assert first.pretrain is not None
    assert second.pretrain is not None
    assert first.ppo is not None
    assert second.ppo is not None
    assert result_fields(first.pretrain) == result_fields(second.pretrain)
    assert result_fields(first.ppo) == result_fields(second.ppo)
    third = load_recipe("quickstart", ["ppo.kl.coefficient=0.2"]).ppo
    assert third is not None
    assert result_fields(first.ppo) != result_fields(third)
    assert result_fields(third)["kl.coefficient"] == 0.2
