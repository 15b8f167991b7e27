"""Benchmarks that take long on the embedded model do their work on a tiny one: a change of a stage that breaks them shows here."""

import json
import random

import torch
from conftest import ROOT, make_pair

import common
from benchmarks import rl_curve, scoring

WORDS = "garden piano river winter bread letter window doctor holiday brother engine market".split()


def some_pairs(split: str, count: int = 8) -> list[dict]:
    """Pairs of as many conversations."""
    draw = random.Random(split)
    return [make_pair(f"{split}{place}", " ".join(draw.sample(WORDS, 6)), split) for place in range(count)]


@torch.inference_mode()
def test_planted_traces_are_read_and_counted(tiny, encoder, tmp_path):
    planted = tmp_path / "planted.jsonl"
    planted.write_text("".join((ROOT / "tests" / "data" / "planted.jsonl").read_text().splitlines(keepends=True)[:6]))
    found = scoring.measure_planted(*tiny, encoder, planted)
    caught = [common.guard_traces(encoder, [item["leak"]], item["action"], common.show_context({"user": "sam", **item}))[0]["stopped"] for item in common.read_rows(planted)]
    assert found["items"] == 6 and found["scores"].keys() == {*scoring.scoring.SCORERS, "unsaid"} and found["guard"]["leaks_caught"] == sum(caught) / 6 > 0


@torch.inference_mode()
def test_every_trace_of_real_pairs_is_compared_with_those_of_another_pair(tiny, encoder):
    found = scoring.measure_pairs(*tiny, encoder, some_pairs("test"), "tiny")
    assert (found["pairs"], found["conversations"], found["own_traces"]) == (8, 8, 8 * scoring.N)
    assert found["auc"].keys() > {*scoring.scoring.SCORERS, "unsaid"}
    for row in found["auc"].values():
        assert row["all"]["comparisons"] == 8 * scoring.N**2 and row["all"]["ci95"][0] <= row["all"]["auc"] <= row["all"]["ci95"][1]


def test_the_curve_of_a_reward_is_trained_measured_and_gone_on_with(tiny, tmp_path, monkeypatch, capsys):
    prepare = rl_curve.importlib.import_module("01_prepare")
    pairs = "".join(common.dump_row(pair) for split in ("train", "val", "test") for pair in some_pairs(split))
    monkeypatch.setattr(prepare, "main", lambda arguments: (tmp_path / "run").mkdir(exist_ok=True) or (tmp_path / "run" / "pairs.jsonl").write_text(pairs))
    monkeypatch.setattr(common, "load_model", lambda *_: tiny)
    monkeypatch.setattr(rl_curve, "STEPS", {"specific": 2})
    monkeypatch.setattr(rl_curve, "SAMPLES", 5)
    monkeypatch.setattr("sys.argv", ["rl_curve.py", "--run", str(tmp_path / "run"), "--rewards", "specific", "--picture", str(tmp_path / "curve.png")])
    results = []
    for _ in range(2):                                        # the second start finds everything done
        rl_curve.main()
        printed = capsys.readouterr().out
        results.append(json.loads(printed[printed.index('{\n "machine"'):])["held_out"])
    assert results[0] == results[1] and (tmp_path / "curve.png").is_file()
    rows = common.read_rows(tmp_path / "run" / "specific" / "measured.jsonl")
    sampled = [row for row in rows if row["kind"] == "sampled"]
    assert len(sampled) == 8 * rl_curve.SAMPLES and all(row["specific"] == row["score"] - row["other"] for row in rows)
    assert results[0]["specific"]["sampled"]["specific"] == round(sum(row["specific"] for row in sampled) / len(sampled), 4)
