"""How much the shared prefix saves: sampling and scoring against the usual ways, in one run on this machine.

    python benchmarks/speed.py                              10 minutes on two cores
    python benchmarks/speed.py --model Qwen/Qwen3-8B        on a GPU: in 4 bits
    python benchmarks/speed.py --pairs 2 --traces 2 --new-tokens 4 --context 64 --rounds 1      a minute, to see it work

Sampling, with a LoRA adapter on the base, greedy, the same number of tokens in every row: common.generate against
transformers' `generate` on the left-padded batch of all prompts, and against its continuous batching,
`generate_batch`, which forks a prompt that was read once; its cache is set up before the race and emptied after each
round. It was written for GPUs: on a CPU it works with a mask over all pages. Scoring, on the bare base: traces behind
one context, an action behind each: common.shared_prefix_logprobs with the prefix read before, as stage 3 does it,
against the padded batch of rows; logits at the scored places only on both sides.

Every way is run --rounds times in turn and the fastest counts. Prints one JSON object last.
"""

import argparse
import importlib
import json
import logging
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

ACTION = 16                                                # scored tokens behind each trace


def make_parser(doc: str, **sizes: tuple[int, str]) -> argparse.ArgumentParser:
    """A parser whose --help shows the defaults; `sizes` are options that take a whole number, with default and help."""
    formatter = (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(description=doc, formatter_class=type("Formatter", formatter, {}))
    for name, (size, what) in sizes.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=common.positive_int, default=size, metavar="N", help=what)
    return parser


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def clock() -> float:
    """Seconds, once the GPU, if there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def race(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Fastest seconds of each way. The ways take turns, so that a noisy moment does not hit one of them alone."""
    best = dict.fromkeys(ways, math.inf)
    for _ in range(rounds):
        for name, way in ways.items():
            started = clock()
            way()
            best[name] = min(best[name], clock() - started)
    return best


def matrix_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product on this machine."""
    device, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / race({"product": lambda: torch.mm(a, b)}, 8)["product"]


def race_sampling(local: common.LocalModel, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer, rows = local.model, local.tokenizer, [prompt for prompt in prompts for _ in range(args.traces)]
    # All must write the same number of tokens, so the end token is switched off for the race.
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    end_token, tokenizer.eos_token_id = tokenizer.eos_token_id, len(tokenizer)
    ids, mask, _ = common.pad_left(rows, [0] * len(rows), model.device)
    drawn, not_run = {}, None

    def shared() -> None:
        groups = [common.split_prefix([prompt] * args.traces) for prompt in prompts]
        drawn["shared_prefix"] = [row.ids for row in common.generate(model, tokenizer, groups, args.new_tokens)]

    def padded() -> None:
        found = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=args.new_tokens,
                               pad_token_id=0)
        drawn["generate"] = found[:, ids.shape[1]:].tolist()

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=args.new_tokens, eos_token_id=-1)
    greedy.num_return_sequences = args.traces              # here, as its constructor refuses copies of a greedy answer
    page = ContinuousBatchingConfig().page_size
    # Room for all rows at once; its own choices would be most of the memory, and on a CPU a mask of gigabytes.
    paging = ContinuousBatchingConfig(num_blocks=len(rows) * (math.ceil((ids.shape[1] + args.new_tokens) / page) + 1),
                                      max_batch_tokens=None if model.device.type == "cuda" else 1024)

    def paged() -> None:
        found = list(model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=paging,
                                          persistent_manager=True).values())
        if len(found) != len(rows) or any(one.error for one in found):         # it logs errors and returns the rest
            raise RuntimeError(next((one.error for one in found if one.error), "rows are missing"))
        drawn["generate_batch"] = [one.generated_tokens for one in found]
        model._cached_continuous_batching_manager.batch_processor.cache.reset()          # else its prompts are there

    ways = {"shared_prefix": shared, "generate": padded, "generate_batch": paged}
    try:
        paged()
    except Exception as problem:                           # of a way that is not ours: the others still count
        not_run = f"{type(problem).__name__}: {common.first_line(problem)}"
        del ways["generate_batch"]
    seconds = race(ways, args.rounds)
    if hasattr(model, "_cached_continuous_batching_manager"):
        model.destroy_cached_continuous_batching_manager()
    model.generation_config.eos_token_id, tokenizer.eos_token_id = ends, end_token
    same = {name: sum(a == b for a, b in zip(drawn["shared_prefix"], drawn[name])) / len(rows)
            for name in ways if name != "shared_prefix"}
    return {"seconds": seconds, "speedup": {name: seconds[name] / seconds["shared_prefix"] for name in same},
            "same_greedy_rows": same, "generate_batch_not_run": not_run}


@torch.inference_mode()
def race_scoring(model: Any, args: argparse.Namespace, trace: int) -> dict[str, Any]:
    """Traces of `trace` tokens behind one context, ACTION tokens behind each of them."""
    highest = min(40_000, model.config.vocab_size)
    draw = lambda *shape: torch.randint(100, highest, shape, generator=torch.manual_seed(0))
    prefix, action = draw(args.context).tolist(), draw(ACTION).tolist()
    stems = draw(2 * args.traces, trace)
    rows = torch.tensor([[*prefix, *stem, *action] for stem in stems.tolist()], device=model.device)
    scores = {}

    def shared() -> None:
        (found,) = common.shared_prefix_logprobs(model, [(prefix, stems.tolist(), [[action]] * len(stems))],
                                                 past=common.read_prefix(model, prefix[:-1]))
        scores["shared"] = torch.cat([row for row, in found])

    def padded() -> None:
        logits = model(rows, logits_to_keep=ACTION + 1).logits[:, :-1].float()
        scores["padded"] = logits.log_softmax(-1).gather(-1, rows[:, -ACTION:, None]).flatten()

    seconds = race({"shared_prefix": shared, "padded_batch": padded}, args.rounds)
    output = model.get_output_embeddings().weight.numel()
    table = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.numel()   # is looked up
    read, scored = args.context + len(stems) * (trace + ACTION - 1), len(stems) * ACTION
    rate = (2 * (model.num_parameters() - output - table) * read + 2 * output * scored) / seconds["shared_prefix"]
    return {"traces": len(stems), "context_tokens": args.context, "trace_tokens": trace, "action_tokens": ACTION,
            "seconds": seconds, "speedup": seconds["padded_batch"] / seconds["shared_prefix"],
            "largest_difference": (scores["shared"] - scores["padded"]).abs().max().item(),
            "share_of_matrix_rate": rate / matrix_rate(model.dtype)}


@torch.no_grad()                                           # generate_batch's threads cannot write to inference tensors
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(
        __doc__, pairs=(8, "real prompts"), traces=(4, "rows a prompt; twice as many are scored"),
        new_tokens=(32, "tokens a row"), context=(512, "tokens before what is scored"),
        rounds=(3, "of which the fastest counts"))
    parser.add_argument("--model", default="embedded", metavar="NAME", help="a local folder or a hub name")
    parser.add_argument("--dtype", default="auto", help="float32 shows that both sides write the same")
    args = parser.parse_args(argv)
    local = common.load_model(args.model, torch.cuda.is_available(), args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        importlib.import_module("01_prepare").main(["--run", folder, "--limit", "44"])
        pairs = common.read_rows(Path(folder) / "pairs.jsonl", common.Pair)[:args.pairs]
    prompts = [common.encode_prompt(local.tokenizer, common.synthesis_prompt(pair)) for pair in pairs]
    local.model = common.add_adapter(local.model, 16, 0)
    for name, weight in local.model.named_parameters():
        if "lora_B" in name:                               # new ones are 0: an adapter left out would not show
            torch.nn.init.normal_(weight, std=0.01, generator=torch.Generator(weight.device).manual_seed(0))
    sampling = race_sampling(local, prompts, args)
    model = local.model.unload()
    print(json.dumps({"machine": machine(), "torch": torch.__version__, "model": args.model, "dtype": str(model.dtype),
                      "sampling": sampling, "scoring": [race_scoring(model, args, trace) for trace in (32, 64)]}))


if __name__ == "__main__":
    main()
