"""The cost model counts the calls that the stages make and the tokens of their prompts."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, make_pair

import common
from benchmarks import cost


def estimate(*arguments):
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "cost.py"), *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_calls_are_those_of_the_embedded_run_and_money_and_hours_are_sums_by_hand():
    """44 pairs at N = 4 made 176 traces, 176 reconstructions and 88 for controls (scores.summary.json)."""
    found = estimate("--pairs", "44", "--context", "100", "--action", "10", "--trace", "30", "--words", "500", "--reconstruction", "20", "--tokens-per-second", "100", "10", "--price", "1", "3")
    parts = {(row["stage"], row["what"]): row for row in found["parts"]}
    assert found["calls_a_pair"] == 9
    assert [parts["03", what]["calls"] for what in ("reconstructions", "reconstructions for controls", "judgements")] == [176, 88, 44] and parts["02", "traces"]["calls"] == 176
    traces = parts["02", "traces"]
    assert (traces["read"], traces["computed"], traces["written"]) == (176 * 610, 44 * 610, 176 * 30)
    assert traces["price"] == pytest.approx((176 * 610 + 3 * 176 * 30) / 1e6, abs=1e-3) and traces["hours"] == pytest.approx((44 * 610 / 100 + 176 * 30 / 10) / 3600, abs=1e-3)
    assert not any("price" in row for row in parts.values() if not row["server"])
    assert found["total"]["calls"] == sum(row["calls"] for row in parts.values())


def test_what_is_not_asked_for_costs_nothing():
    found = estimate("--pairs", "10", "--scorers", "judge", "--steps", "0")
    assert {row["stage"] for row in found["parts"]} == {"02", "03", "04", "06"} and "hours" not in found["total"]
    assert {row["what"] for row in found["parts"] if row["stage"] == "03"} == {"reconstructions", "judgements"}


def test_the_lengths_of_prompts_are_those_of_the_prompts():
    """Each of the counted words is a prompt around single words, less these words; a sum of pieces may differ by a token from a count of the whole."""
    tokenizer = common.load_tokenizer("embedded")
    length = lambda text: len(common.encode_data(tokenizer, text))
    pair = make_pair(action="so") | {"user": "x" * 32}                      # the embedded people have such long ids
    scene, word = length(common.show_scene(pair)), length("so")
    fill = lambda prompt, **fields: len(sum(common.encode_prompt(tokenizer, prompt, context="so", action="so", **fields), []))
    counted = {"synthesis": len(common.synthesis_prompt(tokenizer, pair)) - scene - word,
               "judge": fill("judge", guesses="so") - 3 * word, "comparison": fill("comparison", first="so", second="so") - 4 * word,
               "user_model": len(common.user_prompt(tokenizer, pair, True)) - scene}
    behind = {"user_model": len(common.user_completion(tokenizer, "so", "so")) - 2 * word}
    for prompt in ("reconstruction", "transcript"):
        shared, (suffix,) = common.reconstruction_prompt(tokenizer, common.show_scene(pair), ["so"], prompt)
        counted[prompt], behind[prompt] = len(shared) - scene, len(suffix) - word
    assert cost.WORDS == pytest.approx(counted, abs=2) and cost.BEHIND == pytest.approx(behind, abs=2)
    assert cost.GUESS == pytest.approx(length(common.list_guesses(["so"] * 8)) / 8 - word, abs=1)
    answer = json.dumps({str(guess): dict.fromkeys(common.ASPECTS, 0) for guess in range(1, 9)}, separators=(",", ":"))
    assert cost.RATING == pytest.approx(length(answer) / 8, abs=1)
