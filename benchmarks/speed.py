"""How much the shared prefix saves: sampling and scoring against the usual ways, in one run on this machine.

    python benchmarks/speed.py

Sampling: 4 traces for each of 8 real pairs, greedy, exactly 32 tokens each: `common.generate` against transformers'
`generate` on the left-padded batch of all 32 prompts. Scoring: 8 traces over a context of 512 tokens:
`common.packed_logprobs` against the padded batch of 8 rows and against one row at a time, logits at the scored
positions only for all three; with suffixes of 48 tokens (a trace of 32 and an action of 16) and of 80 (with words of a
prompt around them). Every way is run three times in turn and the fastest counts. Prints one JSON object last.
"""

import importlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

PAIRS, TRACES, NEW_TOKENS, CONTEXT, SCORED, ACTION = 8, 4, 32, 512, 8, 16


def race(ways: dict[str, Callable[[], object]], rounds: int = 3, repeats: dict[str, int] | None = None) -> dict[str, float]:
    """Fastest seconds of each way; the ways take turns, so that a noisy moment does not hit one of them alone.

    A short way is done `repeats` times in a row and its mean counts: right after a long one it would pay for memory that
    the long one gave back.
    """
    best = {name: float("inf") for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            count = (repeats or {}).get(name, 1)
            started = time.perf_counter()
            for _ in range(count):
                way()
            best[name] = min(best[name], (time.perf_counter() - started) / count)
    return best


def matrix_rate() -> float:
    """Floating-point operations a second of a large float32 matrix product on this machine."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / race({"product": lambda: a @ b}, 8)["product"]


@torch.inference_mode()
def scoring_race(model: Any, suffix_tokens: int) -> dict:
    """Packed against padded and one-by-one scoring of SCORED suffixes behind one prefix; the last ACTION tokens are scored.

    All three compute the output layer for the scored tokens alone, so the race is about the shared prefix and padding.
    """
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(100, 40_000, (CONTEXT,), generator=generator).tolist()
    suffixes = torch.randint(100, 40_000, (SCORED, suffix_tokens), generator=generator).tolist()
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
    output = model.get_input_embeddings().weight.numel()                                # tied with the output layer
    flops = 2 * (sum(p.numel() for p in model.parameters()) - output) * (CONTEXT + SCORED * (suffix_tokens - 1)) + 2 * output * SCORED * ACTION
    return {"traces": SCORED, "context_tokens": CONTEXT, "suffix_tokens": suffix_tokens, "scored_tokens": ACTION, "seconds": seconds,
            "rows_a_second": {name: SCORED / value for name, value in seconds.items()},
            "speedup_over_padded": seconds["padded_batch"] / seconds["packed"], "speedup_over_one_by_one": seconds["one_by_one"] / seconds["packed"],
            "largest_difference": max((scores["packed"] - scores[name]).abs().max().item() for name in ("padded", "single")),
            "packed_share_of_matrix_rate": flops / seconds["packed"] / matrix_rate()}


@torch.inference_mode()
def main() -> None:
    model, tokenizer = common.load_model("embedded", None)
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

    sampling = race({"shared_prefix": shared, "transformers_generate": padded})
    same = sum(a == b for a, b in zip(drawn["shared"], drawn["padded"])) / len(rows)
    model.generation_config.eos_token_id, tokenizer.eos_token_id = ends, end_token

    print(json.dumps({
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__,
        "sampling_seconds": sampling, "sampling_speedup": sampling["transformers_generate"] / sampling["shared_prefix"], "sampling_same_greedy_rows": same,
        "scoring": [scoring_race(model, 48), scoring_race(model, 80)],
    }, indent=1))


if __name__ == "__main__":
    main()
