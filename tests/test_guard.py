"""The leak guard, the cut of long contexts, the controls and the side file of stage 3."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_pair

import common

PLANTED = {name: common.read_rows(ROOT / "tests" / "data" / f"{name}.jsonl") for name in ("planted", "planted_fresh")}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_causes_and_justifications_share_no_run_of_words_with_the_action(name):
    """The set itself: a cause that quotes would make every scorer look good."""
    items = PLANTED[name]
    assert len({item["id"] for item in items}) == len(items) and len({item["justification"] for item in items}) == len(items)
    for item in items:
        action = common.ngrams(common.words_of(item["action"]), 3)
        for key in ("cause", "justification"):
            assert not action & common.ngrams(common.words_of(item[key]), 3), item["id"]


def test_the_planted_set_is_large_enough():
    assert len(PLANTED["planted"]) >= 60 and len(PLANTED["planted_fresh"]) >= 30


@pytest.mark.parametrize("name", PLANTED)
def test_the_guard_catches_planted_leaks_and_lets_causes_pass(name, encoder):
    caught, stopped = [], []
    for item in PLANTED[name]:
        context = common.show_context({"user": "sam", **item})
        cause, leak = common.guard_traces(encoder, [item["cause"], item["leak"]], item["action"], context)
        caught.append(leak["stopped"])
        stopped.append(cause["stopped"])
    assert sum(caught) / len(caught) >= 0.95 and sum(stopped) / len(stopped) <= 0.05


def test_words_in_other_forms_and_order_count_as_rewording_and_words_of_the_context_do_not():
    action, context = "I love hiking but my knee hurts these days", "Alex: how is your knee?"
    assert common.stem_share("his knee is hurting and he loved the hikes", action, context) == 0.75          # love, hik, hurt; not days
    assert common.stem_share("the knee is bad", action, context) == 0.0
    assert common.stem_share("Sam loves it", action, context) == 0.0                                          # one word is no rewording


def test_a_trace_that_reports_speech_is_nearer_to_a_leak_than_the_same_thought(encoder):
    said, thought = common.guard_traces(encoder, ["Sam tells Alex about the rain.", "Sam has in mind Alex about the rain."], "it rains a lot here in spring", "Alex: hi")
    plain = common.embed(encoder, ["it rains a lot here in spring", "Sam tells Alex about the rain."])
    assert said["reworded"] == pytest.approx((plain[0] @ plain[1]).item() + 0.1, abs=1e-5)
    assert not common.SPEECH.search("Sam has in mind Alex about the rain.") and thought["leak"] == 0


def test_what_a_passing_trace_gives_away_is_zero():
    assert common.given_away({"leak": 0.0, "reworded": 0.4, "stopped": False}) == 0
    assert common.given_away({"leak": 0.2, "reworded": 0.4, "stopped": True}) == 0.4


def test_the_encoder_reads_a_long_text_to_its_end(encoder):
    """all-MiniLM's window is 256 tokens; what stands behind it must still count, as the mean over all windows' tokens."""
    model, tokenizer = encoder
    start = "the quick brown fox jumps over the lazy dog " * 40
    one, other, short = common.embed(encoder, [start + "volcano eruption lava " * 40, start + "tax law reform bill " * 40, "hello"])
    assert (one @ other).item() < 0.95
    torch.testing.assert_close(short, common.embed(encoder, ["hello"])[0], atol=1e-5, rtol=0)
    text = start + "volcano eruption lava " * 40
    ids = tokenizer.encode(text, add_special_tokens=False)
    total = torch.zeros(model.config.hidden_size)
    with torch.no_grad():
        for at in range(0, len(ids), 254):
            window = [tokenizer.cls_token_id, *ids[at:at + 254], tokenizer.sep_token_id]
            total += model(torch.tensor([window])).last_hidden_state[0].sum(0)
    torch.testing.assert_close(one, total / total.norm(), atol=1e-4, rtol=0)


def test_a_context_is_cut_at_whole_turns_from_the_oldest_and_the_cut_is_recorded(tiny):
    _, tokenizer = tiny
    pair = make_pair() | {"cut": 2}
    pair["context"] = [{"speaker": "bo", "text": f"turn {number} " + "word " * 10} for number in range(6)]
    whole = len(common.encode_data(tokenizer, common.show_context(pair)))
    assert common.cut_context(tokenizer, pair, whole) == pair
    for room in range(whole, 0, -7):
        shorter = common.cut_context(tokenizer, pair, room)
        if shorter is None:
            assert room < len(common.encode_data(tokenizer, common.show_context(pair | {"context": pair["context"][-1:]})))
            continue
        kept = len(shorter["context"])
        assert shorter["context"] == pair["context"][-kept:] and shorter["cut"] == 2 + 6 - kept
        assert len(common.encode_data(tokenizer, common.show_context(shorter))) <= room
        if kept < 6:                                               # one turn more would not have fitted
            assert len(common.encode_data(tokenizer, common.show_context(pair | {"context": pair["context"][-kept - 1:]}))) > room


def write_run(run: Path, pairs: list[dict], n: int = 2) -> None:
    made = [{"id": pair["id"], "candidates": [{"trace": f"Sam feels like number {k}.", "finished": True, "tokens": 5 + k} for k in range(n)]} for pair in pairs]
    for name, rows in (("pairs.jsonl", pairs), ("candidates.jsonl", made)):
        (run / name).write_text("".join(map(common.dump_row, rows)))
    (run / "candidates.jsonl.made.json").write_text(json.dumps({"inputs": {"pairs.jsonl": common.file_hash(run / "pairs.jsonl")}}))


def score(stage, run, folder, *arguments):
    stage("03_reconstruct_score").main(["--run", str(run), "--model", str(folder), "--no-4bit", "--max-action-tokens", "6", *arguments])
    return {row["id"]: row for row in common.read_rows(run / "scores.jsonl")}


def test_stage_3_cuts_what_the_window_cannot_hold_and_reads_every_action_to_its_end(tiny_folder, tmp_path, stage, tiny, capsys):
    """The tiny model's window is 2,048 tokens: one context is far longer, and one action alone is."""
    _, tokenizer = tiny
    pairs = [make_pair(f"c{number}/1") for number in range(3)]
    pairs[0]["context"] = [{"speaker": "bo", "text": f"{number} " + "word " * 60} for number in range(20)]
    pairs[1]["action"] = "long " * 2100
    write_run(tmp_path, pairs)
    rows = score(stage, tmp_path, tiny_folder, "--scorers", "likelihood", "--keep-token-logprobs")
    assert rows.keys() == {"c0/1", "c2/1"} and "c1/1" in capsys.readouterr().out
    assert rows["c0/1"]["cut"] > 0 and rows["c2/1"]["cut"] == 0
    assert json.loads((tmp_path / "scores.summary.json").read_text())["contexts_cut"] == 1
    for line in common.read_rows(tmp_path / "token_logprobs.jsonl"):
        action = next(pair["action"] for pair in pairs if pair["id"] == line["id"])
        assert all(len(some) == len(common.encode_data(tokenizer, action)) for some in (line["baseline"], line["control"], *line["candidates"]))


def test_kept_log_probs_give_the_likelihood_again_and_survive_a_restart(tiny_folder, tmp_path, stage):
    pairs = [make_pair(f"c{number}/1") for number in range(5)]
    write_run(tmp_path, pairs)
    options = ("--scorers", "likelihood", "--keep-token-logprobs", "--batch", "2")
    rows = score(stage, tmp_path, tiny_folder, *options)
    kept = (tmp_path / "token_logprobs.jsonl").read_bytes()
    for line in common.read_rows(tmp_path / "token_logprobs.jsonl"):
        for candidate, tokens in zip(rows[line["id"]]["candidates"], line["candidates"]):
            gain = sum(a - b for a, b in zip(tokens, line["baseline"])) / len(tokens)
            assert candidate["scores"]["likelihood"] == pytest.approx(gain, abs=1e-5)
    whole = (tmp_path / "scores.jsonl").read_bytes()
    (tmp_path / "scores.jsonl").write_bytes(b"".join(whole.splitlines(True)[:2]))            # stopped between two batches, the side file is ahead
    score(stage, tmp_path, tiny_folder, *options)
    assert (tmp_path / "scores.jsonl").read_bytes() == whole and (tmp_path / "token_logprobs.jsonl").read_bytes() == kept


def test_log_probs_asked_for_too_late_and_a_judge_nobody_asked_for_are_refused(tiny_folder, tmp_path, stage, capsys):
    write_run(tmp_path, [make_pair(f"c{number}/1") for number in range(3)])
    score(stage, tmp_path, tiny_folder, "--scorers", "likelihood")
    before = (tmp_path / "scores.jsonl").read_bytes()
    for options, words in ((("--scorers", "likelihood", "--keep-token-logprobs"), "lacks the log-probs"), (("--scorers", "likelihood", "--judge", "openai:x"), "add judge to --scorers"),
                           (("--scorers", "embedding", "--keep-token-logprobs"), "needs the scorer likelihood")):
        with pytest.raises(SystemExit):
            score(stage, tmp_path, tiny_folder, *options)
        assert words in capsys.readouterr().err
    assert (tmp_path / "scores.jsonl").read_bytes() == before


def test_a_finished_stage_with_a_pair_left_out_is_not_done_again(tiny_folder, tmp_path, stage, capsys):
    pairs = [make_pair(f"c{number}/1") for number in range(3)]
    pairs[1]["action"] = "long " * 2100
    write_run(tmp_path, pairs)
    score(stage, tmp_path, tiny_folder, "--scorers", "likelihood")
    capsys.readouterr()
    score(stage, tmp_path, tiny_folder, "--scorers", "likelihood")
    assert "already made (2 rows)" in capsys.readouterr().out


def test_a_run_of_one_pair_is_told_that_controls_need_another(tiny_folder, tmp_path, stage, capsys):
    write_run(tmp_path, [make_pair()])
    with pytest.raises(SystemExit):
        score(stage, tmp_path, tiny_folder, "--scorers", "likelihood")
    assert "another pair" in capsys.readouterr().err and not (tmp_path / "scores.jsonl").exists()


def test_controls_are_traces_of_other_conversations(stage):
    pairs = [make_pair(f"c{number // 2}/{number}") for number in range(8)]
    found = {pair["id"]: {"candidates": [{"trace": pair["id"], "tokens": 3}]} for pair in pairs}
    conversation = {pair["id"]: pair["conversation"] for pair in pairs}
    for name, control in stage("03_reconstruct_score").choose_controls(pairs[:5], pairs, found).items():
        assert conversation[control["id"]] != conversation[name] and control["trace"] == control["id"]


def test_rank_correlation_equals_pearson_on_ranks_inside_groups(stage, numbers):
    scoring = stage("03_reconstruct_score")
    groups = [([numbers.choice([1, 2, 3, 4.5]) for _ in range(4)], [numbers.random() for _ in range(4)]) for _ in range(6)]
    xs = torch.tensor([rank - 1.5 for some, _ in groups for rank in scoring.ranks(some)])
    ys = torch.tensor([rank - 1.5 for _, some in groups for rank in scoring.ranks(some)])
    assert scoring.rank_correlation(groups) == pytest.approx(torch.corrcoef(torch.stack([xs, ys]))[0, 1].item(), abs=1e-5)
    assert scoring.rank_correlation([([1, 2, 3], [10, 20, 30])]) == pytest.approx(1) and scoring.rank_correlation([([1, 2], [2, 1])]) == pytest.approx(-1)
    assert scoring.rank_correlation([([1, 1], [1, 2])]) is None
    assert scoring.ranks([5, 1, 5]) == [1.5, 0, 1.5]


def row_of(name, own, other, stopped=()):
    make = lambda score, k: {"scores": {"s": score}, "tokens": k, "leak": 0.0, "reworded": 0.0, "stopped": k in stopped}
    return {"id": name, "candidates": [make(score, k) for k, score in enumerate(own)], "control": make(other, 99), "baseline": {"s": 0.0}}


def test_auc_is_the_share_of_comparisons_won_and_leaves_out_stopped_traces(stage):
    scoring = stage("03_reconstruct_score")
    rows, conversations = [row_of("a", [1, 2, 3], 2), row_of("b", [5, -1], 0, stopped={0})], {"a": "A", "b": "B"}
    assert scoring.auc(rows, conversations, "s", False)["auc"] == pytest.approx((0 + 0.5 + 1 + 1 + 0) / 5)
    assert scoring.auc(rows, conversations, "s", True)["auc"] == pytest.approx((0 + 0.5 + 1 + 0) / 4)
    found = scoring.measure_controls([row_of("a", [-1, -2], 0), row_of("b", [1, -2], 0)], conversations, "s")
    assert found["pairs_where_no_trace_wins"] == 0.5 and found["correlation_with_length"] == pytest.approx(-1)
    assert scoring.auc(rows, conversations, "t", False) is None and math.isclose(found["own_over_other"]["auc"], 1 / 4)
