"""Parameter groups, the updates against PyTorch's optimizers stepped by hand, and runs with Muon that resume."""

import copy
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train_accelerate
from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.data.shards import open_dataset
from gpt2repro.recipe import Recipe
from gpt2repro.run.folder import RunFolder
from gpt2repro.train.muon import Muon, orthogonalise
from gpt2repro.train.optimizer import averaged_weights, make_optimizer
from modeling_gpt2repro import GPT2ReproForCausalLM
from tests.conftest import train_rows
from tests.test_train import assert_same_bits

MUON = {"optimizer": "muon", "muon_learning_rate": 6e-3}
AVERAGES_SHARDS = torch.__version__ >= "2.13"
PACK = {
    **MUON, "muon_weight_decay": 0.3, "muon_momentum": 0.9, "muon_split_qkv": "true", "muon_normalise_rows": "true",
    "muon_cautious_decay": "true", "embedding_lr_ratio": 1.5, "vector_lr_ratio": 0.5, "ema_decay": 0.8,
    "schedule": "wsd_concave", "decay_ratio": 0.7, "min_lr_ratio": 0.0,
}  # fmt: skip


def make_model():
    torch.manual_seed(0)
    return GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=64))


def test_matrices_and_embeddings_decay_and_vectors_do_not():
    model = make_model()
    groups = make_optimizer(model, Recipe(weight_decay=0.1)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert [{p.dim() for p in group["params"]} for group in groups] == [{2}, {2}, {1}]
    # Four matrices a layer and two embeddings; the tied head is not counted twice.
    assert [len(group["params"]) for group in groups[:2]] == [4 * 2, 2]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_embeddings_and_vectors_have_learning_rates_of_their_own(optimizer):
    recipe = Recipe(optimizer=optimizer, embedding_lr_ratio=3.0, vector_lr_ratio=0.5)
    groups = make_optimizer(make_model(), recipe).param_groups
    assert [group["lr_ratio"] for group in groups] == [1.0, 3.0, 0.5]


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


def muon_by_pytorch(weight, grads, **settings):
    """The weight after a step of torch.optim.Muon for each gradient."""
    weight = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.Muon([weight], **{"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw", **settings})
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach()


def muon_by_us(weight, grads, *, parts=1, **settings):
    weight = torch.nn.Parameter(weight.clone())
    optimizer = Muon([{"params": [weight], "parts": parts}], **{"weight_decay": 0.0, **settings})
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach()


def test_muons_matrices_come_near_the_orthogonal_factor_of_a_singular_value_decomposition():
    rng = np.random.default_rng(0)
    for rows, columns in ((24, 24), (48, 12), (12, 48)):
        rank = min(rows, columns)
        u, v = (np.linalg.qr(rng.normal(size=(size, rank)))[0] for size in (rows, columns))
        matrices = [torch.tensor(u * rng.uniform(0.1, 1.0, rank) @ v.T).float() for _ in range(2)]
        for result in orthogonalise(matrices):
            turned = u.T @ result.double().numpy() @ v  # the singular values, if the result has the same vectors
            values = np.diagonal(turned)
            assert 0.6 < values.min() and values.max() < 1.3
            assert np.abs(turned - np.diag(values)).max() < 0.03


def test_query_key_and_value_are_orthogonalised_as_three_matrices():
    torch.manual_seed(0)
    weight, grads = torch.randn(48, 16), [torch.randn(48, 16) for _ in range(3)]
    apart = zip(weight.chunk(3), *(grad.chunk(3) for grad in grads), strict=True)
    expected = torch.cat([muon_by_pytorch(part, part_grads, lr=0.02) for part, *part_grads in apart])
    torch.testing.assert_close(muon_by_us(weight, grads, parts=3, lr=0.02), expected, atol=1e-3, rtol=0)
    assert (muon_by_us(weight, grads, lr=0.02) - expected).norm() > 0.1 * (weight - expected).norm()


def test_only_query_key_and_value_are_several_matrices_in_one_tensor():
    model = make_model()
    named = {p: name for name, p in model.named_parameters()}
    groups = make_optimizer(model, Recipe(optimizer="muon", muon_split_qkv=True)).param_groups
    assert [group.get("parts") for group in groups] == [3, 1, None, None]
    assert {named[p].split(".", 3)[-1] for p in groups[0]["params"]} == {"attn.c_attn.weight"}
    assert not [named[p] for p in groups[1]["params"] if "c_attn" in named[p]]


def test_normuon_divides_each_row_by_its_running_size_and_keeps_the_norm():
    torch.manual_seed(0)
    weight, grads = torch.zeros(16, 32), [torch.randn(16, 32) * torch.arange(1, 17)[:, None] for _ in range(3)]
    plain = [muon_by_pytorch(weight, grads[:count], lr=1.0) for count in range(4)]
    expected, mean_squares = weight.double(), torch.zeros(16, 1, dtype=torch.float64)
    for before, after in itertools.pairwise(plain):
        update = (after - before).double()
        mean_squares = 0.95 * mean_squares + 0.05 * (update**2).mean(1, keepdim=True)
        even = update / mean_squares.sqrt()
        expected = expected + even * update.norm() / even.norm()
    found = muon_by_us(weight, grads, lr=1.0, normalise=True).double()
    torch.testing.assert_close(found, expected, atol=0.02 * expected.abs().max().item(), rtol=0)
    assert (found - plain[-1]).norm() > 0.05 * found.norm()


def test_cautious_decay_spares_the_weights_that_the_update_makes_larger():
    torch.manual_seed(0)
    weight, grad = torch.randn(16, 16), torch.randn(16, 16)
    moved = muon_by_pytorch(weight, [grad], lr=0.01)
    shrinking = (moved - weight) * weight < 0
    expected = torch.where(shrinking, moved - 0.01 * 0.5 * weight, moved)
    found = muon_by_us(weight, [grad], lr=0.01, weight_decay=0.5, cautious=True)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert shrinking.any() and not shrinking.all()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_average_of_the_weights_is_exponential_and_changes_no_update(optimizer):
    models = [make_model(), make_model()]
    recipes = [Recipe(optimizer=optimizer, ema_decay=0.7), Recipe(optimizer=optimizer)]
    optimizers = [make_optimizer(model, recipe) for model, recipe in zip(models, recipes, strict=True)]
    expected: dict = {}
    for _ in range(3):
        for name, parameter in models[0].named_parameters():
            parameter.grad = torch.randn_like(parameter)
            dict(models[1].named_parameters())[name].grad = parameter.grad.clone()
        for each in optimizers:
            each.step()
        for name, parameter in models[0].named_parameters():
            expected[name] = 0.7 * expected.get(name, parameter.detach()) + 0.3 * parameter.detach()
    raw = copy.deepcopy(models[0].state_dict())
    assert all(torch.equal(raw[name], tensor) for name, tensor in models[1].state_dict().items())
    with averaged_weights(models[0], optimizers[0]):
        for name, parameter in models[0].named_parameters():
            torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-5, check_dtype=False)
    assert all(torch.equal(raw[name], tensor) for name, tensor in models[0].state_dict().items())


@pytest.mark.parametrize(
    ("field", "value"),
    [("muon_learning_rate", 1e-2), ("muon_weight_decay", 0.0), ("muon_cautious_decay", True), ("muon_momentum", 0.9),
     ("muon_split_qkv", True), ("muon_normalise_rows", True)],
)  # fmt: skip
def test_what_only_muon_has_is_refused_without_it(field, value):
    with pytest.raises(ValueError, match=rf"^{field} is {value} with optimizer adamw: .*, or leave it out$"):
        Recipe(**{field: value}).check()
    Recipe(**{field: value}, optimizer="muon").check()


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


# ---- the whole pack in runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pack_run(train_script, tmp_path_factory):
    """The tiny run with every option."""
    run_dir = tmp_path_factory.mktemp("pack") / "run"
    train_script(run_dir, **PACK)
    return run_dir


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_with_every_option_resumes_bit_exactly(pack_run, train_script, tmp_path, processes):
    run_dir = shutil.copytree(pack_run, tmp_path / "run", symlinks=True)
    shutil.rmtree(run_dir / "step-00000008")
    assert "resumed from" in train_script(run_dir, processes=processes, **PACK)
    assert_same_bits(run_dir, pack_run)
    averages = [load_file(run / "latest" / "model.ema.safetensors") for run in (run_dir, pack_run)]
    assert averages[0].keys() == averages[1].keys()
    assert all(torch.equal(averages[0][name], tensor) for name, tensor in averages[1].items())


def test_the_averaged_weights_are_measured_and_loaded_as_a_variant(pack_run, tiny_dataset):
    raw, averaged = (AutoModelForCausalLM.from_pretrained(pack_run / "latest", trust_remote_code=True, variant=variant)
                     for variant in (None, "ema"))  # fmt: skip
    assert averaged.lm_head.weight is averaged.transformer.wte.weight
    assert not torch.equal(raw.transformer.wte.weight, averaged.transformer.wte.weight)
    ids = torch.from_numpy(open_dataset(tiny_dataset).split("val").read(0, 1025).astype("int64"))
    for model, kind in ((raw, "val"), (averaged, "val_ema")):
        logits = model(ids[:-1].view(-1, 32)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1:]).item()
        assert train_rows(pack_run, kind)[8]["loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.skipif(AVERAGES_SHARDS, reason="this torch can average sharded weights")
def test_averages_of_sharded_weights_are_refused_where_torch_keeps_the_gathered_ones(train_script, sharded, tmp_path):
    output = train_script(tmp_path / "run", exit_code=1, **sharded, **PACK)
    assert "ema_decay is 0.8 on sharded processes" in output and not (tmp_path / "run").exists()


@pytest.mark.skipif(not AVERAGES_SHARDS, reason="ema_decay with FSDP2 needs torch 2.13")
def test_sharded_over_two_processes_every_option_does_what_it_does_in_one(pack_run, train_script, sharded, tmp_path):
    train_script(tmp_path / "run", **sharded, **PACK)
    for kind in ("train", "val", "val_ema"):
        found, expected = train_rows(tmp_path / "run", kind), train_rows(pack_run, kind)
        assert found.keys() == expected.keys()
        assert all(found[step]["loss"] == pytest.approx(row["loss"], abs=5e-4) for step, row in expected.items())
    run_dir = tmp_path / "run"
    shutil.rmtree(run_dir / "step-00000008")
    assert "resumed from" in train_script(run_dir, **PACK)  # whole again
