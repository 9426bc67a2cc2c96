"""What `auto` chooses by the kind of device: the table, without the devices."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from gpt2repro.recipe import Recipe
from gpt2repro.train import launch
from gpt2repro.train.devices import CHOICES, choices, kind_of
from tests.conftest import CONFIGS, ROOT

CARDS = [  # name, capability, ROCm, kind, mixed_precision
    ("NVIDIA H100 80GB HBM3", (9, 0), None, "CUDA from 8.0 on", "bf16"),
    ("NVIDIA A100-SXM4-40GB", (8, 0), None, "CUDA from 8.0 on", "bf16"),
    ("Tesla T4", (7, 5), None, "CUDA 7.0 to 7.5", "fp16"),
    ("Tesla V100-SXM2-16GB", (7, 0), None, "CUDA 7.0 to 7.5", "fp16"),
    ("Tesla P100-PCIE-16GB", (6, 0), None, "CUDA before 7.0", "no"),
    ("AMD Instinct MI300X", (9, 4), "6.4", "ROCm", "bf16"),
]
CUDA = torch.device("cuda")


@pytest.fixture
def card(monkeypatch):
    """A function that makes CUDA look like a card."""

    def become(name: str, capability: tuple[int, int], hip: str | None = None) -> None:
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        has_bf16 = hip is not None or capability >= (8, 0)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: has_bf16)

    return become


@pytest.mark.parametrize(("name", "capability", "hip", "kind", "precision"), CARDS)
def test_a_card_computes_in_what_its_hardware_has(card, name, capability, hip, kind, precision):
    card(name, capability, hip)
    assert kind_of(CUDA) == kind
    assert launch._mixed_precision(Recipe(), CUDA) == precision


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_other_accelerators_have_a_row_of_their_own(kind):
    assert kind_of(torch.device(kind)) == kind.upper()


def test_a_cpu_computes_in_bf16_where_it_has_the_instructions(monkeypatch):
    for instructions in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, instructions, lambda: False)
    assert choices(torch.device("cpu")).mixed_precision == "no"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert choices(torch.device("cpu")).mixed_precision == "bf16"


def test_an_unknown_device_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="the device is vulkan: give one of CUDA, ROCm, XPU, MPS and CPU"):
        kind_of(torch.device("vulkan"))


@pytest.mark.parametrize("by", ["recipe", "launcher"])
def test_bf16_that_a_card_emulates_is_refused_with_what_it_has(card, monkeypatch, by):
    card("Tesla T4", (7, 5))
    if by == "launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match=r"Tesla T4 only emulates: give auto \(fp16 on this card\)"):
        launch._mixed_precision(Recipe(mixed_precision="bf16" if by == "recipe" else "auto"), CUDA)


def test_the_configurations_for_data_parallel_runs_leave_the_precision_to_the_card():
    for file in ("single_gpu", "ddp_8gpu", "multi_node"):
        assert "mixed_precision" not in (CONFIGS / f"{file}.yaml").read_text()


def test_fp16_in_shards_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fp16 with FSDP2 is not supported: use DDP, or cards with bf16"):
        launch._sharding("fp16")


def test_the_page_has_the_table_of_the_code():
    lines = (ROOT / "docs" / "devices.md").read_text().splitlines()
    page = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    rows = {cells[0]: tuple(cells[1:4]) for cells in page if len(cells) == 7}
    for kind, auto in CHOICES.items():
        assert rows[kind] == (auto.mixed_precision, "yes" if auto.compile else "no", auto.loss_impl)


def test_evaluation_takes_the_accelerator_that_training_takes(monkeypatch):
    from gpt2repro.eval.loading import best_device

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: SimpleNamespace(type="mps"))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert best_device() == "mps"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert best_device() == "cpu"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_memory_that_a_step_freed_is_used_again_without_page_faults():
    code = (
        "import resource, sys, torch\n"
        "from gpt2repro.train.launch import reuse_memory\n"
        "if sys.argv[1] == 'reuse': reuse_memory()\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    tensors = [torch.ones(2**24) for _ in range(3)]\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(), print(faults())\n"
    )
    without, with_reuse = (
        int(subprocess.run([sys.executable, "-c", code, word], capture_output=True, check=True, cwd=ROOT).stdout)
        for word in ("", "reuse")
    )
    assert with_reuse < 50 < without
