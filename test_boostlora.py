"""The paper's claims and the README's promises as tests, in the order of the files they test.

    pytest                                 about 6 minutes on 2 cores; half of it is the demo, run and killed
    BOOSTLORA_DATA=folder pytest           also on the real data sets, from the files in that folder
"""

import ast
import contextlib
import dataclasses
import gzip
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    EsmConfig,
    EsmForSequenceClassification,
    EsmForTokenClassification,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import boostlora
import train_code
import train_math
import train_protein
from boostlora import (
    BoostConfig,
    Booster,
    CEConfig,
    Completion,
    FullFineTuning,
    GRPOConfig,
    InputError,
    RunConfig,
    TinyLoRA,
    boost,
    completion_logprobs,
    cross_entropy,
    find_targets,
    generate,
    generator,
    group_advantages,
    grpo,
    micro_batches,
    svd_basis,
    takes_masks,
    token_trees,
)
from train_code import (
    CodeTask,
    Sandbox,
    extract_code,
    has_landlock,
    load_data,
    load_problems,
    program,
)
from train_math import grade
from train_protein import (
    LETTERS,
    LINKER,
    PairClassifier,
    ProteinTask,
    auc,
    connected,
    f1,
    load_pairs,
    split,
)

HERE = Path(__file__).parent
DATA = Path(os.environ.get("BOOSTLORA_DATA", ""))
needs_data = pytest.mark.skipif("BOOSTLORA_DATA" not in os.environ, reason="BOOSTLORA_DATA names no folder")


def qwen(dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128,
             "initializer_range": 0.2, "eos_token_id": 1}
    return Qwen2ForCausalLM(Qwen2Config(**{**sizes, **options})).to(dtype).eval()


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=31, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        initializer_range=0.2, eos_token_id=1, tie_word_embeddings=False)).to(dtype).eval()


def esm(dtype=torch.float32):
    torch.manual_seed(0)
    return EsmForSequenceClassification(EsmConfig(
        vocab_size=33, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        position_embedding_type="rotary", mask_token_id=32, pad_token_id=1, initializer_range=0.2,
        token_dropout=False)).to(dtype).eval()


def inputs(model):
    ids = torch.randint(4, 31, (3, 9), generator=generator("inputs"))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model):
    with torch.no_grad():
        return model(**inputs(model)).logits.float()


def trained(model, rounds=3, **options):
    """A booster after `rounds` rounds of random vectors."""
    booster = Booster(model, BoostConfig(**{"rounds": rounds, "u": 3, "groups": 4, **options}))
    for t in range(rounds):
        v = booster.attach()
        v.data = torch.randn(v.shape, generator=generator("v", t))
        booster.merge()
    return booster


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Model, tokenizer and problems of a demo base model that is hardly trained."""
    folder = tmp_path_factory.mktemp("toy") / "base"
    train_math.make_demo(folder, BoostConfig(), ["loses", "gives"], steps=40)
    return folder


@pytest.fixture()
def talker(toy):
    return AutoModelForCausalLM.from_pretrained(toy), AutoTokenizer.from_pretrained(toy)


QUESTIONS = ["has 7, sells 4, triples?", "has 12, wins 3?", "has 5?", "has 9, gives 1, doubles, buys 8?"]


# ------------------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(("kind", "flags", "named"), [
    (BoostConfig, {"rank": 0}, "--rank 0"), (BoostConfig, {"rounds": -1}, "--rounds -1"),
    (BoostConfig, {"u": 0}, "--u 0"), (BoostConfig, {"replay": -2}, "--replay"),
    (BoostConfig, {"basis": "bottom"}, "--basis"), (GRPOConfig, {"temperature": 0.0}, "--temperature"),
    (GRPOConfig, {"group_size": 1}, "--group_size 1"), (GRPOConfig, {"lr": math.inf}, "--lr inf"),
    (CEConfig, {"steps": 0}, "--steps 0"), (boostlora.RunConfig, {"limit": -1}, "--limit -1"),
])
def test_flags_out_of_range_are_refused_by_name(kind, flags, named):
    with pytest.raises(InputError, match=named):
        kind(**flags)


# ------------------------------------------------------------------------------------------------------------
# Basis


@pytest.mark.parametrize("shape", [(200, 96), (96, 200), (128, 128), (500, 300), (300, 500)])
@pytest.mark.parametrize("spectrum", ["decaying", "flat", "outliers", "orthogonal"])
def test_svd_basis_agrees_with_float64_svd(monkeypatch, shape, spectrum):
    side, k = min(shape), 40
    random = generator("svd", shape)
    left = torch.linalg.qr(torch.randn(shape[0], side, generator=random).double()).Q
    right = torch.linalg.qr(torch.randn(shape[1], side, generator=random).double()).Q
    flat = 1 + torch.rand(side, generator=random).sort(descending=True).values
    S = {"decaying": 100 ** (-torch.arange(side) / 39.0), "flat": flat, "orthogonal": flat**1e-4,
         "outliers": flat * torch.tensor([30.0, 10.0] + [1.0] * (side - 2))}[spectrum]
    weight = (left * S.double() @ right.T).float()
    sizes, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda G: sizes.append(len(G)) or eigh(G))
    U, S, V = svd_basis(weight, k)
    assert (max(sizes) == side) == (side < 300 or spectrum == "orthogonal")  # the others need not all n pairs
    exact = torch.linalg.svd(weight.double(), full_matrices=False)
    assert U.dtype == S.dtype == V.dtype == torch.float32
    assert ((S - exact.S[:k]).abs() / exact.S[:k]).max() < 1e-5
    for vectors in (U, V):
        assert (vectors.T @ vectors - torch.eye(k)).abs().max() < 1e-5
    gaps = (exact.S[:-1] - exact.S[1:])[:k] / exact.S[:k]
    apart = torch.minimum(gaps, torch.cat([torch.ones(1), gaps[:-1]])) > 1e-3
    assert ((U * exact.U[:, :k]).sum(0).abs() > 0.9999)[apart].all()
    assert ((V * exact.Vh[:k].T).sum(0).abs() > 0.9999)[apart].all()
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    truncated = exact.U[:, :k] * exact.S[:k] @ exact.Vh[:k]
    assert torch.allclose((U * S @ V.T).double(), truncated, atol=1e-5)


def test_a_weight_of_too_small_rank_is_refused():
    with pytest.raises(InputError, match="fewer than 4"):
        svd_basis(torch.ones(8, 8), 4)


# ------------------------------------------------------------------------------------------------------------
# Targets and layer


def test_targets_are_the_linears_of_the_blocks():
    names = list(find_targets(qwen()))
    assert len(names) == 2 * 7 and names[0] == "model.layers.0.self_attn.q_proj" and "lm_head" not in names
    names = list(find_targets(esm()))
    assert len(names) == 2 * 6 and all(name.startswith("esm.encoder.layer.") for name in names)


def test_a_model_without_linear_blocks_is_refused_with_what_it_has():
    with pytest.raises(InputError, match="transformer.h.*Conv1D"):
        find_targets(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=31)))
    with pytest.raises(InputError, match="no nn.ModuleList"):
        find_targets(nn.Linear(4, 4))


def test_the_layer_is_the_equation():
    U, S, V = svd_basis(torch.randn(7, 5, generator=generator(1)), 2)
    P = torch.randn(3, 2, 2, generator=generator(2))
    v = nn.Parameter(torch.randn(4, 3, generator=generator(3)))
    layer, x = TinyLoRA(U, S, V, P, v, group=1), torch.randn(6, 5, generator=generator(4))
    for _ in range(2):
        R = sum(v[1, i] * P[i] for i in range(3))
        expected = U @ torch.diag(S) @ R @ V.T
        assert torch.allclose(layer.delta(), expected, atol=1e-6)
        assert torch.allclose(layer(x), x @ expected.T, atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(layer(x), x @ expected.T, atol=1e-5)
            v.mul_(-2)  # the folded copy must follow


# ------------------------------------------------------------------------------------------------------------
# Booster


def test_too_many_rounds_or_groups_are_refused_before_the_basis(monkeypatch):
    monkeypatch.setattr(boostlora, "svd_basis", None)
    with pytest.raises(InputError, match=r"layers.0.self_attn.k_proj .* has 16: .* or at most --rounds 5"):
        Booster(qwen(), BoostConfig(rank=3, rounds=6))
    with pytest.raises(InputError, match="--groups 999.*14 target"):
        Booster(qwen(), BoostConfig(rank=1, rounds=1, groups=999))


@pytest.mark.parametrize("make", [qwen, llama, esm])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("basis", ["rotate", "top", "top-decayed"])
def test_attached_equals_merged(make, dtype, tolerance, basis):
    model = make(dtype)
    booster = Booster(model, BoostConfig(rounds=2, u=2, groups=3, basis=basis))
    before = logits(model)
    for t in range(2):
        v = booster.attach()
        assert v.dtype == torch.float32 and v.shape == (3, 2) and not v.any()
        v.data = 0.1 * torch.randn(v.shape, generator=generator("v", t))
        attached = logits(model)
        booster.merge()
        assert (attached - logits(model)).abs().max() < tolerance * before.abs().max()
    if dtype == torch.float32:
        assert (logits(model) - before).abs().max() > 10 * tolerance * before.abs().max()


def test_no_rounds_change_nothing():  # --rounds 0: the model as it is, evaluated
    model, before = qwen(), bits(qwen())
    booster = Booster(model, BoostConfig(rounds=0))
    booster.write()
    assert same_bits(bits(model), before) and booster.summary()["rank"] == {"min": 0, "max": 0}


@pytest.mark.parametrize(("rank", "rounds", "advice"), [
    (9, 4, "at most --rank 4 or at most --rounds 1$"), (17, 4, ": at most --rank 4$"),
    (1, 99, ": at most --rounds 16$"), (99, 99, "lower both$")])
def test_advice_on_rank_and_rounds_fits_every_target(rank, rounds, advice):
    with pytest.raises(InputError, match=advice):
        Booster(qwen(), BoostConfig(rank=rank, rounds=rounds))


def test_only_an_attached_adapter_is_merged_and_only_once():
    booster = Booster(qwen(), BoostConfig(rounds=2))
    for refused in (2, 1):
        with pytest.raises(RuntimeError, match="no adapter"):
            booster.merge()
        booster.attach()
        booster.merge()
        assert len(booster.vectors) == 3 - refused
    with pytest.raises(RuntimeError, match="all 2 rounds"):
        booster.attach()


@pytest.mark.parametrize("make", [qwen, esm])
def test_rank_grows_by_r_each_round_under_rotate_only(make):
    booster = trained(make(), rounds=4, groups=0)
    full = {basis: trained(make(), rounds=4, basis=basis) for basis in ("top", "top-decayed")}
    for name in booster.targets:
        values = torch.linalg.svdvals(booster.delta(name).double())
        assert int((values > 1e-6 * values[0]).sum()) == booster.rank()[name] == 2 * 4
        for other in full.values():
            values = torch.linalg.svdvals(other.delta(name).double())
            assert int((values > 1e-6 * values[0]).sum()) == other.rank()[name] == 2
    for rounds in range(5):
        booster.vectors = booster.vectors[:4 - rounds]
        assert set(booster.rank().values()) == {2 * (4 - rounds)}


def test_rotate_slices_are_orthogonal():
    booster = trained(qwen(), rounds=3)
    vectors = booster.vectors
    for name in booster.targets:
        parts = []
        for t in range(3):
            booster.vectors = [v if s == t else torch.zeros_like(v) for s, v in enumerate(vectors)]
            parts.append(booster.delta(name))
        assert max((parts[s].T @ parts[t]).abs().max() for s in range(3) for t in range(s)) < 1e-5
        assert max((parts[s] @ parts[t].T).abs().max() for s in range(3) for t in range(s)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_is_one_rounding_and_touches_targets_only(dtype):
    model = qwen(dtype, tie_word_embeddings=True)
    base = bits(model)
    booster = trained(model)
    targets = {f"{name}.weight" for name in booster.targets}
    for name, p in model.named_parameters():
        if name in targets:
            exact = base[name].float() + booster.delta(name.removesuffix(".weight"))
            assert torch.equal(p, exact.to(dtype)) and not torch.equal(p, base[name])
        else:
            assert torch.equal(p, base[name])
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_summary_is_about_the_deltas():
    model = qwen(torch.bfloat16)
    base = bits(model)
    booster = trained(model, rounds=2)
    deltas = [booster.delta(name) for name in booster.targets]
    summary = booster.summary()
    squares = sum(float(d.square().sum()) for d in deltas)
    assert summary["total_norm"] == pytest.approx(math.sqrt(squares), rel=1e-4)
    kept = sum(float(((m.weight.float() - base[f"{name}.weight"].float()) * booster.delta(name)).sum())
               for name, m in booster.targets.items())
    assert summary["fidelity"] == pytest.approx(kept / squares, rel=1e-4)
    booster.vectors[0].zero_()
    assert summary["norm"] == pytest.approx(booster.summary()["total_norm"], rel=1e-5)
    assert summary["rank"] == {"min": 4, "max": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rollback_save_load_give_the_same_bits(tmp_path, dtype):
    model = qwen(dtype)
    with torch.no_grad():
        next(iter(find_targets(model).values())).weight[0, 0] = -0.0  # a sum with +0.0 would lose the sign
    booster, history = Booster(model, BoostConfig(rounds=3, u=3, groups=4)), [bits(model)]
    base = {name: p.clone() for name, p in history[0].items()}
    for t in range(3):
        booster.attach().data.normal_(generator=generator("v", t))
        booster.merge()
        history.append(bits(model))
    booster.save(tmp_path / "adapters.safetensors")

    def fresh():
        other = qwen(dtype)
        other.load_state_dict(base)
        return other

    for rounds in range(4):
        other = fresh()
        Booster.load(other, tmp_path / "adapters.safetensors", rounds=rounds)
        assert same_bits(bits(other), history[rounds])
    other = fresh()
    loaded = Booster.load(other, tmp_path / "adapters.safetensors", weights=[1, 0.5, 0])
    for name, linear in loaded.targets.items():
        U, _, V = booster.basis[name]
        first, second = (U[:, s] @ booster.SR(name, t) @ V[:, s].T
                         for t, s in enumerate([slice(0, 2), slice(2, 4)]))
        expected = base[f"{name}.weight"].float() + first + 0.5 * second
        assert torch.allclose(linear.weight.float(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2)
    booster.rollback()
    assert same_bits(bits(model), history[2])
    booster.rollback(3)
    assert same_bits(bits(model), history[0]) and len(booster.vectors) == 3
    assert math.copysign(1, float(next(iter(booster.targets.values())).weight.detach()[0, 0])) == -1


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "adapters.safetensors"
    booster = trained(qwen())
    booster.save(path)
    assert path.stat().st_size < 20_000
    with pytest.raises(InputError, match="another base model"):
        Booster.load(qwen(seed=1), path)
    with pytest.raises(InputError, match="3 rounds, not 4"):
        Booster.load(qwen(), path, rounds=4)
    with pytest.raises(InputError, match="as many weights"):
        Booster.load(qwen(), path, weights=[1.0])
    for option in ({"rank": 1}, {"seed": 1}, {"basis": "top"}, {"groups": 2}):
        other = Booster(qwen(), dataclasses.replace(booster.config, **option))
        with pytest.raises(InputError, match=next(iter(option))):
            other.resume(path)
    mixed = Booster(qwen(), booster.config)
    mixed.fingerprint = mixed.fingerprint.roll(1, 1)  # as if near-equal singular vectors had changed places
    with pytest.raises(InputError, match="another singular basis"):
        mixed.resume(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(InputError, match="damaged"):
        Booster.load(qwen(), path)


def test_a_nearly_degenerate_basis_is_noticed(tmp_path):
    model = qwen()
    booster = trained(model)
    before = booster.fingerprint.clone()
    name = next(iter(booster.targets))
    U, S, V = booster.basis[name]
    turn = torch.tensor([[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]])
    basis = dict(booster.basis) | {name: (torch.cat([U[:, :2] @ turn, U[:, 2:]], 1), S, V)}
    after = boostlora.fingerprint(basis.values(), booster.k)
    assert (after - before).abs().max() > 0.1


@pytest.mark.parametrize("make", [qwen, esm])
def test_the_lora_export_is_the_exact_sum(tmp_path, make):
    model, plain = make(), make()
    booster = trained(model)
    booster.export_lora(tmp_path / "lora")
    tensors = boostlora.safetensors.torch.load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name in booster.targets:
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert torch.allclose(B @ A, booster.delta(name), atol=1e-6) and A.shape[0] == 2 * 3
    peft = pytest.importorskip("peft", reason="peft is not installed: its loader is not tried on the export")
    lora = peft.PeftModel.from_pretrained(plain, tmp_path / "lora")
    assert torch.allclose(logits(lora), logits(model), atol=1e-5)
    assert torch.allclose(logits(lora.merge_and_unload()), logits(model), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("cache_tokens", [0, 100])
def test_greedy_equals_transformers_token_for_token(talker, cache_tokens):
    model, tokenizer = talker
    model.generation_config.eos_token_id = [1, tokenizer.convert_tokens_to_ids("7")]  # several end tokens
    ours = generate(model, tokenizer, QUESTIONS, max_new_tokens=24, cache_tokens=cache_tokens)
    assert len({len(c.tokens) for c in ours}) > 1
    for question, completion in zip(QUESTIONS, ours, strict=True):
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert completion.tokens == theirs[0, ids.shape[1]:].tolist()
        assert completion.text == tokenizer.decode(completion.tokens, skip_special_tokens=True)


def test_a_long_completion_outgrows_the_cache_twice(talker):
    model, tokenizer = qwen(), talker[1]
    ours = generate(model, tokenizer, QUESTIONS[:3], max_new_tokens=300)
    for question, completion in zip(QUESTIONS, ours):
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=300, do_sample=False)
        assert completion.tokens == theirs[0, ids.shape[1]:].tolist()
    assert max(len(c.tokens) for c in ours) == 300


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_those_of_a_forward_pass(talker, temperature):
    model, tokenizer = talker
    done = []
    for seed in range(10):  # with some of them a row leaves in the step in which another one splits
        done += generate(model, tokenizer, QUESTIONS, 5, temperature, max_new_tokens=20, seed=seed)
    for i, c in enumerate(done):
        ids = tokenizer(QUESTIONS[i // 5 % 4])["input_ids"]
        with torch.no_grad():
            all_logprobs = (model(torch.tensor([ids + c.tokens])).logits[0] / temperature).log_softmax(-1)
        expected = all_logprobs[len(ids) - 1:-1].gather(1, torch.tensor(c.tokens)[:, None]).squeeze(1)
        assert (torch.tensor(c.logprobs) - expected).abs().max() < 1e-5


def test_a_draw_depends_on_seed_and_prompt_not_on_the_batch(talker):
    model, tokenizer = talker
    one = generate(model, tokenizer, QUESTIONS, 3, 1.0, max_new_tokens=20, seed=5)
    other = generate(model, tokenizer, QUESTIONS, 3, 1.0, max_new_tokens=20, seed=5, cache_tokens=1)
    assert [c.tokens for c in one] == [c.tokens for c in other]
    other = generate(model, tokenizer, QUESTIONS, 3, 1.0, max_new_tokens=20, seed=6)
    assert [c.tokens for c in one] != [c.tokens for c in other]
    assert len({tuple(c.tokens) for c in one[:3]}) > 1


def test_samples_follow_the_untruncated_distribution(talker):
    model, tokenizer = talker
    model.generation_config.top_k = 1
    first = [c.tokens[0] for c in generate(model, tokenizer, QUESTIONS[:1], 4000, 1.0, max_new_tokens=1)]
    ids = torch.tensor([tokenizer(QUESTIONS[0])["input_ids"]])
    with torch.no_grad():
        p = model(ids).logits[0, -1].softmax(-1)
    frequency = torch.bincount(torch.tensor(first), minlength=len(p)) / len(first)
    assert (frequency - p).abs().max() < 0.03 and (p > 0.01).sum() > 1


def test_generate_leaves_modes_and_random_state_alone(talker):
    model, tokenizer = talker
    model.train()
    model.model.layers[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    generate(model, tokenizer, QUESTIONS, 2, 1.0, max_new_tokens=4)
    assert modes == [m.training for m in model.modules()] and torch.equal(state, torch.get_rng_state())
    assert generate(model, tokenizer, []) == []


# ------------------------------------------------------------------------------------------------------------
# GRPO


def test_advantages_by_hand():
    a = group_advantages([1, 0, 0, 0, 1, 1, 1, 1, 0.5, 0.1, 0.2, 0.4], 4)
    assert torch.allclose(a[0], torch.tensor([3.0, -1, -1, -1]) / math.sqrt(3))
    assert not a[1].any()
    r = torch.tensor([0.5, 0.1, 0.2, 0.4])
    assert torch.allclose(a[2], (r - 0.3) / (r - 0.3).square().mean().sqrt())


def test_micro_batches_hold_their_budget():
    lengths = [5, 1, 9, 3, 3, 30, 2]
    batches = list(micro_batches(lengths, 12))
    assert sorted(i for b in batches for i in b) == list(range(7))
    assert all(len(b) * max(lengths[i] for i in b) <= 12 or len(b) == 1 for b in batches)


def parity(indices, texts):
    """A reward with some variance, and none for the first prompt."""
    return [0.0 if i == 0 else float(len(text) % 2) for i, text in zip(indices, texts, strict=True)]


def test_a_reward_must_be_finite_and_a_policy_the_same_in_training(talker):
    model, tokenizer = talker
    v = Booster(model, BoostConfig(rounds=1)).attach()
    config = GRPOConfig(steps=1, group_size=4, max_new_tokens=8)
    with pytest.raises(InputError, match="finite number"):
        grpo(model, tokenizer, QUESTIONS, lambda indices, texts: [math.nan] * len(texts), v, config)

    def hook(module, x, out):
        out.logits.mul_(-4)  # as models with soft-capping or scaling change their logits after the head

    model.register_forward_hook(hook)
    with pytest.raises(InputError, match="another policy"):
        grpo(model, tokenizer, QUESTIONS, parity, v, config)


@pytest.mark.parametrize(("recompute", "budget", "length"),
                         [(False, 10**6, 12), (True, 60, 12), (True, 60, 5)])
def test_the_gradient_is_the_hand_computed_one(talker, recompute, budget, length):
    model, tokenizer = talker
    booster = Booster(model, BoostConfig(rounds=1, u=2, groups=3))
    v = booster.attach()
    config = GRPOConfig(steps=1, prompts=4, group_size=6, max_new_tokens=length, recompute=recompute,
                        micro_batch_tokens=budget, max_grad_norm=1e9, temperature=0.8, lr=1e-9)
    seen, sizes = {}, []

    def note_size(module, inputs, options):
        if not options["use_cache"]:  # a training pass
            sizes.append(options["input_ids"].numel())

    model.base_model.register_forward_pre_hook(note_size, with_kwargs=True)

    def reward(indices, texts):
        seen.update(indices=indices, texts=texts, rewards=parity(indices, texts))
        return seen["rewards"]

    stats = grpo(model, tokenizer, QUESTIONS, reward, v, config, round=2, seed=7)
    ours = v.grad.clone()
    order = torch.randperm(4, generator=generator(7, "order", 2)).tolist()
    assert seen["indices"] == [i for i in order for _ in range(6)]
    completions = generate(model, tokenizer, [QUESTIONS[i] for i in order], 6, 0.8, length, (7, 2, 0))
    assert [c.text for c in completions] == seen["texts"]
    loss, tokens, flat, trained = 0.0, 0, 0, []
    for g in range(4):  # one completion at a time, with the logits of every position
        r = torch.tensor(seen["rewards"][6 * g:6 * g + 6])
        if r.min() == r.max():
            flat += 1
            continue
        for c, a in zip(completions[6 * g:6 * g + 6], (r - r.mean()) / r.std(correction=0), strict=True):
            ids = tokenizer(QUESTIONS[order[g]])["input_ids"]
            logprobs = (model(torch.tensor([ids + c.tokens])).logits[0] / 0.8).log_softmax(-1)
            loss = loss - a * logprobs[len(ids) - 1:-1].gather(1, torch.tensor(c.tokens)[:, None]).sum()
            tokens += len(c.tokens)
            trained.append((g, *c.tokens))
    assert (len(set(trained)) < len(trained)) == (length == 5)  # equal completions, which train as one row
    theirs, = torch.autograd.grad(loss / tokens, v)
    assert 1 <= flat == stats["flat_groups"] < 4
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max() and ours.abs().min() > 0
    assert stats["logprob_gap"] < 1e-5 and stats["completions"] == 24 and stats["steps"] == 1
    assert max(sizes) <= budget


def test_no_variance_teaches_nothing_and_says_so(talker):
    model, tokenizer = talker
    booster = Booster(model, BoostConfig(rounds=1))
    v = booster.attach()
    config = GRPOConfig(steps=2, prompts=2, group_size=2, max_new_tokens=4)
    stats = grpo(model, tokenizer, QUESTIONS, lambda indices, texts: [1.0] * len(texts), v, config)
    assert not v.any() and stats["steps"] == 0 and "nothing could be learned" in stats["note"]
    before = bits(model)
    booster.merge()
    assert same_bits(before, bits(model)) and len(booster.vectors) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [qwen, llama])
def test_a_grpo_round_moves_v_alone(talker, make, dtype):
    model, tokenizer = make(dtype), talker[1]
    booster = Booster(model, BoostConfig(rounds=1))
    before, v = bits(model), booster.attach()
    grpo(model, tokenizer, QUESTIONS, parity, v, GRPOConfig(steps=2, group_size=4, max_new_tokens=8))
    assert v.abs().min() > 0 and same_bits(before, bits(model))
    assert all(p.grad is None for p in model.parameters())


def test_the_logits_of_a_batch_never_exist(talker):
    model, _ = talker
    trees, heights = token_trees([5, 6, 7], [[8] * 20], 0) * 40, []
    model.get_output_embeddings().register_forward_hook(lambda m, x, out: heights.append(out.shape[0]))
    whole = completion_logprobs(model, trees)
    assert heights == [800]
    heights.clear()
    parts = completion_logprobs(model, trees, max_logits=64 * model.config.vocab_size)
    assert torch.allclose(parts, whole, atol=1e-6)
    assert max(heights) == 64 and sum(heights) == 800


COMPLETIONS = [[8, 9, 3], [8, 9, 3, 4, 4], [7], [8, 5, 3], [8, 9, 3], [7, 7, 7, 9]]


@pytest.mark.parametrize(("limit", "sizes"), [(0, [4, 6, 6, 7, 8]), (9, [7, 8, 8]), (100, [14])])
def test_a_tree_holds_each_beginning_once(limit, sizes):
    prompt = [5, 6, 2]
    trees = token_trees(prompt, COMPLETIONS, limit)
    assert sorted(i for t in trees for i in t.paths) == list(range(6))  # each completion once
    assert sorted(len(t.tokens) for t in trees) == sorted(sizes)
    for tree in trees:
        for i, path in tree.paths.items():
            positions = [len(prompt) + k for k in path]
            assert prompt + COMPLETIONS[i] == [tree.tokens[k] for k in (0, 1, 2, *positions)]
            assert [tree.above[k] for k in path] == [2, *positions[:-1]]
            for position in positions:  # it sees what stands before it in its own completion, and no more
                sees = [j for j in range(position + 1) if position <= tree.last[j]]
                assert sees == [0, 1, 2, *(k for k in positions if k <= position)]


@pytest.mark.parametrize(("make", "dtype"), [(qwen, torch.float32), (llama, torch.float32),
                                             (qwen, torch.bfloat16)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_tree_gives_each_completion_its_own_logprobs(make, dtype, attention):
    model = make(dtype)
    model.set_attn_implementation(attention)
    trees = token_trees([5, 6, 2], COMPLETIONS, 100) + token_trees([4], COMPLETIONS[:2], 100)
    found = completion_logprobs(model, trees, 0.7).split([len(t.above) for t in trees])
    for tree, logprobs, prompt in zip(trees, found, ([5, 6, 2], [4]), strict=True):
        for i, path in tree.paths.items():
            logits = model(torch.tensor([prompt + COMPLETIONS[i]])).logits[0, len(prompt) - 1:-1].float()
            alone = (logits / 0.7).log_softmax(-1)[range(len(path)), COMPLETIONS[i]]
            assert torch.allclose(logprobs[path], alone, atol=1e-5 if dtype == torch.float32 else 0.05)


def test_which_models_take_our_masks():
    model = qwen()
    assert takes_masks(model) and takes_masks(llama())
    model.config._attn_implementation = "flash_attention_2"
    assert not takes_masks(model)
    assert not takes_masks(qwen(use_sliding_window=True, sliding_window=8, max_window_layers=1))
    sizes = {"vocab_size": 31, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    assert not takes_masks(FalconForCausalLM(FalconConfig(**sizes, alibi=True)))
    assert not takes_masks(BloomForCausalLM(BloomConfig(**sizes)))
    local = GPTNeoConfig(vocab_size=31, hidden_size=32, num_layers=2, num_heads=4,
                         attention_types=[[["global", "local"], 1]])
    assert not takes_masks(GPTNeoForCausalLM(local))


def test_padding_stays_inside_the_context():
    sizes = {"vocab_size": 31, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=16)).eval()
    trees = token_trees([5], [[i, *[7] * 8] for i in range(9)], 2048) + token_trees([5], [[6]], 2048)
    assert completion_logprobs(model, trees).isfinite().all() and len(trees[0].tokens) == 82


def test_completions_share_a_row_until_they_part(talker):
    model, tokenizer = talker
    rows = []
    model.register_forward_pre_hook(lambda m, x, k: rows.append(len(k["input_ids"])), with_kwargs=True)
    done = generate(model, tokenizer, QUESTIONS[:2], 8, 1.0, max_new_tokens=6, seed=1)
    for step, count in enumerate(rows):  # a row for every text that goes on
        texts = {(i // 8, *c.tokens[:step]) for i, c in enumerate(done) if len(c.tokens) > step}
        assert count == len(texts)
    assert rows[0] == 2 and max(rows) > 2


def test_a_gradient_that_is_not_finite_stops_the_round(talker):
    model, tokenizer = talker
    v = Booster(model, BoostConfig(rounds=1)).attach()
    v.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(FloatingPointError, match="--lr"):
        grpo(model, tokenizer, QUESTIONS, parity, v, GRPOConfig(steps=1, group_size=4, max_new_tokens=8))
    assert not v.any()
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="float32"):
        generate(model, tokenizer, QUESTIONS, max_new_tokens=2)


# ------------------------------------------------------------------------------------------------------------
# Cross-entropy


def test_cross_entropy_lowers_the_loss_and_moves_v_alone():
    model = esm()
    booster = Booster(model, BoostConfig(rounds=1, u=4, groups=0))
    before, v = bits(model), booster.attach()
    batch = (inputs(model), torch.tensor([0, 1, 1]))
    stats = cross_entropy(model, lambda: iter([batch]), v, CEConfig(steps=12))
    assert stats["last_loss"] < stats["first_loss"] and v.any() and same_bits(before, bits(model))


# ------------------------------------------------------------------------------------------------------------
# The loop and the run folder


class Words:
    """A task without text: which of 12 inputs does a tiny ESM put into the asked class?"""

    def __init__(self, model, stop_at=None):
        self.model, self.stop_at, self.calls = model, stop_at, 0
        self.train = [(torch.randint(4, 31, (1, 6), generator=generator("x", i)), i % 2) for i in range(12)]
        self.tests = {"held": self.train[:4]}

    def happens(self, what):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt(what)

    def evaluate(self, examples):
        self.happens("evaluate")
        with torch.no_grad():
            return [int(self.model(x).logits.argmax()) == y for x, y in examples], {"size": len(examples)}

    def fit(self, examples, v, round):
        self.happens("fit")
        batch = ({"input_ids": torch.cat([x for x, _ in examples])}, torch.tensor([y for _, y in examples]))
        return cross_entropy(self.model, lambda: iter([batch]), v, CEConfig(steps=3, lr=0.05))


CONFIG = BoostConfig(rounds=4, u=4, groups=0, replay=1.0)


def run_words(out, learner=Booster, stop_at=None, config=CONFIG, **options):
    model = esm()
    return boost(learner(model, config), Words(model, stop_at), out, **options), model


def state(out):
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds")
    return lines, (out / "adapters.safetensors").read_bytes()


def test_the_record_is_complete_and_adds_up(tmp_path, capsys):
    records, model = run_words(tmp_path / "run", test_every=2)
    lines, _ = state(tmp_path / "run")
    assert len(records) == len(lines) == 5 and [r["round"] for r in lines] == [0, 1, 2, 3, 4]
    for before, after in itertools.pairwise(lines):
        assert after["failures"] == before["failures"] - after["fixed"] + after["regressed"]
        assert after["failures"] == len(after["failed"])
        assert after["train_accuracy"] == pytest.approx(1 - after["failures"] / 12)
        assert after["steps"] == 3 and after["norm"] > 0 and after["train_size"] == 12
    assert ["held_accuracy" in r for r in lines] == [True, False, True, False, True]
    assert [r["rank"]["max"] for r in lines] == [0, 2, 4, 6, 8] and records[1]["seconds"].keys() == {
        "evaluate", "generate", "train", "merge"}
    reloaded = EsmForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal(logits(reloaded), logits(model))
    printed = capsys.readouterr().out
    assert "to go" in printed and "round  4/4" in printed and "regressed" in printed


@pytest.mark.parametrize("learner", [Booster, FullFineTuning])
def test_broken_off_anywhere_it_continues_to_the_same_bits(tmp_path, learner):
    _, model = run_words(tmp_path / "whole", learner)
    expected = state(tmp_path / "whole")
    for stop_at in range(1, 12):
        out = tmp_path / f"stop{stop_at}"
        with contextlib.suppress(KeyboardInterrupt):
            run_words(out, learner, stop_at)
            pytest.fail("was not broken off")
        _, again = run_words(out, learner)
        assert state(out) == expected and same_bits(bits(model), bits(again))


def test_the_vectors_may_be_one_round_ahead_of_the_record(tmp_path):
    run_words(tmp_path)
    expected, lines = state(tmp_path), (tmp_path / "rounds.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rounds.jsonl").write_text("".join(lines[:3]))
    run_words(tmp_path)
    assert state(tmp_path) == expected


def test_more_rounds_continue_a_finished_run_and_fewer_are_refused(tmp_path):
    run_words(tmp_path / "short")
    run_words(tmp_path / "long", config=dataclasses.replace(CONFIG, rounds=6))
    run_words(tmp_path / "short", config=dataclasses.replace(CONFIG, rounds=6))
    paths = (tmp_path / name / "adapters.safetensors" for name in ("short", "long"))
    one, other = (boostlora.read_adapters(path)[1] for path in paths)
    assert len(one) == 6 and torch.allclose(one, other, atol=1e-4)
    with pytest.raises(InputError, match="6 rounds, more than --rounds 4.*rounds=4"):
        run_words(tmp_path / "short")
    with pytest.raises(InputError, match="at most --rounds 16"):
        run_words(tmp_path / "short", config=dataclasses.replace(CONFIG, rounds=17))


def test_damaged_state_is_named_and_nothing_is_overwritten(tmp_path):
    run_words(tmp_path)

    def refused(match, name=None, content=None, **options):
        old = (tmp_path / name).read_bytes() if name else None
        if name and content is None:
            (tmp_path / name).unlink()
        elif name:
            (tmp_path / name).write_bytes(content)
        before = {f: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
        with pytest.raises(InputError, match=match):
            run_words(tmp_path, **options)
        assert before == {f: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
        if name:
            (tmp_path / name).write_bytes(old)

    vectors = (tmp_path / "adapters.safetensors").read_bytes()
    lines = (tmp_path / "rounds.jsonl").read_bytes()
    refused("adapters.safetensors is damaged", "adapters.safetensors", vectors[:-7])
    refused("adapters.safetensors is missing", "adapters.safetensors")
    refused("line 5 is damaged", "rounds.jsonl", lines[:-30])
    refused("line 1 is damaged", "rounds.jsonl", lines.replace(b'"failures"', b'"failure"'))
    refused("rounds.jsonl is missing", "rounds.jsonl")
    refused("config.json is damaged", "config.json", b"{")
    refused("config.json is damaged", "config.json", b"5")
    refused("another run.*seed 0 there, 1 here", config=dataclasses.replace(CONFIG, seed=1))
    refused("another run.*rank 2 there, 1 here", config=dataclasses.replace(CONFIG, rank=1))
    refused("another run.*model 'a' there", settings={"model": "b"}, name="config.json",
            content=json.dumps({"model": "a"}).encode())
    refused("another run.*data", name="config.json", content=json.dumps({"data": "0"}).encode())
    refused("config.json is missing", "config.json")
    other = Booster(qwen(), CONFIG)
    with pytest.raises(InputError, match="another base model"):
        boost(other, Words(esm()), tmp_path)
    run_words(tmp_path / "full", FullFineTuning)
    for content, match in [(vectors, "is damaged|of round"), (b"", "damaged")]:
        (tmp_path / "full" / "adapters.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=match):
            run_words(tmp_path / "full", FullFineTuning)


def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch):
    run_words(tmp_path)
    before = state(tmp_path)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left.*make room"):
        run_words(tmp_path, config=dataclasses.replace(CONFIG, rounds=5))
    assert state(tmp_path) == before and not list(tmp_path.glob("*.tmp"))


def test_a_folder_in_use_is_refused(tmp_path):
    hold = f"with boostlora.locked({str(tmp_path)!r}): print(1, flush=True); time.sleep(60)"
    hold = f"import boostlora, time\n{hold}"
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, cwd=HERE)
    other.stdout.readline()
    with pytest.raises(InputError, match="in use by another process"):
        run_words(tmp_path)
    other.kill()
    other.wait()
    with boostlora.locked(tmp_path):  # a script holds the folder from its first check on
        run_words(tmp_path)


def test_the_loop_stops_when_nothing_fails(tmp_path):
    model = esm()
    task = Words(model)
    task.evaluate = lambda examples: ([True] * len(examples), {})
    assert len(boost(Booster(model, CONFIG), task, tmp_path)) == 1
    assert (tmp_path / "model" / "config.json").exists()


def test_failures_only_or_with_replayed_right_examples():
    train, failed = list("abcdefghij"), [1, 4, 7]
    chosen = {replay: boostlora.select(train, failed, BoostConfig(replay=replay), 0) for replay in (0, 1, -1)}
    assert chosen[0] == list("beh") and chosen[-1] == train
    assert len(chosen[1]) == 6 and set("beh") < set(chosen[1])
    assert chosen[1] != boostlora.select(train, failed, BoostConfig(replay=1), 1)


class BlockDiagonalLowRank(nn.Module):
    """BoRA (arXiv 2508.06953): B [out, r] and A [r, in] are cut into b blocks each, and block (i, j) of the
    update is B_i diag(Sigma_ij) A_j, so that its rank reaches b r for b b r more numbers than LoRA's."""

    def __init__(self, linear, r, b):
        super().__init__()
        self.B, self.A = (nn.Parameter(0.1 * torch.randn(b, n // b, r, generator=generator(i, n)))
                          for i, n in enumerate(linear.weight.shape))
        self.Sigma = nn.Parameter(torch.zeros(b, b, r))

    def delta(self):
        blocks = torch.einsum("ior,ijr,jnr->iojn", self.B, self.Sigma, self.A)
        return blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)


class BoRA:
    """A learner for `boost` that is not TinyLoRA: fresh BoRA adapters each round, merged as plain deltas."""

    def __init__(self, model, config):
        self.model, self.config, self.targets = model.requires_grad_(False), config, find_targets(model)
        self.sum = {name: torch.zeros_like(m.weight) for name, m in self.targets.items()}

    def attach(self):
        self.adapters = {name: BlockDiagonalLowRank(m, r=2, b=4) for name, m in self.targets.items()}
        self.hooks = [m.register_forward_hook(lambda _, x, out, a=a: out + x[0] @ a.delta().T)
                      for m, a in zip(self.targets.values(), self.adapters.values(), strict=True)]
        return [p for adapter in self.adapters.values() for p in adapter.parameters()]

    @torch.no_grad()
    def merge(self):
        for hook, (name, adapter) in zip(self.hooks, self.adapters.items(), strict=True):
            hook.remove()
            self.targets[name].weight += adapter.delta()
            self.sum[name] += adapter.delta()

    def save(self, path):
        boostlora.replace_file(path, boostlora.safetensors.torch.save(self.sum))

    def summary(self):
        ranks = [int(torch.linalg.matrix_rank(d.double(), rtol=1e-6)) for d in self.sum.values()]
        return {"norm": 0.0, "rank": {"min": min(ranks), "max": max(ranks)}, "fidelity": 1.0}


def test_the_loop_boosts_another_weak_learner(tmp_path):
    records, model = run_words(tmp_path, BoRA, config=BoostConfig(rounds=2, replay=1.0))
    assert [r["rank"] for r in records] == [{"min": 8 * t, "max": 8 * t} for t in range(3)]
    reloaded = EsmForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(reloaded), logits(model))


# ------------------------------------------------------------------------------------------------------------
# train_math: the command line


def run_math(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train_math.py", *map(str, flags)])
    train_math.main()


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def small_qwen(tmp_path_factory):
    """A Qwen2 of random weights whose tokenizer is trained on the spot, as from_pretrained finds a real
    one."""
    from transformers import Qwen2Tokenizer
    folder = tmp_path_factory.mktemp("small")
    words = [f"How many {thing} are {n}?" for thing in ("cows", "cups", "legs") for n in range(40)]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(words, 400)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %} assistant:")
    tokenizer.save_pretrained(folder)
    qwen(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    return folder


ROWS = [{"question": f"How many legs have {n} cows?", "answer": f"#### {4 * n}"} for n in range(9)]
QUICK = ("--rounds", 1, "--steps", 2, "--prompts", 3, "--group_size", 2, "--max_new_tokens", 6,
         "--dtype", "float32")


def test_the_real_path_on_a_small_model_that_cannot_learn(small_qwen, tmp_path, monkeypatch, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"question": "cow " * 900, "answer": "#### 1"}])
    run_math(monkeypatch, "--model", small_qwen, "--train_file", data, "--test_file", data,
             "--out", tmp_path / "run", "--test_limit", 4, "--export_lora", *QUICK)
    printed = capsys.readouterr().out
    assert "Nothing could be learned" in printed and "1 examples were skipped" in printed
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [line["failures"] for line in lines] == [9, 9] and lines[1]["flat_groups"] == 6
    assert lines[0].keys() >= {"rows_accuracy", "rows_lenient_accuracy", "train_lenient_accuracy"}
    base, merged = (AutoModelForCausalLM.from_pretrained(f) for f in (small_qwen, tmp_path / "run" / "model"))
    assert same_bits(bits(base), bits(merged))
    assert (tmp_path / "run" / "lora" / "adapter_config.json").exists()


@pytest.mark.parametrize(("rows", "named"), [
    (None, "no such file"), ([], "is empty"), (b"\xff\xfe", "JSONL in UTF-8"),
    (['{"question": '], "line 1: not a JSON object"),
    ([ROWS[0], {"question": "why?"}], "line 2: the field 'answer' is missing"),
    ([ROWS[0], {"answer": "#### 4"}], "row 2: no 'question'"),
    ([ROWS[0], {"question": "why?", "answer": "####  "}], "row 2: the answer '' cannot be graded"),
])
def test_bad_data_is_refused_by_file_and_row(tmp_path, monkeypatch, rows, named):
    path = tmp_path / "rows.jsonl"
    if isinstance(rows, bytes):
        path.write_bytes(rows)
    elif rows is not None:
        write_jsonl(path, rows)
    monkeypatch.setattr(train_math, "load_language_model", None)  # before anything slow
    with pytest.raises(InputError, match=f"rows.jsonl.*{named}"):
        run_math(monkeypatch, "--train_file", path, "--test_file", path, "--out", tmp_path / "run", *QUICK)


def test_bad_models_are_refused_with_a_way_out(small_qwen, toy, tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    rest = ("--train_file", data, "--test_file", data, "--out", tmp_path / "run", *QUICK)
    with pytest.raises(InputError, match="--model .*nowhere: there is no such folder.*--demo"):
        run_math(monkeypatch, "--model", tmp_path / "nowhere", *rest)
    silent = shutil.copytree(small_qwen, tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        run_math(monkeypatch, "--model", silent, *rest)
    shutil.copytree(small_qwen, tmp_path / "gpt2")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=400))
    gpt2.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="Conv1D"):
        run_math(monkeypatch, "--model", tmp_path / "gpt2", *rest)
    with pytest.raises(InputError, match="context is 512 tokens.*--max_new_tokens is 600"):
        run_math(monkeypatch, "--model", small_qwen, *rest, "--max_new_tokens", 600)
    with pytest.raises(InputError, match="--groups 999"):
        run_math(monkeypatch, "--model", small_qwen, *rest, "--groups", 999)


@pytest.mark.parametrize(("flags", "message"), [
    (["--rouns", "3"], "unknown flag --rouns: did you mean --rounds"),
    (["--demo", "--train_file", "x"], "its own"),
    (["--method", "full", "--dtype", "bfloat16"], "rounds small steps away")])
def test_flags_that_make_no_sense_are_refused(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        run_math(monkeypatch, *flags)
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("script", [train_math, train_code, train_protein])
def test_help_explains_every_flag(monkeypatch, capsys, script):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as exit:
        script.main()
    printed = capsys.readouterr().out
    assert exit.value.code == 0 and "--rank RANK" in printed and "singular triplets" in printed


@pytest.mark.parametrize("script", [train_math, train_code, train_protein])
def test_the_demo_is_checked_before_it_pre_trains(tmp_path, monkeypatch, script):
    monkeypatch.setattr(torch.optim, "AdamW", None)
    monkeypatch.setattr(sys, "argv", ["train.py", "--demo", "--rank", "99", "--out", str(tmp_path / "run")])
    with pytest.raises(InputError, match="--rank 99 x --rounds .* at most --rank (4|6|10)$"):
        script.main()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("error", "code", "message"), [
    (torch.OutOfMemoryError("CUDA"), 1, "lower --cache_tokens"), (KeyboardInterrupt(), 130, "same command"),
    (FloatingPointError("not finite"), 1, "before this one are kept"), (InputError("no"), 2, "error: no")])
def test_what_ends_a_run_is_told_in_a_sentence(capsys, error, code, message):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        boostlora.run(main)
    assert exit.value.code == code and message in capsys.readouterr().err


def test_a_large_model_without_a_gpu_is_warned_of(small_qwen, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(small_qwen, tmp_path / "3b")
    (folder / "model.safetensors").unlink()
    config = Qwen2Config(vocab_size=151936, hidden_size=2048, num_hidden_layers=36, num_attention_heads=16,
                         num_key_value_heads=2, intermediate_size=11008, tie_word_embeddings=True)
    config.save_pretrained(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(InputError, match="could not be loaded"):  # there are no weights
        run_math(monkeypatch, "--model", folder, "--train_file", data, "--test_file", data,
                 "--out", tmp_path / "run")
    assert "3.1 billion weights and no GPU: expect about 19 s for each" in capsys.readouterr().out


def test_a_tokenizer_needs_no_pad_token(talker):
    model, tokenizer = talker
    expected = [c.tokens for c in generate(model, tokenizer, QUESTIONS, max_new_tokens=8)]
    tokenizer.pad_token = None
    assert expected == [c.tokens for c in generate(model, tokenizer, QUESTIONS, max_new_tokens=8)]


def test_a_mistake_ends_in_one_sentence_and_code_2(tmp_path):
    done = subprocess.run([sys.executable, HERE / "train_math.py", "--rank", "0"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stderr.strip() == "error: --rank 0: must be at least 1"


# ------------------------------------------------------------------------------------------------------------
# train_math: the demo


def test_the_stories_of_the_demo_are_true_unless_noisy():
    def true(text):
        steps, _, answer = text.partition(" #### ")
        x = None
        for step in steps.split(";"):
            a, sign, b, result = re.fullmatch(r"(-?\d+)([-+*])(-?\d+)=(-?\d+)", step).groups()
            assert x is None or a == x
            assert int(result) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
            x = result
        return x == answer

    stories = random.Random(1)
    assert all(true(train_math.story(stories, ["loses"] if i % 2 else None)["answer"]) for i in range(400))
    row = train_math.story(stories)
    assert train_math.solved(row["answer"], row["answer"].split("####")[1].strip(), demo=True)


def demo(out, *flags, threads=1):
    command = [sys.executable, HERE / "train_math.py", "--demo", "--out", out, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)})


def test_the_demo_learns_and_killed_it_ends_with_the_same_bits(tmp_path):
    whole = demo(tmp_path / "whole")
    printed, _ = whole.communicate(timeout=900)
    assert whole.returncode == 0, printed
    lines, vectors = state(tmp_path / "whole")
    assert 0.6 < lines[0]["test_accuracy"] < 0.75 and lines[-1]["test_accuracy"] >= 0.9
    assert lines[-1]["failures"] <= lines[0]["failures"] / 4
    assert [line["rank"] for line in lines] == [{"min": 4 * t, "max": 4 * t} for t in range(11)]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole" / "model")
    rows = train_math.load_problems(str(tmp_path / "whole" / "base" / "test.jsonl"), "", "")
    task = train_math.MathTask(model, tokenizer, rows, {}, GRPOConfig(max_new_tokens=40), 0, demo=True)
    assert sum(task.evaluate(rows)[0]) / len(rows) == lines[-1]["test_accuracy"]

    shutil.copytree(tmp_path / "whole" / "base", tmp_path / "killed" / "base")
    pause = random.Random(0)
    for _ in range(3):  # most of these fall into a round: the imports take about 5 of the seconds
        process = demo(tmp_path / "killed", threads=2)  # the demo takes one all the same
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=pause.uniform(5, 15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = demo(tmp_path / "killed", threads=2)
    printed, _ = last.communicate(timeout=900)
    assert last.returncode == 0, printed
    assert state(tmp_path / "killed") == (lines, vectors)


def test_ctrl_c_says_how_to_continue(toy, tmp_path):
    shutil.copytree(toy, tmp_path / "run" / "base")
    process = demo(tmp_path / "run")
    while not (tmp_path / "run" / "rounds.jsonl").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in printed and "Traceback" not in printed


def test_a_run_in_which_nothing_fails_ends_well(small_qwen, tmp_path, monkeypatch, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr(train_math, "solved", lambda *_: True)
    run_math(monkeypatch, "--model", small_qwen, "--train_file", data, "--test_file", data, "--out",
             tmp_path / "run", *QUICK)
    assert "merged model" in capsys.readouterr().out


def test_memory_flags_may_change_when_a_run_goes_on(small_qwen, tmp_path, monkeypatch, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    files = ("--train_file", data, "--test_file", data, "--out", tmp_path / "run")
    flags = ("--model", small_qwen, *files, *QUICK)
    run_math(monkeypatch, *flags)
    run_math(monkeypatch, *flags, "--cache_tokens", 999, "--micro_batch_tokens", 99, "--export_lora")
    assert "LoRA of rank 2" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"lr 0.003 there, 0.1 here"):
        run_math(monkeypatch, *flags, "--lr", 0.1)


def test_two_processes_find_the_same_failures_and_hold_the_same_vectors(toy, tmp_path):
    flags = ("--rounds", "2", "--steps", "6", "--prompts", "1", "--limit", "60", "--test_limit", "8")
    shutil.copytree(toy, tmp_path / "one" / "base")
    shutil.copytree(toy, tmp_path / "two" / "base")
    one = demo(tmp_path / "one", *flags)
    assert one.wait(timeout=300) == 0, one.stdout.read()
    script = tmp_path / "script.py"  # train_math.py, with every process writing its vectors down
    script.write_text(f"""import os, sys; sys.path.insert(0, {str(HERE)!r})
import torch, boostlora, train_math
merge = boostlora.Booster.merge
def merge_and_tell(self):
    merge(self)
    torch.save(self.vectors, {str(tmp_path)!r} + "/vectors" + os.environ["RANK"])
boostlora.Booster.merge = merge_and_tell
boostlora.run(train_math.main)
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    command += ["--demo", "--out", tmp_path / "two", *flags]
    two = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert two.returncode == 0, two.stderr
    vectors = [torch.stack(torch.load(tmp_path / f"vectors{process}")) for process in range(2)]
    assert torch.equal(*vectors) and vectors[0].any()
    ours, theirs = state(tmp_path / "one")[0], state(tmp_path / "two")[0]
    assert [line["failed"] for line in ours] == [line["failed"] for line in theirs]
    norms = [lines[2]["total_norm"] for lines in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and norms[0] > 0


# ------------------------------------------------------------------------------------------------------------
# train_math: grading


GRADES = [
    # where the answer stands
    (r"so \boxed{18}", "18", True, True), ("so 18", "18", True, False),
    ("so 3 + 15 = 18.", "18", False, True), (r"\boxed{5} no, \boxed{6} of 7", "6", True, True),
    (r"\boxed{5} no, \boxed{6}", "5", False, False), (r"\boxed{\boxed{(1, 2)}}", "(1,2)", True, True),
    (r"\fbox{5}", "5", True, True), (r"\boxed 5.", "5", True, True), (r"\boxed{1", "1", True, False),
    (r"\boxed{7} then \boxed{1", "7", True, True), (r"\boxed{}", "5", False, False),
    (r"\boxed{\frac{1}{2}} = 0.5", r"\frac12", True, True), (r"\boxed{\{1, 2\}}", r"\{2,1\}", True, True),
    ("1 + 1\n#### 1,000", "1000", False, True), ("#### 2\nThe answer is 3", "3", False, True),
    ("**Final Answer: $42$**", "42", False, True), ("The answer is 42. There were 7.", "42", False, True),
    ("The answer is that he has 42 cows, as 40 + 2 = 7", "42", False, True),
    ("Answer:\n\\[ x^2 \\]", "x^2", False, True),
    (r"The answer is \(\frac{1}{2}\).", r"\frac{1}{2}", False, True), ("so it is x^2", "x^2", False, False),
    ("The answer is Evelyn.", r"\text{Evelyn}", False, True),
    (r"he pays \$1,234.50 now", "1234.5", False, True),
    # numbers, units, separators
    (r"\boxed{\$18.00}", "18", True, True), (r"\boxed{18 \text{ dollars}}", "18", True, True),
    (r"\boxed{20,000}", "20000", True, True), (r"\boxed{1{,}080}", "1080", True, True),
    (r"\boxed{1\,080 \text{ cm}^2}", "1,080", True, True), (r"\boxed{70\%}", "70", True, True),
    (r"\boxed{0.7}", r"70\%", True, True), (r"\boxed{0.7}", "70", True, False),
    (r"\boxed{5.4}", r"5.4 \text{ cents}", True, True), (r"\boxed{3:00 PM}", "3", True, True),
    (r"\boxed{2:30}", "2:45", True, False), (r"\boxed{90^\circ}", "90", True, True),
    (r"\boxed{18x}", "18", True, False), (r"\boxed{2 \text{ hours } 30}", "60", True, False),
    (r"\boxed{-5}", "5", True, False), (r"\boxed{1.5 \times 10^{3}}", "1500", True, True),
    (r"\boxed{0.333333}", r"\frac13", True, True), (r"\boxed{0.33}", r"\frac13", True, False),
    (r"\boxed{1 1/2}", r"1\frac{1}{2}", True, True),
    (r"\boxed{\frac{1}{999999}}", r"\frac{1}{1000000}", True, False),
    (r"\boxed{2516}", "2516_8", True, True), (r"\boxed{2516_7}", "2516_8", True, False),
    ("\\boxed{−2π√3}", r"-2\sqrt{3}\pi", True, True),
    # algebra and equations
    (r"\boxed{-q + p}", "p - q", True, True), (r"\boxed{q - p}", "p - q", True, False),
    (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", True, True), (r"\boxed{2x + 3}", "y = 2x + 3", True, True),
    (r"\boxed{y - 2x = 3}", "y = 2x + 3", True, True), (r"\boxed{y=2x-3}", "y=2x+3", True, False),
    (r"\boxed{x = 2 + 3 = 5}", "5", True, True), (r"\boxed{\frac{1}{\tan x}}", r"\cot x", True, True),
    (r"\boxed{\cos 60^\circ}", "1", True, False), (r"\boxed{\sqrt[3]{-8}}", "-2", True, True),
    (r"\boxed{(1+i)^2}", "2i", True, True), (r"\boxed{3r^2}", "3R^2", True, False),
    # lists, sets, points, intervals, matrices
    (r"\boxed{x=7 \text{ or } x=5}", "5,7", True, True), (r"\boxed{5}", "5,7", True, False),
    (r"\boxed{(2,1)}", "(1,2)", True, False), (r"\boxed{x=1, y=2}", "(1,2)", True, True),
    (r"\boxed{-2, 1-\sqrt5, 1+\sqrt5}", r"\{1\pm\sqrt{5},-2\}", True, True),
    (r"\boxed{[-2,7)}", r"x \in [-2,7]", True, False),
    (r"\boxed{-2 \le x \le 7}", r"x \in [-2,7]", True, True), (r"\boxed{(12,100)}", "(12, 100)", True, True),
    (r"\boxed{(3, \infty) \cup (-\infty,2)}", r"(-\infty, 2) \cup (3, \infty)", True, True),
    (r"\boxed{\frac13\begin{bmatrix}1\\2\end{bmatrix}}", r"\begin{pmatrix}1/3\\2/3\end{pmatrix}", True, True),
    (r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", True, False),
    # words and choices
    (r"\boxed{evelyn}", r"\text{Evelyn}", True, True), (r"\boxed{\text{seat}}", r"\text{east}", True, False),
    (r"\boxed{\text{(C)}}", "C", True, True), (r"\boxed{\textbf{(C)}\ 42}", r"\text{(C)}", True, True),
    (r"\boxed{\text{june 20}}", r"\text{June 20}", True, True),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "answer", "strict", "expected"), GRADES)
def test_grade(completion, answer, strict, expected):
    assert grade(completion, answer, strict) is expected


PIECES = ["\\", "\\boxed{", "{", "}", "9", "answer is ", "####", " ", "\0", ",", "(", "\\text{", "\ud800"]
BOMBS = ["9**9**9**9", "2^{10^{10}}", "9^{99999}" * 9, "9!!!!!", r"\frac{1}{0}", "1e999999999", "0^{-1}",
         "(" * 400]


@pytest.mark.parametrize("piece", PIECES)
def test_hostile_text_is_only_wrong(piece):
    short = piece * (train_math.LONGEST // len(piece))
    for text in (piece * 20_000, "\\boxed{" + piece * 20_000 + "}", "\\boxed{" + short + "}"):
        assert not grade(text, "42") and not grade(text, r"(3, \frac{\pi}{2})", strict=True)
    assert grade(piece.replace("{", "") * 20_000 + " \\boxed{42}", "42")


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_unequal_but_equal_to_themselves(bomb):
    assert not grade(rf"\boxed{{{bomb}}}", "42") and grade(rf"\boxed{{{bomb}}}", bomb)


@needs_data
@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test", "math500"])
def test_every_gold_solution_is_right_for_its_own_answer_only(name):
    rows = boostlora.read_jsonl(DATA / f"{name}.jsonl", ["answer"])
    problems, strict = train_math.load_problems(str(DATA / f"{name}.jsonl"), "", ""), name == "math500"
    solutions = [row.get("solution", row["answer"]) for row in rows]
    for i, solution in enumerate(solutions):
        answer, other = (problems[j % len(rows)]["answer"] for j in (i, i + 1))
        assert grade(solution, answer) and (not strict or grade(solution, answer, strict=True))
        equal = grade(f"\\boxed{{{other}}}", answer, strict=True)
        assert grade(solution, other, strict) == equal, (name, i)


@needs_data
def test_the_real_path_on_the_real_data(small_qwen, tmp_path, monkeypatch, capsys):
    run_math(monkeypatch, "--model", small_qwen, "--train_file", DATA / "gsm8k_train.jsonl", "--test_file",
             DATA / "gsm8k_test.jsonl", "--limit", 32, "--test_limit", 16, "--out", tmp_path / "run", *QUICK)
    assert "Nothing could be learned" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# train_code: the sandbox. Linux, as root or not.

RIGHT, WRONG = "\ndef f(x): return x + 1\n", "\ndef f(x): return 0\n"
TESTS = "assert f(1) == 2\nassert f(2) == 3"
PROJECT = os.path.dirname(os.path.abspath(train_code.__file__))
both_ways = pytest.mark.parametrize("namespaces", [True, False])
pytestmark = pytest.mark.filterwarnings("ignore:No namespaces", "ignore:invalid escape")

# Each stands before a right function, if it says no `f` itself: only the attack can be why it fails.
ATTACKS = {
    "loop": "while True: pass", "loop in C": "sum(iter(int, 1))", "fork bomb": "while True: os.fork()",
    "10 GB": "x = [0] * (10 << 27)", "10 GB slowly": "x = b'x'\nwhile True: x += x",
    "4 GB": "import mmap\nx = mmap.mmap(-1, 4 << 30)", "sleep": "time.sleep(99)",
    "threads": "import threading\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "print": "print('x' * 10**9)", "print slowly": "for _ in range(10**3): print('x' * 10**5)",
    "recursion": "def g(): g()\ng()", "loop in f": "def f(x):\n    while True: pass",
    "deep recursion": "sys.setrecursionlimit(10**9)\ndef g(): return [g()]\ng()",
    "sys.exit": "sys.exit(0)", "os._exit": "os._exit(0)", "SystemExit": "raise SystemExit", "quit": "quit()",
    "exit in f": "def f(x): os._exit(0)", "crash": "ctypes.string_at(0)",
    "exit in thread": "import _thread\n_thread.start_new_thread(os._exit, (0,))\ntime.sleep(9)",
    "kill parent": "os.kill(os.getppid(), 9)", "kill group": "os.killpg(0, 9)", "kill 1": "os.kill(1, 9)",
    "kill all": "os.kill(-1, 9)", "kill trainer": "os.kill({pid}, 9)",
    "write home": "open('{home}/evil', 'w')", "write project": "open('{project}/evil', 'w')",
    "write tmp": "open('{tmp}/evil', 'w')", "read secret": "open('{secret}').read()",
    "read project": "open('{project}/train_code.py').read()", "list project": "os.listdir('{project}')",
    "environment": "os.environ['SECRET']", "trainer's memory": "open('/proc/{pid}/mem', 'rb').read(1)",
    "trainer's environment": "assert 'SECRET' in open('/proc/{pid}/environ').read()",
    "loopback": "socket.create_connection(('127.0.0.1', {port}))",
    "outward": "socket.create_connection(('1.1.1.1', 53), 2)",
    "descriptors": "for n in range(5, 99):\n    try: os.fstat(n)\n    except OSError: continue\n    break\n"
        "else: raise OSError",
    "flood": "while True: os.write(3, b'x' * 10**6)", "close": "os.closerange(0, 100)",
    "disk": "for n in range(9999): open(str(n), 'w').write('x' * 10**6)",
    "daemon": "if os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(99)",
    "spawn": "os.posix_spawn('/usr/bin/true', ['true'], {})",
    "syntax": "def g(:", "null": "x = 1\x00", "surrogate": "x = '\ud800'", "5 MB": "#" + "x" * 5_000_000,
    "namespace": "assert ctypes.CDLL(None).unshare(0x10000000) == 0", "unfinished": "def g():\n    'doc",
}
EQUAL = """class Same{0}:
    __hash__ = None
    __eq__ = __contains__ = __lt__ = __gt__ = __le__ = __ge__ = lambda a, b: True
    __ne__ = lambda a, b: False
    __sub__ = __rsub__ = __abs__ = __getattr__ = lambda *a: a[0]
"""
CHEATS = {  # each stands after a wrong function: it wants a verdict that it has not earned
    "always equal": EQUAL.format("") + "def f(x): return Same()",
    "equal int": EQUAL.format("(int)") + "def f(x): return Same(7)",
    "equal str": EQUAL.format("(str)") + "def f(x): return Same()",
    "equal list": EQUAL.format("(list)") + "def f(x): return Same()",
    "equal class": EQUAL.format("(type)") + "class f(metaclass=Same): __new__ = lambda c, x: c",
    "builtins": "for n in 'AssertionError compile exec'.split(): setattr(builtins, n, lambda *a: 0)",
    "print": "print('1', 'pass', 'ok', flush=True)", "stderr": "sys.stderr.write('1\\npass\\n')",
    "assert": "class A(BaseException):\n    def __init__(s, *a): os._exit(0)\nbuiltins.AssertionError = A",
    "exit": "sys.exit = os._exit = exit = lambda *a: None", "trace": "sys.settrace(lambda *a: sys._exit(0))",
    "frames": "frame = sys._getframe()\nwhile frame:\n    for k, v in [*frame.f_locals.items()]:\n"
        "        if isinstance(v, int): frame.f_locals[k] = 1\n"
        "        if hasattr(v, 'write'): v.write(b'1pass')\n    frame = frame.f_back",
    "objects": "for x in gc.get_objects():\n    if isinstance(x, dict) and 'tests' in x: x['tests'] = 'pass'",
    "write": "for n in range(100):\n    try: os.write(n, b'1\\npass')\n    except OSError: pass",
    "answers": "for n in range(9): os.write(3, b'[\"return\", {\"other\": 0}, null]\\n')",
    "protocol": "os.write(3, b'[\"return\", {\"tuple\": [{\"dict\": [[\"f\", {\"type\": \"bool\"}], '"
        "b'[\"__builtins__\", 0]]}, {\"dict\": []}]}, null]\\n')\nos._exit(0)",
    "set by protocol": "os.write(3, b'[\"return\", {\"tuple\": [{\"dict\": [[\"f\", {\"type\": \"str\"}], '"
        "b'[\"set\", {\"type\": \"bool\"}]]}, {\"dict\": []}]}, null]\\n')\nos._exit(0)",
    "set": "set = sorted = len = abs = lambda *a: 0\ndef f(x): return [9]",
}
IMPORTS = "import builtins, ctypes, gc, os, socket, sys, time\n"
POOL = "from concurrent.futures import ThreadPoolExecutor as T\ndef f(x): return [*T(8).map(abs, x)]"
VALUES = [  # (code, or the body of f(x); tests; verdict): the tests see what they would see without a sandbox
    ("os._exit(0)", "try: f(1)\nexcept Exception: pass", False),
    ("return range(x)", "assert f(2) == [0, 1]", False), ("f = 2", "f += 1\nassert f == 3", True),
    ("return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}", True),
    ("return deque(x)", "assert f([1]) == [1]", False), ("return x", "assert f(1) is True", False),
    ("return map(str, x)", "assert list(f([1])) == ['1']", True), ("pass", "assert f(1) is None", True),
    ("return map(str, x)", "assert f([1]) == ['1']", False), ("return x", "assert f(1.0) == True", True),
    ("return count(x)", "g = f(7)\nassert (next(g), next(g)) == (7, 8)", True),
    ("return Decimal(x)", "assert f('0.5') == 0.5", True), ("import math", "assert math.pi > 3", True),
    ("class P(str): pass\ndef f(x): return P(x)", "assert f('a') == 'a'", True),
    ("f = lambda x: 2 ** x", "assert f(99999) >> 99999 == 1", True),
    ("class P:\n    def __init__(self, x): self.x = x\ndef f(p): return p.x",
     "p = P(3)\np.y = 4\nassert f(p) + p.y == 7", True),
    ("x.append(3)", "x = []\nf(x)\nassert x == [3]", True),
    ("return float('nan')", "assert f(1) != f(1)", True),
    ("def f(x, what, f): return x + what + f", "assert f(x=1, what=2, f=3) == 6", True),
    ("raise ValueError('no')", "try: f(1)\nexcept ValueError as e: assert str(e) == 'no'", True),
    ("return [x, (x, {x: {x}})]", "assert f(b'a') == [b'a', (b'a', {b'a': {b'a'}})]", True),
    ("def f(x): return x\nif __name__ == '__main__': input()", "assert f(1) == 1", True),
    ("return input()", "f(1)", False), ("open('left', 'x').close()", "f(1)", True),
    ("open('left', 'x').close()", "f(1)", True),
    ("def sum(a, b): return a + b", "assert sum(1, 2) == 3", True),
    ("print('€')\ndef f(x): return '\\ud800'", "assert f(1) == '\\ud800'", True),
    (POOL, "assert f([-1, 2]) == [1, 2]", True),
]
WITH = "import os\nfrom collections import *\nfrom decimal import Decimal\nfrom itertools import count\n"


def running():
    """pid -> (parent's pid, user) of all processes."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            fields = dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)
            if fields["State"][0] != "Z":
                found[int(fields["Pid"])] = int(fields["PPid"]), int(fields["Uid"].split()[0])
    return found


def processes(users=()):
    """This process, what it started, what that started, and what runs as one of the users."""
    everything, found = running(), {os.getpid()}
    for _ in everything:
        found |= {pid for pid, (parent, user) in everything.items() if parent in found or user in users}
    return found


@both_ways
def test_no_attack_passes_harms_or_outlives_its_time(namespaces, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "SECRET")
    (tmp_path / "secret").touch(mode=0o600)
    before = processes()
    with socket.create_server(("127.0.0.1", 0)) as server, Sandbox(2, 1, 3, namespaces=namespaces) as sandbox:
        codes = {name: IMPORTS + code + ("" if "def f" in code else RIGHT) for name, code in ATTACKS.items()}
        codes |= {f"cheat: {name}": IMPORTS + WRONG + code for name, code in CHEATS.items()}
        if not (namespaces or has_landlock()):
            codes = {key: x for key, x in codes.items() if key.split()[0] not in ("read", "write", "list")}
        for name, value in {"pid": os.getpid(), "port": server.getsockname()[1], "project": PROJECT,
                            "home": Path.home(), "tmp": tempfile.gettempdir(),
                            "secret": tmp_path / "secret"}.items():
            codes = {key: code.replace("{" + name + "}", str(value)) for key, code in codes.items()}
        tests = ["assert set(f(1)) == set([2])" if "set" in name else TESTS for name in codes]
        users = {helper.uid for helper in sandbox.helpers}
        helpers, start = processes(users), time.monotonic()
        verdicts = sandbox.run(zip(codes.values(), tests))
        assert [name for name, verdict in zip(codes, verdicts) if verdict] == []
        assert time.monotonic() - start < 3.5 * len(codes)
        assert processes(users) == helpers
        start = time.monotonic()
        assert sandbox.run([("import time\ntime.sleep(99)", "")]) == [False]
        assert time.monotonic() - start < 3 + 2
        pairs = [(RIGHT, TESTS), (WRONG, TESTS), (RIGHT, TESTS + "\nassert 0")]
        assert sandbox.run(pairs) == [True, False, False]
    assert processes(users) == before


@both_ways
def test_values_cross_the_processes_as_they_are(namespaces):
    pairs = [(WITH + (code if re.search(r"\bf\b|sum|math", code) else f"def f(x): {code}"), tests)
             for code, tests, _ in VALUES]
    with Sandbox(1, namespaces=namespaces) as sandbox:  # one box after the other
        verdicts = sandbox.run(pairs)
    threads = namespaces or os.getuid() == 0  # else the user is the trainer's, all of whose threads count
    expected = [right and (threads or code != POOL) for code, _, right in VALUES]
    assert [row for row, ok, wanted in zip(VALUES, verdicts, expected) if ok != wanted] == []


def test_the_sandbox_restarts_helpers_and_refuses_what_it_cannot_do(monkeypatch):
    with Sandbox(2, wall_seconds=5) as sandbox:
        for helper in sandbox.helpers:
            os.kill(helper.process.pid, signal.SIGKILL)
        assert sandbox.run([(RIGHT, TESTS)] * 5) == [True] * 5
    with pytest.raises(InputError, match="cannot start"), monkeypatch.context() as patch:
        patch.setattr(train_code, "HELPER", "raise SystemExit")
        Sandbox(2)
    refused = train_code.HELPER.replace('"unshare", user', '"unshare", 1 | user')
    monkeypatch.setattr(train_code, "HELPER", refused)
    with pytest.warns(UserWarning, match="No namespaces .*unshare") as caught:
        sandbox = Sandbox(2)
    with sandbox:
        assert len(caught) == 1 and sandbox.run([(RIGHT, TESTS), (WRONG, TESTS)]) == [True, False]
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InputError, match="Linux only"):
        Sandbox()


@both_ways
def test_nothing_outlives_a_killed_trainer(namespaces, tmp_path):
    before = processes()
    lines = f"Sandbox(2, namespaces={namespaces}).run([('import time\\ntime.sleep(99)', '')] * 2)"
    command = [sys.executable, "-W", "ignore", "-c", f"from train_code import Sandbox; {lines}"]
    trainer = subprocess.Popen(command, cwd=PROJECT, env=os.environ | {"TMPDIR": str(tmp_path)})
    end = time.monotonic() + 60
    while len(started := processes() - before) < 7 and time.monotonic() < end:
        time.sleep(0.1)
    trainer.kill()
    trainer.wait()
    assert len(started) >= 7  # it, helpers, judges, candidates
    end = time.monotonic() + 10
    while (left := started & set(running())) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left


@pytest.mark.parametrize(("completion", "code"), [
    ("No fence", "No fence"), ("", ""), ("```\nx = 1\n```", "x = 1\n"),
    ("```python\r\nx = 1\r\n", "x = 1\n"), ("```python\nx\n```\n```\nout\n```", "x\n"),
    ("a\n```python\nx = 1\n```\nb\n```py\ny = 2\n```\n", "y = 2\n"),
    ("```Python\nx = 1\n```\n```text\n1\n```", "x = 1\n"),
    ("1. So:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y\n")])
def test_extract_code(completion, code):
    assert extract_code(completion) == code


# ------------------------------------------------------------------------------------------------------------
# train_code: the task

MBPP = {"text": "Add one.", "code": RIGHT, "test_setup_code": "", "test_list": TESTS.split("\n")}
HUMANEVAL = {"task_id": "HumanEval/0", "entry_point": "f", "canonical_solution": "    return [g(x)]\n",
             "prompt": "from typing import List\n\ndef g(x): return x + 1\n\n"
                       'def f(x: int) -> List[int]:\n    """The next."""\n',
             "test": "def check(candidate):\n    assert candidate(1) == [g(1)]\n"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_mbpp_is_split_by_task_id_and_humaneval_is_only_a_test(tmp_path):
    mbpp = write(tmp_path / "mbpp.jsonl", [MBPP | {"task_id": i} for i in (1, 11, 510, 511, 600, 601, 974)])
    human = write(tmp_path / "HumanEval.jsonl", [HUMANEVAL])
    for test_file in (human, f"{mbpp},{human}"):
        train, tests = load_data(RunConfig(train_file=mbpp, test_file=test_file))
        assert [p["task_id"] for p in train] == [601, 974]
        ids = {name: [p["task_id"] for p in problems] for name, problems in tests.items()}
        assert ids == {"mbpp": [11, 510], "humaneval": ["HumanEval/0"]}
    for train_file in (human, write(tmp_path / "few.jsonl", [MBPP | {"task_id": 11}])):
        with pytest.raises(InputError, match="training task_ids, 601 to 974"):
            load_data(RunConfig(train_file=train_file, test_file=human))
    with pytest.raises(InputError, match="no such file"):
        load_data(RunConfig(train_file=mbpp, test_file=f"{human},nowhere"))


@pytest.mark.parametrize(("row", "message"), [
    (MBPP, "line 2: the field 'task_id'"), (MBPP | {"task_id": "601"}, "row 2: 'task_id' is not a number"),
    (MBPP | {"task_id": 1, "text": None}, "row 2: 'text' is not a str"),
    (MBPP | {"task_id": 1, "text": " "}, "row 2: 'text' is empty"),
    (MBPP | {"task_id": 1, "test_list": "assert 1"}, "row 2: 'test_list' is not a list"),
    (MBPP | {"task_id": 1, "test_list": []}, "row 2: 'test_list' holds no tests"),
    (MBPP | {"task_id": 1, "test_list": ["assert f(1) == "]}, "row 2: the tests are not Python"),
    (HUMANEVAL | {"test": 3}, "row 2: 'test' is not a str"),
    (HUMANEVAL | {"entry_point": "h"}, "row 2: 'prompt' does not define the entry_point 'h'")])
def test_a_bad_row_is_named(row, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_problems(write(tmp_path / "rows.jsonl", [MBPP | {"task_id": 1}, row]))


def test_evaluate_rewards_what_passes_in_every_way_to_answer(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [MBPP | {"task_id": 601}, HUMANEVAL])
    mbpp, human = load_problems(path)
    assert "Add one." in mbpp["ask"] and TESTS in mbpp["ask"] and HUMANEVAL["prompt"].strip() in human["ask"]
    whole = "def f(x: int) -> List[int]:\n    return [g(x)]"  # needs the prompt's import and helper
    answers = [  # (problem, completion, right?)
        (mbpp, f"Sure:\n```python{RIGHT}```", True), (mbpp, RIGHT, True),
        (mbpp, f"```python{WRONG}```", False), (mbpp, "I cannot.", False),
        (human, f"```python\n{whole}\n```", True),
        (human, HUMANEVAL["canonical_solution"], True), (human, "```python\nreturn [x + 1]\n```", True),
        (human, whole.replace("def f", "def h"), False), (human, "    pass\n", False),
        (human, "def g(x): return 2\n" + whole, True),  # right for 1, and the tests use their own g
        (human, "def g(x): return 0\n" + whole, False)]
    completions = [Completion(text, [1], [0.0]) for _, text, _ in answers]
    monkeypatch.setattr(train_code, "generate", lambda *_, **__: completions)
    monkeypatch.setattr(train_code, "fits_context", lambda _, __, prompts, ___: [True] * len(prompts))
    tokenizer = SimpleNamespace(apply_chat_template=lambda messages, **_: messages[0]["content"])
    with Sandbox(2) as sandbox:
        task = CodeTask(None, tokenizer, [mbpp], {"humaneval": [human]}, GRPOConfig(), 0, False, sandbox)
        right, metrics = task.evaluate([problem for problem, _, _ in answers])
    assert (right, metrics) == ([ok for _, _, ok in answers], {})


def test_the_demo_s_reference_functions_pass_and_noisy_ones_often_fail():
    numbers, taken = random.Random(0), set()
    rows = [row for long in (False, True) for row in train_code.problem_rows(numbers, range(40), long, taken)]
    assert len(taken) == 80 and {row["code"].count("\n") for row in rows} == {2, 3}
    programs = [(row["code"], "\n".join(row["test_list"])) for row in rows]
    with Sandbox(2) as sandbox:
        assert all(sandbox.run(programs))
        assert not any(sandbox.run([(code.replace("return x", "return 1 + x"), t) for code, t in programs]))
    tasks, clean, noisy = 300, *([train_code.exercise(random.Random(i), False, noisy) for i in range(300)]
                                 for noisy in (False, True))
    assert 0.3 * tasks < sum(a != b for a, b in zip(clean, noisy)) < 0.7 * tasks


@needs_data
def test_every_reference_solution_scores_1_and_renamed_or_silenced_0():
    rows, triples = [], []
    with open(f"{DATA}/mbpp.jsonl") as mbpp, gzip.open(f"{DATA}/HumanEval.jsonl.gz", "rt") as human:
        rows = [json.loads(line) for file in (mbpp, human) for line in file]
    problems = load_problems(f"{DATA}/mbpp.jsonl") + load_problems(f"{DATA}/HumanEval.jsonl.gz")
    references = []
    for row, problem in zip(rows, problems, strict=True):
        body = row.get("canonical_solution")
        whole = row["prompt"] + body if body else row["code"]
        references += [program(problem, f"Here:\n```python\n{whole}\n```")]
        references += [program(problem, body)] if body else []  # continued
        tree, used = ast.parse(whole), ast.parse(problem["tests"])
        used = {row["entry_point"]} if body else {n.id for n in ast.walk(used) if isinstance(n, ast.Name)}
        silent = ast.unparse(NoReturn().visit(ast.parse(whole)))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name in used:
                node.name += "_"
        triples += [program(problem, ast.unparse(tree)), program(problem, silent)]
    assert len(references) == 974 + 2 * 164 and len(triples) == 2 * (974 + 164)
    with Sandbox(2) as sandbox:
        assert sandbox.run(references) == [True] * len(references)
    with Sandbox(2, cpu_seconds=2, wall_seconds=10) as sandbox:
        assert not any(sandbox.run(triples))


class NoReturn(ast.NodeTransformer):
    def visit_Return(self, node):
        return ast.Pass()


# ------------------------------------------------------------------------------------------------------------
# train_protein

WORDS = ["<cls>", "<pad>", "<eos>", "<unk>", *LETTERS, ".", "-", "<null_1>", "<mask>"]


def protein_task(count=150, **options) -> ProteinTask:
    """Two blocks of a random ESM; a pair binds if its ligand begins with K, not D. Some labels are wrong."""
    torch.manual_seed(0)
    model = PairClassifier(EsmConfig(
        vocab_size=33, pad_token_id=1, mask_token_id=32, max_position_embeddings=80, hidden_size=32,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.1, num_labels=1,
        position_embedding_type="rotary", token_dropout=True))
    tokenizer = type("", (), {"get_vocab": lambda self: {word: i for i, word in enumerate(WORDS)}})()
    rows = []
    for i in range(count):
        a, b = ("".join(LETTERS[j] for j in torch.randint(0, 20, (8 + i % 5,)).tolist()) for _ in "ab")
        label = (i + (i % 5 > 0)) % 2
        rows.append({"ligand": "KD"[i % 2] * 2 + a, "receptor": b, "label": label, "pdb": f"P{i // 3}"})
    options = {"steps": 8, "batch_tokens": 800, "lr": 0.05, **options}
    return ProteinTask(model.eval(), tokenizer, rows, {"test": rows[:12]}, CEConfig(**options), seed=0)


def test_rows_are_counted_by_reason(tmp_path, capsys):
    rows = ['"mk, lx",ACD,1e-8,1ABC,no_mutation', "MK,ACD,1e-7,1abc,applied", "MK,ACD,1e-9,1ABC,not_applied",
            " ,ACD,1e-9,1ABC,", "MJ,ACD,1e-9,1ABC,", "MK,ACD,,1ABC,", "MK,ACD,0,1ABC,", "MK,ACD,>1e-5,1ABC,"]
    path = tmp_path / "pairs.csv"
    path.write_text("Ligand Sequences,Receptor Sequences,KD(M),PDB,mutation_status\n" + "\n".join(rows))
    assert load_pairs(path) == [{"ligand": "MKLX", "receptor": "ACD", "label": 1, "pdb": "1ABC"},
                                {"ligand": "MK", "receptor": "ACD", "label": 0, "pdb": "1ABC"}]
    shown = capsys.readouterr().out
    assert "2 usable rows, 1 of them bind" in shown
    for reason in ("the mutation is", "an empty seq", "letters", "KD(M) is missing", "KD(M) is not above 0",
                   "KD(M) is not a number"):
        assert f"1 left out: {reason}" in shown
    for row, reason in [("MK,AC,1,x", "label 1"), ("MK,AC,7,x", "no usable row"), ("", "no usable row"),
                        (None, "no column")]:
        path.write_text("a,b" if row is None else f"ligand_seq,receptor_seq,label,PDB\n{row}")
        with pytest.raises(InputError, match=reason):
            load_pairs(path)


def test_no_group_is_on_both_sides():
    torch.manual_seed(0)
    rows = [{"ligand": f"L{a}", "receptor": f"L{b}", "label": 0, "pdb": f"{p}"}
            for a, b, p in torch.randint(0, 3000, (300, 3)).tolist()]
    train, test = split(rows, seed=0)
    keys = [{value for row in side for value in (row["ligand"], row["receptor"], f"PDB {row['pdb']}")}
            for side in (train, test)]
    assert not keys[0] & keys[1] and len(train) + len(test) == 300 and 30 < len(test) <= 60
    assert split(rows, seed=0) == (train, test) != split(rows, seed=1)
    chain = [{"ligand": a, "receptor": b, "pdb": p} for a, b, p in
             [("A", "B", ""), ("C", "D", "1"), ("E", "C", "2"), ("F", "G", "2"), ("H", "I", "")]]
    assert connected(chain) == [[0], [1, 2, 3], [4]]


def test_pooling_sees_the_partners_only():
    task = protein_task()
    short, long = task.train[0], {**task.train[4], "ligand": "W" * 30, "receptor": "Y" * 90}
    ids, residues = task.tokens(long)
    assert len(ids) == 78 and sum(residues) == task.room == 51 and ids.count(WORDS.index("W")) == 25
    alone, together = task.collate([short])[0], task.collate([short, long])[0]  # with padding
    torch.testing.assert_close(task.model.features(**together)[:1], task.model.features(**alone))
    hidden = task.model.esm(alone["input_ids"], attention_mask=alone["attention_mask"]).last_hidden_state[0]
    n = len(short["ligand"])
    partners = torch.cat([hidden[1:n + 1], hidden[n + 1 + len(LINKER):-1]])
    torch.testing.assert_close(task.model.features(**alone)[0], partners.mean(0))


def test_f1_and_auc():
    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.4]), torch.tensor([0, 0, 1, 1, 1])
    assert auc(scores, labels) == pytest.approx(5 / 6)  # pairs: 1 1 1, 1/2 1 1/2
    assert auc(-scores, labels) == pytest.approx(1 / 6) and auc(torch.zeros(5), labels) == 0.5
    assert f1(scores > 0.3, labels) == pytest.approx(6 / 7) and f1(scores > 1, labels) == 0


@pytest.mark.parametrize("replay", [0, 2])
def test_no_round_makes_the_training_loss_worse(replay, tmp_path):
    task = protein_task(lr=0.1)  # too large for a whole step
    task.probe(tmp_path)
    head = task.model.classifier.weight.clone()
    booster = Booster(task.model, BoostConfig(rounds=4, groups=0, rank=4, u=4, replay=replay))
    records = boost(booster, task, tmp_path)
    losses = [record["train_loss"] for record in records]
    assert losses == sorted(losses, reverse=True) and len(losses) == 5
    assert losses[-1] < losses[0] or not replay
    assert any(record["scale"] < 1 for record in records[1:])
    assert {"test_accuracy", "test_f1", "test_auc"} <= records[-1].keys()
    assert torch.equal(task.model.classifier.weight, head) and len(find_targets(task.model)) == 2 * 6
    inputs, logits = task.collate(task.train[:5])[0], task.evaluate(task.train[:5])
    reloaded = PairClassifier.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(reloaded(**inputs).logits, task.model(**inputs).logits) and logits[1]["loss"] > 0
    stock = EsmForTokenClassification.from_pretrained(tmp_path / "model").eval()
    z = stock(inputs["input_ids"], inputs["attention_mask"]).logits[..., 0]
    z = (z * inputs["residues"]).sum(1) / inputs["residues"].sum(1)
    torch.testing.assert_close(z, reloaded(**inputs).logits[:, 1])


@pytest.mark.parametrize("recompute", [False, True])
def test_cross_entropy_trains_v_alone(recompute, tmp_path):
    task = protein_task(line_search=False, recompute=recompute, steps=40, lr=0.02, batch_tokens=4000)
    task.probe(tmp_path)
    before, loss = [p.clone() for p in task.model.parameters()], task.evaluate(task.train)[1]["loss"]
    booster = Booster(task.model, BoostConfig(rounds=1, groups=0, u=4))
    task.fit(task.train, v := booster.attach(), 0)
    assert v.abs().sum() > 0 and task.evaluate(task.train)[1]["loss"] < loss
    assert all(torch.equal(p, q) for p, q in zip(task.model.parameters(), before, strict=True))


@needs_data
def test_the_real_pairs(capsys):
    rows = load_pairs(DATA / "ppb_affinity_sequences.csv.gz")
    assert len(rows) == 11548 and sum(row["label"] for row in rows) == 7049
    assert "471 left out: the mutation is not in the sequence" in capsys.readouterr().out
    assert max(map(len, connected(rows))) == 1384
    assert len(split(rows, seed=0)[1]) / len(rows) == pytest.approx(0.2, abs=0.01)


# ------------------------------------------------------------------------------------------------------------
# The README


def readme_blocks():
    return re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


def test_the_example_of_the_readme_runs_as_it_stands(toy, tmp_path, monkeypatch):
    example = readme_blocks()[0]
    assert len(example.splitlines()) <= 30
    shutil.copytree(toy, tmp_path / "runs" / "math-demo" / "base")
    monkeypatch.chdir(tmp_path)
    exec(example, {"__name__": "example"})  # noqa: S102 - the README's own program
    assert len((tmp_path / "runs" / "mine" / "rounds.jsonl").read_text().splitlines()) == 3


def test_the_lines_of_the_readme_that_load_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    qwen().save_pretrained("runs/math-demo/base")
    model = qwen()
    trained(model, rounds=10, rank=1).save("runs/math-demo/adapters.safetensors")
    loaded = {}
    exec(readme_blocks()[1], loaded)  # noqa: S102
    assert same_bits(bits(loaded["model"]), bits(model)) and not same_bits(bits(loaded["early"]), bits(model))


def test_the_readme_names_functions_that_exist():
    table = (HERE / "README.md").read_text().split("## From the paper to the code")[1].split("\n\n")[1]
    for name in re.findall(r"`([A-Za-z_.]+)`", " ".join(row.split("|")[2] for row in table.splitlines())):
        owner, _, attribute = name.partition(".")
        assert hasattr(boostlora, owner)
        assert not attribute or hasattr(trained(qwen(), rounds=1), attribute)
