"""Stage 3: the reconstructor M_a predicts the action from context and trace, and each trace is scored by how close it comes.

The heart of Recon: a trace from which the action can be predicted holds a cause of it; a mere justification does not.
M_a never sees the action when it writes. All scores are per candidate, higher is better, and all stay in the row:

    likelihood   mean over the action's tokens of log p(token | context, trace) - log p(token | context), nats a token
    unsaid       the same, but tokens of content words that the trace gives away earn nothing
    embedding    cosine of the encoded reconstruction and the encoded action
    leak         share of the action's 4-grams that stand in the trace but not in the context (a warning, not a score)

    in     RUN/pairs.jsonl, RUN/candidates.jsonl
    out    RUN/scores.jsonl     id, candidates [{… reconstruction, leak, scores, logprob_sum}],
                                baseline {the same scores with no trace}

How to run it:

    python 03_reconstruct_score.py
    python 03_reconstruct_score.py --scorers likelihood      without writing reconstructions: several times faster

Departures from the paper: it rates the reconstruction with a language model; here its probability and an encoder do.
Both read the same (context, trace) prompt. The leak share and `unsaid` are ours, and needed: a trace that quotes the
action reconstructs it best.
"""

from collections.abc import Sequence
from typing import Any

from common import (Group, Row, append_rows, batches_by_length, begin_output, begin_run, check_made_from, clean_action, closing_line, decode,
                    embed, finished_rows, generate, leak_share, likelihood_scores, load_encoder, load_model, made_with, positive_int,
                    progress, read_candidates, read_pairs, reconstruction_prompt, show_context, stage_arguments, stop)

SCORERS = ("likelihood", "embedding")


def reconstruct(model: Any, tokenizer: Any, contexts: Sequence[str], traces: Sequence[Sequence[str | None]], max_tokens: int) -> list[list[str]]:
    """M_a's greedy prediction of the action for each trace of each context; a trace of None predicts without one.

    The context is computed once for its traces. There is no action among the arguments.
    """
    groups: list[Group] = []
    for context, some in zip(contexts, traces):
        prefix, suffixes = reconstruction_prompt(tokenizer, context, some)
        groups.append((prefix, suffixes))
    texts = iter([clean_action(decode(tokenizer, completion)) for completion in generate(model, tokenizer, groups, max_tokens, stop_text="\n")])
    return [[next(texts) for _ in some] for some in traces]


def score_pairs(model: Any, tokenizer: Any, encoder: Any, pairs: Sequence[Row], sampled: Sequence[Row],
                scorers: Sequence[str], max_tokens: int) -> list[Row]:
    """The row `sampled` of each pair, every candidate with its scores, and `baseline`, the same without a trace."""
    contexts = [show_context(pair) for pair in pairs]
    rows = []
    for pair, context, row in zip(pairs, contexts, sampled):
        scored = [{**candidate, "leak": leak_share(candidate["trace"], pair["action"], context), "scores": {}} for candidate in row["candidates"]]
        rows.append({**row, "candidates": scored, "baseline": {}})
    if "likelihood" in scorers:
        for pair, row in zip(pairs, rows):
            gains, base = likelihood_scores(model, tokenizer, pair, [candidate["trace"] for candidate in row["candidates"]])
            for candidate, gain in zip(row["candidates"], gains):
                candidate["logprob_sum"] = gain.pop("logprob_sum")
                candidate["scores"] |= gain
            row["baseline"] |= {"likelihood": 0.0, "unsaid": 0.0, "logprob_sum": sum(base), "action_tokens": len(base)}
    if "embedding" in scorers:
        written = reconstruct(model, tokenizer, contexts, [[None, *(c["trace"] for c in row["candidates"])] for row in rows], max_tokens)
        for pair, row, (without, *texts) in zip(pairs, rows, written):
            action, *vectors = embed(encoder, [pair["action"], without, *texts])        # unit length, so a dot is a cosine
            row["baseline"] |= {"reconstruction": without, "embedding": (action @ vectors[0]).item()}
            for candidate, text, vector in zip(row["candidates"], texts, vectors[1:]):
                candidate["reconstruction"] = text
                candidate["scores"]["embedding"] = (action @ vector).item()
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = stage_arguments(__doc__)
    group = parser.add_argument_group("scoring")
    group.add_argument("--scorers", default=",".join(SCORERS), help="which scores to compute, comma-separated (default: %(default)s)")
    group.add_argument("--encoder", default="embedded", metavar="NAME", help="mean-pooled sentence encoder: 'embedded', a local folder or a hub name (default: %(default)s)")
    group.add_argument("--max-action-tokens", type=positive_int, default=24, help="tokens in a reconstruction, at most (default: %(default)s)")
    group.add_argument("--batch", type=positive_int, default=16, help="pairs reconstructed at once (default: %(default)s)")
    args = parser.parse_args(argv)
    scorers = args.scorers.split(",")
    if unknown := [name for name in scorers if name not in SCORERS]:
        stop(f"--scorers: unknown scorer {unknown[0]!r}; choose from {', '.join(SCORERS)}")

    started = begin_run(args.run)
    sources, output = (args.run / "pairs.jsonl", args.run / "candidates.jsonl"), args.run / "scores.jsonl"
    pairs = {pair["id"]: pair for pair in read_pairs(sources[0])}
    found = {row["id"]: row for row in read_candidates(sources[1], "02_sample_candidates.py", ("trace", "tokens"))}
    check_made_from(sources[1], sources[0], "02_sample_candidates.py")
    if foreign := next((name for name in found if name not in pairs), None):
        stop(f"{sources[1]}: id {foreign!r} is not in {sources[0]}; run 02_sample_candidates.py --overwrite")
    work = [pair for name, pair in pairs.items() if name in found][:args.limit]
    record = made_with(args, sources, ["reconstruction", "reconstruction_no_trace"])
    keys, expected = ("id", "candidates", "baseline"), [pair["id"] for pair in work]
    done = finished_rows(output, record, args.overwrite, keys, expected)
    if work and len(done) == len(work):
        print(f"03_reconstruct_score: {output} is already made ({len(done)} rows)")
        return
    model, tokenizer = load_model(args.model, args.four_bit)
    encoder = load_encoder(args.encoder) if "embedding" in scorers else None
    begin_output(output, record, args.overwrite)
    tokens = 0
    for batch in progress(batches_by_length(work, lambda pair: len(tokenizer.encode(show_context(pair))), args.batch), "reconstructing and scoring"):
        if all(pair["id"] in done for pair in batch):
            continue
        rows = score_pairs(model, tokenizer, encoder, batch, [found[pair["id"]] for pair in batch], scorers, args.max_action_tokens)
        append_rows(output, [row for row in rows if row["id"] not in done])
        texts = [text for row in rows for some in (*row["candidates"], row["baseline"]) for text in (some.get("trace", ""), some.get("reconstruction", ""))]
        tokens += sum(map(len, tokenizer([*texts, *(show_context(pair) for pair in batch)]).input_ids))

    rows = list(finished_rows(output, record, False, keys, expected).values())
    every = [candidate for row in rows for candidate in row["candidates"]]
    leaking = sum(candidate["leak"] > 0 for candidate in every)
    print(f"candidates that leak a part of the action: {leaking} of {len(every)}")
    for name in ("likelihood", "unsaid", "embedding"):
        if scored := [row for row in rows if name in row["baseline"]]:
            best = sum(max(c["scores"][name] for c in row["candidates"]) > row["baseline"][name] for row in scored)
            print(f"pairs whose best trace beats no trace by {name}: {best} of {len(scored)}")
    closing_line("03_reconstruct_score", len(work), len(rows), len(done), started, tokens)


if __name__ == "__main__":
    main()
