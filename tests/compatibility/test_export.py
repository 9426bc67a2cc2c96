"""torch.export and ONNX, of this project's model and of its conversion to stock GPT-2."""

import pytest
import torch

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.hub.convert import to_stock
from modeling_gpt2repro import GPT2ReproForCausalLM

LENGTHS = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}


class Logits(torch.nn.Module):
    """(B, T) -> (B, T, V) and nothing else."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


def other_ids():
    return torch.randint(1, 128, (3, 33), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_an_exported_program_computes_the_logits_for_any_batch_and_length(ours, ids, kind):
    model = Logits(ours if kind == "ours" else to_stock(ours)).eval()
    program = torch.export.export(model, (ids,), dynamic_shapes=LENGTHS)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(other_ids()), Logits(ours)(other_ids()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_program_exported_from_a_short_example_takes_the_longest_texts(dtype):
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 320, "vocab_size": 128}
    torch.manual_seed(0)
    model = Logits(GPT2ReproForCausalLM(GPT2ReproConfig(**shape, bos_token_id=0, eos_token_id=0)).to(dtype)).eval()
    program = torch.export.export(model, (torch.randint(128, (2, 16)),), dynamic_shapes=LENGTHS)
    long_ids, tolerance = torch.randint(128, (3, 300)), 1e-5 if dtype == torch.float32 else 0.1
    with torch.no_grad():
        torch.testing.assert_close(program.module()(long_ids), model(long_ids), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_onnxruntime_computes_the_logits_of_the_onnx_file(ours, ids, kind, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Logits(ours if kind == "ours" else to_stock(ours)).eval()
    torch.onnx.export(
        model, (ids,), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=LENGTHS, input_names=["input_ids"],
        verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input_ids": other_ids().numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), Logits(ours)(other_ids()), atol=1e-4, rtol=1e-5)
