"""Stage 2: the synthesizer M_r writes N candidate traces for each pair, seeing context and action.

A trace says what the person feels, wants and values just before acting. Sampled this way it may explain the action
or merely justify it after the fact; stage 3 finds out which.

    in     RUN/pairs.jsonl
    out    RUN/candidates.jsonl     id, candidates [{trace, finished, tokens}]

How to run it:

    python 02_sample_candidates.py                        4 traces for each pair of runs/demo
    python 02_sample_candidates.py --model Qwen/Qwen3-8B  with another synthesizer (4 bits on a GPU)
    accelerate launch 02_sample_candidates.py             on all GPUs; the rows are the same
    python 02_sample_candidates.py --model openai:NAME    with one on a server (OPENAI_BASE_URL, OPENAI_API_KEY)

Departures from the paper: N = 4 is the paper's; the prompt, with worked examples because the embedded model is small, the
temperature and min-p are ours. A trace that meets the token limit loses the sentence it was in the middle of. Test pairs get candidates too, to be looked at in the report; only the
train split is ever learnt from. A server samples by the temperature alone: min-p is not part of the API.
"""

from collections.abc import Sequence
from typing import Any

from common import (MIN_P, PAIR_KEYS, REMOTE, Portions, Row, Server, append_rows, batches_by_length, begin_output, begin_run, closing_line, end_output,
                    finished_rows, fraction, gather, generate, leave_to_first, load_writer, made_with, messages_of, part_of, positive_int, progress, read_pairs,
                    run_stage, seed_of, server_address, server_arguments, share, show_context, show_scene, stage_arguments, stop_unanswered, synthesis_prompt,
                    trace_of, whole_sentences)


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


def ask_traces(server: Server, pairs: Sequence[Row], n: int, max_tokens: int, temperature: float, seed: object) -> list[list[Row]]:
    """As sample_traces, from a server; no candidates for a pair that it did not answer n times."""
    answers = iter(server.ask_all({"messages": messages_of("synthesis", context=show_scene(pair), action=pair["action"]), "max_tokens": max_tokens,
                                   "temperature": temperature, "seed": seed_of(seed, pair["id"], k)} for pair in pairs for k in range(n)))
    found = [[next(answers) for _ in range(n)] for _ in pairs]
    return [[{"trace": whole_sentences(a.text, a.whole), "finished": a.whole, "tokens": a.completion_tokens} for a in some] if all(some) else [] for some in found]


def main(argv: list[str] | None = None) -> None:
    parser = stage_arguments(__doc__)
    group = parser.add_argument_group("sampling")
    group.add_argument("--n", type=positive_int, default=4, help="candidates a pair (default: %(default)s)")
    group.add_argument("--max-trace-tokens", type=positive_int, default=40, help="tokens in a trace, at most (default: %(default)s)")
    group.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: %(default)s)")
    group.add_argument("--min-p", type=fraction, default=MIN_P, help="leave out tokens less likely than this times the likeliest (default: %(default)s)")
    group.add_argument("--batch", type=positive_int, default=16, help="pairs sampled at once (default: %(default)s)")
    server_arguments(parser)
    args = parser.parse_args(argv)

    if args.temperature < 0:
        parser.error("argument --temperature: must not be negative")
    started = begin_run(args.run, args.max_memory)
    source, output = args.run / "pairs.jsonl", args.run / "candidates.jsonl"
    pairs = read_pairs(source)[:args.limit]
    remote = args.model.startswith(REMOTE)
    record = made_with(args, [source], ["synthesis"], ignore=("concurrency", *(["batch"] if remote else [])), **({"server": server_address()} if remote else {}))
    done = finished_rows(output, record, args.overwrite, ("id", "candidates"), [pair["id"] for pair in pairs])
    if pairs and len(done) == len(pairs):
        print(f"02_sample_candidates: {output} is already made ({len(done)} rows)")
        return
    model, tokenizer = load_writer(args.model, args.four_bit, args.concurrency, args.temperature)
    length = lambda pair: len(show_context(pair) if remote else synthesis_prompt(tokenizer, pair))
    begin_output(output, record, args.overwrite)
    draw = lambda some: sample_traces(model, tokenizer, some, args.n, args.max_trace_tokens, args.temperature, args.min_p, (args.seed, "02"))
    tokens = finished = sampled = missing = alike = 0
    portions, batches = Portions(), batches_by_length(pairs, length, args.batch)
    for batch in progress(share(batches), "sampling traces"):
        if all(pair["id"] in done for pair in batch):
            continue
        if remote:                                            # rows do not depend on one another, and none is paid for twice
            batch = [pair for pair in batch if pair["id"] not in done]
            candidates = ask_traces(model, batch, args.n, args.max_trace_tokens, args.temperature, (args.seed, "02"))
        else:
            candidates = portions.run(draw, batch)
        missing += candidates.count([])
        rows = [{"id": pair["id"], **{key: value for key, value in pair.items() if key not in PAIR_KEYS}, "candidates": some}
                for pair, some in zip(batch, candidates) if some and pair["id"] not in done]
        append_rows(part_of(output), rows)
        fresh = [candidate for row in rows for candidate in row["candidates"]]
        tokens += sum(candidate["tokens"] for candidate in fresh)
        finished, sampled = finished + sum(candidate["finished"] for candidate in fresh), sampled + len(fresh)
        alike += sum(len({candidate["trace"] for candidate in row["candidates"]}) == 1 for row in rows)
    end_output(output, [pair["id"] for batch in batches for pair in batch])
    tokens, finished, sampled, alike = map(sum, zip(*gather([(tokens, finished, sampled, alike)])))
    leave_to_first()
    print(f"traces that ended by themselves: {finished} of {sampled}")
    if args.n > 1 and args.temperature > 0 and alike * args.n == sampled > 0:
        print("note: every pair's traces are all the same, as if the temperature were 0; a server may need to be told to sample (README, Troubleshooting)")
    closing_line(args.run, "02_sample_candidates", len(pairs), len(pairs) - missing, len(done), started, tokens, [model] if remote else [])
    if missing:
        stop_unanswered([model], missing, "pairs")


if __name__ == "__main__":
    run_stage(main)
