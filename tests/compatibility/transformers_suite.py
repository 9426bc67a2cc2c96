"""Transformers' own model tests on this project's model, with stock GPT-2 beside it as the control.

    pip download --no-deps --no-binary :all: transformers==5.23.0 && tar xf transformers-5.23.0.tar.gz
    python tests/compatibility/transformers_suite.py transformers-5.23.0 [-k NAME …]      # needs `parameterized`

The tree is a source distribution or a checkout of the installed version; what it has of the suite is run. A source
distribution leaves out the mixins in tests/generation, tests/exporters and tests/utils, which is then said and done
without. Further arguments are pytest's. Exit code: pytest's.
"""

import os
import sys
import types
import unittest
from pathlib import Path

PARTS = {
    "tests/generation/test_utils.py": ("GenerationTesterMixin", type("GenerationTesterMixin", (), {})),
    "tests/exporters/test_export.py": ("ExportTesterMixin", type("ExportTesterMixin", (), {})),
    "tests/utils/test_configuration_utils.py": ("config_common_kwargs", {}),
}


def main(argv: list[str]) -> int:
    import pytest

    if not argv or not (Path(argv[0]) / "tests" / "test_modeling_common.py").is_file():
        print("error: give the folder of an unpacked transformers source tree: one with tests/test_modeling_common.py")
        return 1
    print("".join(f"not in this tree: {file}\n" for file in PARTS if not (Path(argv[0]) / file).is_file()), end="")
    (Path(argv[0]) / "tests" / "__init__.py").touch()  # source distributions leave it out
    os.environ["TRANSFORMERS_TREE"] = str(Path(argv[0]).resolve())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    here = Path(__file__).resolve()
    # Our own tests/ must not become the package `tests` of the tree.
    alone = ["--noconftest", "--import-mode=importlib", "-c", os.devnull, f"--rootdir={here.parent}"]
    return pytest.main([str(here), *alone, "-q", "-rfE", "-p", "no:cacheprovider", *argv[1:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

sys.path[:0] = [os.environ["TRANSFORMERS_TREE"], str(Path(__file__).resolve().parents[2])]
for file, (name, stand_in) in PARTS.items():
    if not Path(os.environ["TRANSFORMERS_TREE"], file).is_file():
        package, module = file.split("/")[1], file.removesuffix(".py").split("/")[2]
        for missing in (f"tests.{package}", f"tests.{package}.{module}"):
            sys.modules.setdefault(missing, types.ModuleType(missing))
        setattr(sys.modules[f"tests.{package}.{module}"], name, stand_in)

from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, torch_device  # noqa: E402
from tests.test_training_mixin import TrainingTesterMixin  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

from configuration_gpt2repro import GPT2ReproConfig  # noqa: E402
from modeling_gpt2repro import GPT2ReproForCausalLM, GPT2ReproModel  # noqa: E402

# The suite asks these tables by class name what a model is and whether it takes labels.
modeling_auto.MODEL_MAPPING_NAMES["gpt2repro"] = "GPT2ReproModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["gpt2repro"] = "GPT2ReproForCausalLM"


class Sizes:
    """The tiny model and batch that the suite asks for, as the library's own GPT-2 tests choose them."""

    batch_size, seq_length, vocab_size, hidden_size = 13, 7, 99, 32
    num_hidden_layers, num_attention_heads, is_training = 2, 4, True

    def __init__(self, parent):
        self.parent = parent
        self.config_class = parent.config_class
        self.causal_lm_class = parent.all_model_classes[-1]

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size, n_embd=self.hidden_size, n_layer=self.num_hidden_layers,
            n_head=self.num_attention_heads, n_positions=512, bos_token_id=98, eos_token_id=98, pad_token_id=97,
            resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape).to(torch_device)}


class Suite(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    model_tester = None
    test_can_init_all_missing_weights_before_2023 = True  # or only files with a recent copyright line are tested

    def setUp(self):
        self.model_tester = Sizes(self)

    def test_config(self):
        ConfigTester(self, config_class=self.config_class, n_embd=37, n_head=1).run_common_tests()


class TestGPT2Repro(Suite, unittest.TestCase):
    config_class = GPT2ReproConfig
    all_model_classes = (GPT2ReproModel, GPT2ReproForCausalLM)


class TestStockGPT2(Suite, unittest.TestCase):
    config_class = GPT2Config
    all_model_classes = (GPT2Model, GPT2LMHeadModel)
