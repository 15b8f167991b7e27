"""The computed peaks of GPU memory against what a small model of the same kind really holds."""

import argparse
import json
import os
import sys

import pytest
import torch
from transformers import Qwen3ForCausalLM

import common
from benchmarks import memory

SIZES = {"shape": "tiny", "judge": "tiny", "context": 300, "trace": 40, "action": 20, "n": 4, "group": 8, "pairs": 2}


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(memory.SHAPES, "tiny", (64, 128, 2, 16, True, 1000))


@pytest.fixture()
def model():
    """The small model as the benchmark's shapes say it is, its linear layers not yet in 4 bits."""
    return Qwen3ForCausalLM(memory.config_of("tiny")).to(torch.bfloat16).requires_grad_(False)


def peaks(**sizes):
    """{stage: bytes}"""
    return {stage: size * memory.GIB for stage, size in memory.compute(argparse.Namespace(**SIZES | sizes)).items()}


def test_weights_are_those_of_the_model_in_four_bits_with_its_table_in_sixteen(model):
    linear = sum(weight.numel() for name, weight in model.model.layers.named_parameters() if "norm" not in name)
    assert peaks()["weights"] == pytest.approx(linear * 0.516 + model.lm_head.weight.numel() * 2 + 64 * 128 * 2, rel=1e-3)      # and one layer's weight unpacked
    assert linear / 2 + model.lm_head.weight.numel() * 2 < memory.weight_bytes("tiny") < peaks(judge="qwen3-1.7b")["03 judging"] - memory.weight_bytes("qwen3-1.7b")


def test_a_token_more_of_each_trace_costs_its_keys_and_values_in_every_row(model):
    cache = model(torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values
    a_token = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert a_token == memory.past_bytes("tiny")
    one, other = peaks(), peaks(trace=140)
    for stage, rows in (("02 sampling", 2 * 4), ("05 rollout", 2 * 8), ("06 acting", 2 * memory.TRACES), ("03 likelihood", 4 + 2), ("06 true action", memory.TRACES)):
        assert other[stage] - one[stage] == pytest.approx(100 * rows * a_token), stage


def test_training_adds_the_adapter_its_gradient_and_two_moments_in_float32(model):
    adapter = sum(weight.numel() for weight in common.add_adapter(model, memory.RANK, 0).parameters() if weight.requires_grad)
    found = peaks(n=8)
    assert found["05 rollout"] - found["02 sampling"] == pytest.approx(16 * adapter)


def test_a_layer_keeps_as_much_for_each_token_and_more_than_what_enters_it():
    few, many = memory.kept_by_a_layer("tiny", 64), memory.kept_by_a_layer("tiny", 256)
    assert few == pytest.approx(many, rel=0.02) and many > 10 * 64 * 2


@pytest.mark.parametrize("size, grow", [("context", {"02 sampling", "03 reconstructing", "03 likelihood", "03 judging", "04 fitting", "05 validation", "05 rollout", "05 update", "06 acting",
                                                     "06 true action", "06 judging"}),
                                        ("n", {"02 sampling", "03 reconstructing", "03 likelihood", "03 judging"}), ("group", {"05 rollout", "05 update"}),
                                        ("pairs", {"02 sampling", "03 reconstructing", "05 rollout", "06 acting"})])
def test_what_grows_with_a_size_and_nothing_else(size, grow):
    one, other = peaks(), peaks(**{size: 2 * SIZES[size]})
    assert {stage for stage in one if other[stage] > one[stage]} == grow and all(other[stage] == one[stage] for stage in one.keys() - grow)
    assert all(one[stage] > one["weights"] for stage in one.keys() - {"weights"})


def test_stage_3_holds_model_and_judge_and_stage_6_the_judge_alone():
    alone, beside = peaks(), peaks(judge="qwen3-1.7b")
    for stage in ("02 sampling", "04 fitting", "05 update", "06 acting", "06 true action"):
        assert alone[stage] == beside[stage]
    more = memory.weight_bytes("qwen3-1.7b") - memory.weight_bytes("tiny")
    assert beside["03 reconstructing"] - alone["03 reconstructing"] == pytest.approx(more) and beside["03 judging"] - alone["03 judging"] > more
    assert beside["06 judging"] > memory.weight_bytes("qwen3-1.7b") and alone["06 judging"] < beside["weights"] + more


def test_the_lengths_of_judges_questions_are_those_of_the_prompts():
    tokenizer = common.load_tokenizer("embedded")
    ask = lambda first, second: sum(common.encode_prompt(tokenizer, "comparison", context="so", action="so", first=first, second=second), [])
    questions = [ask("one", "two"), ask("two", "one")]
    assert memory.BETWEEN == pytest.approx(len(questions[0]) - len(os.path.commonprefix(questions)) - 2, abs=2)
    assert memory.ANSWER == max(len(tokenizer.encode(f'{{"1":{{"{aspect}":', add_special_tokens=False)) for aspect in common.ASPECTS)


def test_the_program_prints_one_json_object_last(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory.py", "--shape", "tiny", "--judge", "tiny", "--computed"])
    memory.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["device"] == "none: computed" and found["context"] == 2048 and found["peak_gib"]["05 update"] > 0


def test_what_a_gpu_would_measure_runs_and_has_the_stages_that_are_computed(monkeypatch):
    """The stages' own functions on a small model on the CPU; the allocator is not there."""
    monkeypatch.setitem(memory.SHAPES, "tiny", (64, 128, 2, 16, True, 40000))
    monkeypatch.setattr(memory, "QUESTIONS", 3)
    monkeypatch.setattr(memory, "random_model", lambda shape: Qwen3ForCausalLM(memory.config_of(shape)).eval().requires_grad_(False))
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: memory.GIB)
    assert list(memory.measure(argparse.Namespace(**SIZES | {"context": 30, "trace": 4, "action": 4, "group": 2, "n": 2, "pairs": 1}))) == list(peaks())
