"""The benchmarks on a tiny model: a change of a stage that breaks one shows here, and what they compute is checked."""

import json
import os
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, make_pair, make_run, random_ids, release, run_stages
from transformers import Qwen3ForCausalLM

import common
from benchmarks import contrast, cost, evaluation, memory, own_traces, profiling, readers, rl_curve, scoring

evaluate = own_traces.evaluate
SIZES = {"shape": "tiny", "judge": "tiny", "context": 30, "trace": 6, "action": 4, "n": 2, "group": 2, "prompts": 1,
         "batch_tokens": 99}


def printed(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_cost_counts_the_calls_that_the_stages_make_and_nothing_else(stage, tmp_path, tiny_folder, capsys):
    run = make_run(tmp_path, 2, 1, 1)
    run_stages(stage, run, tiny_folder, "02_sample_candidates --num-samples 2 --max-trace-tokens 4",
               "03_reconstruct_score --scorers likelihood,embedding,judge --max-action-tokens 4")
    made = json.loads((run / "scores.summary.json").read_text())["calls"]
    cost.main(["--pairs", "4", "--num-samples", "2", "--model", str(tiny_folder), "--price", "1", "3", "--steps", "0"])
    found = printed(capsys)
    calls = {row["what"]: row["calls"] for row in found["parts"] if row["stage"] in ("02", "03")}
    assert made == {what: calls[what] for what in made} and found["calls_a_pair"] == 5
    assert all(("price" in row) == row["server"] for row in found["parts"])
    assert {row["stage"] for row in found["parts"]} == {"02", "03", "04", "06"}


def test_cost_knows_how_many_words_a_prompt_has_of_its_own(tiny):
    pair = make_pair(user=common.hash_of("a user")[:8])
    length = lambda text: len(common.encode_data(tiny.tokenizer, text))
    for prompt in (common.synthesis_prompt(pair), common.user_prompt(pair, True),
                   common.with_trace("transcript", "Sam", context="so", setting=common.SETTING)):
        filled = sum(length(text) for key, text in prompt.fields.items() if key not in ("user", "setting"))
        assert sum(cost.prompt_words(tiny.tokenizer, prompt.name)) == tiny.length(prompt) - filled, prompt.name
    assert cost.prompt_words(tiny.tokenizer, "transcript")[1] == length("]\nSam:")


def test_the_computed_cache_is_the_measured_one_however_rows_end(tiny, numbers):
    head, count = random_ids(numbers, 0, 100), lambda: range(numbers.randint(1, 4))
    groups = [(head + random_ids(numbers, 1, 100), [random_ids(numbers, 1, 20) for _ in count()]) for _ in count()]
    suffixes, prefixes = [suffix for _, some in groups for suffix in some], [prefix for prefix, _ in groups]
    tiny.model.generation_config.eos_token_id = list(range(2, 400, numbers.choice([20, 60, 150])))
    limit, found = numbers.randint(5, 150), []
    measured = memory.CacheMeter().measure(lambda: found.extend(
        common.generate(tiny.model, tiny.tokenizer, groups, limit, range(len(suffixes)), 1.0)))
    assert measured == memory.cache_peak(
        2, 2 * 2 * 2 * 8 * 4, max(map(len, prefixes)), len(os.path.commonprefix(prefixes)), len(groups),
        max(map(len, suffixes)), [one.tokens for one in found], limit)
    # Before anything was sampled, it is so within 10 %.
    tiny.model.generation_config.eos_token_id = list(range(2, 400, 40))
    found = memory.check_cache(tiny, [head + random_ids(numbers, 60, 100) for _ in range(4)], 4, 48)
    assert 0.9 < found["computed_over_measured"] < 1.1 and found["ended_early"]


def test_computed_memory_has_the_shapes_of_a_model_and_its_adapter(monkeypatch):
    monkeypatch.setitem(memory.SHAPES, "tiny", (64, 128, 2, 16, True, 1000))
    model = Qwen3ForCausalLM(memory.config_of("tiny")).to(torch.bfloat16).requires_grad_(False)
    linear = sum(weight.numel() for name, weight in model.model.layers.named_parameters() if "norm" not in name)
    assert memory.weight_bytes("tiny") == pytest.approx(linear * 0.516 + 2 * (1000 * 64 + 64 * 128), rel=1e-3)
    layers = model(torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values.layers
    assert memory.past_bytes("tiny") == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    adapter = [weight for weight in common.add_adapter(model, memory.RANK, 0).parameters() if weight.requires_grad]
    sizes, larger = memory.compute(Namespace(**SIZES)), memory.compute(Namespace(**SIZES | {"group": 8}))
    trained = (sizes["05 rollout"] - sizes["02 sampling"]) * memory.GIB
    assert trained == pytest.approx(4 * sum(weight.nbytes for weight in adapter))       # gradient and two moments
    assert {name for name in sizes if larger[name] > sizes[name]} == {"05 rollout", "05 rewards", "05 update"}


def test_what_a_gpu_would_measure_runs_and_has_the_stages_that_are_computed(monkeypatch):
    build = lambda shape: Qwen3ForCausalLM(memory.config_of(shape)).eval().requires_grad_(False)
    monkeypatch.setitem(memory.SHAPES, "tiny", (16, 16, 1, 8, True, 500))
    for name, value in (("random_model", build), ("COMPARED", 2), ("VALIDATED", (1, 2)), ("words_of", lambda name: 99)):
        monkeypatch.setattr(memory, name, value)
    for name in ("empty_cache", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: memory.GIB)
    assert list(memory.measure(Namespace(**SIZES))) == list(memory.compute(Namespace(**SIZES)))


def test_planted_traces_and_those_of_real_pairs_get_every_score(tiny, encoder, monkeypatch):
    items = common.read_rows(ROOT / "tests" / "data" / "planted.jsonl", scoring.Planted)[:3]
    found = scoring.measure_planted(tiny, encoder, items)
    caught = [common.detect_leaks(encoder, [item.leak], item.action, item.context[0].text)[0].is_leak for item in items]
    assert found["leak_detector"]["leaks_caught"] == sum(caught) / 3 > 0
    monkeypatch.setattr(scoring, "N", 2)
    pairs = [make_pair(f"{place}/1", f"we are {place}") for place in range(6)]
    table = scoring.measure_pairs(tiny, encoder, pairs)["auc"]
    assert {*scoring.scoring.SCORES} == {*found["scores"]} < {*table}
    assert all(row["all"]["comparisons"] == 24 and row["all"]["ci95"] for row in table.values())


def test_the_default_among_the_forms_of_contrast_is_stage_3s_and_others_are_made_of_the_same_gains(tiny, encoder):
    pair, others = make_pair("c/1", "i like old trains"), ["no idea", "see you later then", "we eat soup", "why?"]
    traces = ["Sam is fond of trains.", "Sam is tired."]
    row = contrast.score_pair(tiny, encoder, pair, traces[:1], traces[1:], others)
    ((expected, _),) = common.likelihood_scores(tiny, [(pair, traces, others)])
    for scores, wanted in zip((*row.own, *row.other), expected, strict=True):
        assert [scores[name] for name in ("likelihood", "masked_likelihood", contrast.DEFAULT)] == pytest.approx(
            [wanted[name] for name in ("likelihood", "masked_likelihood", "contrast")], abs=1e-5)
        assert scores[contrast.NEAREST] == pytest.approx(scores[contrast.DEFAULT], abs=1e-6)   # all four are nearest
    gains, masks = ([1.0, 3.0], [0.5], [5.0]), ([1, 1], [1], [0])
    found = contrast.forms_of([*map(torch.tensor, gains)], [*map(torch.tensor, masks)], [1])
    assert found["contrast, 1 negatives"] == 1.5 and found["contrast, 2 negatives"] == 1.75
    assert found[contrast.NEAREST] == 2.0 and found["contrast, nothing masked"] == pytest.approx(2 - 2.75)
    assert found["contrast with the likeliest other action alone"] == 1.5
    assert found["share of other actions that gain less"] == 1.0
    row = contrast.Variants(id="a", own=[{contrast.DEFAULT: 1.0, "x": 0.0}], other=[{contrast.DEFAULT: 0.0, "x": 0.0}])
    summary = contrast.summarise([row], {"a": "c"})
    assert summary["x"]["auc"]["mean"] == 0.5 and summary["x"]["over_default"]["mean"] == -0.5


def test_an_action_follows_its_trace_by_what_other_traces_of_the_same_pair_would_say_of_it(tiny):
    pair = make_pair()
    answers = [("Sam is fond of trains.", "i like trains"), ("Sam is tired.", "good night"), ("x", "")]
    logprob = lambda trace, action: evaluate.true_action_logprobs(
        tiny, pair.model_copy(update={"action": action}), [trace])[0] / len(common.encode_data(tiny.tokenizer, action))
    slow = sum(logprob(*answers[k]) - logprob(answers[1 - k][0], answers[k][1]) for k in (0, 1)) / 2
    assert own_traces.how_followed(tiny, pair, answers) == pytest.approx(slow, abs=1e-5)
    assert own_traces.how_followed(tiny, pair, [answers[0]] * 2) is None


def test_the_commands_of_the_whole_loop_are_understood_by_the_stages(stage):
    for script, *settings in evaluation.stages():
        assert stage(script.removesuffix(".py")).parse_args(settings)


def test_gains_are_of_passing_traces_by_pair_and_what_paraphrase_explains_is_taken_off():
    def write(shift):
        """8 pairs of 3 traces, the third of which is a leak. The score is twice the paraphrase."""
        rows = [(str(p), k, near) for p in range(8) for k, near in enumerate([shift, 0.1 + shift, 9.0])]
        zeros = dict.fromkeys(("masked_likelihood", "leak", "malformed", "unfinished", "tokens"), 0.0)
        return [rl_curve.Written(id=f"{p}#{k}", pair=p, conversation=p, trace="t", second={}, measured={
            "contrast": 2 * near, "paraphrase": near, "is_leak": float(k == 2)} | zeros) for p, k, near in rows]
    found = rl_curve.summarise(write(0.0), {0: write(0.3), 1: write(0.1)})
    passing = found["passing"]["contrast"]
    assert passing["before"] == pytest.approx(0.1) and passing["gain"] == pytest.approx(0.4)
    assert [passing["by_seed"][seed]["gain"] for seed in (0, 1)] == pytest.approx([0.6, 0.2])
    assert passing["ci95"] == pytest.approx([0.4, 0.4])
    assert passing["at_equal_paraphrase"]["gain"] == pytest.approx(0.0) and found["all"]["is_leak"]["after"] == 1 / 3


def test_every_method_is_trained_and_measured_once(stage, tiny_folder, tmp_path, monkeypatch, capsys):
    run, started = make_run(tmp_path, val=1), []
    monkeypatch.setattr(rl_curve, "run_program", lambda script, *arguments: (
        started.append(script), stage(script.removesuffix(".py")).main(list(arguments)), release()))
    pictures = []                                          # matplotlib is not in requirements.txt
    monkeypatch.setattr(rl_curve, "draw", lambda *given: pictures.append(given))
    monkeypatch.setattr(rl_curve.rl_train, "is_faulty", lambda *_: False)               # a random model writes no trace
    options = ["--run", str(run), "--model", str(tiny_folder), "--second-reader", str(tiny_folder), *(
        "--steps 1 --num-prompts 2 --num-generations 2 --num-traces 2 --rounds 2 --methods".split())]
    for methods in ("likelihood", "expert"):               # in two sittings, which add up
        rl_curve.main([*options, methods])
    times = lambda: {path: path.stat().st_mtime_ns for path in (run / "measured").iterdir()}
    found, before = printed(capsys), times()
    assert set(found["results"]) == {"likelihood", "expert"} and len(pictures) == len(started) == 2
    assert found["results"]["expert"]["all"]["contrast, second reader"]["ci95"]
    rl_curve.main([*options, "likelihood,expert"])
    assert printed(capsys) == found and times() == before


def test_a_profile_counts_operations_by_section(tiny, tiny_folder, tmp_path):
    run = make_run(tmp_path)
    found = profiling.profile_stage("02_sample_candidates.py", "--run", str(run), "--model", str(tiny_folder), *(
        "--dtype float32 --limit 1 --num-samples 2 --max-trace-tokens 1".split()))
    output = tiny.model.get_output_embeddings().weight.numel()
    body = tiny.model.num_parameters() - 2 * output        # the other table is looked up
    prompt = tiny.length(common.synthesis_prompt(common.read_rows(run / "pairs.jsonl", common.Pair)[0]))
    assert found["operations"] == {"prefill": 2 * body * (prompt - 1 + 2) + 2 * output * (1 + 2)}
    assert min(found["seconds"][name] for name in ("imports", "loading", "prefill", "rest")) > 0


def read_by_hand(patterns, control, times=1.0):
    """A row a pattern of (scores, paraphrases, leaks), each of a conversation of its own."""
    some = lambda value, near, leak: {"trace": "t", "finished": True, "tokens": 9, "leak": float(leak), "is_leak": leak,
                                      "paraphrase": near, "scores": dict.fromkeys(readers.SCORES, times * value)}
    other = common.Control(id="other", **some(control, 0.0, False))
    return [common.Scores(id=str(p), baseline={}, calls={}, control=other.model_copy(deep=True),
                          candidates=[common.Scored(**some(*one)) for one in zip(*pattern)])
            for p, pattern in enumerate(patterns)]


def test_readers_agree_within_pairs_and_gains_and_ties_are_counted_by_hand():
    # Six pairs in which both readers follow the paraphrase, two in which they disagree, one of leaks alone.
    near, flat, passing, leaks = [0.0, 0.1, -0.1, 0.0], [0.5] * 4, [False] * 3 + [True], [True] * 4
    same, turned = [0.0, 1.0, -1.0, 8.0], [0.0, -1.0, 1.0, 8.0]
    last = (same, near, leaks)
    one = read_by_hand([(same, near, passing)] * 6 + [(same, flat, passing)] * 2 + [last], -0.5)
    other = read_by_hand([(same, near, passing)] * 6 + [(turned, flat, passing)] * 2 + [last], 1.0)
    where = {row.id: row.id for row in one}
    found = readers.agreement(one, other, where, "contrast", True)
    assert found["traces"] == 24 and found["correlation"]["r"] == pytest.approx((6 * 2 - 2 * 2) / (8 * 2))
    assert found["partial"]["r"] == pytest.approx(-1.0)    # what paraphrase explains is all that they agree on
    low, high = found["correlation"]["ci95"]
    assert -1 <= low < 0.5 < high <= 1
    everything = readers.agreement(one, other, where, "contrast", False)
    assert everything["traces"] == 36 and everything["correlation"]["r"] == pytest.approx((7 * 50 + 2 * 46) / (9 * 50))

    for heard, gain in (([one], 1.0), ([other], (6 - 2) / 8), ([one, other], 0.75)):
        found = readers.choice_gain(one, heard, where, "contrast")
        assert found["pairs"] == 8 and found["over_mean"]["gain"] == pytest.approx(gain)
        assert found["over_first"]["gain"] == pytest.approx(gain)      # the first trace's score is the mean
    larger = read_by_hand([(same, near, passing)] * 6 + [(same, flat, passing)] * 2 + [last], -0.5, 1000.0)
    tables = readers.summarise({"one": one, "other": other, "larger": larger}, where)["auc"]["contrast"]
    assert tables["one"]["auc"] == tables["one+larger"]["auc"] == pytest.approx(2 / 3)
    assert tables["other"]["auc"] == pytest.approx(0.5 / 3)            # a tie is half
    assert readers.pool(one, larger)[0].candidates[3].scores["contrast"] == pytest.approx(
        readers.pool(one, one)[0].candidates[3].scores["contrast"])    # no reader counts more than another


def test_every_reader_scores_the_same_traces_once(tiny, encoder, tmp_path):
    run = make_run(tmp_path, 0, 0, 8)
    pairs = common.read_rows(run / "pairs.jsonl", common.Pair)
    traces = [common.Candidate(trace=f"Sam likes {word}.", finished=True, tokens=5) for word in ("tea", "rain")]
    found = {pair.id: common.Candidates(id=pair.id, candidates=traces) for pair in pairs}
    (run / "candidates.jsonl").write_text("")
    work = readers.scoring.prepare_work(encoder, pairs, found, 4, 0)
    outputs = {name: readers.open_scores(run, f"models/{name}", 0) for name in ("a", "b")}
    for output in outputs.values():
        readers.read_traces(tiny, encoder, work, output, "reading")
    again = readers.open_scores(run, "models/a", 0)
    assert again.has(work) and (run / "scores.a.jsonl").is_file()
    readers.read_traces(None, encoder, work, again, "reading")         # nothing is left to read
    table = readers.summarise({name: [output.rows[item.id] for item in work] for name, output in outputs.items()},
                              {pair.id: pair.conversation for pair in pairs})
    assert table["pairs"] == table["conversations"] == 8
    assert table["correlation"]["contrast"]["a+b"]["all"]["correlation"]["r"] == pytest.approx(1.0)
    assert {*table["auc"]["contrast"]} == {"a", "b", "a+b"}
