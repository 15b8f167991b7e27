"""Where is the score lost on its way to the actions? The traces that user models write for themselves, read closely.

    python benchmarks/own_traces.py                        on the run of evaluation.py
    python benchmarks/own_traces.py --run runs/demo --pairs 4 --arms backward,guarded,recon

A trace that stage 4 chose was written with the action in view; at test time a user model must do without. For each arm,
over held-out pairs:

    chosen     contrast of the trace that the arm's rule takes from the pair's candidates, nats a token; for shuffled of
               stage 3's control
    own        contrast of the traces that its user model writes, by the same frozen base; `over_guarded` is the gain
    followed   how much likelier its user model finds its action behind the trace that it came from than behind the
               other traces that it wrote for the same pair, nats a token: 0 if actions do not depend on traces

All with 95 % intervals by conversation. Prints one JSON object last.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

import common
from benchmarks import speed
from benchmarks.evaluation import rounded, with_interval
from common import LocalModel, Pair, Scores

evaluate = importlib.import_module("06_evaluate")
ARMS = "backward,guarded,recon,recon-grpo,e2e-grpo,shuffled,longest,worst"
NEGATIVES = 4


@torch.inference_mode()
def how_followed(user: LocalModel, pair: Pair, answers: Sequence[tuple[str, str]]) -> float | None:
    """Mean over a pair's answers (trace, action) of log p(action | its trace) minus that behind the other traces."""
    answers = [(trace, action) for trace, action in answers if action]
    if len({trace for trace, _ in answers}) < 2:
        return None                                        # one trace alone: nothing to compare
    prompt = common.encode_prompt(user.tokenizer, common.user_prompt(pair, thinking=True))
    stems = [common.close_trace(user.tokenizer, trace) for trace, _ in answers]
    leaves = [common.encode_data(user.tokenizer, action) for _, action in answers]
    (rows,) = common.shared_prefix_logprobs(user.model, [(prompt, stems, [leaves] * len(stems))])
    table = torch.tensor([[row.mean().item() for row in behind] for behind in rows])        # [trace, action]
    count = len(answers)
    return ((table.diag() - (table.sum(0) - table.diag()) / (count - 1)).mean()).item()


def main(argv: list[str] | None = None) -> None:
    parser = speed.make_parser(__doc__, pairs=(64, "held-out pairs"))
    parser.add_argument("--run", type=Path, default=Path("runs/evaluation"), metavar="DIR", help="folder of the run")
    parser.add_argument("--model", default="embedded", metavar="NAME", help="as in the stages")
    parser.add_argument("--arms", default=ARMS, help="comma-separated, arms with traces")
    args = parser.parse_args(argv)
    test = [pair for pair in common.read_rows(args.run / "pairs.jsonl", Pair) if pair.split == "test"]
    pairs, conversations = test[:args.pairs], {pair.id: pair.conversation for pair in test}
    arms = [arm for arm in args.arms.split(",") if (args.run / "predictions" / f"{arm}.jsonl").is_file()]
    if "guarded" not in arms:
        common.fail(f"{args.run} has no answers of the arm guarded; run benchmarks/evaluation.py first")
    answers = {arm: {row.id: [(some.trace, some.action) for some in row.answers] for row in common.read_rows(
        args.run / "predictions" / f"{arm}.jsonl", evaluate.Prediction)} for arm in arms}
    chosen = {}
    for arm in arms:
        tag = arm.removeprefix("recon-") if arm.startswith("recon-") else None
        rows = common.read_rows(args.run / common.tagged("scores.jsonl", tag), Scores) if arm != "e2e-grpo" else []
        chosen[arm] = {name: trace for name, [(trace, _)] in evaluate.reconstructed(
            [row for row in rows if row.id in conversations], "guarded" if tag else arm, "contrast").items()}
    local = common.load_model(args.model, False, "auto")
    values: dict[str, dict[str, dict[str, float]]] = {arm: {"own": {}, "chosen": {}, "followed": {}} for arm in arms}
    for pair in tqdm(pairs, "the base reads", disable=None):
        own = {arm: [trace for trace, _ in answers[arm][pair.id]] for arm in arms}
        taken = {arm: chosen[arm][pair.id] for arm in arms if pair.id in chosen[arm]}      # stage 3 may not have it
        traces = sorted({*sum(own.values(), []), *taken.values()})
        others = common.choose_negatives(pair, test, NEGATIVES, "", "own traces")
        ((scores, _),) = common.likelihood_scores(local, [(pair, traces, others)])
        contrast = {trace: score["contrast"] for trace, score in zip(traces, scores)}
        for arm in arms:
            values[arm]["own"][pair.id] = sum(contrast[trace] for trace in own[arm]) / len(own[arm])
            if arm in taken:
                values[arm]["chosen"][pair.id] = contrast[taken[arm]]
    for arm in arms:
        user = LocalModel(common.add_adapter(local.model, 0, 0, args.run / "models" / arm, trainable=False),
                          local.tokenizer)
        for pair in tqdm(pairs, f"{arm} reads its own", disable=None):
            if (found := how_followed(user, pair, answers[arm][pair.id])) is not None:
                values[arm]["followed"][pair.id] = found
        local.model = user.model.unload()
    for parts in values.values():
        parts["over_guarded"] = {name: value - values["guarded"]["own"][name] for name, value in parts["own"].items()}
    results = {arm: {part: with_interval([*found.values()], [conversations[name] for name in found])
                     for part, found in parts.items() if found} for arm, parts in values.items()}
    print(json.dumps(rounded({"machine": speed.machine(), "torch": torch.__version__, "model": args.model,
                              "pairs": len(pairs), "arms": results})))


if __name__ == "__main__":
    main()
