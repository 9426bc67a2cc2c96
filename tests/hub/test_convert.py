"""Conversion between stock GPT-2 and ours, and of the checkpoints of nanoGPT and build-nanogpt."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gpt2repro.data.shards import open_dataset
from gpt2repro.hub.convert import TRANSPOSED, from_stock, load_as_gpt2repro, main, to_stock
from gpt2repro.hub.nanogpt import character_tokenizer
from modeling_gpt2repro import GPT2ReproForCausalLM
from tests.conftest import ROOT, train_rows

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": 512}
TOKENS = torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def stock():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**TINY, bos_token_id=0, eos_token_id=0)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which an initialisation leaves at zero, so that a lost one would not show
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def stock_folder(stock, tiny_dataset, tmp_path):
    """A stock checkpoint as the oldest ones of the Hub are: a pickle, bare names, causal masks among the weights."""
    folder = tmp_path / "stock-bin"
    stock.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_dataset).save_pretrained(folder)
    state = {name: tensor.clone() for name, tensor in stock.transformer.state_dict().items()}
    for layer in range(TINY["n_layer"]):
        state[f"h.{layer}.attn.bias"] = torch.ones(32, 32).tril().view(1, 1, 32, 32)
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, folder / "pytorch_model.bin")
    return folder


@torch.no_grad()
def nanogpt_forward(state, ids, *, n_layer, n_head, approximate):
    """The network of nanoGPT and build-nanogpt, (B, T) -> (B, T, rows), from its tensors alone."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state.get(f"{name}.bias"), 1e-5)

    (B, T), C = ids.shape, state["transformer.wte.weight"].shape[1]
    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][:T]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for layer in range(n_layer):
        h = f"transformer.h.{layer}"
        parts = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(C, dim=2)
        q, k, v = (part.view(B, T, n_head, C // n_head).transpose(1, 2) for part in parts)
        scores = (q @ k.transpose(-2, -1) / (C // n_head) ** 0.5).masked_fill(future, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C)
        x = x + linear(mixed, f"{h}.attn.c_proj")
        hidden = F.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), approximate=approximate)
        x = x + linear(hidden, f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["transformer.wte.weight"].T


def nanogpt_state(*, rows, bias=True, prefix=""):
    """Random weights as their scripts save them: padded vocabulary, tied head, linear layers of shape (out, in)."""
    generator, C = torch.Generator().manual_seed(2), TINY["n_embd"]
    shapes = {"transformer.wte.weight": (rows, C), "transformer.wpe.weight": (32, C), "transformer.ln_f.weight": (C,)}
    for layer in range(TINY["n_layer"]):
        h = f"transformer.h.{layer}"
        shapes |= {f"{h}.ln_1.weight": (C,), f"{h}.ln_2.weight": (C,), f"{h}.attn.c_attn.weight": (3 * C, C),
                   f"{h}.attn.c_proj.weight": (C, C), f"{h}.mlp.c_fc.weight": (4 * C, C),
                   f"{h}.mlp.c_proj.weight": (C, 4 * C)}  # fmt: skip
    if bias:
        shapes |= {n.replace("weight", "bias"): shape[:1] for n, shape in shapes.items() if ".w" not in n[:14]}
    state = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()  # of nanoGPT without flash attention
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return {prefix + name: tensor for name, tensor in state.items()}


def save_nanogpt(file, state, *, rows, bias=True):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "bias": bias, "vocab_size": rows}
    weight = torch.nn.Parameter(torch.zeros(2))
    (weight * 2).sum().backward()
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    torch.save(
        {"model": state, "optimizer": optimizer.state_dict(), "model_args": sizes, "iter_num": 7,
         "best_val_loss": torch.tensor(3.1), "config": {"dataset": "openwebtext"}}, file,
    )  # fmt: skip


def save_build_nanogpt(file, state, *, rows, tmp_path):
    """By a script of its own, whose `GPTConfig` is then a class of `__main__` that this process does not have."""
    torch.save(state, tmp_path / "state.pt")
    (tmp_path / "train_gpt2.py").write_text(
        "import sys, torch\nfrom dataclasses import dataclass\n\n@dataclass\nclass GPTConfig:\n"
        f"    block_size: int = 32\n    vocab_size: int = {rows}\n    n_layer: int = 2\n    n_head: int = 2\n"
        "    n_embd: int = 32\n\nmodel = torch.load(sys.argv[1])\n"
        "torch.save({'model': model, 'config': GPTConfig(), 'step': 9, 'val_loss': 3.2}, sys.argv[2])\n"
    )
    subprocess.run([sys.executable, tmp_path / "train_gpt2.py", tmp_path / "state.pt", file], check=True, timeout=600)


def refusal(capsys, *arguments) -> str:
    """The one line that the command ends with, after checking that it made nothing."""
    *command, destination = [str(word) for word in arguments]
    assert main([*command, destination, "--to", "gpt2repro"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not os.path.exists(destination)
    return line


def test_a_round_trip_changes_no_byte_of_any_tensor(stock):
    there = from_stock(stock)
    back = to_stock(there)
    ours, again = there.state_dict(), back.state_dict()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(again[name], tensor)
        assert torch.equal(ours[name].t() if name.endswith(TRANSPOSED) else ours[name], tensor)
    settings = [{**model.config.to_diff_dict(), "dtype": None, "n_ctx": 32} for model in (back, stock)]
    assert settings[0] == settings[1]
    assert back.lm_head.weight is back.transformer.wte.weight


@pytest.mark.parametrize("said", [True, False], ids=["config says so", "config says tied"])
def test_an_untied_head_is_kept_both_ways(tmp_path, tiny_dataset, said):
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(**TINY, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)).eval()
    stock.save_pretrained(tmp_path / "stock")
    AutoTokenizer.from_pretrained(tiny_dataset).save_pretrained(tmp_path / "stock")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    (tmp_path / "stock" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": not said}))
    assert main([str(tmp_path / "stock"), str(tmp_path / "ours"), "--to", "gpt2repro"]) == 0
    assert main([str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "gpt2"]) == 0
    for folder in (tmp_path / "ours", tmp_path / "back"):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        assert not model.config.tie_word_embeddings
        assert torch.equal(model.lm_head.weight, stock.lm_head.weight)
        assert (model(TOKENS).logits - stock(TOKENS).logits).abs().max() < 1e-5


def test_a_checkpoint_of_a_run_comes_back_from_stock_byte_for_byte(unbroken_run, tmp_path, capsys):
    assert main([str(unbroken_run / "latest"), str(tmp_path / "stock"), "--to", "gpt2"]) == 0
    assert main([str(tmp_path / "stock"), str(tmp_path / "again"), "--to", "gpt2repro"]) == 0
    before, stock, after = (
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        for folder in (unbroken_run / "latest", tmp_path / "stock", tmp_path / "again")
    )
    assert type(stock) is GPT2LMHeadModel
    for name, tensor in before.state_dict().items():
        assert tensor.numpy().tobytes() == after.state_dict()[name].numpy().tobytes()
    assert (before(TOKENS).logits - stock(TOKENS).logits).abs().max() < 1e-5
    words = [(folder / "tokenizer.json").read_bytes() for folder in (unbroken_run / "latest", tmp_path / "again")]
    assert words[0] == words[1]


def test_the_stock_export_has_the_names_that_older_readers_look_for(stock):
    assert to_stock(from_stock(stock)).config.to_dict()["n_ctx"] == TINY["n_positions"]


def test_an_old_pickle_of_bare_names_and_masks_gives_the_same_logits(stock, stock_folder, tmp_path, tiny_dataset):
    assert main([str(stock_folder), str(tmp_path / "ours"), "--to", "gpt2repro"]) == 0
    ours = load_as_gpt2repro(tmp_path / "ours")
    assert (ours(TOKENS).logits - stock(TOKENS).logits).abs().max() < 1e-5
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "config.json", "configuration_gpt2repro.py", "generation_config.json", "model.safetensors",
        "modeling_gpt2repro.py", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert len({path.stat().st_mode for path in (tmp_path / "ours").iterdir()}) == 1
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (tiny_dataset, tmp_path / "ours")]
    assert tokenizers[0]("def train():")["input_ids"] == tokenizers[1]("def train():")["input_ids"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("to", ["gpt2", "gpt2repro"])
def test_a_nanogpt_checkpoint_gives_the_logits_of_its_own_network(tmp_path, tiny_dataset, capsys, bias, to):
    state = nanogpt_state(rows=576, bias=bias)
    save_nanogpt(tmp_path / "ckpt.pt", {f"_orig_mod.{n}": t for n, t in state.items()}, rows=576, bias=bias)
    arguments = [str(tmp_path / "ckpt.pt"), str(tmp_path / "out"), "--to", to, "--tokenizer", str(tiny_dataset)]
    assert main(arguments) == 0
    assert ("biases are zeros" in capsys.readouterr().err) == (not bias)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    expected = nanogpt_forward(state, TOKENS, n_layer=2, n_head=2, approximate="none")[..., :512]
    assert model(TOKENS).logits.shape == (2, 32, 512)
    assert (model(TOKENS).logits - expected).abs().max() < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == model.config.n_positions
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_build_nanogpt_checkpoint_gives_the_logits_of_its_own_network(tmp_path, tiny_dataset, capsys):
    state = nanogpt_state(rows=576, prefix="_orig_mod.")
    save_build_nanogpt(tmp_path / "model.pt", state, rows=576, tmp_path=tmp_path)
    with pytest.raises(Exception, match="GPTConfig"):  # by itself it does not load
        torch.load(tmp_path / "model.pt", weights_only=True)
    arguments = [str(tmp_path / "model.pt"), str(tmp_path / "out"), "--to", "gpt2", "--tokenizer", str(tiny_dataset)]
    assert main(arguments) == 0, capsys.readouterr().err
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    bare = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
    expected = nanogpt_forward(bare, TOKENS, n_layer=2, n_head=2, approximate="tanh")[..., :512]
    assert (model(TOKENS).logits - expected).abs().max() < 1e-5


def test_the_47_rows_past_gpt2s_vocabulary_are_cut(tmp_path):
    state = nanogpt_state(rows=50304)
    save_nanogpt(tmp_path / "ckpt.pt", state, rows=50304)
    model = load_as_gpt2repro(tmp_path / "ckpt.pt")
    assert model.config.vocab_size == 50257 and model.config.eos_token_id == 50256
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"][:50257])
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_run_starts_from_a_nanogpt_checkpoint(tmp_path, tiny_dataset, train_script):
    state = nanogpt_state(rows=576)
    save_nanogpt(tmp_path / "ckpt.pt", state, rows=576)
    fields = {"init_from": tmp_path / "ckpt.pt", "max_steps": 1, "warmup_steps": 0, "eval_tokens": 64}
    output = train_script(tmp_path / "run", **fields)
    assert "done: step 1" in output
    first = train_rows(tmp_path / "run", "val")[0]["loss"]
    ids = torch.from_numpy(open_dataset(tiny_dataset).split("val").read(0, 65).astype("int64"))
    windows = torch.stack([ids[0:33], ids[32:65]])
    logits = nanogpt_forward(state, windows[:, :-1], n_layer=2, n_head=2, approximate="none")[..., :512]
    assert first == pytest.approx(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item(), abs=1e-5)


def save_meta(file, characters):
    """As nanoGPT's data/shakespeare_char/prepare.py does."""
    stoi = {character: index for index, character in enumerate(characters)}
    file.write_bytes(pickle.dumps({"vocab_size": len(stoi), "itos": dict(enumerate(characters)), "stoi": stoi}))
    return stoi


def test_a_character_level_checkpoint_of_nanogpt_converts_with_its_meta_pkl(tmp_path):
    characters = sorted({*"\n !'&,-.:;?3$", *map(chr, range(65, 91)), *map(chr, range(97, 123)), "é"})
    stoi, state = save_meta(tmp_path / "meta.pkl", characters), nanogpt_state(rows=len(characters))
    save_nanogpt(tmp_path / "ckpt.pt", state, rows=len(characters))
    words = [tmp_path / "ckpt.pt", tmp_path / "out", "--to", "gpt2", "--tokenizer", tmp_path / "meta.pkl"]
    assert main(list(map(str, words))) == 0
    tokenizer, text = AutoTokenizer.from_pretrained(tmp_path / "out"), " O Romeo,\n\nwhere  art thou? é !"
    ids = tokenizer(text)["input_ids"]
    assert ids == [stoi[character] for character in text]
    assert tokenizer.decode(ids) == text
    with pytest.raises(Exception, match="UNK"):
        tokenizer("#")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = nanogpt_forward(state, torch.tensor([ids]), n_layer=2, n_head=2, approximate="none")
    assert (model(torch.tensor([ids])).logits - expected).abs().max() < 1e-5


def test_a_meta_pkl_with_code_in_it_or_of_another_kind_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for content in (pickle.dumps({"stoi": {"a": Evil()}}), pickle.dumps([1]), b"", b"text"):
        (tmp_path / "meta.pkl").write_bytes(content)
        with pytest.raises(ValueError, match=r"meta\.pkl is no meta\.pkl of nanoGPT"):
            character_tokenizer(tmp_path / "meta.pkl")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["gpt2", "gpt2repro"])
def test_a_lora_adapter_converts_as_its_base_with_the_adapter_merged(stock, tiny_dataset, tmp_path, kind, monkeypatch):
    peft = pytest.importorskip("peft")
    model = stock if kind == "gpt2" else from_stock(stock)
    for part in (model, AutoTokenizer.from_pretrained(tiny_dataset)):
        part.save_pretrained(tmp_path / "base")
    base = type(model).from_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], init_lora_weights=False, task_type="CAUSAL_LM",
                           fan_in_fan_out=kind == "gpt2")  # fmt: skip
    adapted = peft.get_peft_model(base, lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(input_ids=TOKENS).logits
        assert (expected - stock.eval()(TOKENS).logits).abs().max() > 1e-3
        for to in ("gpt2", "gpt2repro"):
            assert main([str(tmp_path / "adapter"), str(tmp_path / to), "--to", to]) == 0
            converted = AutoModelForCausalLM.from_pretrained(tmp_path / to)
            assert (converted(TOKENS).logits - expected).abs().max() < 1e-4
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="holds a LoRA adapter: pip install peft"):
        load_as_gpt2repro(tmp_path / "adapter")


def test_our_class_refuses_a_stock_checkpoint_and_says_how_to_convert_it(stock, tmp_path):
    stock.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"this is a gpt2 checkpoint.* python -m gpt2repro\.hub\.convert"):
        GPT2ReproForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["bin", "nanogpt"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(stock_folder, tmp_path, tiny_dataset, capsys, kind):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    evil = tmp_path / "evil.pt" if kind == "nanogpt" else stock_folder
    if kind == "nanogpt":
        torch.save({"model": {"x": Payload()}, "model_args": {}}, evil)
    else:
        torch.save({"wte.weight": Payload()}, stock_folder / "pytorch_model.bin")
    line = refusal(capsys, evil, "--tokenizer", tiny_dataset, tmp_path / "out")
    assert "asks for posix.system" in line and "nothing of it was run" in line
    assert not (tmp_path / "pwned").exists()


def test_tensors_that_do_not_fit_are_named(stock_folder, tmp_path, tiny_dataset, capsys):
    file = stock_folder / "pytorch_model.bin"
    good = torch.load(file)
    for name, change, expected in (
        ("missing", lambda s: s.pop("h.1.mlp.c_fc.weight"), "(missing: transformer.h.1.mlp.c_fc.weight)"),
        ("extra", lambda s: s.update({"h.2.ln_1.weight": torch.ones(32)}), "(unexpected: h.2.ln_1.weight)"),
        ("shape", lambda s: s.update({"wpe.weight": torch.ones(9, 32)}), "transformer.wpe.weight [9, 32])"),
    ):
        state = dict(good)
        change(state)
        torch.save(state, file)
        assert refusal(capsys, stock_folder, tmp_path / name).endswith(expected)
    state = nanogpt_state(rows=576)
    del state["transformer.ln_f.bias"]
    save_nanogpt(tmp_path / "ckpt.pt", state, rows=576)
    line = refusal(capsys, tmp_path / "ckpt.pt", "--tokenizer", tiny_dataset, tmp_path / "out")
    assert line.endswith("(missing: transformer.ln_f.bias)")
    save_nanogpt(tmp_path / "ckpt.pt", {**nanogpt_state(rows=576), "lm_head.weight": torch.zeros(576, 32)}, rows=576)
    line = refusal(capsys, tmp_path / "ckpt.pt", "--tokenizer", tiny_dataset, tmp_path / "out")
    assert "has a head of its own" in line


def test_weights_that_are_not_finite_are_refused(unbroken_run, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(unbroken_run / "latest")
    model.transformer.ln_f.bias.data[3] = torch.nan
    model.save_pretrained(tmp_path / "model")
    line = refusal(capsys, tmp_path / "model", "--tokenizer", unbroken_run / "latest", tmp_path / "out")
    assert "NaN or infinite weights in transformer.ln_f.bias (float32)" in line


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("README.md", "---\nlicense: [\n---\n", "README.md is no YAML"),
        ("adapter_config.json", "{}", "adapter_config.json names no base model (KeyError"),
        ("adapter_config.json", "[]", "adapter_config.json names no base model (TypeError"),
        ("adapter_config.json", '{"base_model_name_or_path": null}', "names no base model (TypeError"),
        ("adapter_config.json", '{"base_model_name_or_path": "stock-bin/../stock-bin"}', "its own folder as the base"),
        ("adapter_config.json", "{", "adapter_config.json names no base model (JSONDecodeError"),
    ],
)
def test_a_damaged_file_beside_the_weights_is_named(
    stock_folder, tmp_path, monkeypatch, capsys, name, content, expected
):
    monkeypatch.chdir(tmp_path)
    (stock_folder / name).write_text(content)
    if name == "adapter_config.json":
        (stock_folder / "config.json").unlink()
    assert expected in refusal(capsys, stock_folder, tmp_path / "out")


def test_damaged_files_are_refused(stock_folder, tmp_path, tiny_dataset, capsys):
    for content in (b"", b"garbage", (stock_folder / "pytorch_model.bin").read_bytes()[:5000]):
        (stock_folder / "pytorch_model.bin").write_bytes(content)
        (tmp_path / "ckpt.pt").write_bytes(content)
        assert "no checkpoint loads from" in refusal(capsys, stock_folder, tmp_path / "out")
        line = refusal(capsys, tmp_path / "ckpt.pt", "--tokenizer", tiny_dataset, tmp_path / "out")
        assert "is no checkpoint of nanoGPT or build-nanogpt" in line
    torch.save({"state_dict": {}}, tmp_path / "ckpt.pt")
    line = refusal(capsys, tmp_path / "ckpt.pt", "--tokenizer", tiny_dataset, tmp_path / "out")
    assert "KeyError: 'model'" in line


def test_a_tokenizer_that_is_missing_or_of_another_model_is_named(stock_folder, tmp_path, tiny_dataset, capsys):
    save_nanogpt(tmp_path / "ckpt.pt", nanogpt_state(rows=704), rows=704)
    line = refusal(capsys, tmp_path / "ckpt.pt", tmp_path / "out")
    assert "carries no tokenizer: name it, e.g. --tokenizer openai-community/gpt2" in line
    line = refusal(capsys, tmp_path / "ckpt.pt", "--tokenizer", tiny_dataset, tmp_path / "out")
    assert "embeds 704 ids, the tokenizer has 512" in line
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (stock_folder / name).unlink()
    assert "holds no tokenizer" in refusal(capsys, stock_folder, tmp_path / "out")
    larger = AutoTokenizer.from_pretrained(tiny_dataset)
    larger.add_tokens(["<|other|>"])
    larger.save_pretrained(tmp_path / "larger")
    line = refusal(capsys, stock_folder, "--tokenizer", tmp_path / "larger", tmp_path / "out")
    assert "the tokenizer has 513 entries, the model 512" in line


def test_what_cannot_be_converted_is_refused_and_nothing_is_overwritten(stock, tmp_path, capsys):
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx=True"):
        from_stock(GPT2LMHeadModel(GPT2Config(**TINY, scale_attn_by_inverse_layer_idx=True)))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="holds a bert model: expected gpt2 or gpt2repro"):
        load_as_gpt2repro(tmp_path / "bert")
    with pytest.raises(ValueError, match="no checkpoint loads from"):
        load_as_gpt2repro(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert main([str(tmp_path / "bert"), str(tmp_path / "full"), "--to", "gpt2"]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_a_conversion_that_fails_while_writing_leaves_nothing(stock_folder, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    before = sorted(tmp_path.iterdir())
    assert "No space left on device" in refusal(capsys, stock_folder, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_hub_id_without_a_network_is_one_line_that_names_it_and_no_retries(hub, tmp_path, capsys, monkeypatch):
    hub.trouble = lambda method, path: 502  # as a proxy answers without a network behind it
    line = refusal(capsys, "openai-community/gpt2", tmp_path / "out")
    expected = "no tokenizer loads from 'openai-community/gpt2': give a folder or a Hub id"
    assert line == f"error: {expected} (the Hub does not answer at {hub.url})"
    asked = [asked for asked in hub.requests if asked[0] == "HEAD"]
    assert asked == [("HEAD", "/")] * 2  # the library's own retries of the model's files take 46 s
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"no checkpoint loads from 'openai-community/gpt2': .*127.0.0.1:9\)"):
        load_as_gpt2repro("openai-community/gpt2")


def test_the_command_says_nothing_but_its_error_without_a_network(tmp_path):
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "gpt2repro.hub.convert", "openai-community/gpt2", tmp_path / "out", "--to", "gpt2"],
        cwd=ROOT, env={**os.environ, **closed}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no tokenizer loads from 'openai-community/gpt2'")
    assert not (tmp_path / "out").exists()
