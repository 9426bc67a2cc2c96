"""Parameter groups, the updates against PyTorch's optimizers stepped by hand, and runs with Muon that resume."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import train_accelerate
from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.recipe import Recipe
from gpt2repro.run.folder import RunFolder
from gpt2repro.train.optimizer import make_optimizer
from modeling_gpt2repro import GPT2ReproForCausalLM
from tests.conftest import train_rows
from tests.test_train import assert_same_bits

MUON = {"optimizer": "muon", "muon_learning_rate": 6e-3}


def make_model():
    torch.manual_seed(0)
    return GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=64))


def test_matrices_and_embeddings_decay_and_vectors_do_not():
    model = make_model()
    decayed, plain = make_optimizer(model, Recipe(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in plain["params"]} == {1}
    # Two embeddings and four matrices a layer; the tied head is not counted twice.
    assert len(decayed["params"]) == 2 + 4 * 2
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_updates_equal_those_of_an_unfused_adamw():
    model = make_model()
    reference_model = copy.deepcopy(model)
    optimizer = make_optimizer(model, Recipe(learning_rate=1e-2, weight_decay=0.5))
    named = dict(reference_model.named_parameters())
    reference = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n.endswith("bias") or "ln_" in n], "weight_decay": 0.0},
            {"params": [p for n, p in named.items() if not (n.endswith("bias") or "ln_" in n)]},
        ],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5, fused=False, foreach=False,
    )  # fmt: skip
    for _ in range(5):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            named[name].grad = parameter.grad.clone()
        optimizer.step()
        reference.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, named[name], atol=1e-6, rtol=1e-5)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = make_model()
    names = {parameter: name for name, parameter in model.named_parameters()}
    muon, decayed, plain = make_optimizer(model, Recipe(**MUON)).param_groups
    matrices = {f"transformer.h.{i}.{name}.weight" for i in range(2)
                for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}  # fmt: skip
    assert {names[p] for p in muon["params"]} == matrices
    assert {names[p] for p in decayed["params"]} == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert {names[p] for p in muon["params"] + decayed["params"] + plain["params"]} == set(names.values())
    assert [group["lr_ratio"] for group in (muon, decayed, plain)] == pytest.approx([10.0, 1.0, 1.0])
    assert [group["weight_decay"] for group in (muon, decayed, plain)] == [0.1, 0.1, 0.0]


def test_muon_updates_equal_those_of_pytorchs_two_optimizers_stepped_by_hand():
    model = make_model()
    reference_model = copy.deepcopy(model)
    recipe = Recipe(learning_rate=1e-2, weight_decay=0.5, optimizer="muon", muon_learning_rate=3e-2)
    optimizer = make_optimizer(model, recipe)
    named = dict(reference_model.named_parameters())
    blocks = [name for name in named if ".h." in name and named[name].dim() == 2]
    others = [name for name in named if name not in blocks]
    references = [
        torch.optim.Muon(
            [named[n] for n in blocks], lr=3e-2, weight_decay=0.5, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [
                {"params": [named[n] for n in others if named[n].dim() == 2], "weight_decay": 0.5},
                {"params": [named[n] for n in others if named[n].dim() == 1], "weight_decay": 0.0},
            ],
            lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True,
        ),
    ]  # fmt: skip
    for step in range(5):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            named[name].grad = parameter.grad.clone()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1) * group["lr_ratio"]
        for reference, rate in zip(references, (3e-2, 1e-2), strict=True):
            for group in reference.param_groups:
                group["lr"] = rate / (step + 1)
            reference.step()
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, named[name], atol=1e-7, rtol=1e-6)


def test_a_rate_for_muon_without_muon_is_refused():
    with pytest.raises(ValueError, match=r"^muon_learning_rate is 0\.01 with optimizer adamw: .*, or leave it out$"):
        Recipe(muon_learning_rate=1e-2).check()


def test_a_record_without_an_optimizer_is_one_of_adamw(tmp_path):
    facts = {"dataset": {"fingerprint": "f"}, "model": {}}
    folder = RunFolder(tmp_path)
    record = folder.check(Recipe(), **facts)
    for field in ("optimizer", "muon_learning_rate", "decay_ratio"):
        del record["recipe"][field]
    (tmp_path / "run.json").write_text(json.dumps(record))
    folder.check(Recipe(), **facts)
    with pytest.raises(ValueError, match="optimizer is 'adamw' there and 'muon' here"):
        folder.check(Recipe(optimizer="muon"), **facts)


@pytest.fixture(scope="module")
def muon_runs(train_script, tmp_path_factory) -> dict:
    """The tiny run of conftest.py with Muon, of one process and of two, by the number of processes."""
    folder = tmp_path_factory.mktemp("muon")
    for processes in (1, 2):
        train_script(folder / str(processes), processes=processes, **MUON)
    return {processes: folder / str(processes) for processes in (1, 2)}


def test_a_run_with_muon_learns_and_saves_one_moment_a_matrix(muon_runs, unbroken_run):
    losses = [row["loss"] for row in train_rows(muon_runs[1]).values()]
    assert losses[-1] < losses[0] - 0.1
    assert losses != [row["loss"] for row in train_rows(unbroken_run).values()]
    kinds = {name.rsplit(".", 1)[1] for name in load_file(muon_runs[1] / "latest" / "optimizer.safetensors")
             if "c_attn.weight" in name}  # fmt: skip
    assert kinds == {"momentum_buffer"}


def test_with_muon_two_processes_equal_one_bitwise(muon_runs):
    assert_same_bits(muon_runs[2], muon_runs[1])


@pytest.mark.parametrize("processes", [1, 2])  # of what one has saved, which is what two save
def test_a_run_with_muon_resumes_bit_exactly(muon_runs, train_script, tmp_path, processes):
    run_dir = shutil.copytree(muon_runs[1], tmp_path / "run", symlinks=True)
    shutil.rmtree(run_dir / "step-00000008")
    assert "resumed from" in train_script(run_dir, processes=processes, **MUON)
    assert_same_bits(run_dir, muon_runs[1])


def test_a_run_with_muon_does_not_resume_with_adamw(muon_runs, train_script, capsys):
    assert train_accelerate.main(train_script.flags(muon_runs[1])) == 1
    assert "optimizer is 'muon' there and 'adamw' here" in capsys.readouterr().err


def test_sharded_over_two_processes_muon_orthogonalises_whole_matrices(muon_runs, train_script, sharded, tmp_path):
    """The same updates but for the bf16 of the iteration, whose sums are taken in another order there."""
    train_script(tmp_path / "run", **sharded, **MUON)
    found, expected = train_rows(tmp_path / "run"), train_rows(muon_runs[1])
    assert all(found[step]["loss"] == pytest.approx(row["loss"], abs=2e-4) for step, row in expected.items())
    sharded, whole = (load_file(run / "latest" / "model.safetensors") for run in (tmp_path / "run", muon_runs[1]))
    torch.manual_seed(Recipe().seed)
    before = GPT2ReproForCausalLM(GPT2ReproConfig.from_pretrained(muon_runs[1] / "latest")).state_dict()
    for name in (name for name in whole if ".h." in name and whole[name].dim() == 2):
        apart, moved = (sharded[name] - whole[name]).norm(), (whole[name] - before[name]).norm()
        assert apart < 0.1 * moved
