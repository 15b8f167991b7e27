"""Stage 6: each arm's user model acts on held-out pairs, and a judge compares the arms.

    in     RUN/pairs.jsonl, RUN/models/ARM/; for the report: scores.jsonl, rl.jsonl
    out    RUN/predictions/ARM.jsonl    id, trace, action
           RUN/judgements.jsonl         id, a, b, order, winner
           RUN/results.json             per arm: n, wins, ties, losses, win_rate, ci95, versus, similarity, action_logprob, …
           RUN/report.html              table, plot and examples in one file that works offline

The judge is the sentence encoder: of two actions the one closer to the true action wins; closer by less than --margin
is a tie. It is symmetric, so there is one order, `both`. A win rate counts a tie as half a win; its 95 % interval is a
bootstrap over conversations, because pairs of one conversation are not independent.

How to run it:

    python 06_evaluate.py
    python 06_evaluate.py --versus none

Departures from the paper: its judge is a language model that agrees with people in 77 % of comparisons (as reported
in a summary of the paper); an encoder sees topic and wording, less of style and values.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common import (END_THINK, MIN_P, Row, append_rows, batches_by_length, begin_output, begin_run, bootstrap_interval, check_adapter, check_made_from,
                    clean_action, close_trace, closing_line, decode, dump_row, embed, encode_data, finished_rows, fraction,
                    generate, load_adapter, load_encoder, load_model, made_with, packed_logprobs, positive_float, positive_int, progress,
                    read_candidates, read_pairs, read_rows, record_of, seed_of, show_context, stage_arguments, stop, user_prompt,
                    write_output, write_text)

ARMS = ("none", "backward", "recon", "recon-grpo", "e2e-grpo", "shuffled", "longest", "worst")


# ------------------------------------------------------------------------------------------------
# Acting


def act(model: Any, tokenizer: Any, pairs: Sequence[Row], thinking: bool, max_trace: int, max_action: int, temperature: float, seed: object) -> list[Row]:
    """One {id, trace, action} a pair, sampled from a user model.

    A trace that does not end within `max_trace` tokens is closed for the model, so that every arm answers every pair.
    """
    prompts = [user_prompt(tokenizer, pair, thinking) for pair in pairs]
    traces: list[str | None] = [None] * len(pairs)
    groups = [(prompt[:-1], [prompt[-1:]]) for prompt in prompts]
    if thinking:
        done = generate(model, tokenizer, groups, max_trace, [seed_of(seed, pair["id"], "trace") for pair in pairs], temperature, MIN_P, END_THINK.strip())
        traces = [decode(tokenizer, completion).partition(END_THINK.strip())[0].strip() for completion in done]
        groups = [(prompt, [close_trace(tokenizer, trace)]) for prompt, trace in zip(prompts, traces)]
    done = generate(model, tokenizer, groups, max_action, [seed_of(seed, pair["id"], "action") for pair in pairs], temperature, MIN_P, "\n")
    return [{"id": pair["id"], "trace": trace, "action": clean_action(decode(tokenizer, completion))} for pair, trace, completion in zip(pairs, traces, done)]


@torch.inference_mode()
def true_action_logprob(model: Any, tokenizer: Any, pair: Row, trace: str | None) -> float:
    """Mean log-prob of the true action's tokens under the user model, after the trace that it wrote itself; nats a token."""
    thought = [] if trace is None else close_trace(tokenizer, trace)
    group = user_prompt(tokenizer, pair, thinking=trace is not None), [thought + encode_data(tokenizer, pair["action"])]
    return packed_logprobs(model, [group], [[len(thought)]])[0][0].mean().item()


# ------------------------------------------------------------------------------------------------
# Judging


def judge(similarity_a: float, similarity_b: float, margin: float) -> str:
    """'a', 'b' or 'tie': which action is closer to the true one by at least `margin`."""
    if abs(similarity_a - similarity_b) < margin:
        return "tie"
    return "a" if similarity_a > similarity_b else "b"


def compare(judgements: Sequence[Row], pairs: Sequence[Row], seed: int) -> Row:
    """Wins, ties, losses, win rate and its interval of arm `a` of the judgements."""
    points = {row["id"]: {"a": 1.0, "tie": 0.5, "b": 0.0}[row["winner"]] for row in judgements}
    values = [points[pair["id"]] for pair in pairs]
    return {"wins": values.count(1.0), "ties": values.count(0.5), "losses": values.count(0.0), "win_rate": sum(values) / len(values),
            "ci95": bootstrap_interval(values, [pair["conversation"] for pair in pairs], seed)}


# ------------------------------------------------------------------------------------------------
# Report


def draw_table(results: Row) -> str:
    lines = [f"{'arm':<12} {'n':>4} {'wins':>5} {'ties':>5} {'losses':>6}  {'win rate':<22} {'similarity':>10} {'log p(action)':>13}"]
    for arm, row in results.items():
        rate = f"{row['win_rate']:.1%} [{row['ci95'][0]:.1%}, {row['ci95'][1]:.1%}]" if row["versus"] else "(compared with)"
        wins = (row["wins"], row["ties"], row["losses"]) if row["versus"] else ("", "", "")
        lines.append(f"{arm:<12} {row['n']:>4} {wins[0]:>5} {wins[1]:>5} {wins[2]:>6}  {rate:<22} {row['similarity']:>10.3f} {row['action_logprob']:>13.3f}")
    return "\n".join(lines)


def write_report(path: Path, data: Row) -> None:
    """The page with its data as JSON inside. '<' is escaped, so no text can end the script; the page sets text, never HTML."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    write_text(path, PAGE.replace("DATA", text.encode("utf-8", "replace").decode(), 1))


# In this file, because a report must be one file that works offline and the stage should be one file too.
PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Recon: report of a run</title>
<style>
:root { color-scheme: light dark; --ink: light-dark(#1c1e21, #e6e6e3); --soft: light-dark(#63676e, #9a9ea6); --line: light-dark(#dcdee2, #393d44);
  --card: light-dark(#fff, #1f2226); --back: light-dark(#f5f6f7, #16181b); --mark: light-dark(#2458c5, #82aaff); --good: light-dark(#117a4b, #5fd0a0); --bad: light-dark(#b3342b, #ff8f84); }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; } h3 { font-size: .95rem; margin: 1.2rem 0 .4rem; color: var(--soft); }
p.note { color: var(--soft); margin: .3rem 0; max-width: 46rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 500; font-size: .85rem; white-space: nowrap; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
svg { display: block; width: 100%; min-width: 34rem; height: auto; } svg text { fill: var(--ink); font: 13px system-ui, sans-serif; } svg .soft { fill: var(--soft); }
.turns { margin: 0; padding: 0; list-style: none; } .turns li { margin: .15rem 0; } .turns b { font-weight: 600; }
.true { border-left: 3px solid var(--good); padding: .3rem .8rem; margin: .6rem 0; }
nav { display: flex; gap: .5rem; align-items: center; flex-wrap: wrap; margin: .6rem 0; } button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .25rem .8rem; cursor: pointer; }
button:disabled { opacity: .4; cursor: default; } button:focus-visible { outline: 2px solid var(--mark); }
.leak { color: var(--bad); } small { color: var(--soft); } pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; margin: 0; }
td.text { overflow-wrap: anywhere; white-space: normal; } #examples td.text { min-width: 12rem; }
@media (max-width: 40rem) { #examples table, #examples tbody, #examples tr, #examples td { display: block; text-align: left; } #examples tr:first-child { display: none; } #examples td { border: 0; padding: .1rem 0; } #examples tr { border-bottom: 1px solid var(--line); padding: .5rem 0; } #examples td[data-label]::before { content: attr(data-label) ": "; color: var(--soft); font-size: .85rem; } }
</style>
</head>
<body>
<h1>Recon: report of a run</h1>
<p class="note" id="about"></p>
<h2>Arms</h2><div class="card" id="table"></div>
<p class="note">Similarity: mean cosine to the true action. log p(action): the true action under the user model, behind the trace it wrote itself, nats a token. Distinct: share of its actions that differ from one another.</p>
<h2>Win rate and its 95 % interval</h2><div class="card" id="plot"></div>
<h2 id="curve-title" hidden>Reward over training steps</h2><div class="card" id="curve" hidden></div>
<h2>Held-out examples</h2>
<nav><button id="previous">Previous</button><button id="next">Next</button><span id="place"></span></nav>
<div class="card" id="examples"></div>
<h2>Made with</h2><div class="card"><pre id="made"></pre></div>
<script type="application/json" id="data">DATA</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = id => document.getElementById(id);
function make(tag, text, name) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  if (name) node.className = name;
  return node;
}
function draw(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  return node;
}
const fixed = (value, digits = 3) => value === null || value === undefined ? "" : value.toFixed(digits);
const percent = value => (100 * value).toFixed(1) + " %";
function table(head, rows, textColumns) {
  const node = make("table"), first = node.appendChild(make("tr"));
  head.forEach((label, i) => first.append(make("th", label, textColumns.includes(i) ? "text" : "")));
  for (const row of rows) {
    const line = node.appendChild(make("tr"));
    row.forEach((cell, i) => {
      const box = line.appendChild(make("td", cell.text ?? cell, (textColumns.includes(i) ? "text " : "") + (cell.name ?? "")));
      box.dataset.label = head[i];
    });
  }
  return node;
}
const arms = Object.keys(data.results), versus = data.versus;
const model = data.made_with.arguments.model === "embedded" ? "SmolLM2-135M-Instruct" : data.made_with.arguments.model;
by("about").textContent = `${data.examples.length} held-out pairs, model ${model}. Every arm is compared with “${versus}” by a sentence encoder: of two actions the one closer to what the person really wrote wins. With few pairs the intervals are wide; an interval that holds 50 % shows no difference.`;
by("table").append(table(["arm", "n", "wins", "ties", "losses", "win rate", "95 % interval", "similarity", "log p(action)", "distinct"],
  arms.map(arm => {
    const r = data.results[arm];
    return [arm, r.n, r.wins ?? "", r.ties ?? "", r.losses ?? "", r.versus ? percent(r.win_rate) : "compared with",
      r.versus ? r.ci95.map(percent).join(" – ") : "", fixed(r.similarity), fixed(r.action_logprob), percent(r.distinct_actions)];
  }), []));
{
  const shown = arms.filter(arm => data.results[arm].versus), height = 44 + 34 * shown.length, x = value => 130 + 540 * value;
  const svg = draw("svg", {viewBox: `0 0 720 ${height}`, role: "img", "aria-label": "win rates with intervals"});
  for (const tick of [0, .25, .5, .75, 1]) svg.append(
    draw("line", {x1: x(tick), x2: x(tick), y1: 8, y2: height - 30, stroke: "var(--line)", "stroke-width": tick === .5 ? 2 : 1}),
    draw("text", {x: x(tick), y: height - 10, "text-anchor": "middle", class: "soft"}, 100 * tick + " %"));
  shown.forEach((arm, i) => {
    const r = data.results[arm], y = 26 + 34 * i;
    svg.append(
      draw("text", {x: 8, y: y + 5}, arm),
      draw("line", {x1: x(r.ci95[0]), x2: x(r.ci95[1]), y1: y, y2: y, stroke: "var(--mark)", "stroke-width": 2}),
      draw("circle", {cx: x(r.win_rate), cy: y, r: 6, fill: "var(--mark)"}));
  });
  by("plot").append(svg, make("p", `Win rate against ${versus}; a tie counts as half a win; bootstrap over conversations.`, "note"));
}
for (const objective of new Set(data.rl.map(row => row.objective))) {
  const rows = data.rl.filter(row => row.objective === objective);
  const last = Math.max(1, ...rows.map(row => row.step));
  for (const [key, title] of [["reward", "mean reward"], ["leak", "share of the action's 4-grams quoted"], ["length", "tokens a completion"]]) {
    const dots = rows.filter(row => Number.isFinite(row[key])), held = rows.filter(row => Number.isFinite(row["val_" + key]));
    const values = [...dots.map(row => row[key]), ...held.map(row => row["val_" + key])];
    if (!values.length) continue;
    by("curve").hidden = by("curve-title").hidden = false;
    const low = Math.min(...values), high = Math.max(...values);
    const x = step => 60 + 640 * step / last, y = value => 20 + 100 * (high > low ? (high - value) / (high - low) : .5);
    const svg = draw("svg", {viewBox: "0 0 720 150", role: "img", "aria-label": `${title} of ${objective}`});
    svg.append(
      draw("text", {x: 4, y: y(high) + 4, class: "soft"}, fixed(high, 2)),
      draw("text", {x: 4, y: y(low) + 4, class: "soft"}, low < high ? fixed(low, 2) : ""),
      draw("polyline", {points: dots.map(row => `${x(row.step)},${y(row[key])}`).join(" "), fill: "none", stroke: "var(--mark)", "stroke-width": 2}));
    dots.forEach((row, i) => {
      svg.append(draw("circle", {cx: x(row.step), cy: y(row[key]), r: 3.5, fill: "var(--mark)"}));
      if (i % Math.ceil(dots.length / 10) === 0)
        svg.append(draw("text", {x: x(row.step), y: 145, "text-anchor": "middle", class: "soft"}, (i ? "" : "step ") + row.step));
    });
    for (const row of held)
      svg.append(draw("rect", {x: x(row.step) - 5, y: y(row["val_" + key]) - 5, width: 10, height: 10, fill: "none", stroke: "var(--good)", "stroke-width": 2}));
    by("curve").append(make("h3", `objective ${objective}: ${title} of sampled completions (dots) and of greedy ones on held-out pairs (squares)`), svg);
  }
}
let place = 0;
function show() {
  const example = data.examples[place], box = by("examples");
  box.replaceChildren();
  by("place").textContent = `${place + 1} of ${data.examples.length}`;
  by("previous").disabled = place === 0;
  by("next").disabled = place === data.examples.length - 1;
  const turns = box.appendChild(make("ul", null, "turns"));
  for (const line of example.context.split("\n")) {
    const cut = line.indexOf(": ");
    turns.appendChild(make("li")).append(make("b", line.slice(0, cut + 1)), line.slice(cut + 1));
  }
  box.appendChild(make("div", null, "true")).append(make("small", "what Sam really wrote"), make("div", example.action));
  box.append(make("h3", "What each arm's user model wrote"));
  box.append(table(["arm", "trace", "action", "similarity"], arms.map(arm => {
    const r = example.arms[arm];
    return [arm, r.trace === null ? "(this arm has none)" : r.trace || "(empty)", r.action || "(nothing)", fixed(r.similarity)];
  }), [1, 2]));
  if (example.candidates.length) {
    box.append(make("h3", "Candidate traces (written with the action in view) and their scores"));
    box.append(make("p", "likelihood: how much likelier the trace makes the action, nats a token; unsaid: the same without the words that the trace "
      + "gives away; embedding: cosine of reconstruction and action; leak: share of the action's 4-grams in the trace, red if the leak guard stopped it; reworded: how near the trace comes to the action in other words; judge: 0 to 9.", "note"));
    const scores = Object.keys(example.candidates[0].scores ?? {});
    const lines = example.candidates.map(c => [c.trace, c.reconstruction ?? "", ...scores.map(s => fixed(c.scores[s])),
      {text: percent(c.leak), name: c.stopped ? "leak" : ""}, fixed(c.reworded, 2)]);
    lines.push(["(no trace)", example.baseline.reconstruction ?? "", ...scores.map(s => fixed(example.baseline[s])), "", ""]);
    box.append(table(["trace", "reconstruction", ...scores, "leak", "reworded"], lines, [0, 1]));
  }
  box.append(make("p", `${example.id} · modelled person ${example.user}`, "note"));
}
function move(step) {
  place = Math.min(Math.max(place + step, 0), data.examples.length - 1);
  show();
}
by("previous").onclick = () => move(-1);
by("next").onclick = () => move(1);
document.addEventListener("keydown", event => { if (event.key === "ArrowLeft") move(-1); if (event.key === "ArrowRight") move(1); });
show();
by("made").textContent = JSON.stringify(data.made_with, null, 1);
</script>
</body>
</html>
"""


def main(argv: list[str] | None = None) -> None:
    parser = stage_arguments(__doc__)
    group = parser.add_argument_group("acting")
    group.add_argument("--max-trace-tokens", type=positive_int, default=40, help="tokens in a trace, at most (default: %(default)s)")
    group.add_argument("--max-action-tokens", type=positive_int, default=32, help="tokens in an action, at most (default: %(default)s)")
    group.add_argument("--temperature", type=positive_float, default=0.7, help="of traces and actions (default: %(default)s)")
    group.add_argument("--batch", type=positive_int, default=32, help="pairs at once (default: %(default)s)")
    group = parser.add_argument_group("judging")
    group.add_argument("--versus", default="backward", choices=ARMS, help="the arm that all others are compared with (default: %(default)s)")
    group.add_argument("--encoder", default="embedded", metavar="NAME", help="sentence encoder that judges (default: %(default)s)")
    group.add_argument("--margin", type=fraction, default=0.02, help="cosines closer than this are a tie (default: %(default)s)")
    args = parser.parse_args(argv)

    started = begin_run(args.run)
    source = args.run / "pairs.jsonl"
    pairs = [pair for pair in read_pairs(source) if pair["split"] == "test"][:args.limit]
    if not pairs:
        stop(f"{source} holds no pair of the test split; run 01_prepare.py with more pairs")
    folders = {arm: args.run / "models" / arm for arm in ARMS if (args.run / "models" / arm).is_dir()}
    if args.versus not in folders:
        stop(f"{args.run / 'models' / args.versus} does not exist, and --versus {args.versus} is compared with; run 04_select_sft.py first")
    for arm, folder in folders.items():
        check_adapter(folder, args.model)
        check_made_from(folder, source, "the stages from 02 on with")
    adapters = {arm: folder / "adapter_model.safetensors" for arm, folder in folders.items()}
    shown = {name: args.run / name for name in ("scores.jsonl", "rl.jsonl") if (args.run / name).is_file()}
    record = made_with(args, [source, *adapters.values(), *shown.values()], ["user_model"])
    products = [args.run / name for name in ("results.json", "report.html", "judgements.jsonl")]
    # Judging takes seconds, so another --versus or a new arm is judged anew; only what the models wrote is kept.
    if not args.overwrite and all(path.is_file() for path in products) and record_of(products[0]) == record:
        print(draw_table(json.loads(products[0].read_text(encoding="utf-8"))["arms"]))
        print(f"06_evaluate: {products[0]} and {products[1]} are already made")
        return

    model = tokenizer = None
    tokens = reused = 0
    predictions: dict[str, dict[str, Row]] = {}
    for arm, folder in folders.items():
        output = args.run / "predictions" / f"{arm}.jsonl"
        of_arm = made_with(args, [source, adapters[arm]], ["user_model"], ignore=("versus", "margin", "encoder"))
        rows = finished_rows(output, of_arm, args.overwrite, ("id", "trace", "action", "action_logprob"), [pair["id"] for pair in pairs])
        reused += len(rows)
        if len(rows) < len(pairs):
            if model is None:
                model, tokenizer = load_model(args.model, args.four_bit)
            user_model = load_adapter(model, folder, args.model)
            begin_output(output, of_arm, args.overwrite)
            for batch in progress(batches_by_length(pairs, lambda pair: len(show_context(pair)), args.batch), f"{arm} acts"):
                if all(pair["id"] in rows for pair in batch):
                    continue
                made = act(user_model, tokenizer, batch, arm != "none", args.max_trace_tokens, args.max_action_tokens, args.temperature, (args.seed, "06"))
                for pair, row in zip(batch, made):
                    row["action_logprob"] = true_action_logprob(user_model, tokenizer, pair, row["trace"])
                    tokens += len(encode_data(tokenizer, (row["trace"] or "") + row["action"]))
                append_rows(output, [row for row in made if row["id"] not in rows])
                rows |= {row["id"]: row for row in made}
            user_model.unload()
        predictions[arm] = rows

    encoder = load_encoder(args.encoder)
    true = embed(encoder, [pair["action"] for pair in pairs])                           # [pairs, dim]
    similarity = {arm: (embed(encoder, [rows[pair["id"]]["action"] for pair in pairs]) * true).sum(-1).tolist()
                  for arm, rows in predictions.items()}
    judgements, results = [], {}
    for arm, rows in predictions.items():
        mine = [rows[pair["id"]] for pair in pairs]
        results[arm] = {"n": len(pairs), "versus": None, "wins": None, "ties": None, "losses": None, "win_rate": None, "ci95": None}
        if arm != args.versus:
            verdicts = [{"id": pair["id"], "a": arm, "b": args.versus, "order": "both", "winner": judge(a, b, args.margin)}
                        for pair, a, b in zip(pairs, similarity[arm], similarity[args.versus])]
            results[arm] |= {"versus": args.versus, **compare(verdicts, pairs, args.seed)}
            judgements += verdicts
        actions = [row["action"] for row in mine]
        results[arm] |= {"similarity": sum(similarity[arm]) / len(pairs), "action_logprob": sum(row["action_logprob"] for row in mine) / len(pairs),
                         "distinct_actions": len(set(actions)) / len(actions), "empty_actions": actions.count(""), "ids": [pair["id"] for pair in pairs]}

    scored = {}
    if "scores.jsonl" in shown:
        scored = {row["id"]: row for row in read_candidates(shown["scores.jsonl"], "03_reconstruct_score.py", ("scores", "leak", "stopped"), ("baseline",))}
    examples = []
    for place, pair in enumerate(pairs):
        arms = {arm: {"trace": rows[pair["id"]]["trace"], "action": rows[pair["id"]]["action"], "similarity": similarity[arm][place]}
                for arm, rows in predictions.items()}
        row = scored.get(pair["id"], {"candidates": [], "baseline": {}})
        examples.append({"id": pair["id"], "user": pair["user"], "context": show_context(pair), "action": pair["action"],
                         "candidates": row["candidates"], "baseline": row["baseline"], "arms": arms})
    summary = {arm: {key: value for key, value in row.items() if key != "ids"} for arm, row in results.items()}
    curves = read_rows(shown["rl.jsonl"], ("objective", "step")) if "rl.jsonl" in shown else []
    judged_by = f"encoder {args.encoder}, margin {args.margin}"
    write_text(products[2], "".join(map(dump_row, judgements)))
    write_report(products[1], {"results": summary, "versus": args.versus, "made_with": record, "examples": examples, "rl": curves})
    write_output(products[0], json.dumps({"arms": results, "judge": judged_by, "made_with": record}, indent=1), record)
    print(draw_table(results))
    print(f"report: {products[1]}")
    closing_line("06_evaluate", len(folders) * len(pairs), len(folders) * len(pairs), reused, started, tokens)


if __name__ == "__main__":
    main()
