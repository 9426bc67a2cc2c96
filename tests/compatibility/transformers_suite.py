"""Transformers' own GPT-2 tests on this project's model, and on stock GPT-2 beside it: every difference is listed.

    python tests/compatibility/transformers_suite.py CHECKOUT [DISTRIBUTION] [-k NAME …]      # needs `parameterized`

CHECKOUT is a checkout of Transformers, best of the installed version. Over one of another version goes DISTRIBUTION,
the unpacked source distribution of the installed version: it has the tests that all models share, but not those of
generation, exporters and pipelines, nor GPT-2's own. Further arguments are pytest's.

Our classes run in the library's own GPT-2 test class, with its batch and its special cases: nothing is copied.
Exit code: 0 if ours passes all that stock passes, 1 if not, pytest's own if nothing ran.
"""

import ast
import collections
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import transformers

# What stock GPT-2 has and this project's model has not, with the tests of it; these run on stock alone.
NOT_OURS = {
    "test_gpt2_double_lm_head_model": "GPT2DoubleHeadsModel",
    "test_gpt2_scale_attn_by_inverse_layer_idx": "the flag scale_attn_by_inverse_layer_idx",
    "test_gpt2_sdpa_matches_eager_with_scaling_configs": "the flags scale_attn_weights and …_by_inverse_layer_idx",
    "test_gpt2_fa2_matches_eager_with_scaling_configs": "the flags scale_attn_weights and …_by_inverse_layer_idx",
    "test_gpt2_reorder_and_upcast_attn": "the flag reorder_and_upcast_attn",
    "test_cross_attention_respects_encoder_padding_mask": "cross-attention",
    "test_question_answering_model": "GPT2ForQuestionAnswering",
}
GPT2_TESTS, HELPERS = "tests/models/gpt2/test_modeling_gpt2.py", "src/transformers/testing_utils.py"
STAND_IN = """import unittest  # for a module that neither tree has
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    def missing(*args, **kwargs):
        raise unittest.SkipTest(f"{__name__} is in neither tree")
    return missing
"""


def merged(checkout: Path, distribution: Path | None, to: Path) -> Path:
    """The tests of a checkout in `to`, under the files of a source distribution; says which file is whose."""
    for folder in ("tests", "utils"):
        shutil.copytree(checkout / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(checkout / HELPERS, to / "checkout_testing_utils.py")
    (to / "src").mkdir()
    (to / "src/transformers").symlink_to(Path(transformers.__file__).parent)  # the pipelines' tests load it by path
    print(f"from {checkout}: the tests of version {version_of(checkout)}")
    if distribution:
        print(f"from {distribution}: what it has of the same, of version {version_of(distribution)}")
        shutil.copytree(distribution / "tests", to / "tests", dirs_exist_ok=True)
        for file in sorted((distribution / "tests").glob("*.py")):
            for name in sorted(imported(file)):
                module = to / "tests" / f"{name}.py"
                if not module.exists() and not module.with_suffix("").exists():
                    print(f"in neither tree: tests/{name}.py, for {file.name}: what calls it is skipped")
                    module.write_text(STAND_IN)
    return to


def version_of(tree: Path) -> str:
    """`__version__` of a source tree."""
    init = tree / "src" / "transformers" / "__init__.py"
    lines = init.read_text().splitlines() if init.is_file() else []
    return next((line.split('"')[1] for line in lines if line.startswith("__version__")), "unknown")


def imported(file: Path) -> set[str]:
    """The modules of tests/ that a file of that folder imports, as paths without .py."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    return {node.module.replace(".", "/") for node in nodes if node.level == 1 and node.module}


class Outcomes:
    """A pytest plugin that keeps what became of every test of the two classes, subtests included."""

    def __init__(self):
        self.reports = collections.defaultdict(list)  # {(class, test): [(is_subtest, outcome, why)]}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            cls, test = report.nodeid.split("::")[-2:]
            why = ""
            if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
                why = report.longrepr[2].removeprefix("Skipped: ")
            elif report.outcome == "failed":
                crash = getattr(report.longrepr, "reprcrash", None)
                why = (crash.message if crash else str(report.longrepr)).splitlines()[0]
            self.reports[cls, test].append((hasattr(report, "context"), report.outcome, why))

    def of(self, cls) -> dict[str, tuple[str, str]]:
        """{test: (outcome, why)} of a class."""
        found = {}
        for (name, test), reports in self.reports.items():
            if name != cls:
                continue
            subtests = [outcome for is_subtest, outcome, _ in reports if is_subtest]
            outcomes = {outcome for _, outcome, _ in reports}
            if "failed" in outcomes:
                outcome = "failed"
            elif "skipped" in outcomes:  # a test whose subtests are skipped is itself reported as passed
                outcome = "passed in part" if "passed" in subtests else "skipped"
            else:
                outcome = "passed"
            found[test] = outcome, next((why for _, outcome_, why in reports if outcome_ != "passed"), "")
        return found

    def compared(self) -> int:
        """Prints the comparison; the exit code."""
        ours, stock = self.of("TestGPT2Repro"), self.of("TestStockGPT2")
        for name, outcomes in (("ours", ours), ("stock GPT-2", stock)):
            count = collections.Counter(outcome for outcome, _ in outcomes.values())
            print(f"{name}: {', '.join(f'{n} {outcome}' for outcome, n in sorted(count.items()))}")
        lists = collections.defaultdict(list)
        for test in sorted(ours | stock):
            (here, why), (there, their_why) = ours.get(test, ("absent", "")), stock.get(test, ("absent", ""))
            both = f"{test}: ours {here} {why}".rstrip() + f"\n    stock {there} {their_why}".rstrip()
            if test in NOT_OURS:
                lists["of what ours has not"].append(f"{test}: {NOT_OURS[test]} (stock: {there})")
            elif here == there == "failed":
                lists["failed by both"].append(both)
            elif here != there:
                alone = there == "passed" or (there == "passed in part" and here != "passed")
                lists["PASSED BY STOCK ALONE" if alone else "other differences"].append(both)
            elif plain(why) != plain(their_why):
                lists["skipped by both, for another reason"].append(both)
        for kind, lines in lists.items():
            print(f"{kind}: {len(lines)}", *lines, sep="\n  ")
        return 1 if lists["PASSED BY STOCK ALONE"] else 0


def plain(why: str) -> str:
    """A reason without the names of the classes that it speaks of."""
    why = re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", why).replace("LMHeadModel", "ForCausalLM")
    return why.replace("TestStockGPT2", "TestGPT2").replace("GPT2Repro", "GPT2")


def main(argv: list[str]) -> int:
    import pytest

    trees = []
    while argv and Path(argv[0]).is_dir():
        trees.append(Path(argv.pop(0)).resolve())
    if not 1 <= len(trees) <= 2 or not all((trees[0] / file).exists() for file in (GPT2_TESTS, HELPERS, "utils")):
        print(f"error: give the folder of a checkout of transformers, one with utils, {GPT2_TESTS} and {HELPERS}")
        return 1
    print(f"installed: transformers {transformers.__version__}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    here, outcomes = Path(__file__).resolve(), Outcomes()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRANSFORMERS_TREE"] = str(merged(trees[0], trees[1] if trees[1:] else None, Path(folder)))
        # Our own tests/ must not become the package `tests` of the tree.
        alone = ["--noconftest", "--import-mode=importlib", "-c", os.devnull, f"--rootdir={here.parent}"]
        quiet = ["-q", "--tb=short", "--disable-warnings", "-p", "no:cacheprovider"]
        code = pytest.main([str(here), *alone, *quiet, *argv], plugins=[outcomes])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(code)
    return outcomes.compared()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

TREE = Path(os.environ["TRANSFORMERS_TREE"])
sys.path[:0] = [str(TREE), str(Path(__file__).resolve().parents[2])]

from tokenizers import Tokenizer  # noqa: E402
from tokenizers.decoders import ByteLevel as ByteLevelDecoder  # noqa: E402
from tokenizers.models import BPE  # noqa: E402
from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402
from tokenizers.trainers import BpeTrainer  # noqa: E402
from transformers import (  # noqa: E402
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    testing_utils,
)
from transformers.models.auto import modeling_auto  # noqa: E402

# A table of a checkout's tests that has left the library since then comes from the checkout.
for node in ast.parse((TREE / "checkout_testing_utils.py").read_text()).body:
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and isinstance(node.targets[0], ast.Name):
        if not hasattr(testing_utils, node.targets[0].id):
            setattr(testing_utils, node.targets[0].id, ast.literal_eval(node.value))

import modeling_gpt2repro as ours  # noqa: E402
from configuration_gpt2repro import GPT2ReproConfig  # noqa: E402

HEADS = ("SequenceClassification", "TokenClassification")
heads = {head: getattr(ours, f"GPT2ReproFor{head}", None) for head in HEADS}


def tiny_models(folder: Path, classes) -> None:
    """What the pipelines' tests load from the Hub, made here of random weights, for both models alike."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    state = json.loads(tokenizer.to_str())["model"]
    tokenizer = transformers.GPT2Tokenizer(state["vocab"], [tuple(pair) for pair in state["merges"]])
    end, summary = tokenizer.eos_token_id, {}
    for cls in classes:
        config = cls.config_class(
            vocab_size=len(tokenizer), n_positions=1024, n_embd=32, n_layer=2, n_head=4,
            bos_token_id=end, eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        for part in (cls(config), tokenizer):
            part.save_pretrained(folder / cls.config_class.model_type / cls.__name__)
        summary[cls.__name__] = {"tokenizer_classes": ["GPT2Tokenizer"], "processor_classes": []}
    (folder / "reports").mkdir()
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))


our_classes = [ours.GPT2ReproModel, ours.GPT2ReproForCausalLM, *(head for head in heads.values() if head)]
stock_classes = [GPT2Model, GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2ForTokenClassification]
tiny_models(TREE / "tiny_models", our_classes + stock_classes)
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(TREE / "tiny_models")  # the library's own name for such a folder
gpt2 = importlib.import_module("tests.models.gpt2.test_modeling_gpt2")

# The suite asks these tables by class name what a model is and whether it takes labels.
modeling_auto.MODEL_MAPPING_NAMES["gpt2repro"] = "GPT2ReproModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["gpt2repro"] = "GPT2ReproForCausalLM"
if heads["SequenceClassification"]:
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["gpt2repro"] = "GPT2ReproForSequenceClassification"
if heads["TokenClassification"]:
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["gpt2repro"] = "GPT2ReproForTokenClassification"


class Tester(gpt2.GPT2ModelTester):
    """The library's own batch and sizes, without what stock GPT-2 alone takes."""

    base_model_class, config_class = ours.GPT2ReproModel, GPT2ReproConfig
    causal_lm_class, question_answering_class = ours.GPT2ReproForCausalLM, None
    sequence_classification_class = heads["SequenceClassification"]
    token_classification_class = heads["TokenClassification"]

    def get_config(self, **flags_of_stock):
        config = super(gpt2.GPT2ModelTester, self).get_config()
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.1  # the defaults of stock
        return config

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        return config, {name: value for name, value in inputs.items() if name != "token_type_ids"}


class Suite(gpt2.GPT2ModelTest):
    __test__ = False
    test_can_init_all_missing_weights_before_2023 = True  # or only files with a recent copyright line are tested


class TestGPT2Repro(Suite):
    __test__ = True
    model_tester_class = Tester
    all_model_classes = tuple(our_classes)
    pipeline_model_mapping = {  # noqa: RUF012
        task: cls
        for task, cls in (
            ("feature-extraction", ours.GPT2ReproModel),
            ("text-classification", heads["SequenceClassification"]),
            ("text-generation", ours.GPT2ReproForCausalLM),
            ("token-classification", heads["TokenClassification"]),
            ("zero-shot", heads["SequenceClassification"]),
        )
        if cls
    }


class TestStockGPT2(Suite):
    __test__ = True


for name, reason in NOT_OURS.items():
    if hasattr(TestGPT2Repro, name):
        setattr(TestGPT2Repro, name, lambda self, reason=reason: self.skipTest(f"ours has not: {reason}"))
