"""Values of a recipe as people write them, in YAML and as flags: the right value, or one error."""

import pytest

from gpt2repro.command import UsageError
from gpt2repro.recipe import Recipe
from gpt2repro.recipe_parser import parse_recipe, read_recipe, write_recipe
from tests.conftest import ROOT

# A field, its text in YAML and as a flag, and its value.
VALUES = [
    ("learning_rate", "6e-4", 6e-4),
    ("learning_rate", "1", 1.0),
    ("mixed_precision", "no", "no"),
    ("compile", "true", "true"),
    ("output_dir", "12:30", "12:30"),
    ("output_dir", "20251125_10", "20251125_10"),
    ("output_dir", "0x10", "0x10"),
    ("output_dir", "2025-11-25", "2025-11-25"),
    ("warmup_steps", "010", 10),
    ("global_batch_tokens", "524,288", 524_288),
    ("global_batch_tokens", "524_288", 524_288),
    ("max_steps", "1e9", 1_000_000_000),
    ("seed", "9007199254740993", 2**53 + 1),
    ("seed", "9223372036854775807", 2**63 - 1),
    ("shuffle", "False", False),
    ("n_layer", "null", None),
    ("n_layer", "~", None),
    ("muon_learning_rate", "null", None),
    ("init_from", "null", None),
    ("max_steps", "1.5e3", 1500),
    ("learning_rate", ".5", 0.5),
    ("sample_prompt", "~/notes", "~/notes"),
]
# A field, its text, and what is expected instead.
MISTAKES = [
    ("learning_rate", "0,0006", "a number"),
    ("learning_rate", "6e-4x", "a number"),
    ("learning_rate", "null", "a number"),
    ("max_steps", "12:30", "a whole number"),
    ("max_steps", "0x10", "a whole number"),
    ("max_steps", "52,4288", "a whole number"),
    ("max_steps", "0,5", "a whole number"),
    ("max_steps", "1e-3", "a whole number"),
    ("seed", "9007199254740993.5", "a whole number"),
    ("n_layer", "many", "a whole number or null"),
    ("shuffle", "no", "true or false"),
    ("output_dir", "null", "a text"),
    ("max_steps", "1__0", "a whole number"),
    ("max_steps", "20251125_10", "a whole number"),
    ("max_steps", "1.000", "a whole number"),
    ("max_steps", "５", "a whole number"),
    ("max_steps", "NaN", "a whole number"),
    ("learning_rate", "0_6e-4", "a number"),
    ("learning_rate", "٥", "a number"),
    ("learning_rate", "1e-400", "a number"),
    ("learning_rate", ".inf", "a number"),
]


def by_flag(*words: str) -> Recipe:
    return parse_recipe(list(words), default="none.yaml")


@pytest.fixture
def by_yaml(tmp_path):
    """The recipe that a YAML file with this text is."""

    def parse(text: str) -> Recipe:
        (tmp_path / "recipe.yaml").write_text(text)
        return parse_recipe(["--recipe", str(tmp_path / "recipe.yaml")], default="none.yaml")

    return parse


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_a_value_has_the_type_of_its_field(by_yaml, name, text, value):
    for recipe in (by_yaml(f"{name}: {text}"), by_flag(f"--{name}", text)):
        assert getattr(recipe, name) == value
        assert type(getattr(recipe, name)) is type(value)


@pytest.mark.parametrize(("name", "text", "expected"), MISTAKES)
def test_a_value_of_another_type_is_one_error(by_yaml, name, text, expected):
    for parse in (lambda: by_yaml(f"{name}: {text}"), lambda: by_flag(f"--{name}", text)):
        with pytest.raises(UsageError) as error:
            parse()
        assert str(error.value) == f"{name} is {text!r}: expected {expected}"


def test_a_list_may_be_one_text_several_or_none(by_yaml):
    assert by_yaml("dataset_dir: data/a").dataset_dir == ("data/a",)
    assert by_yaml("dataset_dir: [data/a, 2025_11]").dataset_dir == ("data/a", "2025_11")
    assert by_flag("--dataset_dir", "a", "b").dataset_dir == ("a", "b")
    for empty in (by_yaml("files:"), by_yaml("files: null"), by_yaml("files: []"), by_flag("--files")):
        assert empty.files == ()


def test_a_mixture_is_the_same_by_folder_by_list_and_by_flag(by_yaml, tmp_path):
    expected = Recipe(dataset_dir=("a", "b=1"), dataset_weights=(0.7, 3e-5))
    texts = (
        "dataset_dir: [{dir: a, weight: 0.7}, {dir: b=1, weight: 3e-5}]",
        "dataset_dir: [a, b=1]\ndataset_weights: [0.7, 3e-5]",
    )
    for text in texts:
        assert by_yaml(text) == expected
    assert by_flag("--dataset_dir", "a", "b=1", "--dataset_weights", "0.7", "3e-5") == expected
    write_recipe(expected, tmp_path / "written.yaml")
    assert by_flag("--recipe", str(tmp_path / "written.yaml")) == expected


def test_a_flag_changes_the_weights_and_other_folders_have_none_of_them(by_yaml, tmp_path):
    by_yaml("dataset_dir: [{dir: a, weight: 0.7}, {dir: b, weight: 0.3}]")
    recipe = ["--recipe", str(tmp_path / "recipe.yaml")]
    assert by_flag(*recipe, "--dataset_weights", "1", "2").dataset_weights == (1.0, 2.0)
    other = by_flag(*recipe, "--dataset_dir", "c", "d")
    assert (other.dataset_dir, other.dataset_weights) == (("c", "d"), ())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("dataset_dir: [a, {dir: b, weight: 0.3}]", "dataset_dir has 'a': give every folder of a mixture as {dir: "),
        ("dataset_dir: [{dir: a, weight: 1}, {dir: b}]", "dataset_dir has {'dir': 'b'}: give every folder"),
        ("dataset_dir: [{dir: a, wieght: 1}]", "dataset_dir has {'dir': 'a', 'wieght': '1'}: give every folder"),
        ("dataset_dir: [{dir: a, weight: x}]", "dataset_weights is ['x']: expected a list of numbers"),
        ("dataset_dir: [{dir: a, weight: inf}]", "dataset_weights is ['inf']: expected a list of numbers"),
        ("dataset_dir: [{dir: [a], weight: 1}]", "dataset_dir is [['a']]: expected a list of texts"),
        ("dataset_dir: [{dir: a, weight: 1}]\ndataset_weights: [1]", "dataset_weights stands beside a dataset_dir "),
        ("dataset_dir: [a, b]\ndataset_weights: [0.5, -0.5]", "dataset_weights is [0.5, -0.5]: give numbers above 0"),
        ("dataset_dir: [a, b]\ndataset_weights: [1, 0]", "dataset_weights is [1.0, 0.0]: give numbers above 0"),
        ("dataset_dir: [a, b]\ndataset_weights: [1]", "dataset_weights has 1 numbers for 2 folders: give one each"),
        ("dataset_dir: a\ndataset_weights: [1]", "dataset_weights is one number, and a single dataset needs none"),
        ("dataset_dir: [a, a]\ndataset_weights: [1, 2]", "dataset_dir is a, a: give every folder of a mixture once"),
        ("document_mask: yes", "document_mask is 'yes': give one of false, true, restart"),
        (
            "document_mask: true\nattn_implementation: flash_attention_2",
            "document_mask is true with attn_implementation flash_attention_2, which gets no mask of documents: give",
        ),
    ],
)
def test_a_mixture_or_mask_that_makes_no_sense_is_one_error(by_yaml, text, problem):
    with pytest.raises((UsageError, ValueError)) as error:
        by_yaml(text).check()
    assert str(error.value).startswith(problem) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--files", ""], "files is ['']: expected a list of texts"),
        (["--files", "a.txt", ""], "files is ['a.txt', '']: expected a list of texts"),
        (["--learning_rate", ""], "learning_rate is '': expected a number"),
        (["--init_from", ""], "init_from is '': expected a text or null"),
        (["--n_layer="], "n_layer is '': expected a whole number or null"),
        (["--resume", ""], "resume is '': expected a text"),
    ],
)
def test_an_empty_value_is_one_error(flags, problem):
    with pytest.raises(UsageError) as error:
        by_flag(*flags)
    assert str(error.value) == problem


def test_an_empty_recipe_or_folder_is_one_error_and_an_empty_prompt_is_none():
    with pytest.raises(UsageError, match=r"the recipe \. cannot be read"):
        by_flag("--recipe", "")
    assert by_flag("--sample_prompt", "").sample_prompt == ""
    with pytest.raises(ValueError, match=r"^output_dir is empty: give a folder$"):
        Recipe(output_dir="").check()


@pytest.mark.parametrize("text", ["seed: 1\nmax_steps: 5\nseed: 2", "seed: 1\n'seed': 1", "files: [{a: 1, a: 2}]"])
def test_a_key_that_stands_twice_in_a_recipe_is_one_error(by_yaml, text):
    with pytest.raises(UsageError, match=r"recipe\.yaml cannot be read: (seed|a) stands there twice"):
        by_yaml(text)


def test_a_list_that_is_given_twice_is_one_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        by_flag("--files", "a.txt", "--files", "b.txt")
    assert "--files is given twice: give all values after one of them" in capsys.readouterr().err


def test_a_list_or_a_mapping_is_no_number(by_yaml):
    with pytest.raises(UsageError) as error:
        by_yaml("warmup_steps: [1]\nseed: {a: 1}\nfiles: {a: 1}")
    assert str(error.value).splitlines() == [
        "warmup_steps is ['1']: expected a whole number",
        "seed is {'a': '1'}: expected a whole number",
        "files is {'a': '1'}: expected a list of texts",
    ]


def test_a_written_recipe_is_read_as_the_same_and_resumes_automatically(tmp_path):
    recipe = by_flag(
        "--recipe", str(ROOT / "recipes" / "demo.yaml"), "--resume", "previous", "--seed", str(2**53 + 1),
        "--learning_rate", "1e-5", "--mixed_precision", "no", "--sample_prompt", " To be:\nor # not? ’",
        "--output_dir", "010", "--eval_tasks", "hellaswag", "piqa:harness", "--muon_learning_rate", "null",
    )  # fmt: skip
    write_recipe(recipe, tmp_path / "recipe.yaml")
    again = by_flag("--recipe", str(tmp_path / "recipe.yaml"))
    assert again.resume == "auto"
    assert by_flag("--recipe", str(tmp_path / "recipe.yaml"), "--resume", "previous") == recipe


def test_a_run_without_a_recipe_says_first_which_one_it_is(capsys):
    for words in ([], ["--recipe", "recipes/demo.yaml"], [f"--recipe={ROOT / 'recipes' / 'demo.yaml'}"]):
        read_recipe(words, announce=True)
        assert capsys.readouterr().out == ""
    read_recipe(["--max_steps", "9999"], announce=True)
    said = capsys.readouterr().out
    assert said.startswith("no --recipe: ") and "model gpt2, 9,999 steps of 524,288 tokens" in said


def test_a_checkpoint_that_starts_a_run_gives_its_shape_unless_the_recipe_has_one():
    assert by_flag("--init_from", "there").model == "init_from"
    for words in (["--model", "gpt2"], ["--n_layer", "3"], ["--recipe", str(ROOT / "recipes" / "demo.yaml")]):
        assert by_flag("--init_from", "there", *words).model in ("gpt2", "demo")
    by_flag("--init_from", "there", "--seq_len", "99999", "--global_batch_tokens", str(16 * 99999)).check()
    with pytest.raises(ValueError, match="model is init_from without an init_from"):
        by_flag("--model", "init_from").check()
