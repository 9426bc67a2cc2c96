"""LoRA with peft, on the names that GPT-2 has and on plain linear layers."""

import pytest
import torch

from modeling_gpt2repro import GPT2ReproForCausalLM


def test_lora_trains_merges_and_reloads(pair, ours, checkpoint, ids, tmp_path):
    peft = pytest.importorskip("peft")
    # Stock GPT-2 needs fan_in_fan_out=True for its Conv1D; an nn.Linear does not.
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM", fan_in_fan_out=False
    )
    model = peft.get_peft_model(ours, config)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 3 * 2 and all("lora_" in name for name in trained)  # layers, targets, A and B
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        reloaded = peft.PeftModel.from_pretrained(
            GPT2ReproForCausalLM.from_pretrained(checkpoint), tmp_path / "adapter"
        )
        assert torch.equal(reloaded.eval()(input_ids=ids).logits, adapted)
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = GPT2ReproForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(ids).logits, adapted, atol=1e-4, rtol=1e-4)
        assert merged.state_dict().keys() == pair[1].state_dict().keys()
