"""Loading from a folder or the Hub: errors that name the source, and no retries where the Hub does not answer."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import validate_repo_id
from torch.nn import Parameter
from transformers import AutoTokenizer

from gpt2repro.hub.upload import hub_is_reachable
from gpt2repro.run.checkpoints import RECORD, verify_checkpoint

CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # buffers that older files of GPT-2 hold beside the weights


def from_pretrained(loader: Any, source: str | Path, *, what: str = "checkpoint", **options: Any) -> Any:
    """`loader.from_pretrained(source)`; where the Hub does not answer, a Hub id loads from the library's cache.

    Raises:
        ValueError: nothing there, or a damaged file; with the reason.
    """
    offline = False
    try:
        if not Path(source).is_dir():
            validate_repo_id(str(source))
            offline = not hub_is_reachable()
        return loader.from_pretrained(source, local_files_only=offline, **options)
    except Exception as error:  # a damaged file makes the libraries raise almost anything
        why = f"the Hub does not answer at {constants.ENDPOINT}" if offline else reason(error)
        raise ValueError(f"no {what} loads from {str(source)!r}: give a folder or a Hub id ({why})") from error


def refuse_damage(source: str | Path) -> None:
    """Read the weights, configuration and tokenizer of a run's checkpoint against its record; others have none.

    Raises:
        ValueError: a file is missing or damaged; it is named.
    """
    if (Path(source) / RECORD).is_file():
        verify_checkpoint(Path(source), to_resume=False)


def check_weights(source: str | Path, model: Any, info: dict[str, Any]) -> None:
    """Refuse weights that are not those of the configuration, or not finite.

    `info` is the library's report of the loading: it makes up random tensors for missing ones, and leaves out those
    of a configuration with fewer layers.
    """
    problems = [
        *(f"missing: {name}" for name in info["missing_keys"]),
        *(f"wrong shape: {name} {list(shape)}" for name, shape, _ in info["mismatched_keys"]),
    ]
    if model.config.model_type in ("gpt2", "gpt2repro"):  # others leave out tensors of tasks that are not theirs
        problems += [f"unexpected: {name}" for name in info["unexpected_keys"] if not name.endswith(CAUSAL_MASKS)]
    if problems:
        named = ", ".join(sorted(problems)[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise ValueError(f"the tensors of {source} are not those of its configuration ({named})")
    check_finite(source, model)


def check_finite(source: str | Path, model: Any) -> None:
    """Refuse NaN in a model, and infinite weights; a mask is infinite."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.isnan().any() or (isinstance(tensor, Parameter) and tensor.isinf().any()):
            what = f"NaN or infinite weights in {name} ({str(tensor.dtype).removeprefix('torch.')})"
            raise ValueError(f"{source} has {what}: give an earlier checkpoint")


def base_of_adapter(source: str | Path) -> str | None:
    """The model that a folder with a LoRA adapter of peft's belongs to, as the adapter names it; else None."""
    folder = Path(source)
    if (folder / "config.json").exists() or not (folder / "adapter_config.json").is_file():
        return None
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        itself = Path(base).resolve() == folder.resolve()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'adapter_config.json'} names no base model ({reason(error)})") from None
    if itself:
        raise ValueError(f"{folder / 'adapter_config.json'} names its own folder as the base model")
    return base


def with_adapter(model: Any, folder: str | Path) -> Any:
    """`model` with the LoRA adapter in `folder` merged into its weights; ValueError where that cannot be done."""
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError(f"{folder} holds a LoRA adapter: pip install peft, which merges it") from None
    try:
        merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except Exception as error:  # a damaged file makes the libraries raise almost anything
        raise ValueError(f"the LoRA adapter in {folder} does not load ({reason(error)})") from error
    check_finite(folder, merged)
    return merged


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer at a folder or Hub id; that of a LoRA adapter's base where none lies beside the adapter.

    Raises:
        ValueError: there is none, or only an empty one that the library made from the configuration.
    """
    if (base := base_of_adapter(source)) and not (Path(source) / "tokenizer_config.json").exists():
        source = base
    tokenizer = from_pretrained(AutoTokenizer, source, what="tokenizer")
    if len(tokenizer) < 2:
        raise ValueError(f"{source} holds no tokenizer: save the model's there, or convert with --tokenizer DIR_OR_ID")
    return tokenizer


def reason(error: Exception) -> str:
    """A loading error on one line; for a refused pickle the name that it asks for."""
    if name := re.search(r"GLOBAL (\S+)", str(error)):  # without PyTorch's advice to load the pickle nevertheless
        return f"the pickle asks for {name[1]}, which no weights need; nothing of it was run"
    text = " ".join(str(error).split("WeightsUnpickler error:")[-1].split())
    return f"{type(error).__name__}: {text}"[:300]
