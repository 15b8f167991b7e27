"""Stage 2: the synthesizer writes N candidate traces for each pair, seeing context and action.

A trace says what the person feels, wants and values just before acting. Sampled this way it may explain the action or
merely justify it after the fact; stage 3 finds out which.

    in     RUN/pairs.jsonl                      (with --tag: RUN/models/synthesizer, from stage 5, as well)
    out    RUN/candidates[.TAG].jsonl

How to run it:

    python 02_sample_candidates.py                        4 traces for each pair of runs/demo
    python 02_sample_candidates.py --model Qwen/Qwen3-8B  with another synthesizer (4 bits on a GPU)
    python 02_sample_candidates.py --model openai:NAME    with one on a server (OPENAI_BASE_URL, OPENAI_API_KEY)
    python 02_sample_candidates.py --tag grpo             a second set by the synthesizer that stage 5 trained
    accelerate launch 02_sample_candidates.py             on all GPUs; the rows are the same

Departures from the paper: N = 4 is the paper's; the prompt, with worked examples because the embedded model is small,
the temperature and min-p are ours. A trace that meets the token limit loses the sentence it was in the middle of. Test
pairs get candidates too, for the report and for the reconstructions of stage 6; only the train split is ever learnt
from. A server samples by the temperature alone: min-p is not part of the API.
"""

from pathlib import Path

import common
from common import Candidate, Candidates, Pair


def sample_traces(model: common.LocalModel | common.ApiModel, pairs: list[Pair], args) -> list[Candidates]:
    """N traces a pair. The noise of trace k depends on (seed, pair, k), so a resumed run draws the same traces.

    A pair that a server did not answer N times has no row.
    """
    groups = model.sample(
        [[common.synthesis_prompt(pair)] * args.num_samples for pair in pairs],
        seeds=[[common.stable_seed(args.seed, "trace", pair.id, k) for k in range(args.num_samples)] for pair in pairs],
        max_new_tokens=args.max_trace_tokens, temperature=args.temperature, min_p=args.min_p)     # [pair][k]
    traces = [[Candidate(trace=common.trace_of(found), finished=found.finished, tokens=found.tokens) for found in group]
              if all(group) else None for group in groups]
    return [Candidates(id=pair.id, **pair.model_extra, candidates=some) for pair, some in zip(pairs, traces) if some]


def parse_args(argv: list[str] | None):
    parser = common.stage_arguments(__doc__)
    add = parser.add_argument_group("sampling").add_argument
    add("--num-samples", **common.COUNT, default=4, help="traces a pair")
    add("--held-out", **common.COUNT, help="pairs of val and test, at most, that get traces too; only the report and "
        "the reconstructions of stage 6 need them (unset: all)")
    add("--max-trace-tokens", **common.COUNT, default=48, help="tokens in a trace, at most")
    add("--temperature", type=common.number_type(float, 0, 10), default=1.0, help="0 is greedy")
    add("--min-p", type=common.fraction, default=0.1, help="leave out tokens less likely than this times the likeliest")
    common.batch_argument(add)
    add = parser.add_argument_group("a second set of candidates").add_argument
    add("--tag", metavar="NAME", help="of the set, whose other settings are those of candidates.jsonl")
    add("--adapter", type=Path, metavar="DIR", help="of the synthesizer (unset: RUN/models/synthesizer with --tag)")
    common.api_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    started = common.open_run(args)
    source, target = args.run / "pairs.jsonl", args.run / common.tagged("candidates.jsonl", args.tag)
    following = "python 03_reconstruct_score.py" + (f" --tag {args.tag}" if args.tag else "")
    if args.tag:
        args = common.inherit_settings(args, args.run / "candidates.jsonl")
        args.adapter = args.adapter or args.run / "models" / "synthesizer"
        common.check_adapter(args.adapter, args.model)
    pairs = common.read_rows(source, Pair, "01_prepare.py")[:args.limit]
    held_out = [pair for pair in pairs if pair.split != "train"][:args.held_out]
    pairs = [pair for pair in pairs if pair.split == "train"] + held_out
    if args.show_prompt:
        return print(common.load_writer(args.model, args).show(common.synthesis_prompt(pairs[0])))
    inputs = [source, *([args.adapter / "adapter_model.safetensors"] if args.adapter else [])]
    config = common.run_config(args, inputs, ["synthesis"], ignore=["adapter"])
    output = common.Output(target, Candidates, config, args.overwrite)
    skipped = len(output.rows)
    if output.has(pairs):
        print(f"{target} is complete ({skipped} rows)")
        return common.print_next(args, following)
    model = common.load_writer(args.model, args)
    if args.adapter:
        model.model = common.add_adapter(model.model, 0, args.seed, args.adapter, trainable=False)
    tokens = lambda pair: args.num_samples * (model.length(common.synthesis_prompt(pair)) + args.max_trace_tokens)
    batches = common.batch_by_length(pairs, tokens, args.batch_tokens)
    todo, made = [batch for batch in batches if not output.has(batch)], []
    for rows in common.run_batches(lambda batch: sample_traces(model, batch, args), todo, "sampling traces"):
        output.append(rows)
        made += [candidate for row in rows for candidate in row.candidates]
    print(f"traces that ended by themselves: {sum(candidate.finished for candidate in made)} of {len(made)}")
    apis = [model] if isinstance(model, common.ApiModel) else []
    common.end_stage(args, "02_sample_candidates", len(pairs), len(output.rows), skipped, started,
                     0 if apis else sum(candidate.tokens for candidate in made), following, apis)
    common.fail_unanswered(apis, len(pairs) - len(output.rows), "pairs")


if __name__ == "__main__":
    common.run_stage(main)
