"""Predict a recipe's step time, memory, hours and dollars on 1 to 512 GPUs, by arithmetic; nothing runs.

    python -m gpt2repro.tools.scaling recipes/gpt2-124m-10b.yaml --card H100 [--card A100] [--dollars-per-hour 2]
    python -m gpt2repro.tools.scaling --published       # the prediction beside published step times

The first prints a row for each number of GPUs and way: DDP with its all-reduce after the backward, DDP with the
all-reduce hidden behind the backward of the last micro-step, and FSDP2. The assumptions are printed above the table.
"""

from gpt2repro import command
from gpt2repro.tools import flags

if command.starting(__name__):
    command.parse_early(lambda: flags.scaling(__doc__, None))

import argparse
import math
import sys
from dataclasses import dataclass, replace

import torch

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.hub.initial import take_shape
from gpt2repro.recipe import Recipe
from gpt2repro.train.estimates import PEAK_FLOPS, USABLE, flops_per_token, memory_estimate
from modeling_gpt2repro import GPT2ReproForCausalLM

NODE = 8  # cards in a node
LINKS = 0.7  # of a link's datasheet rate that a collective reaches: 214 of 300 GB/s on four A100 (FastChat, pull 9)
# Bytes that a step moves in the card's memory, as counted in docs/performance.md.
STATE_BYTES = 54  # of a parameter: bf16 copy, gradient in bf16 and fp32, its norm and scaling, AdamW
MORE_STATE_BYTES = 18  # of a parameter for each further micro-step: bf16 copy, gradient in bf16, its sum in fp32
BLOCK_NUMBERS = 16  # per token, layer and channel, in bf16, written and read
LOGITS_PASSES = 6  # over the logits in bf16
FEW_TOKENS = 8192  # in a micro-batch: below, matmuls are too small for the efficiency that is assumed


@dataclass(frozen=True)
class Card:
    """Datasheet figures of an SXM card, bytes and bytes/s of one direction, and the measured efficiency of matmuls."""

    memory: float
    memory_rate: float
    link_rate: float  # NVLink, to the other cards of the node
    network_rate: float  # to other nodes: a card's share of the node's adapters
    efficiency: float  # of the peak, that the matmuls of a step reach
    source: str  # of the efficiency


CARDS = {
    "A100": Card(80e9, 2039e9, 300e9, 25e9, 0.69, "llm.c's 350M: 820 ms on 8 A100"),
    "H100": Card(80e9, 3350e9, 450e9, 50e9, 0.54, "llm.c's 1558M: 2.80 s on 8 H100"),
    "H200": Card(141e9, 4800e9, 450e9, 50e9, 0.54, "taken from H100, whose peak it has"),
}


@dataclass(frozen=True)
class Setup:
    """How a run is spread over `gpus` cards."""

    gpus: int
    efficiency: float
    sharded: bool = False  # FSDP2
    overlap: bool = False  # communication behind computation
    gradient_bytes: int = 4  # of a gradient in the all-reduce: fp32 as this project's loop, or bf16


@dataclass(frozen=True)
class Published:
    """A published step time. Its implementation's efficiency is set by one `anchor`; the other rows are predicted."""

    what: str
    card: str
    model: str
    tokens: int  # of a step
    micro_batch_size: int
    setup: Setup
    seconds: float
    anchor: bool = False


LLM_C_A100 = Setup(8, CARDS["A100"].efficiency, overlap=True, gradient_bytes=2)
LLM_C_H100 = Setup(8, CARDS["H100"].efficiency, overlap=True, gradient_bytes=2)
LECTURE = Setup(8, 0.58, overlap=True)
MODAL = Setup(8, 0.26)
PUBLISHED = [  # llm.c's are in scripts/run_gpt2_*.sh and modded-nanogpt's log, the lecture's in its chapters
    Published("llm.c, 820 ms", "A100", "gpt2-medium", 2**19, 64, LLM_C_A100, 0.820, anchor=True),
    Published("llm.c, 300 ms (218k tokens/s each)", "A100", "gpt2", 2**19, 64, LLM_C_A100, 0.300),
    Published("llm.c, 1.7 s", "A100", "gpt2-large", 2**19, 32, LLM_C_A100, 1.7),
    Published("llm.c, 2.80 s", "H100", "gpt2-xl", 2**20, 16, LLM_C_H100, 2.80, anchor=True),
    Published("llm.c, 468k tokens/s each", "H100", "gpt2", 2**19, 64, LLM_C_H100, 2**16 / 468e3),
    Published("lecture, 90 ms", "A100", "gpt2", 2**14, 16, replace(LECTURE, gpus=1), 0.090, anchor=True),
    Published("lecture, 1.5M tokens/s in all", "A100", "gpt2", 2**19, 64, LECTURE, 2**19 / 1.5e6),
    # github.com/modal-labs/multinode-training-guide; its batch is taken to be nanoGPT's.
    Published("nanoGPT at Modal, 231 ms", "H100", "gpt2", 491_520, 12, MODAL, 0.231, anchor=True),
    Published("nanoGPT at Modal, 121 ms", "H100", "gpt2", 491_520, 12, replace(MODAL, gpus=16), 0.121),
    Published("nanoGPT at Modal, 63 ms", "H100", "gpt2", 491_520, 12, replace(MODAL, gpus=32), 0.063),
]


def predict(recipe: Recipe, model: GPT2ReproForCausalLM, card: str, setup: Setup) -> dict[str, float]:
    """Seconds of a step by part (`step` is their sum), and what follows: tokens a second, MFU, bytes of memory."""
    config, rates, gpus = model.config, CARDS[card], setup.gpus
    n_parameters, tokens = model.num_parameters(), recipe.global_batch_tokens / gpus
    micro_steps = math.ceil(tokens / (recipe.micro_batch_size * recipe.seq_len))
    sizes = {name: getattr(config, name) for name in ("n_positions", "n_layer", "n_embd")}
    flops = tokens * flops_per_token(n_parameters=n_parameters, seq_len=recipe.seq_len, **sizes)
    recomputed = 4 / 3 if recipe.gradient_checkpointing else 1  # one forward more
    matmuls = recomputed * flops / (PEAK_FLOPS[card] * setup.efficiency)

    shards = gpus if setup.sharded else 1
    activations = 2 * (2 * BLOCK_NUMBERS * config.n_layer * config.n_embd + LOGITS_PASSES * config.vocab_size) * tokens
    state = n_parameters * (STATE_BYTES / shards + MORE_STATE_BYTES * (micro_steps - 1))
    traffic = (activations + state) / rates.memory_rate

    # A ring's slowest link; between nodes a ring runs through every adapter, so a node's whole network carries it.
    rate = LINKS * (rates.link_rate if gpus <= NODE else min(rates.link_rate, NODE * rates.network_rate))
    # An all-reduce moves everything twice. FSDP2 gathers bf16 weights for every forward and backward, and scatters
    # fp32 gradients.
    moved = n_parameters * (4 * micro_steps + 4 if setup.sharded else 2 * setup.gradient_bytes)
    communication = moved * (gpus - 1) / gpus / rate
    if setup.overlap:  # DDP: behind the backward of the last micro-step, two thirds of its time
        communication = max(0.0, communication - (matmuls + traffic) * (1 if setup.sharded else 2 / 3 / micro_steps))
    step = matmuls + traffic + communication
    memory = memory_estimate(
        recipe, config, n_parameters=n_parameters, bf16=True, chunked_loss=recipe.loss_impl != "plain", shards=shards
    )
    return {
        "matmuls": matmuls, "traffic": traffic, "communication": communication, "step": step,
        "tokens_per_second": recipe.global_batch_tokens / step, "mfu": flops / step / PEAK_FLOPS[card],
        "memory": sum(memory.values()),
    }  # fmt: skip


def model_of(recipe: Recipe) -> GPT2ReproForCausalLM:
    """The recipe's model without its weights; GPT-2's vocabulary where the recipe names none."""
    with torch.device("meta"):
        return GPT2ReproForCausalLM(GPT2ReproConfig(**recipe.shape(), vocab_size=recipe.vocab_size or 50257))


def print_table(recipe: Recipe, arguments: argparse.Namespace) -> None:
    card, model = arguments.card, model_of(recipe)
    efficiency = arguments.efficiency or CARDS[card].efficiency
    source = "--efficiency" if arguments.efficiency else f"{CARDS[card].source}; on a GPU this project is not measured"
    gradient_bytes = {"fp32": 4, "bf16": 2}[arguments.gradients]
    ways = {"DDP": {}, "DDP, hidden": {"overlap": True}, "FSDP2, hidden": {"overlap": True, "sharded": True}}
    print(
        f"{card}: {efficiency:.0%} of {PEAK_FLOPS[card] / 1e12:,.0f} TFLOP/s in matmuls ({source}); the bytes of "
        f"activations, logits and optimizer at\n{CARDS[card].memory_rate / 1e9:,.0f} GB/s; {NODE} cards a node; links "
        f"at {LINKS:.0%} of NVLink's {CARDS[card].link_rate / 1e9:.0f} GB/s, between nodes "
        f"{CARDS[card].network_rate / 1e9:.0f} GB/s a card; latency, data and evaluation not counted.\n"
        f"{model.num_parameters():,} parameters, {model.config.vocab_size:,} ids, gradients reduced in "
        f"{arguments.gradients}. * fewer than {FEW_TOKENS:,} tokens in a micro-batch: expect less.\n\n"
        "| GPUs | way | sequences | step ms | matmuls | traffic | links | tokens/s | MFU | memory GB | hours | "
        f"dollars |\n|{'---|' * 12}"
    )
    for gpus in arguments.gpus:
        sequences, rest = divmod(recipe.global_batch_tokens // recipe.seq_len, gpus)
        if rest or not sequences:
            print(f"| {gpus} | does not divide the {sequences * gpus + rest} sequences of a step |")
            continue
        local = replace(recipe, micro_batch_size=math.gcd(recipe.micro_batch_size, sequences))
        for name, way in ways.items():
            made = predict(local, model, card, Setup(gpus, efficiency, gradient_bytes=gradient_bytes, **way))
            hours = recipe.max_steps * made["step"] / 3600
            dollars = f"{hours * gpus * arguments.dollars_per_hour:,.0f}" if arguments.dollars_per_hour else ""
            few = "*" if local.micro_batch_size * recipe.seq_len < FEW_TOKENS else ""
            fits = "" if made["memory"] <= USABLE * CARDS[card].memory else ", too much"
            parts = " | ".join(f"{1000 * made[part]:.1f}" for part in ("step", "matmuls", "traffic", "communication"))
            print(
                f"| {gpus} | {name} | {local.micro_batch_size}{few} | {parts} | {made['tokens_per_second']:,.0f} | "
                f"{made['mfu']:.1%} | {made['memory'] / 1e9:.1f}{fits} | {hours:.2f} | {dollars} |"
            )


def predict_published(row: Published) -> float:
    """The predicted seconds of a step, where a published figure has its own."""
    recipe = Recipe(
        model=row.model, seq_len=1024, global_batch_tokens=row.tokens, micro_batch_size=row.micro_batch_size
    )
    return predict(recipe, model_of(recipe), row.card, row.setup)["step"]


def print_published() -> None:
    print(f"| published | model | GPUs | efficiency | published ms | predicted ms | error |\n|{'---|' * 7}")
    for row in PUBLISHED:
        seconds, setup = predict_published(row), row.setup
        error = "sets the efficiency" if row.anchor else f"{seconds / row.seconds - 1:+.1%}"
        print(
            f"| {row.what} | {row.model} | {setup.gpus} {row.card} | {setup.efficiency:.0%} | "
            f"{1000 * row.seconds:,.0f} | {1000 * seconds:,.0f} | {error} |"
        )


def main(argv: list[str] | None = None) -> int:
    def work() -> None:
        recipe, arguments = flags.scaling(__doc__, argv)
        if recipe is None:
            print_published()
        else:
            recipe.check()
            print_table(take_shape(recipe, world_size=1), arguments)

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
