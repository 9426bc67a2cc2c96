"""The validation loss against sums written out token by token."""

import copy
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eval.validation import _text_loss, bytes_per_token, text_ids, text_windows, validation_loss


def slow_loss(model, stream: list[int], *, seq_len: int, stride: int) -> tuple[float, int]:
    """The same quantity with one forward for every predicted token."""
    total = 0.0
    for position in range(1, len(stream)):
        window = max(0, math.ceil((position - seq_len) / stride)) * stride
        past = torch.tensor([stream[window:position]])
        with torch.no_grad():
            log_probs = model(past).logits[0, -1].double().log_softmax(-1)
        total -= log_probs[stream[position]].item()
    return total / (len(stream) - 1), len(stream) - 1


@pytest.mark.parametrize("stride", [16, 5, 1])
@pytest.mark.parametrize("which", ["tiny_model", "stock_model"])
def test_sliding_windows_give_the_loss_computed_one_token_at_a_time(which, stride, request):
    model = request.getfixturevalue(which)
    ids = torch.randint(0, model.config.vocab_size, (41,), generator=torch.Generator().manual_seed(3)).tolist()
    batches = text_windows(ids, start_id=0, seq_len=16, stride=stride, batch_size=3)
    loss, tokens = validation_loss(model, batches)
    expected, expected_tokens = slow_loss(model, [0, *ids], seq_len=16, stride=stride)
    assert tokens == expected_tokens == 41
    assert loss == pytest.approx(expected, abs=1e-5)


def test_every_window_has_one_shape_and_every_token_is_counted_once():
    for length in (1, 15, 16, 17, 100):
        batches = list(text_windows(list(range(1, length + 1)), start_id=0, seq_len=16, stride=6, batch_size=4))
        assert {tuple(part.shape) for batch in batches for part in batch.values()} == {(4, 16)}
        counted = torch.cat([batch["shift_labels"][batch["shift_labels"] != -100] for batch in batches])
        assert sorted(counted.tolist()) == list(range(1, length + 1))


def random_batch(generator: torch.Generator, B: int) -> dict[str, torch.Tensor]:
    return {name: torch.randint(0, 300, (B, 8), generator=generator) for name in ("input_ids", "shift_labels")}


def test_the_mean_weighs_tokens_and_not_batches(tiny_model):
    generator = torch.Generator().manual_seed(0)
    batch = random_batch(generator, 4)
    batch["shift_labels"][2:, 1:] = -100
    whole, tokens = validation_loss(tiny_model, [batch])
    halves = [{name: part[half] for name, part in batch.items()} for half in (slice(2), slice(2, 4))]
    parts, _ = validation_loss(tiny_model, halves)
    assert tokens == 18
    assert parts == pytest.approx(whole, abs=1e-6)


def test_shares_of_two_processes_sum_to_the_whole_even_where_one_is_empty(tiny_model):
    generator = torch.Generator().manual_seed(0)
    batch = random_batch(generator, 4)
    sent = []
    validation_loss(tiny_model, [batch], reduce=lambda totals: sent.append(totals) or totals)
    both = validation_loss(tiny_model, [], reduce=lambda totals: totals + sent[0])
    assert both == validation_loss(tiny_model, [batch])


def test_a_compiled_model_validates_with_one_graph_for_all_rounds(fresh_model):
    model = fresh_model
    generator = torch.Generator().manual_seed(0)
    batches = [random_batch(generator, 2) for _ in range(3)]
    eager = validation_loss(model, batches)
    graphs = []
    model.compile(backend=lambda module, _: graphs.append(module) or module.forward, fullgraph=True, dynamic=False)
    rounds = [validation_loss(model, batches) for _ in range(3)]
    assert len(graphs) == 1
    assert rounds[0][0] == pytest.approx(eager[0], abs=1e-6)
    assert rounds == [rounds[0]] * 3


def test_nothing_to_count_is_an_error(tiny_model):
    inputs = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="no token to validate on"):
        validation_loss(tiny_model, [{"input_ids": inputs, "shift_labels": torch.full_like(inputs, -100)}])


def test_a_tokenizer_without_a_token_to_begin_with_is_an_error(tiny_model, bpe, tmp_path):
    (tmp_path / "text.txt").write_text("The man throws.", encoding="utf-8")
    bare = PreTrainedTokenizerFast(tokenizer_object=bpe.backend_tokenizer)
    with pytest.raises(ValueError, match="neither a bos nor an eos token"):
        _text_loss(tiny_model, bare, str(tmp_path / "text.txt"), seq_len=32, batch_size=1, stride=32)


TEXT = "The café — “well”,\r\nit's 😀 <|endoftext|> time.\n\n"


def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(bpe):
    assert bytes_per_token(bpe)[text_ids(bpe, TEXT)].sum() == len(TEXT.encode("utf-8"))
    assert bytes_per_token(bpe)[bpe.eos_token_id] == 0


def test_an_added_token_counts_the_bytes_of_its_text(bpe):
    more = copy.deepcopy(bpe)
    more.add_tokens(["café", "😀", "<user>"])
    ids = text_ids(more, f"<user>{TEXT}")
    assert {*more.convert_tokens_to_ids(["café", "😀", "<user>"])} <= {*ids}
    assert bytes_per_token(more)[ids].sum() == len(f"<user>{TEXT}".encode())


@pytest.mark.parametrize("change", ["a normalizer", "prefix space", "a token that strips spaces"])
def test_the_bytes_are_not_known_where_the_tokenizer_changes_the_text(bpe, change):
    other = copy.deepcopy(bpe)
    if change == "a normalizer":
        other.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    elif change == "prefix space":
        other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        other.add_tokens([AddedToken("<user>", rstrip=True)])
    assert bytes_per_token(other) is None


def test_a_text_file_is_measured_as_it_is(tiny_model, bpe, tmp_path):
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    result = _text_loss(tiny_model, bpe, str(tmp_path / "text.txt"), seq_len=64, batch_size=1, stride=64)
    ids = bpe.backend_tokenizer.encode(TEXT.split("<|endoftext|>")[0], add_special_tokens=False).ids
    assert text_ids(bpe, TEXT)[: len(ids)] == ids and bpe.eos_token_id not in text_ids(bpe, TEXT)
    assert (result["tokens"], result["bytes"]) == (len(text_ids(bpe, TEXT)), len(TEXT.encode()))


def test_a_text_file_that_is_not_utf8_is_named(tiny_model, bpe, tmp_path):
    (tmp_path / "text.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"text\.txt is not UTF-8 .*: convert it"):
        _text_loss(tiny_model, bpe, str(tmp_path / "text.txt"), seq_len=64, batch_size=1, stride=64)


@pytest.fixture
def prepared(tmp_path, checkpoint):
    """A prepared dataset of the checkpoint's tokenizer, and the text of all its documents."""
    from gpt2repro.data.prepare import prepare

    texts = [f"The man number {index} throws the ball. She said “no” {index} times.\n" for index in range(80)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = [str(tmp_path / "texts.jsonl")]
    out = tmp_path / "prepared"
    prepare(source="files", files=files, tokenizer=str(checkpoint), out=out, val_tokens=600)
    return out


def test_a_prepared_dataset_is_measured_over_all_windows_of_its_validation_split(
    prepared, checkpoint, tiny_model, bpe, tmp_path
):
    from eval import validation
    from gpt2repro.data.shards import open_dataset

    output = tmp_path / "val.json"
    command = ["--model", str(checkpoint), "--dataset", str(prepared), "--output", str(output)]
    assert validation.main([*command, "--seq-len", "32", "--device", "cpu"]) == 0
    result = json.loads(output.read_text())
    stream = open_dataset(prepared).split("val")
    windows = (stream.tokens - 1) // 32
    ids = stream.read(0, windows * 32 + 1).tolist()
    rows = torch.tensor(ids[:-1]).view(windows, 32)
    with torch.no_grad():
        log_probs = tiny_model(rows).logits.double().log_softmax(-1)
    picked = log_probs.gather(2, torch.tensor(ids[1:]).view(windows, 32, 1))
    assert result["tokens"] == windows * 32
    assert result["loss"] == pytest.approx(-picked.mean().item(), abs=1e-5)
    text_bytes = len(bpe.decode([token for token in ids[1:] if token != bpe.eos_token_id]).encode())
    nats = result["loss"] * result["tokens"]
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=0.01)  # a cut “ at the end


def test_nanogpts_shards_are_measured_as_the_same_tokens_prepared(prepared, checkpoint, tmp_path):
    from eval import validation
    from gpt2repro.data.shards import open_dataset

    (tmp_path / "foreign").mkdir()
    stream = open_dataset(prepared).split("val")
    stream.read(0, stream.tokens).astype(np.uint16).tofile(tmp_path / "foreign" / "val.bin")
    results = []
    for flags in ([str(prepared)], [str(tmp_path / "foreign"), "--format", "nanogpt"]):
        output = tmp_path / f"{len(results)}.json"
        command = ["--model", str(checkpoint), "--output", str(output), "--device", "cpu", "--dataset"]
        assert validation.main([*command, *flags]) == 0
        results.append(json.loads(output.read_text()))
    assert results[1].pop("measured_on") == str(tmp_path / "foreign")
    assert results[1].items() <= results[0].items()


def test_a_replaced_validation_shard_is_refused(prepared, checkpoint, capsys):
    from eval import validation

    shard = prepared / "val-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\x01\x00")
    assert validation.main(["--model", str(checkpoint), "--dataset", str(prepared), "--device", "cpu"]) == 1
    assert "val-00000.npy has the sha256" in capsys.readouterr().err


def test_a_dataset_of_another_tokenizer_is_refused(prepared, stock_model, tmp_path, capsys):
    from eval import validation

    other = tmp_path / "other"
    stock_model.save_pretrained(other)
    (other / "tokenizer_config.json").write_text((prepared / "tokenizer_config.json").read_text())
    tokenizer = json.loads((prepared / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert validation.main(["--model", str(other), "--dataset", str(prepared)]) == 1
    assert "was prepared with another tokenizer" in capsys.readouterr().err


def run_validation(*arguments):
    command = [sys.executable, "-m", "eval.validation", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_measures_a_text_file_and_names_what_is_wrong(checkpoint, tmp_path, tiny_model, bpe):
    from eval import validation

    text = "The man throws the ball. She said “no”.\n" * 4
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    output = tmp_path / "out" / "val.json"
    common = ["--model", str(checkpoint), "--text", str(tmp_path / "text.txt"), "--device", "cpu"]
    more = ["--seq-len", "32", "--stride", "8", "--output", str(output)]
    assert validation.main([*common, *more]) == 0
    assert validation.main([*common, *more]) == 0  # replaces its own results
    result = json.loads(output.read_text())
    ids = bpe(text)["input_ids"]
    loss, tokens = slow_loss(tiny_model, [0, *ids], seq_len=32, stride=8)
    assert result["tokens"] == tokens
    assert result["loss"] == pytest.approx(loss, abs=1e-4)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(loss * tokens / math.log(2) / len(text.encode()), abs=1e-4)

    failed = run_validation(*common, "--seq-len", 65)
    assert failed.returncode == 1
    assert failed.stderr.strip().endswith("error: --seq-len is 65: the model takes 1 to 64 tokens")


def test_several_texts_have_a_row_each_and_a_mean_in_which_each_has_the_same_weight(checkpoint, tmp_path, capsys):
    from eval import validation

    texts = {tmp_path / "a.txt": "The man throws the ball.\n" * 4, tmp_path / "b.txt": "She said “no”."}
    single = []
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")
        command = ["--model", str(checkpoint), "--device", "cpu", "--output"]
        assert validation.main([*command, str(tmp_path / "one.json"), "--text", str(file)]) == 0
        single.append(json.loads((tmp_path / "one.json").read_text()))
    assert validation.main([*command, str(tmp_path / "all.json"), "--texts", *map(str, texts)]) == 0
    both = json.loads((tmp_path / "all.json").read_text())
    assert [row["measured_on"] for row in both["texts"]] == [*map(str, texts)]
    for name in ("loss", "bits_per_byte"):
        assert [row[name] for row in both["texts"]] == [figures[name] for figures in single]
        assert both[name] == pytest.approx(sum(figures[name] for figures in single) / 2)
    assert both["perplexity"] == pytest.approx(math.exp(both["loss"]))
    assert both["tokens"] == sum(figures["tokens"] for figures in single)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[-4:-1]] == [*map(str, texts), "mean"]
    (tmp_path / "b.txt").write_text("")
    assert validation.main(["--model", str(checkpoint), "--texts", *map(str, texts)]) == 1
    assert f"{tmp_path / 'b.txt'} has no tokens" in capsys.readouterr().err
