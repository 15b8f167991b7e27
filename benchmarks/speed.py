"""How much the shared prefix saves: sampling and scoring against the usual ways, in one run on this machine.

    python benchmarks/speed.py
    python benchmarks/speed.py --model Qwen/Qwen3-8B        on a GPU: in 4 bits

Sampling, with a LoRA adapter on the base: 4 traces for each of 8 real pairs, greedy, exactly 32 tokens each: `common.generate` against transformers'
`generate` on the left-padded batch of all 32 prompts, and against its continuous batching (`generate_batch`): pages of keys and values, each
prompt read once and forked, its cache set up before the race and emptied after each round. The last was written for a GPU, where this script has not been
run yet; on a CPU it works too, with a mask over all pages, which is not what it is for. It takes flash attention where that is installed
(requirements.txt does not) and the same mask otherwise; the result says which. Scoring, on the bare base: 8 traces over a context of 512 tokens:
`common.packed_logprobs` against the padded batch of 8 rows and against one row at a time, logits at the scored
positions only for all three; with suffixes of 48 tokens (a trace of 32 and an action of 16) and of 80 (with words of a
prompt around them). Every way is run three times in turn and the fastest counts. Prints one JSON object last.
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
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

PAIRS, TRACES, NEW_TOKENS, CONTEXT, SCORED, ACTION = 8, 4, 32, 512, 8, 16


def clock() -> float:
    """Seconds, once the GPU, if there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def race(ways: dict[str, Callable[[], object]], rounds: int = 3, repeats: dict[str, int] | None = None) -> dict[str, float]:
    """Fastest seconds of each way; the ways take turns, so that a noisy moment does not hit one of them alone.

    A short way is done `repeats` times in a row and its mean counts: right after a long one it would pay for memory that
    the long one gave back.
    """
    best = {name: float("inf") for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            count = (repeats or {}).get(name, 1)
            started = clock()
            for _ in range(count):
                way()
            best[name] = min(best[name], (clock() - started) / count)
    return best


def matrix_rate(model: Any) -> float:
    """Floating-point operations a second of a large matrix product on the model's device, in the type it computes in."""
    size = 8192 if model.device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=model.device, dtype=model.dtype)
    return 2 * size**3 / race({"product": lambda: a @ b}, 8)["product"]


@torch.inference_mode()
def scoring_race(model: Any, suffix_tokens: int) -> dict:
    """Packed against padded and one-by-one scoring of SCORED suffixes behind one prefix; the last ACTION tokens are scored.

    All three compute the output layer for the scored tokens alone, so the race is about the shared prefix and padding.
    """
    generator = torch.Generator().manual_seed(0)
    largest = min(40_000, model.config.vocab_size)
    prefix = torch.randint(100, largest, (CONTEXT,), generator=generator).tolist()
    suffixes = torch.randint(100, largest, (SCORED, suffix_tokens), generator=generator).tolist()
    scores = {}

    def gather(logits: torch.Tensor, suffix: torch.Tensor) -> torch.Tensor:
        return logits[:, :-1].float().log_softmax(-1).gather(-1, suffix[:, -ACTION:].unsqueeze(-1)).squeeze(-1)

    def packed() -> None:
        scores["packed"] = torch.stack(common.packed_logprobs(model, [(prefix, suffixes)], [[suffix_tokens - ACTION] * SCORED])[0])

    def batch() -> None:
        rows = torch.tensor([prefix + suffix for suffix in suffixes], device=model.device)
        scores["padded"] = gather(model(rows, logits_to_keep=ACTION + 1).logits, torch.tensor(suffixes, device=model.device))

    def single() -> None:
        scores["single"] = torch.cat([gather(model(torch.tensor([prefix + suffix], device=model.device), logits_to_keep=ACTION + 1).logits,
                                             torch.tensor([suffix], device=model.device)) for suffix in suffixes])

    seconds = race({"packed": packed, "padded_batch": batch, "one_by_one": single}, repeats={"packed": 4})
    output = model.get_output_embeddings().weight.numel()
    table = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.numel()     # looked up, not multiplied
    flops = 2 * (model.num_parameters() - output - table) * (CONTEXT + SCORED * (suffix_tokens - 1)) + 2 * output * SCORED * ACTION
    return {"traces": SCORED, "context_tokens": CONTEXT, "suffix_tokens": suffix_tokens, "scored_tokens": ACTION, "seconds": seconds,
            "rows_a_second": {name: SCORED / value for name, value in seconds.items()},
            "speedup_over_padded": seconds["padded_batch"] / seconds["packed"], "speedup_over_one_by_one": seconds["one_by_one"] / seconds["packed"],
            "largest_difference": max((scores["packed"] - scores[name]).abs().max().item() for name in ("padded", "single")),
            "packed_share_of_matrix_rate": flops / seconds["packed"] / matrix_rate(model)}


@torch.no_grad()                                           # not inference_mode: the threads of generate_batch could not write to what is made in it
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", metavar="NAME", help="'embedded', a local folder or a hub name (default: %(default)s)")
    args = parser.parse_args()
    model, tokenizer = common.load_model(args.model, None)
    model = common.add_adapter(model, 16, 0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:                                  # new ones are 0, and an adapter that does nothing could be left out unseen
            torch.nn.init.normal_(weight, std=0.01, generator=torch.Generator(weight.device).manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        importlib.import_module("01_prepare").main(["--run", folder, "--limit", "40"])
        pairs = common.read_rows(Path(folder) / "pairs.jsonl")[:PAIRS]
    prompts = [common.synthesis_prompt(tokenizer, pair) for pair in pairs]

    # Both sides must write the same number of tokens, so the end token is switched off for the race.
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    end_token, tokenizer.eos_token_id = tokenizer.eos_token_id, len(tokenizer)
    rows = [prompt for prompt in prompts for _ in range(TRACES)]
    ids, mask, _ = common.pad_left(rows, [0] * len(rows), model.device)
    drawn = {}

    def shared() -> None:
        drawn["shared"] = [completion.ids for completion in common.generate(model, tokenizer, [(prompt[:-1], [prompt[-1:]] * TRACES) for prompt in prompts], NEW_TOKENS)]

    def padded() -> None:
        drawn["padded"] = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)[:, ids.shape[1]:].tolist()

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=-1)
    greedy.num_return_sequences = TRACES                      # set here, as its constructor refuses copies of a greedy answer
    block = ContinuousBatchingConfig().page_size
    # Room for all rows at once; its own choice would be most of the memory. On a CPU its usual 8,192 tokens a forward would mean a mask of gigabytes.
    paging = ContinuousBatchingConfig(num_blocks=len(rows) * (math.ceil((ids.shape[1] + NEW_TOKENS) / block) + 1), max_batch_tokens=None if model.device.type == "cuda" else 1024)

    def paged() -> None:
        found = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=paging, persistent_manager=True).values()
        if len(found) != len(rows) or any(one.error for one in found):          # it logs what goes wrong and returns the rest
            raise RuntimeError(next((one.error for one in found if one.error), "rows are missing"))
        drawn["paged"] = [one.generated_tokens for one in found]
        model._cached_continuous_batching_manager.batch_processor.cache.reset() # or the next round would find its prompts there

    ways = {"shared_prefix": shared, "transformers_generate": padded}
    try:
        paged()
        ways["transformers_generate_batch"] = paged
        not_run = None
    except Exception as problem:                              # of a path that is not ours and was not tried on every machine: the others still count
        not_run = f"{type(problem).__name__}: {common.first_line(problem)}"
        print(f"generate_batch was not run: {not_run}", file=sys.stderr)
    sampling = race(ways)
    model.destroy_cached_continuous_batching_manager()
    same = {name: sum(a == b for a, b in zip(drawn["shared"], drawn[name])) / len(rows) for name in drawn if name != "shared"}
    model.generation_config.eos_token_id, tokenizer.eos_token_id = ends, end_token
    model = model.unload()

    print(json.dumps({
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "model": args.model, "four_bit": bool(getattr(model, "is_loaded_in_4bit", False)),
        "sampling_seconds": sampling, "sampling_speedup": {name: seconds / sampling["shared_prefix"] for name, seconds in sampling.items() if name != "shared_prefix"},
        "sampling_same_greedy_rows": same, "generate_batch_not_run": not_run,
        "generate_batch_attention": "flash" if is_flash_attn_2_available(True) or is_flash_attn_3_available(True) else "a mask",
        "scoring": [scoring_race(model, 48), scoring_race(model, 80)],
    }, indent=1))


if __name__ == "__main__":
    main()
