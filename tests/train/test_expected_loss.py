"""The band of expected losses against public runs that it was not drawn through, and its word in a run."""

import itertools

import pytest

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.train.estimates import STEP_TOKENS, expected_loss, has_expected_loss, loss_warning
from tests.conftest import ROOT, train_rows

FINEWEB_EDU = {"source": {"name": "hub", "dataset": "HuggingFaceFW/fineweb-edu"}}


@pytest.mark.parametrize(("step", "loss"), [(250, 6.1631), (1000, 4.1533), (1250, 3.9518), (19_072, 3.0944)])
def test_a_sound_public_run_stays_inside(step, loss):
    assert loss_warning(step * STEP_TOKENS, loss) is None


@pytest.mark.parametrize(("step", "loss"), [(250, 6.4300), (1000, 4.8797), (2500, 4.1250), (19_072, 3.3969)])
def test_a_public_run_that_went_wrong_leaves_it(step, loss):
    assert "run python -m gpt2repro.tools.doctor" in loss_warning(step * STEP_TOKENS, loss)


def test_a_validation_text_that_was_trained_on_leaves_it_below():
    assert "is the validation text part of the training text?" in loss_warning(10_000 * STEP_TOKENS, 2.4)


def test_the_band_falls_without_a_jump_and_stays_after_the_log():
    highs = [expected_loss(step * STEP_TOKENS)[1] for step in range(0, 19_073)]
    steps = list(itertools.pairwise(highs))
    assert all(0 <= before - after < 0.3 for before, after in steps)
    assert expected_loss(50_000 * STEP_TOKENS) == expected_loss(19_072 * STEP_TOKENS)


def test_it_speaks_of_gpt2_124m_from_scratch_on_fineweb_edu_alone():
    config = GPT2ReproConfig()
    assert has_expected_loss(FINEWEB_EDU, config, init_from=None)
    assert not has_expected_loss(FINEWEB_EDU, config, init_from="openai-community/gpt2")
    assert not has_expected_loss(FINEWEB_EDU, GPT2ReproConfig(n_layer=24), init_from=None)
    assert not has_expected_loss({"source": {"name": "python-docs"}}, config, init_from=None)
    assert not has_expected_loss({"source": None}, config, init_from=None)


def test_a_run_that_leaves_the_band_says_so_and_goes_on(train_script, tmp_path):
    compared = tmp_path / "compared.py"  # the script, made to believe that the band is for the tiny model
    compared.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_accelerate\n"
        "train_accelerate.has_expected_loss = lambda *_, **__: True\nsys.exit(train_accelerate.main())\n"
    )
    output = train_script(tmp_path / "run", script=compared)
    assert "warning: the validation loss 6." in output
    assert "expected after 1,024 tokens" in output
    warnings = train_rows(tmp_path / "run", "warning")
    assert list(warnings) == [0, 4, 8]
    assert len(train_rows(tmp_path / "run")) == 8
