"""Sampling against a loop of forwards, and what it must not disturb."""

import subprocess
import sys

import pytest
import torch

from eval.sample import sample


def test_greedy_text_is_the_argmax_of_every_step(tiny_model, bpe):
    ids = bpe("The man")["input_ids"]
    for _ in range(8):
        with torch.no_grad():
            ids.append(tiny_model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == bpe.eos_token_id:
            break
    expected = bpe.decode(ids, skip_special_tokens=True)
    assert sample(tiny_model, bpe, "The man", max_new_tokens=8, temperature=0) == [expected]


def test_one_seed_gives_one_set_of_texts_and_another_seed_another(tiny_model, bpe):
    first = sample(tiny_model, bpe, "The man", seed=1)
    assert len(first) == 4
    assert len(set(first)) > 1
    assert all(text.startswith("The man") for text in first)
    assert sample(tiny_model, bpe, "The man", seed=1) == first
    assert sample(tiny_model, bpe, "The man", seed=2) != first


def test_sampling_leaves_the_random_state_of_the_caller_alone(tiny_model, bpe):
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    sample(tiny_model, bpe, "The man", max_new_tokens=4)
    assert torch.equal(torch.rand(4), expected)


def test_top_k_of_one_is_greedy(tiny_model, bpe):
    greedy = sample(tiny_model, bpe, "A woman", max_new_tokens=6, temperature=0)
    assert sample(tiny_model, bpe, "A woman", max_new_tokens=6, top_k=1, num_samples=2) == greedy * 2


def test_a_compiled_model_samples_eagerly(fresh_model, bpe):
    model = fresh_model
    expected = sample(model, bpe, "The", max_new_tokens=4)
    graphs = []
    model.compile(backend=lambda module, _: graphs.append(module) or module.forward)
    assert sample(model, bpe, "The", max_new_tokens=4) == expected
    assert graphs == []


def test_an_empty_prompt_starts_a_document(tiny_model, bpe):
    assert len(sample(tiny_model, bpe, "", num_samples=2, max_new_tokens=3)) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 63}, "2 tokens and 63 new ones do not fit the model's 64 positions"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"num_samples": 0}, "num_samples is 0"),
    ],
)
def test_a_setting_out_of_range_is_named(tiny_model, bpe, settings, message):
    assert len(bpe("The man")["input_ids"]) == 2
    with pytest.raises(ValueError, match=message):
        sample(tiny_model, bpe, "The man", **settings)


def test_a_prompt_that_is_no_unicode_is_one_error(tiny_model, bpe):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        sample(tiny_model, bpe, "a\udcff")


def test_the_command_prints_texts_and_converses(checkpoint, tiny_model, bpe, capsys):
    from eval import sample as module

    arguments = ["--model", str(checkpoint), "--max-new-tokens", "4", "--greedy", "--device", "cpu"]
    expected = sample(tiny_model, bpe, "The man", max_new_tokens=4, temperature=0)[0]
    assert module.main([*arguments, "--prompt", "The man"]) == 0
    assert capsys.readouterr().out == f"> {expected}\n"
    command = [sys.executable, "-m", "eval.sample", *arguments, "--interactive"]
    talk = subprocess.run(command, input="The man\nThe man\n", capture_output=True, text=True)
    assert talk.stdout == f"{expected}\n{expected}\n", talk.stderr
