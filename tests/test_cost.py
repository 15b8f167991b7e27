"""The cost model counts the calls that the stages make."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


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
