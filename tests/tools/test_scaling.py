"""The prediction of step times on many GPUs: against published figures, and against what arithmetic demands of it."""

import pytest

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.command import USAGE
from gpt2repro.recipe import Recipe
from gpt2repro.tools.scaling import CARDS, PUBLISHED, Setup, main, model_of, predict, predict_published
from gpt2repro.train.estimates import PEAK_FLOPS
from modeling_gpt2repro import GPT2ReproForCausalLM
from tests.conftest import ROOT

RECIPE = Recipe(model="gpt2", seq_len=1024, global_batch_tokens=2**19, micro_batch_size=64)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row.what} of {row.model} on {row.setup.gpus}")
def test_predictions_are_within_15_percent_of_published_step_times(row):
    """An anchor sets the efficiency to two digits; the others are other sizes and numbers of cards."""
    assert predict_published(row) == pytest.approx(row.seconds, rel=0.02 if row.anchor else 0.15)


def test_published_figures_of_a_card_and_of_all_cards_are_not_mixed_up():
    """llm.c's 300 ms on 8 A100 are 218k tokens/s each, the lecture's 1.5M tokens/s are those of all eight."""
    per_card = {row.what: row.tokens / row.seconds / row.setup.gpus for row in PUBLISHED}
    assert per_card["llm.c, 300 ms (218k tokens/s each)"] == pytest.approx(218e3, rel=0.01)
    assert per_card["llm.c, 468k tokens/s each"] == pytest.approx(468e3)
    assert per_card["lecture, 1.5M tokens/s in all"] == pytest.approx(187.5e3)


def test_one_card_communicates_nothing_and_no_number_of_cards_beats_its_peak():
    model = model_of(RECIPE)
    assert predict(RECIPE, model, "H100", Setup(1, 0.5))["communication"] == 0
    for gpus in (1, 8, 64, 512):
        for sharded in (False, True):
            made = predict(RECIPE, model, "H100", Setup(gpus, 0.5, sharded=sharded, overlap=True))
            assert made["mfu"] < 0.5
            assert made["step"] >= 2**19 * 855_166_464 / (gpus * PEAK_FLOPS["H100"] * 0.5)


def test_the_all_reduce_of_eight_cards_moves_seven_quarters_of_the_gradients():
    """A ring of N moves 2 (N - 1) / N of the bytes over every link (nccl-tests, PERFORMANCE.md)."""
    seconds = predict(RECIPE, model_of(RECIPE), "A100", Setup(8, 0.5))["communication"]
    assert seconds == pytest.approx(7 / 4 * 4 * 124_439_808 / (0.7 * 300e9))
    assert CARDS["A100"].link_rate == 300e9


def test_the_table_has_every_number_of_cards_and_says_what_does_not_divide(capsys):
    words = [str(ROOT / "recipes" / "gpt2-124m-10b.yaml"), "--gpus", "8", "512", "1024", "--dollars-per-hour", "2"]
    assert main(words) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| 8"] * 3 + ["| 512"] * 3 + ["| 1024"]
    assert rows[-1][1] == "does not divide the 512 sequences of a step |"
    hours, dollars = float(rows[0][10]), float(rows[0][11].rstrip(" |"))
    assert dollars == pytest.approx(hours * 8 * 2, abs=1)
    assert rows[0][2] == "16" and rows[3][2] == "1*"  # one sequence a card: fewer tokens than the efficiency is for


def test_the_table_of_a_run_from_a_checkpoint_is_of_its_shape(tmp_path, capsys):
    GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=1, n_head=1, n_embd=8, n_positions=64)).save_pretrained(tmp_path)
    recipe = str(ROOT / "recipes" / "demo.yaml")
    assert main([recipe, "--gpus", "1", "--model", "init_from", "--init_from", str(tmp_path), "--seq_len", "64"]) == 0
    assert f"{50257 * 8 + 64 * 8 + 16 + 12 * 64 + 9 * 8 + 4 * 8:,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--published", "--card", "A100"], ["R.yaml", "--efficiency", "53"]])
def test_options_that_would_do_nothing_or_are_no_share_are_refused(words):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == USAGE
