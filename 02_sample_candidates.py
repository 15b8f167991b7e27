"""Stage 2: the synthesizer M_r writes N candidate traces for each pair, seeing context and action.

A trace says what the person feels, wants and values just before acting. Sampled this way it may explain the action
or merely justify it after the fact; stage 3 finds out which.

    in     RUN/pairs.jsonl
    out    RUN/candidates.jsonl     id, candidates [{trace, finished, tokens}]

How to run it:

    python 02_sample_candidates.py                        4 traces for each pair of runs/demo
    python 02_sample_candidates.py --model Qwen/Qwen3-8B  with another synthesizer (4 bits on a GPU)

Departures from the paper: N = 4 is the paper's; the prompt, with worked examples because the embedded model is small, the
temperature and min-p are ours. A trace that meets the token limit loses the sentence it was in the middle of. Test pairs get candidates too, to be looked at in the report; only the
train split is ever learnt from.
"""

from collections.abc import Sequence
from typing import Any

from common import (MIN_P, PAIR_KEYS, Row, append_rows, batches_by_length, begin_output, begin_run, closing_line, finished_rows, fraction,
                    generate, load_model, made_with, positive_int, progress, read_pairs, run_stage, seed_of, stage_arguments, synthesis_prompt, trace_of)


def sample_traces(model: Any, tokenizer: Any, pairs: Sequence[Row], n: int, max_tokens: int, temperature: float,
                  min_p: float, seed: object) -> list[list[Row]]:
    """`n` candidates {trace, finished, tokens} for each pair, drawn from the synthesis prompt.

    The worked examples are computed once for the batch and each prompt once for its n traces. The noise of trace k
    of a pair depends on (seed, pair id, k) alone.
    """
    prompts = [synthesis_prompt(tokenizer, pair) for pair in pairs]
    groups = [(prompt[:-1], [prompt[-1:]] * n) for prompt in prompts]
    seeds = [seed_of(seed, pair["id"], k) for pair in pairs for k in range(n)]
    completions = generate(model, tokenizer, groups, max_tokens, seeds, temperature, min_p)
    candidates = [{"trace": trace_of(tokenizer, c), "finished": c.finished, "tokens": len(c.ids)} for c in completions]
    return [candidates[start:start + n] for start in range(0, len(candidates), n)]


def main(argv: list[str] | None = None) -> None:
    parser = stage_arguments(__doc__)
    group = parser.add_argument_group("sampling")
    group.add_argument("--n", type=positive_int, default=4, help="candidates a pair (default: %(default)s)")
    group.add_argument("--max-trace-tokens", type=positive_int, default=40, help="tokens in a trace, at most (default: %(default)s)")
    group.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: %(default)s)")
    group.add_argument("--min-p", type=fraction, default=MIN_P, help="leave out tokens less likely than this times the likeliest (default: %(default)s)")
    group.add_argument("--batch", type=positive_int, default=16, help="pairs sampled at once (default: %(default)s)")
    args = parser.parse_args(argv)

    if args.temperature < 0:
        parser.error("argument --temperature: must not be negative")
    started = begin_run(args.run)
    source, output = args.run / "pairs.jsonl", args.run / "candidates.jsonl"
    pairs = read_pairs(source)[:args.limit]
    record = made_with(args, [source], ["synthesis"])
    done = finished_rows(output, record, args.overwrite, ("id", "candidates"), [pair["id"] for pair in pairs])
    if pairs and len(done) == len(pairs):
        print(f"02_sample_candidates: {output} is already made ({len(done)} rows)")
        return
    model, tokenizer = load_model(args.model, args.four_bit)
    begin_output(output, record, args.overwrite)
    tokens = finished = sampled = 0
    for batch in progress(batches_by_length(pairs, lambda pair: len(synthesis_prompt(tokenizer, pair)), args.batch), "sampling traces"):
        if all(pair["id"] in done for pair in batch):
            continue
        candidates = sample_traces(model, tokenizer, batch, args.n, args.max_trace_tokens, args.temperature, args.min_p, (args.seed, "02"))
        rows = [{"id": pair["id"], **{key: value for key, value in pair.items() if key not in PAIR_KEYS}, "candidates": some}
                for pair, some in zip(batch, candidates) if pair["id"] not in done]
        append_rows(output, rows)
        fresh = [candidate for row in rows for candidate in row["candidates"]]
        tokens += sum(candidate["tokens"] for candidate in fresh)
        finished, sampled = finished + sum(candidate["finished"] for candidate in fresh), sampled + len(fresh)
    print(f"traces that ended by themselves: {finished} of {sampled}")
    closing_line(args.run, "02_sample_candidates", len(pairs), len(pairs), len(done), started, tokens)


if __name__ == "__main__":
    run_stage(main)
