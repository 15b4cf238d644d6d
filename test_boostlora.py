"""The paper's claims and the README's promises as tests, in the order of the files they test.

    pytest                                 about 4 minutes on 2 cores; half of it is the demo, run and killed
    BOOSTLORA_DATA=folder pytest           also on the real data sets, from the files in that folder
"""

import ast
import contextlib
import dataclasses
import inspect
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
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, EsmForSequenceClassification

import boostlora
import train_code
import train_math
import train_protein
from boostlora import (BoostConfig, Booster, CEConfig, Completion, FullFineTuning, GRPOConfig,  # isort: skip
                       InputError, RunConfig, TextTask, TinyLoRA, batch_size, boost, claim, completion_states,
                       cross_entropy, find_targets, generate, generator, group_advantages, grpo,
                       policy_gradient, replace, split, svd_basis, takes_masks, to_json)
from train_code import Sandbox
from train_math import grade
from train_protein import LETTERS, LINKER, WORDS, PairClassifier, ProteinTask, auc, f1, load_pairs

HERE = Path(__file__).parent
DATA = Path(os.environ.get("BOOSTLORA_DATA", "missing"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="BOOSTLORA_DATA names no folder")
ours = "(boostlora|train_|test_|torch|transformers)"  # where warnings about our own calls come up
pytestmark = pytest.mark.filterwarnings(f"error::FutureWarning:{ours}", f"error::DeprecationWarning:{ours}",
                                        "ignore:No file system", "ignore:invalid escape")
torch.set_num_threads(1)  # for tiny matrices; --demo does so too
os.environ["CUDA_VISIBLE_DEVICES"] = ""
fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
SIZES = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "initializer_range": 0.2}
QUESTIONS = ["has 7, sells 4, triples?", "has 12, wins 3?", "has 5?", "has 9, gives 1, doubles, buys 8?"]

def qwen(dtype=fp32, seed=0, kind=hf.Qwen2ForCausalLM, **options):
    torch.manual_seed(seed)
    sizes = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": 1}
    return kind(kind.config_class(**sizes | options)).to(dtype).eval()

def sliding(dtype=fp32):
    return qwen(dtype, use_sliding_window=True, sliding_window=8, max_window_layers=1)

def llama(dtype=fp32):
    return qwen(dtype, kind=hf.LlamaForCausalLM)

def esm(dtype=fp32, **options):
    return qwen(dtype, kind=EsmForSequenceClassification, position_embedding_type="rotary", mask_token_id=30,
                pad_token_id=1, token_dropout=False, **options)

def refused(message, kind=InputError):
    return pytest.raises(kind, match=message)

def inputs():
    ids = torch.randint(4, 30, (3, 9), generator=generator("inputs"))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

@torch.no_grad()
def logits(model):
    return model(**inputs()).logits.float()

@torch.no_grad()
def draw(v, t, scale=1.0):
    """Random numbers into v, as if round t had learned them."""
    v.copy_(scale * torch.randn(v.shape, generator=generator("v", t)))

def trained(model, rounds=3, scale=1.0, **options):
    """A booster after `rounds` rounds of random vectors."""
    booster = Booster(model, BoostConfig(**{"rounds": rounds, "u": 3, "groups": 4, **options}))
    for t in range(rounds):
        draw(booster.attach(), t, scale)
        booster.merge()
    return booster

def parts(booster, name):
    """What each round adds to a target."""
    U, _, V = booster.basis[name]
    return [U @ booster.core(name, [t]) @ V.T for t in range(len(booster.vectors))]

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

# ------------------------------------------------------------------------------------------------------------
# Settings, basis, targets, layer

@pytest.mark.parametrize(("kind", "name", "value"), [
    (BoostConfig, "rank", 0), (BoostConfig, "rounds", -1), (BoostConfig, "u", 0), (BoostConfig, "groups", -1),
    (BoostConfig, "replay", -2), (BoostConfig, "recheck", -0.1), (BoostConfig, "accept", "worse"),
    (BoostConfig, "basis", "bottom"), (GRPOConfig, "temperature", 0.0), (GRPOConfig, "epochs", 0.0),
    (GRPOConfig, "group_size", 1), (GRPOConfig, "lr", math.inf), (GRPOConfig, "lr", math.nan),
    (CEConfig, "epochs", 0), (RunConfig, "limit", -1), (RunConfig, "dtype", "int8")])
def test_flags_out_of_range_are_refused_by_name(kind, name, value):
    with refused(f"--{name} {value}: must be (one of|at least)"):
        kind(**{name: value})

@pytest.mark.parametrize("shape", [(200, 96), (96, 200), (128, 128)])
@pytest.mark.parametrize("spectrum", ["decaying", "flat", "outliers", "orthogonal"])
def test_svd_basis_agrees_with_float64_svd(monkeypatch, shape, spectrum):
    side, k, stream, eigh = min(shape), 40, generator("svd", shape), torch.linalg.eigh
    left, right = (torch.linalg.qr(torch.randn(n, side, generator=stream).double()).Q for n in shape)
    flat = 1 + torch.rand(side, generator=stream).sort(descending=True).values
    S = {"decaying": 100 ** (-torch.arange(side) / 39.0), "flat": flat, "orthogonal": flat**1e-4,
         "outliers": flat * torch.tensor([30.0, 10.0] + [1.0] * (side - 2))}[spectrum]
    weight = (left * S.double() @ right.T).float()
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: eigh(gram) if len(gram) == side else None)
    U, S, V = svd_basis(weight, k)
    exact = torch.linalg.svd(weight.double(), full_matrices=False)
    assert U.dtype == S.dtype == V.dtype == fp32 and (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    assert ((S - exact.S[:k]).abs() / exact.S[:k]).max() < 1e-6
    gaps = (exact.S[:-1] - exact.S[1:])[:k] / exact.S[:k]
    apart = torch.minimum(gaps, torch.cat([torch.ones(1), gaps[:-1]])) > 1e-3
    for vectors, theirs in ((U, exact.U), (V, exact.Vh.T)):
        assert (vectors.T @ vectors - torch.eye(k)).abs().max() < 1e-5
        assert ((vectors * theirs[:, :k]).sum(0).abs() > 0.9999)[apart].all()
    assert torch.allclose((U * S @ V.T).double(), exact.U[:, :k] * exact.S[:k] @ exact.Vh[:k], atol=1e-5)
    for bad in (torch.ones(shape), weight / 0, weight[:k - 1]):
        with refused("the weight .* (not finite|no 40|fewer than 40)"):
            svd_basis(bad, k)

def test_targets_are_the_linears_of_the_language_model_s_blocks():
    names = list(find_targets(qwen()))
    assert len(names) == 2 * 7 and names[0] == "model.layers.0.self_attn.q_proj" and "lm_head" not in names
    assert len(find_targets(esm())) == 2 * 6 and "esm.encoder.layer.1.output.dense" in find_targets(esm())
    seeing = nn.Module()  # with a vision tower of more blocks
    seeing.tower, seeing.text = nn.ModuleList(nn.Linear(4, 4) for _ in range(9)), qwen()
    seeing.get_decoder = lambda: seeing.text.model
    assert list(find_targets(seeing)) == [f"text.{name}" for name in names]
    experts = [nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(5))}) for _ in range(2)]
    mixture = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(4, 4)]), "blocks": nn.ModuleList(experts)})
    assert list(find_targets(mixture)) == [f"blocks.{i}.experts.{j}" for i in range(2) for j in range(5)]
    with refused("transformer.h.*Conv1D"):
        find_targets(hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=31)))
    with refused("no nn.ModuleList"):
        find_targets(nn.Linear(4, 4))

def test_the_layer_is_the_equation():
    U, S, V = svd_basis(torch.randn(7, 5, generator=generator(1)), 2)
    P, x = torch.randn(3, 2, 2, generator=generator(2)), torch.randn(6, 5, generator=generator(4))
    v = nn.Parameter(torch.randn(4, 3, generator=generator(3)))
    layer = TinyLoRA(U, S, V, P, v, group=1)
    for _ in range(2):
        expected = U @ torch.diag(S) @ sum(v[1, i] * P[i] for i in range(3)) @ V.T
        assert torch.allclose(layer.delta(), expected, atol=1e-6)
        assert torch.allclose(layer(x), x @ expected.T, atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(layer(x), x @ expected.T, atol=1e-5)
            v.mul_(-2)  # the folded copy must follow

# ------------------------------------------------------------------------------------------------------------
# Booster

def test_what_does_not_fit_is_refused_before_the_basis(monkeypatch):
    monkeypatch.setattr(boostlora, "svd_basis", None)
    linear = find_targets(whole := qwen())["model.layers.1.mlp.up_proj"]
    linear.weight = nn.Parameter(torch.eye(32).char(), requires_grad=False)
    for model, config, message in [
            (qwen(), {"rank": 3, "rounds": 6}, "needs 18 singular .*layers.0.self_attn.k_proj .* has 16"),
            (qwen(), {"rank": 1, "groups": 999}, "--groups 999.*14 target"), (whole, {}, "int8.*unquantised"),
            (qwen(), {"basis": "top", "rank": 17}, "--rank 17")]:
        with refused(message):
            Booster(model, BoostConfig(**{"rounds": 1, **config}))

@pytest.mark.parametrize("make", [qwen, llama, esm])
@pytest.mark.parametrize(("dtype", "tolerance"), [(fp32, 1e-5), (bf16, 0.05)])
@pytest.mark.parametrize("basis", ["rotate", "top", "top-decayed"])
def test_attached_equals_merged(make, dtype, tolerance, basis):
    booster = Booster(model := make(dtype), BoostConfig(rounds=2, u=2, groups=3, basis=basis))
    before = logits(model)
    for t in range(2):
        v = booster.attach()
        assert v.dtype == fp32 and v.shape == (3, 2) and not v.any()
        draw(v, t, 0.1)
        attached = logits(model)
        booster.merge()
        assert (attached - logits(model)).abs().max() < tolerance * before.abs().max()
    assert dtype == bf16 or (logits(model) - before).abs().max() > 10 * tolerance * before.abs().max()

def test_modules_share_vectors_in_contiguous_blocks_in_depth_order():
    few, many = (Booster(qwen(), BoostConfig(rounds=1, u=50, groups=groups)) for groups in (4, 0))
    assert [*few.group_of.values()] == sorted([0, 1, 2, 3] * 3 + [0, 2])
    assert [*many.group_of.values()] == [*range(14)]
    Ps = [many.P(name, t) for name in many.targets for t in range(2)]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(Ps, 2))
    assert torch.cat(Ps).std() == pytest.approx(100**-0.5, rel=0.05)

def test_only_an_attached_adapter_is_merged_and_only_once():
    booster = Booster(qwen(), BoostConfig(rounds=2))
    for done in range(2):
        with refused("no adapter", RuntimeError):
            booster.merge()
        draw(booster.attach(), 99)  # dropped, as another is attached
        assert not booster.attach().any() and torch.equal(logits(booster.model), logits(qwen()))
        booster.merge()
        assert len(booster.vectors) == done + 1 and same_bits(bits(booster.model), bits(qwen()))
    with refused("all 2 rounds", RuntimeError):
        booster.attach()
    none = Booster(qwen(), BoostConfig(rounds=0))  # --rounds 0: the model as it is, evaluated
    none.write()
    assert same_bits(bits(none.model), bits(qwen())) and none.summary()["rank"] == {"min": 0, "max": 0}

@pytest.mark.parametrize("make", [qwen, esm])
@pytest.mark.parametrize("basis", ["rotate", "top", "top-decayed"])
def test_rank_grows_by_r_each_round_under_rotate_only(make, basis):
    booster = trained(make(), rounds=4, groups=0, basis=basis)
    for rounds in range(4, -1, -1):
        booster.vectors = booster.vectors[:rounds]
        for name, rank in booster.rank().items():
            values = torch.linalg.svdvals(booster.delta(name).double())
            assert rank == 2 * (rounds if basis == "rotate" else rounds > 0)
            assert int((values > 1e-6 * values[0]).sum()) == rank

def test_rotate_slices_are_orthogonal_and_top_decayed_only_moves_them():
    rotate, decayed = trained(qwen()), trained(qwen(), basis="top-decayed")
    for name in rotate.targets:
        rotated, moved, top = parts(rotate, name), parts(decayed, name), rotate.basis[name][0][:, :2]
        for one, other in itertools.combinations(rotated, 2):
            assert max((one.T @ other).abs().max(), (one @ other.T).abs().max()) < 1e-5
        for one, other in zip(rotated, moved, strict=True):
            assert torch.allclose(*(torch.linalg.svdvals(x)[:2] for x in (one, other)), atol=1e-5)
            assert torch.allclose(top @ (top.T @ other), other, atol=1e-5)

@pytest.mark.parametrize("dtype", [fp32, bf16, fp16])
def test_merging_is_one_rounding_of_targets_and_the_summary_tells_what_was_lost(dtype):
    base = bits(model := qwen(dtype, tie_word_embeddings=True))
    booster, kept, squares = trained(model, rounds=2, scale=0.01), 0.0, 0.0
    for name, p in model.named_parameters():
        delta = booster.delta(target) if (target := name.removesuffix(".weight")) in booster.targets else None
        assert torch.equal(p, base[name] if delta is None else (base[name].float() + delta).to(dtype))
        if delta is not None:
            kept += ((p.float() - base[name].float()) * delta).sum()
            squares += delta.square().sum()
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    summary = booster.summary()
    assert summary["total_norm"] == pytest.approx(float(squares) ** 0.5, rel=1e-4)
    assert summary["fidelity"] == pytest.approx(float(kept / squares), rel=1e-4)
    assert (summary["fidelity"] < 0.99) == (dtype == bf16)
    booster.vectors[0].zero_()
    assert summary["norm"] == pytest.approx(booster.summary()["total_norm"], rel=1e-5)

@pytest.mark.parametrize("dtype", [fp32, bf16])
def test_rollback_save_load_give_the_same_bits(tmp_path, dtype):
    def fresh():
        next(iter(find_targets(model := qwen(dtype)).values())).weight.data[0, 0] = -0.0  # not 0.0 after + 0
        return model

    path, history = tmp_path / "adapters.safetensors", [bits(fresh())]
    booster = Booster(model := fresh(), BoostConfig(rounds=3, u=3, groups=4))
    for t in range(3):
        draw(booster.attach(), t)
        booster.merge()
        history.append(bits(model))
    booster.save(path)
    for rounds, weights in enumerate(history):
        assert same_bits(bits(Booster.load(fresh(), path, rounds=rounds).model), weights)
    loaded = Booster.load(fresh(), path, weights=[1, 0.5, 0])
    for name, linear in loaded.targets.items():
        first, second, _ = parts(booster, name)
        expected = history[0][f"{name}.weight"].float() + first + 0.5 * second
        assert torch.allclose(linear.weight.float(), expected, atol=1e-5 if dtype == fp32 else 2e-2)
    for back, left in ((1, 2), (3, 0)):
        booster.rollback(back)
        assert same_bits(bits(model), history[left]) and len(booster.vectors) == 3
    assert next(iter(booster.targets.values())).weight[0, 0].signbit()
    with refused("there are 3 rounds"):
        booster.rollback(4)

def test_a_file_that_does_not_fit_is_refused(tmp_path):
    path, booster = tmp_path / "adapters.safetensors", trained(qwen())
    booster.save(path)
    assert (whole := path.read_bytes()) and len(whole) < 20_000
    for model, options, message in [
            (qwen(seed=1), {}, "another base model"), (qwen(bf16), {}, "another --dtype"),
            (qwen(), {"rounds": 4}, "3 rounds, not 4"), (qwen(), {"weights": [1.0]}, "as many weights")]:
        with refused(message):
            Booster.load(model, path, **options)
    for option in ({"rank": 1}, {"seed": 1}, {"basis": "top"}, {"groups": 2}, {"u": 2}, {"rounds": 2}):
        with refused(next(iter(option))):
            Booster(qwen(), dataclasses.replace(booster.config, **option)).resume(path)
    booster.vectors[1][0, 0] = math.nan
    booster.save(path)
    for content, message in [(path.read_bytes(), "not finite"), (whole[:-10], "damaged"), (b"", "damaged"),
                             (whole.replace(b"boostlora", b"postflora"), "not a BoostLoRA file")]:
        path.write_bytes(content)
        with refused(message):
            Booster.load(qwen(), path)

@pytest.mark.parametrize(("angle", "fits"), [(0.5, False), (math.pi, False), (1e-4, True)])
def test_another_machine_s_basis_is_noticed(tmp_path, monkeypatch, angle, fits):
    trained(qwen()).save(tmp_path / "adapters.safetensors")
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    calls = itertools.count()

    def theirs(*given):  # of the first target, two near-equal triplets are mixed, or of the other sign
        U, S, V = svd_basis(*given)
        for vectors in (U, V) if next(calls) == 0 else ():
            vectors[:, :2] = vectors[:, :2] @ turn
        return U, S, V

    monkeypatch.setattr(boostlora, "svd_basis", theirs)
    with contextlib.nullcontext() if fits else refused("another singular basis"):
        Booster.load(qwen(), tmp_path / "adapters.safetensors")

@pytest.mark.parametrize("make", [qwen, esm])
def test_the_lora_export_is_the_exact_sum(tmp_path, make):
    booster = trained(model := make())
    booster.export_lora(tmp_path / "lora")
    tensors = boostlora.safetensors.torch.load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name in booster.targets:
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert torch.allclose(B @ A, booster.delta(name), atol=1e-6) and A.shape[0] == 2 * 3
    peft = pytest.importorskip("peft", reason="peft is not installed: its loader is not tried on the export")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        lora = peft.PeftModel.from_pretrained(make(), tmp_path / "lora")
        assert torch.allclose(logits(lora), logits(model), atol=1e-5)
        assert torch.allclose(logits(lora.merge_and_unload()), logits(model), atol=1e-5)

# ------------------------------------------------------------------------------------------------------------
# Generation

@pytest.mark.parametrize(("make", "length", "size"), [
    (None, 24, 9), (None, 24, 2), (None, 24, 1), (qwen, 90, 9), (llama, 90, 9), (sliding, 90, 9)])
def test_greedy_equals_transformers_token_for_token(monkeypatch, talker, make, length, size):
    monkeypatch.setattr(boostlora, "batch_size", lambda *_: size)
    model, tokenizer = make() if make else talker[0], talker[1]
    model.generation_config.eos_token_id = [1] if make else [1, tokenizer.convert_tokens_to_ids("7")]
    questions, expected = [*QUESTIONS, "has 1, " + "buys 2, " * 20], []
    for text in (tokenizer(question, return_tensors="pt") for question in questions):
        done = model.generate(**text, max_new_tokens=length, do_sample=False)
        expected += done[:, text["input_ids"].shape[1]:].tolist()
    tokenizer.pad_token = None  # none is needed
    ours = generate(model, tokenizer, questions, max_new_tokens=length)
    assert [c.tokens for c in ours] == expected and len({len(c.tokens) for c in ours}) > 1
    assert [c.text for c in ours] == [tokenizer.decode(c.tokens, skip_special_tokens=True) for c in ours]

def test_a_batch_fits_in_memory_and_is_hardly_padded():
    model = qwen()
    assert batch_size(model, [60] * 10**6, 1, 40) == 2**31 // (100 * 2 * 2 * 2 * 8 * 4 + 16 * 31)  # in fp32
    model.config.vocab_size = 2**31 // 16 // 7  # so that 6 rows fit
    assert [batch_size(model, [20] * 9, n, 5) for n in (1, 2, 3, 7)] == [6, 3, 2, 1]
    lengths = [3752, 900, 480, *sorted((60 + 370 * i // 97 for i in range(97)), reverse=True)] * 5
    real, padded, left = sum(lengths), 0, sorted(lengths, reverse=True)
    while left:
        size = batch_size(qwen(), left, 1, 160)
        padded, left = padded + size * left[0], left[size:]
    assert padded < 1.3 * real
    assert batch_size(qwen(), [3752, 300], 8, 160) == 1 and batch_size(qwen(), [430] + [150] * 7, 8, 160) == 8

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_those_of_a_forward_pass(talker, temperature):
    model, tokenizer = talker
    for i, c in enumerate(generate(model, tokenizer, QUESTIONS, 30, temperature, max_new_tokens=20)):
        ids = tokenizer(QUESTIONS[i // 30])["input_ids"]
        with torch.no_grad():
            all_logprobs = (model(torch.tensor([ids + c.tokens])).logits[0] / temperature).log_softmax(-1)
        expected = all_logprobs[len(ids) - 1:-1].gather(1, torch.tensor(c.tokens)[:, None]).squeeze(1)
        assert (torch.tensor(c.logprobs) - expected).abs().max() < 1e-5
        assert c.tokens.index(1) == len(c.tokens) - 1 if 1 in c.tokens else len(c.tokens) == 20

def test_a_draw_depends_on_seed_and_prompt_not_on_the_batch_or_the_random_state(monkeypatch, talker):
    state = torch.get_rng_state()
    one, third = ([c.tokens for c in generate(*talker, QUESTIONS, 3, 1.0, 20, seed)] for seed in (5, 6))
    monkeypatch.setattr(boostlora, "batch_size", lambda *_: 1)
    other = [c.tokens for c in generate(*talker, QUESTIONS, 3, 1.0, 20, 5)]
    assert one == other != third and len(set(map(tuple, one[:3]))) > 1
    assert torch.equal(state, torch.get_rng_state()) and generate(*talker, []) == []
    dropping, model = qwen(attention_dropout=0.9).train(), qwen()
    one, other = (generate(m, talker[1], QUESTIONS, 2, 1.0, max_new_tokens=9) for m in (dropping, model))
    assert one == other
    with refused("no token"):
        generate(*talker, ["has 1?", ""])

def test_samples_follow_the_untruncated_distribution(talker):
    model, tokenizer = talker
    model.generation_config.top_k = 1
    first = [c.tokens[0] for c in generate(model, tokenizer, QUESTIONS[:1], 4000, 1.0, max_new_tokens=1)]
    with torch.no_grad():
        p = model(**tokenizer(QUESTIONS[0], return_tensors="pt")).logits[0, -1].softmax(-1)
    frequency = torch.bincount(torch.tensor(first), minlength=len(p)) / len(first)
    assert (frequency - p).abs().max() < 0.03 and (p > 0.01).sum() > 1

def test_prompts_are_encoded_once_and_finished_rows_leave(talker):
    model, tokenizer = talker
    shapes, lengths = [], [len(ids) for ids in tokenizer(QUESTIONS)["input_ids"]]
    hook = lambda m, x, options: shapes.append(options["input_ids"].shape) or None  # noqa: E731
    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    done = generate(model, tokenizer, QUESTIONS, 8, 1.0, max_new_tokens=20)
    going = [sum(len(c.tokens) > step for c in done) for step in range(len(shapes) - 1)]
    rows = [count for count, width in shapes[1:] if width == 1]
    assert shapes[0] == (4, max(lengths) - 1) and rows[0] == 4 * 8 and rows[-1] < 4 * 8 and rows != going
    assert all(n <= count < 8 / 7 * n + 1 for n, count in zip(going, rows, strict=True))  # an eighth at once

@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # from transformers 5.24 on, and before
def test_the_cache_is_passed_under_its_name_and_used(talker, name):
    model, tokenizer = talker
    expected = [c.tokens for c in generate(model, tokenizer, QUESTIONS, max_new_tokens=9)]
    outer, inner = model.forward, model.base_model.forward
    own, = {"cache", "past_key_values"} & inspect.signature(inner).parameters.keys()
    if name == "cache":
        model.forward = lambda cache, **more: outer(**{own: cache}, **more)
        model.base_model.forward = lambda cache=None, **more: inner(**{own: cache, **more})
    else:
        model.forward = lambda past_key_values, **more: outer(**{own: past_key_values}, **more)
        model.base_model.forward = lambda past_key_values=None, **m: inner(**{own: past_key_values, **m})
    assert [c.tokens for c in generate(model, tokenizer, QUESTIONS, max_new_tokens=9)] == expected
    if name == "cache":
        model.base_model.forward = lambda cache=None, **more: inner(**more)
    else:
        model.base_model.forward = lambda past_key_values=None, **more: inner(**{**more, own: None})
    with refused("does not use its cache"):
        generate(model, tokenizer, QUESTIONS, max_new_tokens=9)

# ------------------------------------------------------------------------------------------------------------
# GRPO and cross-entropy

def test_advantages_by_hand():
    r = [0.5, 0.1, 0.2, 0.4]
    a = group_advantages([1, 0, 0, 0, *r, 1, 1, 1, 1, 0.1 + 0.2, 0.3, 0.3, 0.3 + 1e-6], 4)
    assert torch.allclose(a[0], torch.tensor([3.0, -1, -1, -1]) / math.sqrt(3))
    assert torch.allclose(a[1], (torch.tensor(r) - 0.3) / np.std(r)) and not a[2:].any()  # nor float noise

def parity(indices, texts):
    """A reward with some variance, and none for the first prompt."""
    return [0.0 if i == 0 else float(len(text) % 2) for i, text in zip(indices, texts, strict=True)]

@pytest.mark.parametrize(("make", "budget"), [(None, 10**6), (None, 60), (None, 1), (sliding, 10**6)])
def test_the_gradient_is_the_hand_computed_one(talker, make, budget):
    model, tokenizer = make() if make else talker[0], talker[1]
    v = Booster(model, BoostConfig(rounds=1, u=2, groups=3)).attach()
    config = GRPOConfig(prompts=4, group_size=6, max_new_tokens=12, micro_batch_tokens=budget,
                        max_grad_norm=1e9, temperature=0.8, lr=1e-9)
    seen, sizes, trained, loss = [], [], [], 0.0
    hook = model.base_model.register_forward_pre_hook(
        lambda m, x, k: None if k["use_cache"] else sizes.append(k["input_ids"].numel()), with_kwargs=True)
    stats = grpo(model, tokenizer, QUESTIONS, lambda *x: seen.append(x) or parity(*x), v, config, 2, seed=7)
    hook.remove()
    ours, order = v.grad.clone(), torch.randperm(4, generator=generator(7, "order", 2)).tolist()
    done = generate(model, tokenizer, [QUESTIONS[i] for i in order], 6, 0.8, 12, (7, 2, 0))
    assert seen == [([i for i in order for _ in range(6)], [c.text for c in done])]
    rewards = torch.tensor(parity(*seen[0])).view(4, 6)
    for g, r in enumerate(rewards):  # one completion at a time, with the logits of every position
        for c, a in zip(done[6 * g:6 * g + 6], (r - r.mean()) / r.std(correction=0), strict=True):
            ids = tokenizer(QUESTIONS[order[g]])["input_ids"]
            logprobs = (model(torch.tensor([ids + c.tokens])).logits[0] / 0.8).log_softmax(-1)
            if r.min() < r.max():
                loss = loss - a * logprobs[len(ids) - 1:-1].gather(1, torch.tensor(c.tokens)[:, None]).sum()
                trained.append((len(ids), len(c.tokens)))
    theirs, = torch.autograd.grad(loss / sum(new for _, new in trained), v)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max() and ours.abs().min() > 0
    assert stats["steps"] == 1 and stats["completions"] == 24 and stats["logprob_gap"] < 1e-5
    assert 1 <= stats["flat_groups"] == 4 - len(trained) / 6 < 4
    assert stats["reward"] == pytest.approx(float(rewards.mean()))
    if budget == 1 or make:  # no mask of ours: one completion a row
        assert sorted(sizes) == sorted(map(sum, trained))
    else:  # in one sequence each prompt stands once
        assert max(sizes) <= budget and len(sizes) < len(trained) and (budget == 60 or sum(sizes) == (
            sum(new for _, new in trained) + sum(prompt for prompt, _ in trained[::6])))

COMPLETIONS = [Completion("", tokens, [0.0] * len(tokens))
               for tokens in ([8, 9, 3], [8, 9, 3, 4, 4], [7], [8, 5, 3], [8, 9, 3], [7, 7, 7, 9])]

@pytest.mark.parametrize(("limit", "sizes"), [(0, [1] * 6), (9, [1, 2, 2, 1]), (99, [6])])
def test_parts_of_a_group_hold_their_budget_and_each_completion_once(limit, sizes):
    parts = split([5, 6, 2], COMPLETIONS, range(6), limit)  # of 3, 5, 1, 3, 3 and 4 tokens
    assert [len(completions) for _, completions, _ in parts] == sizes
    assert [c for _, completions, _ in parts for c in completions] == COMPLETIONS
    assert [a for _, _, advantages in parts for a in advantages] == [*range(6)]

@pytest.mark.parametrize(("make", "dtype", "tolerance"), [
    (qwen, fp32, 1e-5), (llama, fp32, 1e-5), (qwen, bf16, 0.05)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_each_completion_sees_its_prompt_and_itself_alone(make, dtype, tolerance, attention):
    model, prompt = make(dtype), [5, 6, 2]
    model.set_attn_implementation(attention)
    together = completion_states(model, prompt, COMPLETIONS).split([len(c.tokens) for c in COMPLETIONS])
    for completion, states in zip(COMPLETIONS, together, strict=True):
        whole = model.base_model(torch.tensor([prompt + completion.tokens])).last_hidden_state[0]
        for alone in (whole[len(prompt) - 1:-1], completion_states(model, prompt, [completion])):
            logprobs = [model.lm_head(x).float().log_softmax(-1) for x in (states, alone)]
            assert torch.allclose(*logprobs, atol=tolerance * float(logprobs[0].abs().max()))

def test_the_logits_of_a_batch_never_exist(talker):
    model, heights, gradients = talker[0], [], []
    v = Booster(model, BoostConfig(rounds=1)).attach()
    model.get_output_embeddings().register_forward_hook(lambda m, x, out: heights.append(out.shape[0]))
    for model.config.vocab_size in (31, 2**25 // 8):
        v.grad = None
        gap = policy_gradient(model, [5, 6, 7], COMPLETIONS, [1.0 - i for i in range(6)], 0.9)
        gradients.append(v.grad)
    assert heights == [19, 8, 8, 3] and torch.allclose(*gradients, atol=1e-5) and gradients[0].all()
    assert gap > 1  # against log-probabilities of 0

def test_which_models_take_our_masks():
    sizes = {"vocab_size": 31, "hidden_size": 32}
    local = hf.GPTNeoConfig(**sizes, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])
    falcon = hf.FalconConfig(**sizes, num_hidden_layers=1, num_attention_heads=4, alibi=True)
    others = (hf.FalconForCausalLM(falcon), hf.BloomForCausalLM(hf.BloomConfig(**sizes, n_layer=1)),
              hf.GPTNeoForCausalLM(local), sliding())
    assert takes_masks(model := qwen()) and takes_masks(chunked := llama())
    assert not any(map(takes_masks, others))
    chunked.config.layer_types = ["full_attention", "chunked_attention"]
    model.config._attn_implementation = "flash_attention_2"
    assert not takes_masks(model) and not takes_masks(chunked)

SHORT = GRPOConfig(group_size=4, max_new_tokens=8)

@pytest.mark.parametrize("dtype", [fp32, bf16, fp16])
@pytest.mark.parametrize("make", [qwen, llama, sliding])
def test_a_grpo_round_moves_v_alone(talker, make, dtype):
    before, v = bits(model := make(dtype)), Booster(model, BoostConfig(rounds=1)).attach()
    grpo(model, talker[1], QUESTIONS, parity, v, dataclasses.replace(SHORT, epochs=2))
    assert v.abs().min() > 0 and same_bits(before, bits(model))
    assert all(p.grad is None for p in model.parameters())

@pytest.mark.parametrize(("epochs", "prompts", "steps"), [(1, 2, 2), (1.5, 3, 2), (2.25, 3, 3), (2, 9, 2)])
@pytest.mark.parametrize("kind", [np.array, torch.tensor])  # of rewards
def test_steps_follow_from_epochs_and_failures(talker, epochs, prompts, steps, kind):
    asked, v = [], Booster(talker[0], BoostConfig(rounds=1)).attach()
    stats = grpo(*talker, QUESTIONS, lambda i, _: asked.append(i) or kind([0.0, 1, 1, 1] * (len(i) // 4)), v,
                 dataclasses.replace(SHORT, epochs=epochs, prompts=prompts))
    assert stats["steps"] == len(asked) == steps and json.dumps(stats)
    assert stats["completions"] == sum(map(len, asked)) == steps * min(prompts, 4) * 4
    assert prompts != 2 or sorted(asked[0] + asked[1]) == sorted([*range(4)] * 4)  # a pass sees each once

def test_no_variance_teaches_nothing_and_says_so(talker):
    before, booster = bits(talker[0]), Booster(talker[0], BoostConfig(rounds=1))
    v = booster.attach()
    stats = grpo(*talker, QUESTIONS, lambda indices, texts: [1.0] * len(texts), v, SHORT)
    booster.merge()
    assert not v.any() and (stats["steps"], stats["flat_groups"]) == (0, 4) and "nothing" in stats["note"]
    assert same_bits(before, bits(talker[0])) and len(booster.vectors) == 1

def test_a_wrong_reward_gradient_policy_or_model_stops_the_round(talker):
    model, tokenizer = talker
    v = Booster(model, BoostConfig(rounds=1)).attach()
    for reward in (lambda _, texts: [math.nan] * len(texts), lambda _, texts: [1.0]):
        with refused("finite number for each"):
            grpo(*talker, QUESTIONS, reward, v, SHORT)
    hook = v.register_hook(lambda grad: grad * math.nan)
    with refused("--lr", FloatingPointError):
        grpo(*talker, QUESTIONS, parity, v, SHORT)
    assert not v.any()
    hook.remove()
    model.register_forward_hook(lambda m, x, out: [out.logits.mul_(-4), out][1])  # as soft-capping does
    with refused("another policy"):
        grpo(*talker, QUESTIONS, parity, v, SHORT)
    model.lm_head.weight.data.fill_(math.nan)
    with refused("float32", FloatingPointError):
        generate(*talker, QUESTIONS, max_new_tokens=2)

def test_cross_entropy_lowers_the_loss_and_moves_v_alone():
    model, labels, passes = esm(hidden_dropout_prob=0.9).train(), torch.tensor([0, 1, 1]), []
    before, v = bits(model), Booster(model, BoostConfig(rounds=1, u=4, groups=0)).attach()
    batch = (inputs(), labels)
    config = CEConfig(epochs=6, max_grad_norm=1e-3)
    stats = cross_entropy(model, lambda: passes.append(1) or iter([batch] * 2), v, config)
    first = nn.functional.cross_entropy(logits(esm()), labels)
    assert stats["first_loss"] == pytest.approx(float(first), abs=1e-5)  # without dropout
    assert stats["last_loss"] < stats["first_loss"] and len(passes) == 6 and stats["steps"] == 12
    assert v.any() and same_bits(before, bits(model)) and v.grad.norm() == pytest.approx(1e-3, rel=1e-3)
    with refused("no batch"):
        cross_entropy(model, lambda: iter([]), v, CEConfig())
    v.register_hook(lambda grad: grad * math.nan)
    with refused("--lr", FloatingPointError):
        cross_entropy(model, lambda: iter([batch]), v, CEConfig())

# ------------------------------------------------------------------------------------------------------------
# The loop and the run folder

class Words:
    """A task without text: which of 12 inputs does a tiny ESM put into the asked class?"""

    def __init__(self, model, stop_at=None, lr=0.05):
        self.model, self.stop_at, self.lr, self.calls = model, stop_at, lr, itertools.count(1)
        self.train = [(torch.randint(4, 30, (1, 6), generator=generator("x", i)), i % 2) for i in range(12)]
        self.tests = {"held": self.train[:4]}

    def evaluate(self, examples):
        if next(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        right = [int(self.model(x).logits.argmax()) == y for x, y in examples]
        return right, {"size": torch.tensor(len(examples)), "half": np.float32(0.5)}

    def fit(self, examples, v, round):
        batch = ({"input_ids": torch.cat([x for x, _ in examples])}, torch.tensor([y for _, y in examples]))
        stats = cross_entropy(self.model, lambda: iter([batch]), v, CEConfig(epochs=6, lr=self.lr))
        if next(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        return {**stats, "loss": torch.tensor(0.5), "round": 99, "failures": -1}

CONFIG = BoostConfig(rounds=4, u=4, groups=0, replay=1.0)
WARY = dataclasses.replace(CONFIG, recheck=0.5, accept="better")

def run_words(out, learner=Booster, stop_at=None, config=CONFIG, **options):
    model, lr = esm(), {FullFineTuning: 1e-4, BoRA: 0.03}.get(learner, 0.05)
    return boost(learner(model, config), Words(model, stop_at, lr), out, **options), model

def saved(out):
    return EsmForSequenceClassification.from_pretrained(out / "model")

def state(out):
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    times = [line.pop("seconds") for line in lines]
    assert all(time.keys() >= {"evaluate", "generate", "train", "merge"} for time in times)
    return lines, (out / "adapters.safetensors").read_bytes()

def test_the_record_is_complete_and_adds_up(tmp_path, capsys):
    records, model = run_words(tmp_path, test_every=2, settings={"lr": 0.05})
    lines, _ = state(tmp_path)
    assert len(records) == 5 and [r["round"] for r in lines] == [0, 1, 2, 3, 4]
    for before, after in itertools.pairwise(lines):
        assert after["failures"] == len(after["failed"])
        assert after["failures"] == before["failures"] - after["fixed"] + after["regressed"]
        assert after["train_accuracy"] == pytest.approx(1 - after["failures"] / 12)
        assert after["steps"] == 6 and after["norm"] > 0 and after["train_size"] == 12
        assert after["loss"] == after["train_half"] == 0.5  # were a tensor and a number of numpy
    assert len({tuple(line["failed"]) for line in lines}) > 1
    assert ["held_accuracy" in r for r in lines] == [True, False, True, False, True]
    assert [r["rank"]["max"] for r in lines] == [0, 2, 4, 6, 8]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.items() >= {**vars(CONFIG), "lr": 0.05}.items() and config["versions"]["torch"]
    again = saved(tmp_path)
    assert same_bits(bits(again), bits(model)) and torch.allclose(logits(again), logits(model), atol=2e-6)
    printed = capsys.readouterr().out
    assert "to go" in printed and "round  4/4" in printed and "regressed" in printed

@pytest.mark.parametrize(("learner", "config"), [
    (Booster, CONFIG), (Booster, WARY), (FullFineTuning, CONFIG)])
def test_broken_off_anywhere_it_continues_to_the_same_bits(tmp_path, learner, config):
    records, model = run_words(tmp_path / "whole", learner, config=config)
    expected = state(tmp_path / "whole")
    assert any("note" in record for record in records) == (config is WARY)  # some rounds are taken back
    for stop_at in range(1, 12):
        with pytest.raises(KeyboardInterrupt):
            run_words(tmp_path / f"{stop_at}", learner, stop_at, config)
        _, again = run_words(tmp_path / f"{stop_at}", learner, config=config)
        assert state(tmp_path / f"{stop_at}") == expected and same_bits(bits(model), bits(again))
    for rounds in range(1, 4):  # the vectors may be ahead of the record
        lines = (tmp_path / "whole" / "rounds.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "whole" / "rounds.jsonl").write_text("".join(lines[:rounds + 1]))
        if learner is Booster:
            run_words(tmp_path / "whole", config=config)
            assert state(tmp_path / "whole") == expected

def test_more_rounds_continue_a_finished_run_and_fewer_are_refused(tmp_path):
    longer = dataclasses.replace(CONFIG, rounds=6)
    for name, config in (("short", CONFIG), ("short", longer), ("long", longer)):
        run_words(tmp_path / name, config=config)
    one, other = (Booster.read(tmp_path / name / "adapters.safetensors")[1] for name in ("short", "long"))
    assert len(one) == 6 and torch.allclose(one, other, atol=1e-4)
    with refused("6 rounds, more than --rounds 4.*rounds=4"):
        run_words(tmp_path / "short")

def test_damaged_state_is_named_and_nothing_is_overwritten(tmp_path):
    run_words(tmp_path, settings={"lr": 1})
    files = {f: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
    config, lines, vectors = map(tmp_path.joinpath, ("config.json", "rounds.jsonl", "adapters.safetensors"))
    for match, path, change in [
            ("safetensors is damaged", vectors, lambda old: old[:-7]), ("tensors is damaged, missing", vectors, None),
            ("line 5 is damaged", lines, lambda old: old[:-30]), ("rounds.jsonl is missing", lines, None),
            ("line 1 is damaged", lines, lambda old: old.replace(b'"failures"', b'"failure"')),
            ("line 2 is damaged", lines, lambda old: old.replace(b'"round": 1', b'"round": 3')),
            ("config.json is damaged", config, lambda old: b"{"), ("config.json is missing", config, None),
            ("config.json is damaged", config, lambda old: b"5"),
            ("another run.*data", config, lambda old: old.replace(b'"data": "', b'"data": "0'))]:
        path.write_bytes(change(files[path])) if change else path.unlink()
        damaged = {f: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
        with refused(match):
            run_words(tmp_path, settings={"lr": 1})
        assert damaged == {f: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
        path.write_bytes(files[path])
    for match, options in [
            ("seed 0 there, 1 here", {"config": dataclasses.replace(CONFIG, seed=1)}),
            ("rank 2 there, 1 here", {"config": dataclasses.replace(CONFIG, rank=1)}),
            ("lr 1 there, 2 here", {"settings": {"lr": 2}}), ("lr 1 there, None here", {"settings": {}}),
            ("top_p None there, 1 here", {"settings": {"lr": 1, "top_p": 1}}),
            ("another base model", {"learner": lambda _, config: Booster(esm(bf16), config)}),
            ("of round -1, not 4", {"learner": FullFineTuning})]:
        with refused(match):
            run_words(tmp_path, **{"settings": {"lr": 1}, **options})
        assert files == {f: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
    run_words(tmp_path, settings={"lr": 1, "workers": 9, "micro_batch_tokens": 9})  # these change no result
    vectors.write_bytes(b"x")
    with refused("adapters.safetensors could not be loaded"):
        run_words(tmp_path, FullFineTuning, settings={"lr": 1})

def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    run_words(tmp_path)
    before = state(tmp_path)
    with refused("model .*No space left.*make room"):
        replace(tmp_path / "model", lambda new: [new.mkdir(), (new / "config.json").touch(), full()])
    assert saved(tmp_path)
    monkeypatch.setattr(boostlora.safetensors.torch, "save_file", lambda *given: [given[1].touch(), full()])
    with refused("adapters.safetensors .*No space left.*make room"):
        run_words(tmp_path, config=dataclasses.replace(CONFIG, rounds=5))
    assert state(tmp_path) == before

def test_a_folder_in_use_is_refused(tmp_path):
    hold = "import boostlora, sys; boostlora.claim(sys.argv[1], {}); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", hold, tmp_path], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, cwd=HERE)
    other.stdout.readline()
    with refused("in use by another process"):
        run_words(tmp_path)
    other.communicate(b"\n")
    claim(tmp_path, dataclasses.asdict(CONFIG))  # a script holds the folder from its first check on
    assert len(run_words(tmp_path)[0]) == 5

class Script:
    """A task by the book: after round t wrong[t] are wrong, whatever the model says."""

    def __init__(self, *wrong):
        self.train, self.tests, self.wrong, self.t = [*range(12)], {"held": [*range(50, 54)]}, wrong, 0
        self.model, self.asked, self.trained, self.weights = esm(), [], [], []

    def evaluate(self, examples):
        self.asked.append(examples)
        self.weights.append(bits(self.model))
        return [example not in self.wrong[self.t] for example in examples], {}

    def fit(self, examples, v, round):
        self.t, self.trained = round + 1, [*self.trained, examples]
        draw(v, round)
        return {}

    def run(self, out, **options):
        self.booster = Booster(self.model, BoostConfig(**options))
        return boost(self.booster, self, out)

def test_the_loop_stops_when_nothing_fails_and_refuses_no_data(tmp_path):
    task = Script({3, 4}, {50}, {})
    records = task.run(tmp_path, rounds=9)
    assert len(records) == 2 and task.trained == [[3, 4]] and records[1]["held_failed"] == [0]
    assert same_bits(bits(task.model), bits(saved(tmp_path)))
    task.tests["none"] = []
    with refused("empty training or test set"):
        task.run(tmp_path / "other")

def test_test_figures_are_paired_with_those_of_the_base_model(tmp_path):
    first, middle, last = Script({0, 50, 51}, {0, 51, 52, 53}, {0, 50, 52}).run(tmp_path, rounds=2)
    names = "held_fixed", "held_regressed", "held_failed", "held_accuracy"
    figures = [[record[name] for name in names] for record in (first, last)]
    assert figures == [[0, 0, [0, 1], 0.5], [1, 1, [0, 2], 0.5]] and "held_failed" not in middle

def test_with_recheck_a_round_looks_at_failures_and_a_seeded_share(tmp_path):
    wrong = {0, 1, 2, 3}, {1, 2, 3, 8, 9, 10, 11}, {2, 3, 8}, {3, 9}
    tasks = [Script(*wrong) for _ in range(3)]
    records, *_ = [task.run(tmp_path / f"{i}", rounds=3, recheck=0.25, seed=i // 2)
                   for i, task in enumerate(tasks)]
    assert tasks[0].asked == tasks[1].asked != tasks[2].asked
    first, _, *looked, last, _ = tasks[0].asked
    assert first == last == [*range(12)] and records[3]["failed"] == [3, 9] and len(looked) == 2
    for t, asked in enumerate(looked, 1):  # whoever was right, and was not looked at, stays right
        before = records[t - 1]["failed"]
        assert set(before) < set(asked) and len(asked) == len(before) + math.ceil((12 - len(before)) / 4)
        assert records[t]["failed"] == sorted(set(asked) & wrong[t])
    records = (task := Script({0, 1}, {9}, {9})).run(tmp_path / "all", rounds=2, recheck=0)
    assert task.asked[2:4] == [[0, 1], [*range(12)]] and records[1]["failed"] == [9]  # as 0 and 1 were right
    (task := Script({0}, {0}, {0}, {0})).run(tmp_path / "same", rounds=3, recheck=0.25)
    assert task.asked[2] != task.asked[3]

def test_a_worse_round_is_taken_back_where_accept_is_better(tmp_path):
    wrong = {0, 1, 2}, {1, 2, 3, 4}, {2, 7, 8}, {0, 1, 2, 3}
    records = (task := Script(*wrong)).run(tmp_path / "better", rounds=3, accept="better")
    assert [r["failed"] for r in records] == [[0, 1, 2], [0, 1, 2], [2, 7, 8], [2, 7, 8]]
    assert ["taken back" in r.get("note", "") for r in records] == [False, True, False, True]
    assert [(r["fixed"], r["regressed"]) for r in records] == [(0, 0), (0, 0), (2, 2), (0, 0)]
    assert [bool(v.any()) for v in task.booster.vectors] == [False, True, False]
    only, weights = Booster(esm(), BoostConfig(rounds=3)), task.weights
    only.vectors = [torch.zeros(12, 1), task.booster.vectors[1]]  # the second round, in the second slice
    only.write()
    assert same_bits(weights[-1], bits(only.model)) and same_bits(weights[-1], bits(task.model))
    assert same_bits(weights[0], bits(esm())) and not same_bits(weights[0], weights[2])
    assert [r["failures"] for r in Script(*wrong).run(tmp_path / "all", rounds=3)] == [3, 4, 3, 4]

def test_failures_only_or_with_replayed_right_examples():
    train, failed = list("abcdefghij"), [1, 4, 7]
    none, some, other, every = (boostlora.select(train, failed, BoostConfig(replay=replay), t)
                                for replay, t in ((0, 0), (1, 0), (1, 1), (-1, 0)))
    assert none == list("beh") and every == train and some != other
    assert len(some) == 6 and set("beh") < set(some) and some == sorted(some)

def test_the_time_to_go_counts_rounds_trained_evaluated_and_tested():
    task = SimpleNamespace(train=range(80), tests={"a": range(15), "b": range(5)}, effort=lambda n: 3 * n)
    seconds = 600 / 100 * (10 * (3 * 40 + 40 + 20) + 20)  # with half of the 40 right ones looked at again
    assert boostlora.estimate(task, BoostConfig(recheck=0.5), 6, 40).seconds == seconds

def test_data_are_compared_by_content_and_tests_belong_to_them(tmp_path):
    def run(text="b", order=("x", 0, 8), held=1):
        task = Script({1}, {1})
        task.train = [SimpleNamespace(text=text, tags={*order}), 1, (np.float32(1), torch.ones(2), object())]
        task.evaluate, task.tests = lambda some: ([False] * len(some), {}), {"held": [held]}
        return task.run(tmp_path, rounds=1)

    assert list({0, 8}) != list({8, 0}) and run() == run(order=(8, 0, "x"))  # as they were made
    for other in ({"text": "c"}, {"held": 2}, {"order": (0, 8)}):
        with refused("another run.*data"):
            run(**other)
    assert to_json({"a": {2, 1}, "b": torch.tensor([1.5])}) == '{"a": [1, 2], "b": [1.5]}'

class BoRA:
    """A learner for `boost` that is not TinyLoRA: BoRA (arXiv 2508.06953). B [out, r] and A [r, in] are cut
    into b blocks each, and block (i, j) of the update is B_i diag(Sigma_ij) A_j, so its rank reaches b r."""

    def __init__(self, model, config):
        self.model, self.config, self.targets = model.requires_grad_(False), config, find_targets(model)
        self.sum = {name: torch.zeros_like(linear.weight) for name, linear in self.targets.items()}

    def attach(self, r=2, b=4):
        self.parts, self.hooks = {}, []
        for name, linear in self.targets.items():
            B, A = (torch.randn(b, n // b, r, generator=generator(n)) / 10 for n in linear.weight.shape)
            self.parts[name] = [nn.Parameter(x) for x in (B, torch.zeros(b, b, r), A.flip(0))]
            self.hooks.append(linear.register_forward_hook(
                lambda _, x, out, name=name: out + x[0] @ self.delta(name).T))
        return [p for parts in self.parts.values() for p in parts]

    def delta(self, name):
        return torch.einsum("ior,ijr,jnr->iojn", *self.parts[name]).reshape(self.sum[name].shape)

    @torch.no_grad()
    def merge(self):
        for hook, (name, linear) in zip(self.hooks, self.targets.items(), strict=True):
            hook.remove()
            linear.weight += self.delta(name)
            self.sum[name] += self.delta(name)

    def save(self, path):
        replace(path, lambda new: boostlora.safetensors.torch.save_file(self.sum, new))

    def summary(self):
        ranks = (torch.linalg.matrix_rank(delta.double(), rtol=1e-6) for delta in self.sum.values())
        return {"norm": 1.5, "ranks": [*map(int, ranks)]}

def test_the_loop_boosts_another_weak_learner(tmp_path, capsys):
    records, model = run_words(tmp_path, BoRA, config=BoostConfig(rounds=2, replay=1.0))
    assert [set(r["ranks"]) for r in records] == [{0}, {8}, {16}] and "norm 1.50" in capsys.readouterr().out
    assert same_bits(bits(saved(tmp_path)), bits(model))

# ------------------------------------------------------------------------------------------------------------
# A task of prompts and grades

def test_a_task_of_one_s_own_is_a_prompt_and_a_grade(talker, tmp_path, capsys):
    def grade(texts, examples):  # rewarded by degrees: right from three on
        return [text.count("+") / 3 for text in texts]

    model, tokenizer = talker
    config = GRPOConfig(epochs=2, prompts=4, group_size=4, max_new_tokens=12, lr=0.1)
    data = [f"has {n}, buys {n}?" for n in range(2, 9)] + ["has 1, " + "buys 2, " * 40]
    task = TextTask(model, tokenizer, data, {"same": data}, config, prompt=str, grade=grade,
                    lenient=lambda texts, examples: [float("####" in text) for text in texts])
    records = boost(Booster(model, BoostConfig(rounds=2, groups=0, u=4)), task, tmp_path, tokenizer=tokenizer)
    assert task.train == task.tests["same"] == data[:7] and "1 examples are" in capsys.readouterr().out
    texts = [c.text for c in generate(model, tokenizer, task.train, max_new_tokens=12)]
    assert records[-1]["failed"] == [i for i, text in enumerate(texts) if text.count("+") < 3]
    assert records[-1]["train_lenient_accuracy"] == sum("####" in text for text in texts) / 7
    assert records[1]["completions"] == 4 * 4 * 4 and task.effort(3) == 2 * 2 * 3 * 4
    assert records[-1]["failures"] < records[0]["failures"] == 7
    assert (tmp_path / "model" / "tokenizer.json").exists()
    with refused("no prompt fits: the model's context is 128 tokens .* 200"):
        TextTask(model, tokenizer, data, {}, dataclasses.replace(config, max_new_tokens=200), str, grade)
    tokenizer.chat_template = "{{ messages[0]['role'] }}: {{ messages[0]['content'] }}" \
                              "{% if add_generation_prompt %} say:{% endif %}"
    assert task.prompts(["1", "2"]) == ["user: 1 say:", "user: 2 say:"]
    tokenizer.chat_template = None
    assert task.prompts(["1", "2"]) == ["1", "2"]

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
    """A Qwen2 of random weights with a tokenizer trained on the spot, as from_pretrained finds a real one."""
    folder = tmp_path_factory.mktemp("small")
    words = [f"How many {thing} are {n}?" for thing in ("cows", "cups", "legs") for n in range(40)]
    tokenizer = hf.Qwen2Tokenizer().train_new_from_iterator(words, 400)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %} assistant:"
    tokenizer.save_pretrained(folder)
    qwen(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    return folder

ROWS = [{"question": f"How many legs have {n} cows?", "answer": f"#### {4 * n}"} for n in range(9)]

@pytest.fixture()
def flags(small_qwen, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    return ("--rounds", 1, "--prompts", 3, "--group_size", 2, "--max_new_tokens", 6, "--train_file", data,
            "--test_file", data, "--test_limit", 4, "--out", tmp_path / "run", "--model", small_qwen)

def test_the_real_path_on_a_small_model_that_cannot_learn(small_qwen, flags, tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"question": "cow " * 900, "answer": "#### 1"}])
    run_math(monkeypatch, *flags, "--export_lora")
    printed = capsys.readouterr().out
    for said in ("nothing could be learned", "1 examples are skipped", "no GPU: about", "LoRA of rank 2"):
        assert said in printed
    lines, _ = state(tmp_path / "run")
    assert [line["failures"] for line in lines] == [9, 9] and lines[1]["flat_groups"] == 9
    assert lines[0].keys() >= {"rows_accuracy", "rows_lenient_accuracy", "train_lenient_accuracy"}
    base, merged = (AutoModelForCausalLM.from_pretrained(f) for f in (small_qwen, tmp_path / "run" / "model"))
    assert same_bits(bits(base), bits(merged)) and (tmp_path / "run/lora/adapter_config.json").exists()
    run_math(monkeypatch, *flags, "--micro_batch_tokens", 99)
    assert "has 1 of 1 rounds" in capsys.readouterr().out  # memory flags may change when a run goes on
    with refused("lr 0.01 there, 0.1 here"):
        run_math(monkeypatch, *flags, "--lr", 0.1)

@pytest.mark.parametrize(("method", "lr", "moves"), [("boost", 0.1, 14), ("full", 0.001, 27)])
def test_the_real_path_learns(small_qwen, flags, tmp_path, monkeypatch, capsys, method, lr, moves):
    flags += ("--method", method, "--lr", lr, "--limit", 5)
    monkeypatch.setattr(train_math, "grades", lambda texts, _: [i % 2 for i in range(len(texts))])
    run_math(monkeypatch, *flags)
    folders = small_qwen, tmp_path / "run" / "model"
    base, merged = (bits(AutoModelForCausalLM.from_pretrained(folder)) for folder in folders)
    assert sum(not torch.equal(p, merged[name]) for name, p in base.items()) == moves
    assert state(tmp_path / "run")[0][0]["train_accuracy"] == 0.4
    monkeypatch.setattr(train_math, "grades", lambda texts, _: [True] * len(texts))
    run_math(monkeypatch, *flags, "--out", tmp_path / "other")
    assert "merged model" in capsys.readouterr().out
    assert len((tmp_path / "other" / "rounds.jsonl").read_text().splitlines()) == 1

@pytest.mark.parametrize(("rows", "named"), [
    (None, "No such file"), ([], "is empty"), (b"\xff\xfe", "JSONL and UTF-8"),
    (['{"question": '], "line 1: not a JSON object"),
    ([ROWS[0], {"question": "why?"}], "line 2: the field 'answer' is missing"),
    ([ROWS[0], {"answer": "#### 4"}], "row 2: no 'question'"),
    ([ROWS[0], {"question": "why?", "answer": "####  "}], "row 2: the answer '' cannot be graded")])
def test_bad_data_is_refused_by_file_and_row(flags, tmp_path, monkeypatch, rows, named):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rows) if isinstance(rows, bytes) else write_jsonl(path, rows or [])
    if rows is None:
        path.unlink()
    monkeypatch.setattr(train_math, "load_language_model", None)  # before anything slow
    with refused(f"rows.jsonl.*{named}"):
        run_math(monkeypatch, *flags)

def test_bad_models_are_refused_with_a_way_out(small_qwen, flags, tmp_path, monkeypatch):
    silent, gpt2, cut = (shutil.copytree(small_qwen, tmp_path / name) for name in ("silent", "gpt2", "cut"))
    (silent / "chat_template.jinja").unlink()
    (cut / "model.safetensors").write_bytes(b"{")
    hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=400)).save_pretrained(gpt2)
    for more, message in [(["--model", tmp_path / "nowhere"], "nowhere: there is no such folder.*--demo"),
                          (["--model", silent], "no chat template"), (["--model", gpt2], "Conv1D"),
                          (["--model", tmp_path], "could not be loaded.*--demo"),
                          (["--model", cut], "cut could not be loaded.*--demo"),
                          (["--max_new_tokens", 600], "context is 512 tokens and --max_new_tokens 600"),
                          (["--groups", 999], "--groups 999"), (["--rank", 99], "--rank 99")]:
        with refused(message):
            run_math(monkeypatch, *flags, *more)

@pytest.mark.parametrize(("flags", "message"), [
    (["--demo", "--train_file", "x"], "its own"), (["--demo", "--demo_wrong", "steals"], "demo_wrong steals"),
    (["--method", "full", "--dtype", "bfloat16"], "rounds small steps away"),
    (["--method", "full", "--export_lora"], "--export_lora: not with --method full")])
def test_flags_that_make_no_sense_are_refused(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    with refused(message):
        run_math(monkeypatch, *flags)
    with refused("2", SystemExit):
        run_math(monkeypatch, "--roun", 3)
    assert "--roun" in capsys.readouterr().err and not list(tmp_path.glob("runs/*"))

@pytest.mark.parametrize("script", [train_math, train_code, train_protein])
def test_help_explains_every_flag_and_the_demo_is_checked_first(tmp_path, monkeypatch, capsys, script):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with refused("0", SystemExit):
        script.main()
    flags = re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]
    assert len(flags) > 20 and all(re.search(r"(  |\n)\s*\w.* ", flag) for flag in flags)
    monkeypatch.setattr(torch.optim, "AdamW", None)
    monkeypatch.setattr(sys, "argv", ["train.py", "--demo", "--rank", "99", "--out", str(tmp_path / "run")])
    with refused("--rank 99 x --rounds .* lower one"):
        script.main()
    assert {path.name for path in tmp_path.glob("run/*")} <= {".lock"}

@pytest.mark.parametrize(("error", "code", "message"), [
    (torch.OutOfMemoryError("CUDA"), 1, "lower --micro_batch_tokens"), (KeyboardInterrupt(), 130, "same command"),
    (FloatingPointError("not finite"), 1, "before this one are kept"), (InputError("no"), 2, "error: no")])
def test_what_ends_a_run_is_told_in_a_sentence(capsys, error, code, message):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        boostlora.run(main)
    assert exit.value.code == code and message in capsys.readouterr().err

# ------------------------------------------------------------------------------------------------------------
# train_math: grading

GRADES = [
    # where the answer stands
    (r"so \boxed{18}", "18", True, True), ("so 18", "18", True, False),
    ("so 3 + 15 = 18.", "18", False, True), (r"\boxed{5} no, \boxed{6} of 7", "6", True, True),
    (r"\boxed{5} no, \boxed{6}", "5", False, False), (r"\boxed{\boxed{(1, 2)}}", "(1,2)", True, True),
    (r"\fbox{5}", "5", True, True), (r"\boxed{1", "1", True, False),
    (r"\boxed{7} then \boxed{1", "7", True, True), (r"\boxed{}", "5", False, False),
    (r"\boxed{\frac{1}{2}} = 0.5", r"\frac12", True, True), (r"\boxed{\{1, 2\}}", r"\{2,1\}", True, True),
    ("1 + 1\n#### 1,000", "1000", False, True), ("#### 2\nThe answer is 3", "3", False, True),
    ("#### Step 2: add\nso 7", "7", False, True), ("**Final Answer: $42$**", "42", False, True),
    ("The answer is 42. There were 7.", "42", False, True),
    ("The answer is that he has 42 cows, as 40 + 2 = 7", "42", False, True),
    ("The answer is that 5 + 3 = 8 cows live.", "8", False, True), ("nothing", "$", True, False),
    ("The answer is 3, 5, and 7.", "3,5,7", False, True), ("It is 1/2", r"\frac12", False, True),
    ("The answer is x^2. We are done.", "x^2", False, True), ("we take 7-3", "3", False, True),
    ("**Answer: x^2** here", "x^2", False, True), ("he has -$5", "-5", False, True),
    ("Answer:\n\\[\n x^2 \\]", "x^2", False, True),
    (r"The answer is \(\frac{1}{2}\).", r"\frac{1}{2}", False, True), ("so it is x^2", "x^2", False, False),
    ("The answer is Evelyn.", r"\text{Evelyn}", False, True),
    (r"he pays \$1,234.50 now", "1234.5", False, True),
    # numbers, units, separators
    (r"\boxed{\$18.00}", "18", True, True), (r"\boxed{18 \text{ dollars}}", "18", True, True),
    (r"\boxed{\text{She makes } \$18 \text{ a day}}", "18", True, True), (r"\boxed{18cm}", "18", True, True),
    (r"\boxed{18~\mathrm{m}}", "18", True, True), (r"\boxed{864}", r"864 \mbox{ inches}^2", True, True),
    (r"\boxed{20,000}", "20000", True, True), (r"\boxed{1{,}080}", "1080", True, True),
    (r"\boxed{1\,080 \text{ cm}^2}", r"1,\!080", True, True), (r"\boxed{70\%}", "70", True, True),
    (r"\boxed{12\pi \text{ cm}^2}", r"12\pi", True, True), (r"\boxed{3 m}", "3", True, True),
    (r"\boxed{5.4}", r"5.4 \text{ cents}", True, True), (r"\boxed{90^{\circ}}", "90", True, True),
    (r"\boxed{90\degree}", "90", True, True), (r"\boxed{5 # 7}", "5", True, False),
    (r"\boxed{18x}", "18", True, False), (r"\boxed{2 \text{ hours } 30}", "60", True, False),
    (r"\boxed{\log 18}", "18", True, False), (r"\boxed{5!}", "5", True, False),
    (r"\boxed{-5}", "5", True, False), (r"\boxed{1.5 \times 10^{3}}", "1500", True, True),
    (r"\boxed{0.333333}", r"\frac13", True, True), (r"\boxed{0.33}", r"\frac13", True, False),
    (r"\boxed{1 1/2}", r"1\frac{1}{2}", True, True), (r"\boxed{-2\frac13}", r"-\frac{7}{3}", True, True),
    (r"\boxed{2516}", "2516_8", True, True), (r"\boxed{2516_{\text{8}}}", "2516_8", True, True),
    (r"\boxed{2516_7}", "2516_8", True, False), ("\\boxed{−2√3}", r"-2\sqrt{3}", True, True),
    (r"\boxed{3\sqrt2 \approx 4.24}", r"3\sqrt{2}", True, True),
    (r"\boxed{\frac{2}{\frac{1}{3}}}", "6", True, True), (r"\boxed{\dfrac9{19}}", "9/19", True, True),
    (r"\boxed{\displaystyle \tfrac12}", "0.5", True, True), (r"\boxed{3\cdot\sqrt2}", r"3\sqrt2", True, True),
    # algebra and equations
    (r"\boxed{-q + p}", "p - q", True, True), (r"\boxed{q - p}", "p - q", True, False),
    (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", True, True), (r"\boxed{2x + 3}", "y = 2x + 3", True, True),
    (r"\boxed{y=2x-3}", "y=2x+3", True, False), (r"\boxed{2x = 3 - y}", "2x + y = 3", True, True),
    (r"\boxed{2x = y - 3}", "2x + y = 3", True, False), (r"\boxed{x = 2 + 3 = 5}", "5", True, True),
    (r"\boxed{\frac{1}{\tan x}}", r"\cot x", True, True), (r"\boxed{\cos 60^\circ}", "1", True, False),
    (r"\boxed{(1+i)^2}", "2i", True, True), (r"\boxed{3r^2}", "3R^2", True, False),
    (r"\boxed{2x}", "f(x)=2x", True, True), (r"\boxed{\frac{\cos x}{\sin x}}", r"\cot (x)", True, True),
    # lists, sets, points, intervals, matrices
    (r"\boxed{x=7 \text{ or } x=5}", "5,7", True, True), (r"\boxed{5}", "5,7", True, False),
    (r"\boxed{3, 5, \text{ and } 7}", "7,5,3", True, True), (r"\boxed{5,9}", "5,7", True, False),
    (r"\boxed{(2,1)}", "(1,2)", True, False), (r"\boxed{x=1,\quad 2}", "(1,2)", True, True),
    (r"\boxed{5,7,9}", "5,7", True, False), (r"\boxed{(2,3) \cup (1,4)}", r"(1,3) \cup (2,4)", True, False),
    (r"\boxed{(x,\theta) = (3, \pi/2)}", r"\left( 3, \frac{\pi}{2} \right)", True, True),
    (r"\boxed{-2, 1-\sqrt5, 1+\sqrt5}", r"\{1\pm\sqrt{5},-2\}", True, True),
    (r"\boxed{[-2,7)}", r"x \in [-2,7]", True, False), (r"\boxed{[-2, 7]}", r"x \in [-2,7]", True, True),
    (r"\boxed{(12,100)}", "(12, 100)", True, True), (r"\boxed{(1, \infty)}", "(1,4)", True, False),
    (r"\boxed{(1, ∞)}", r"(1, \infty)", True, True),
    (r"\boxed{(3, +\infty) \cup (-\infty,2)}", r"(-\infty, 2) \cup (3, \infty)", True, True),
    (r"\boxed{\begin{bmatrix}\frac12&0.5\end{bmatrix}}", r"\begin{pmatrix}1/2&1/2\end{pmatrix}", True, True),
    (r"\boxed{\begin{bmatrix}1\\2\\ \end{bmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", True, True),
    (r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", True, False),
    # words and choices
    (r"\boxed{evelyn}", r"\text{Evelyn}", True, True), (r"\boxed{\text{seat}}", r"\text{east}", True, False),
    (r"\boxed{\text{(C)}}", "C", True, True), (r"\boxed{\textbf{(C)}\ 42}", r"\text{(C)}", True, True),
]  # fmt: skip
PIECES = ["\\", "\\boxed{", "{", "}", "9", "answer is ", "####", " ", "\0", ",", "(", "sin(", "\\text{",
          "\ud800"]
BOMBS = ["9**9**9**9", "2^{10^{10}}", "9^{99999}" * 9, "9!!!!!", r"\frac{1}{0}", "1e999999999", "0^{-1}",
         "(" * 400, "-" * 400 + "1", "9" * 400]  # fmt: skip

@pytest.mark.parametrize(("completion", "answer", "strict", "expected"), GRADES)
def test_grade(completion, answer, strict, expected):
    assert grade(completion, answer, strict) is expected

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
    rows, strict = list(map(json.loads, (DATA / f"{name}.jsonl").open())), name == "math500"
    answers = [row["answer"].split("####")[-1].strip() for row in rows]
    for row, answer, other in zip(rows, answers, answers[1:] + answers[:1], strict=True):
        solution = row.get("solution", row["answer"])
        assert grade(solution, answer) and (not strict or grade(solution, answer, strict=True))
        assert grade(solution, other, strict) == grade(f"\\boxed{{{other}}}", answer, strict=True)

# ------------------------------------------------------------------------------------------------------------
# train_math: the demo

def test_the_stories_of_the_demo_are_true_unless_noisy():
    def true(text):
        steps, _, answer = text.partition(" #### ")
        sums = [step.split("=") for step in steps.split(";")]
        right = all(eval(sum) == int(x) for sum, x in sums)
        return right and re.split("[-+*]", sums[1][0])[0] == sums[0][1] and sums[1][1] == answer

    clean, noisy, worse = ([train_math.story(random.Random(i), wrongly)["answer"] for i in range(400)]
                           for wrongly in (None, [], ["loses"]))
    assert all(map(true, clean + noisy + worse))  # what is wrong is the verb's meaning
    assert 40 < sum(map(str.__ne__, clean, noisy)) < sum(map(str.__ne__, clean, worse))
    problem = {"answer": clean[0].split("####")[1].strip()}
    assert train_math.demo_grades([clean[0], "#### 99"], [problem] * 2) == [True, False]

def demo(out, *flags, threads=1):
    command = [sys.executable, HERE / "train_math.py", "--demo", "--out", out, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)})

def end_after(process, out, rounds, seconds, signal):
    """Signal the process some seconds into a round; what it printed."""
    record = out / "rounds.jsonl"
    while process.poll() is None and (not record.exists() or len(record.read_text().splitlines()) <= rounds):
        time.sleep(0.05)
    time.sleep(seconds)
    process.send_signal(signal)
    return process.communicate(timeout=60)[0]

def test_the_demo_learns_and_killed_it_ends_with_the_same_bits(tmp_path):
    out, killed, pause = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    flags = ("--rounds", "4", "--limit", "200", "--epochs", "2", "--micro_batch_tokens", "512")
    whole = demo(out, *flags)
    printed, _ = whole.communicate(timeout=900)
    assert whole.returncode == 0, printed
    lines, vectors = state(out)
    assert 0.6 < lines[0]["test_accuracy"] < 0.75 and lines[-1]["test_accuracy"] > 0.8
    assert lines[-1]["failures"] <= lines[0]["failures"] * 0.6
    assert [line["rank"] for line in lines] == [{"min": 4 * t, "max": 4 * t} for t in range(5)]
    model, tokenizer = (kind.from_pretrained(out / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    assert same_bits(bits(Booster.load(base, out / "adapters.safetensors").model), bits(model))
    rows = train_math.load_problems(str(out / "base" / "test.jsonl"), "", "")
    task = TextTask(model, tokenizer, rows, {}, GRPOConfig(max_new_tokens=40), lambda p: p["question"],
                    train_math.demo_grades)
    assert sum(task.evaluate(rows)[0]) / len(rows) == lines[-1]["test_accuracy"]

    shutil.copytree(out / "base", killed / "base")
    for rounds in (0, 1, 2):
        end_after(demo(killed, *flags, threads=2), killed, rounds, pause.uniform(0, 2), signal.SIGKILL)
        assert len((killed / "rounds.jsonl").read_text().splitlines()) < len(lines)
    last = demo(killed, *flags, threads=2)  # the demo takes one all the same
    printed, _ = last.communicate(timeout=900)
    assert last.returncode == 0, printed
    assert state(killed) == (lines, vectors)

def test_ctrl_c_and_mistakes_end_in_one_sentence(toy, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a child ignores it where pytest was told to
    shutil.copytree(toy, tmp_path / "run" / "base")
    printed = end_after(process := demo(tmp_path / "run"), tmp_path / "run", 0, 0.5, signal.SIGINT)
    assert process.returncode == 130 and "the same command goes on" in printed and "Traceback" not in printed
    process = demo(tmp_path / "run", "--rank", "0")
    assert process.communicate(timeout=60)[0].strip() == "error: --rank 0: must be at least 1"
    assert process.returncode == 2

def test_two_processes_find_the_same_failures_and_hold_the_same_vectors(toy, tmp_path, monkeypatch):
    flags = ("--rounds", "2", "--epochs", "0.5", "--prompts", "3", "--limit", "40", "--test_limit", "8")
    for name in ("one", "two"):
        shutil.copytree(toy, tmp_path / name / "base")
    run_math(monkeypatch, "--demo", "--out", tmp_path / "one", *flags)
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
    two = subprocess.run([*command, "--demo", "--out", tmp_path / "two", *flags], capture_output=True,
                         text=True, timeout=300, check=False)
    assert two.returncode == 0, two.stderr
    vectors = [torch.stack(torch.load(tmp_path / f"vectors{process}")) for process in range(2)]
    assert torch.equal(*vectors) and vectors[0].any()
    ours, theirs = state(tmp_path / "one")[0], state(tmp_path / "two")[0]
    assert [line["failed"] for line in ours] == [line["failed"] for line in theirs]
    assert 0 < ours[2]["total_norm"] == pytest.approx(theirs[2]["total_norm"], rel=1e-3)

# ------------------------------------------------------------------------------------------------------------
# train_code: the sandbox. Linux, as root or not.

RIGHT, WRONG = "\ndef f(x): return x + 1\n", "\ndef f(x): return 0\n"
TESTS = "assert f(1) == 2\nassert f(2) == 3"
both_ways = pytest.mark.parametrize("namespaces", [True, False])

# Each stands before a right function, if it says no `f` itself: only the attack can be why it fails.
ATTACKS = {
    "loop": "while True: pass", "fork bomb": "while True: os.fork()", "10 GB": "x = [0] * (10 << 27)",
    "4 GB": "import mmap\nx = mmap.mmap(-1, 4 << 30)", "sleep": "time.sleep(99)",
    "threads": "import threading\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "print": "print('x' * 10**9)", "print slowly": "for _ in range(10**3): print('x' * 10**5)",
    "loop in f": "def f(x):\n    while True: pass",
    "deep recursion": "sys.setrecursionlimit(10**9)\ndef g(): return [g()]\ng()", "os._exit": "os._exit(0)",
    "SystemExit": "raise SystemExit", "exit in f": "def f(x): os._exit(0)", "crash": "ctypes.string_at(0)",
    "kill parent": "os.kill(os.getppid(), 9)", "kill all": "os.kill(-1, 9)",
    "kill trainer": "os.kill({pid}, 9)", "write project": "open('{project}/evil', 'w')",
    "write tmp": "open('{tmp}/evil', 'w')", "read secret": "open('{secret}').read()",
    "list project": "os.listdir('{project}')", "environment": "assert os.environ",
    "trainer's memory": "open('/proc/{pid}/mem', 'rb').read(1)",
    "trainer's environment": "assert 'SECRET' in open('/proc/{pid}/environ').read()",
    "loopback": "socket.create_connection(('127.0.0.1', {port}))",
    "outward": "socket.create_connection(('1.1.1.1', 53), 2)",
    "descriptors": "for n in range(5, 99):\n    try: os.fstat(n)\n    except OSError: continue\n    break\n"
        "else: raise OSError", "flood": "while True: os.write(4, b'x' * 10**6)",
    "close": "os.closerange(0, 100)", "disk": "for n in range(9999): open(str(n), 'w').write('x' * 10**6)",
    "daemon": "if os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(99)",
    "spawn": "os.posix_spawn('/usr/bin/true', ['true'], {})", "syntax": "def g(:",
    "surrogate": "x = '\ud800'", "exec": "os.execv('/lib64/ld-linux-x86-64.so.2', ['ld'])",
    "stop judge": "os.kill(os.getppid(), 19)", "SIGIO": "import fcntl\nfcntl.fcntl(3, fcntl.F_SETOWN, {pid})",
    "memory file": "os.memfd_create('x')",
    "SIGIO by socket": "import array, fcntl\nfcntl.ioctl(socket.socketpair()[0], 0x8901, array.array('i', "
        "[{pid}]))", "outlive": "assert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0",
    "limit trainer": "import resource\nresource.prlimit({pid}, resource.RLIMIT_CPU, (9, 9))",
    "renice": "os.setpriority(0, {pid}, 19)",
    "trace": "assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "judge's memory": "open(f'/proc/{os.getppid()}/mem', 'rb').read(1)", "stdin": "assert os.read(0, 1)",
    "root": "assert os.getuid() == 0", "chroot": "os.chroot('.')",
    "bare fork": "assert ctypes.CDLL(None).syscall(57) >= 0",
    "link": "os.symlink('{secret}', 's')\nopen('s').read()",
    "shared memory": "from multiprocessing import shared_memory as m\nm.SharedMemory(create=True, size=9)",
    "list root": "os.listdir('/')", "many MB": "for n in range(40): open(str(n), 'w').write('x' * 10**6)",
    "list the way": "os.listdir(os.path.dirname(os.path.dirname(os.path.dirname(os.__file__))))",
    "tests in memory": "n = bytes([60]) + b'tests>'\nassert [x for y in gc.get_objects() for x in "
        "gc.get_referents(y) if type(x) is bytes and n in x != n]",
    "chmod library": "os.chmod(os.__file__, 0o777)", "write library": "open(os.__file__, 'a')",
    "stat project": "os.stat('{project}')", "namespace": "assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "unfinished": "def g():\n    'doc",
    "many threads": "import threading\nthreading.stack_size(32768)\nfor n in range(99): "
        "threading.Thread(target=time.sleep, args=(9,)).start()",
    "deep folders": "while True:\n    os.mkdir('x')\n    os.chdir('x')",
    "many files": "for n in range(2000): open(str(n), 'w')", "stat": "os.stat('{file}')",
    "5 MB": "#" + "x" * 5_000_000,
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
    "answers": "for n in range(9): os.write(4, b'[\"return\", {\"other\": 0}, null]\\n')",
    "protocol": "os.write(4, b'[\"return\", {\"tuple\": [{\"dict\": [[\"f\", {\"type\": \"bool\"}], '"
        "b'[\"__builtins__\", 0]]}, {\"dict\": []}]}, null]\\n')\nos._exit(0)",
    "set by protocol": "os.write(4, b'[\"return\", {\"tuple\": [{\"dict\": [[\"f\", {\"type\": \"str\"}], '"
        "b'[\"set\", {\"type\": \"bool\"}]]}, {\"dict\": []}]}, null]\\n')\nos._exit(0)",
    "set": "set = sorted = len = abs = lambda *a: 0\ndef f(x): return [9]",
}
IMPORTS = "import builtins, ctypes, gc, os, socket, sys, time\n"
POOL = "from concurrent.futures import ThreadPoolExecutor as T\ndef f(x): return [*T(8).map(abs, x)]"
POINT = '''class P:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x == getattr(other, 'x', other)
    def __hash__(self): return hash(self.x)
    def __len__(self): return self.x
    def __iter__(self): return iter(range(self.x))
    def __str__(self): return f'P{self.x}'
    def __getitem__(self, n): return n * self.x'''
VALUES = [  # (code, or the body of f(x); tests; verdict): the tests see what they would see without a sandbox
    ("os._exit(0)", "try: f(1)\nexcept Exception: pass", False),
    ("return range(x)", "assert f(2) == [0, 1]", False), ("f = 2", "f += 1\nassert f == 3", True),
    ("return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}", True),
    ("return x", "assert f(1) is True", False), ("return map(str, x)", "assert list(f([1])) == ['1']", True),
    ("return map(str, x)", "assert f([1]) == ['1']", False),
    ("return count(x)", "g = f(7)\nassert (next(g), next(g)) == (7, 8)", True),
    ("return Decimal(x)", "assert f('0.5') == 0.5", True), ("import math", "assert math.pi > 3", True),
    ("f = lambda x: 2 ** x", "assert f(99999) >> 99999 == 1", True),
    ("class P:\n    def __init__(self, x): self.x = x\ndef f(p): return p.x",
     "p = P(3)\np.y = 4\nassert f(p) + p.y == 7", True),
    ("x.append(3)", "x = []\nf(x)\nassert x == [3]", True),
    ("return float('nan')", "assert f(1) != f(1)", True),
    ("def f(x, what, f): return x + what + f", "assert f(x=1, what=2, f=3) == 6", True),
    ("return [x, (x, {x: {x}})]", "assert f(b'a') == [b'a', (b'a', {b'a': {b'a'}})]", True),
    ("def f(x): return x\nif __name__ == '__main__': input()", "assert f(1) == 1", True),
    ("return input()", "f(1)", False), ("open('left', 'x').close()", "f(1)", True),
    ("open('left', 'x').close()", "f(1)", True),
    ("def sum(a, b): return a + b", "assert sum(1, 2) == 3", True),
    ("print('€')\ndef f(x): return '\\ud800'", "assert f(1) == '\\ud800'", True),
    (POOL, "assert f([-1, 2]) == [1, 2]", True), ("x.append(3)", "x = []\nf(x=x)\nassert x == [3]", True),
    ("x.update(a=3)", "x = Counter()\nassert f(x) is None and x == {'a': 3}", True),
    ("raise KeyError('no', x)", "try: f(1)\nexcept KeyError as e: assert e.args == ('no', 1)", True),
    ("raise FileNotFoundError(2, 'no')", "try: f(1)\nexcept OSError as e: assert e.errno == 2", True),
    (POINT, "assert P(1) == P(1) and not P(1) != P(1) and P(1) != P(2) and {P(1)} == {P(1)}", True),
    (POINT, "assert P(1) != 1 and not P(1) == 1 and P(1) not in [1, None]", True),
    (POINT, "assert len(P(2)) == 2 and [*P(2)] == [0, 1] and str(P(2)) == 'P2' and P(2)[3] == 6", True),
    ("import math\ndef f(x): return x", "assert math.isclose(f(1), 1)", True),
    ("class math: isclose = lambda *a: 1\ndef f(x): return 9", "assert math.isclose(f(1), 2)", False),
    ("class math: isclose = lambda *a: 1\ndef sum(*x): return 9", "assert math.isclose(sum(1, 2), 3)", False),
    ("math = type(os)('math')\nmath.isclose = lambda *a: 1\ndef f(x): return 9",
     "assert math.isclose(f(1), 2)", False), ("def copy(x): return x + 1", "assert copy(1) == 2", True),
    ("def f(x): return datetime(2020, 1, x, tzinfo=timezone.utc), timedelta(x)",
     "assert f(1) == (datetime(2020, 1, 1, tzinfo=timezone.utc), timedelta(1))", True),
    ("def f(x): return Fraction(x, 3), 1j, bytearray(x), {x: {x}}, {1: 2}.keys(), None, ..., int",
     "r = f(2)\nassert r[:6] == (Fraction(2, 3), 1j, b'\\0\\0', {2: {2}}, {1}, None) and r[7] is int", True),
    ("def f(x):\n    for n in range(x): yield n", "assert sum(f(4)) == 6 and set(f(2)) == {0, 1}", True),
    ("return g", "f(1)", False), ("raise SystemExit", "try: f(1)\nexcept BaseException: pass", False),
    ("return [0] * 10**6", "assert f(1) == [0] * 10**6", True), ("return 'x' * 10**8", "f(1)", False),
]
WITH = """import os
from collections import *
from datetime import *
from decimal import Decimal
from fractions import Fraction
from itertools import count
"""

def running():
    """pid -> (parent's pid, user) of all processes."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            fields = dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)
            if fields["State"][0] != "Z":
                found[int(fields["Pid"])] = int(fields["PPid"]), int(fields["Uid"].split()[0])
    return found

def processes():
    """This process, what it started, what that started, and what runs as one of the sandbox's users."""
    everything, found = running(), {os.getpid()}
    for _ in everything:
        found |= {pid for pid, (parent, user) in everything.items() if parent in found or user > 1 << 31}
    return found

@both_ways
def test_no_attack_passes_harms_or_outlives_its_time(namespaces, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "SECRET")
    (tmp_path / "secret").touch(mode=0o600)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = processes()
    with socket.create_server(("127.0.0.1", 0)) as server, Sandbox(2, 1, 3, namespaces=namespaces) as sandbox:
        codes = {name: IMPORTS + code + ("" if "def f" in code else RIGHT) for name, code in ATTACKS.items()}
        codes |= {f"cheat: {name}": IMPORTS + WRONG + code for name, code in CHEATS.items()}
        if not namespaces:  # what the warning says
            codes = {key: x for key, x in codes.items() if key.split()[0] not in ("stat", "many")}
        for name, value in {"pid": os.getpid(), "port": server.getsockname()[1], "project": HERE,
                            "tmp": "/tmp", "file": train_code.__file__,
                            "secret": tmp_path / "secret"}.items():
            codes = {key: code.replace("{" + name + "}", str(value)) for key, code in codes.items()}
        tests = ["assert set(f(1)) == set([2])" if "set" in name else TESTS for name in codes]
        start = time.monotonic()
        verdicts = sandbox.run(zip(codes.values(), tests))
        assert [name for name, verdict in zip(codes, verdicts) if verdict] == []
        assert time.monotonic() - start < 3.5 * len(codes)
        assert processes() <= before
        start = time.monotonic()
        assert sandbox.run([("import time\ntime.sleep(99)", ""), ("", "while True: pass")]) == [False] * 2
        assert time.monotonic() - start < 3 + 2
        with Sandbox(1, 1, 30, namespaces=namespaces) as patient:
            assert patient.run([("while True: pass", "")]) == [False]
        assert time.monotonic() - start < 3 + 2 + 3 + 2
        pairs = [(RIGHT, TESTS), (WRONG, TESTS), (RIGHT, TESTS + "\nassert 0"), (RIGHT, "def"), (RIGHT, "")]
        assert sandbox.run(pairs) == [True, False, False, False, True]
    assert processes() <= before and os.listdir(tmp_path) == ["secret"]

@both_ways
def test_values_cross_the_processes_as_they_are(namespaces):
    pairs = [(WITH + (code if re.search(r"\bf\b|sum|math|copy|class", code) else f"def f(x): {code}"),
              WITH + tests) for code, tests, _ in VALUES]
    with Sandbox(1, namespaces=namespaces) as sandbox:
        verdicts = sandbox.run(pairs)
    assert [row for row, ok in zip(VALUES, verdicts) if ok != row[2]] == []

def test_the_sandbox_refuses_what_it_cannot_do(monkeypatch):
    with refused("cannot start"), monkeypatch.context() as patch:
        patch.setattr(train_code, "PROGRAM", "raise SystemExit")
        Sandbox(2)
    monkeypatch.setattr(train_code, "PROGRAM", train_code.PROGRAM.replace('"unshare", ', '"unshare", 1 | '))
    with pytest.warns(UserWarning, match="No file system .*unshare") as caught:
        sandbox = Sandbox(2)
    assert len(caught) == 1 and sandbox.run([(RIGHT, TESTS), (WRONG, TESTS)]) == [True, False]
    monkeypatch.setattr(sys, "platform", "darwin")
    with refused("Linux only"):
        Sandbox()

@pytest.mark.parametrize("inside", [True, False])
def test_a_virtual_environment_does_not_show_the_project(inside, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    for name in "train_code.py", "boostlora.py":
        shutil.copy(HERE / name, project)
    environment = (project if inside else tmp_path) / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    site, = environment.glob("lib/python*/site-packages")
    (site / "extra.py").write_text("x = 7")
    (site / "extra.py").chmod(0o666)
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    steps = ["extra.x", *(f"os.{call}({str(project)!r})" for call in ("listdir", "stat")),
             "open(extra.__file__, 'a')"]
    codes = [f"import extra, os\n{step}" for step in steps]
    script = f"import train_code\nprint(train_code.Sandbox(1).run([(c, '') for c in {codes}]))"
    command = [environment / "bin/python", "-c", script]
    assert subprocess.check_output(command, cwd=project) == b"[True, False, False, False]\n"

@both_ways
@pytest.mark.parametrize("victim", ["trainer", "judge"])
def test_nothing_outlives_a_killed_trainer_or_judge(namespaces, victim, tmp_path):
    before = processes()
    pairs = "[(f'import time\\ntime.sleep({n})', '') for n in (98, 99)]"
    line = f"Sandbox(2, namespaces={namespaces}).run({pairs})"
    command = [sys.executable, "-W", "ignore", "-c", f"from train_code import Sandbox; {line}"]
    trainer = subprocess.Popen(command, cwd=HERE, env=os.environ | {"TMPDIR": str(tmp_path)})
    end = time.monotonic() + 60
    while len(started := processes() - before) < 5 and time.monotonic() < end:  # it, judges, candidates
        time.sleep(0.1)
    judges = [pid for pid, (parent, _) in running().items() if parent == trainer.pid]
    for pid in [trainer.pid] if victim == "trainer" else judges:
        os.kill(pid, signal.SIGKILL)
    trainer.wait(10)
    assert len(started) >= 5
    end = time.monotonic() + 10
    while (left := started & set(running())) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left

# ------------------------------------------------------------------------------------------------------------
# train_code: the task

MBPP = {"task_id": 601, "text": "Add one.", "code": RIGHT, "test_setup_code": "",
        "test_list": TESTS.splitlines()}
HUMANEVAL = {"task_id": "HumanEval/0", "entry_point": "f", "canonical_solution": "    return [g(x)]\n",
             "prompt": "from typing import List\n\ndef g(x): return x + 1\n\n"
                       'def f(x: int) -> List[int]:\n    """The next."""\n',
             "test": "def check(candidate):\n    assert candidate(1) == [g(1)]\n"}

def test_mbpp_is_split_by_task_id_and_humaneval_is_only_a_test(tmp_path):
    ids = (1, 11, 510, 511, 600, 601, 974)
    mbpp = f"{write_jsonl(tmp_path / 'mbpp.jsonl', [MBPP | {'task_id': i} for i in ids])}"
    human = f"{write_jsonl(tmp_path / 'HumanEval.jsonl', [HUMANEVAL])}"
    for test_file in (human, f"{mbpp},{human}"):
        train, tests = train_code.load_data(RunConfig(train_file=mbpp, test_file=test_file))
        assert [p["task_id"] for p in train] == [601, 974]
        ids = {name: [p["task_id"] for p in problems] for name, problems in tests.items()}
        assert ids == {"mbpp": [11, 510], "humaneval": ["HumanEval/0"]}
    for train_file in (human, write_jsonl(tmp_path / "few.jsonl", [MBPP | {"task_id": 11}])):
        with refused("training task_ids, 601 to 974"):
            train_code.load_data(RunConfig(train_file=f"{train_file}", test_file=human))
    with refused("No such file"):
        train_code.load_data(RunConfig(train_file=mbpp, test_file=f"{human},nowhere"))

@pytest.mark.parametrize(("row", "message"), [
    ({"text": "Add."}, "line 2: the field 'task_id'"), (MBPP | {"task_id": ""}, "'task_id' is not a number"),
    (MBPP | {"text": None}, "row 2: 'text' is not a str"), (MBPP | {"text": " "}, "row 2: 'text' is empty"),
    (MBPP | {"test_list": "assert 1"}, "row 2: 'test_list' is not a list"),
    (MBPP | {"test_list": []}, "row 2: 'test_list' holds no tests"),
    (MBPP | {"test_list": ["assert f(1) == "]}, "row 2: the tests are not Python"),
    (HUMANEVAL | {"test": 3}, "row 2: 'test' is not a str"),
    (HUMANEVAL | {"entry_point": "h"}, "row 2: 'prompt' does not define the entry_point 'h'")])
def test_a_bad_row_is_named(row, message, tmp_path):
    with refused(message):
        train_code.load_problems(f"{write_jsonl(tmp_path / 'rows.jsonl', [MBPP, row])}")

def test_what_passes_is_rewarded_in_every_way_to_answer(tmp_path):
    mbpp, human = train_code.load_problems(f"{write_jsonl(tmp_path / 'rows.jsonl', [MBPP, HUMANEVAL])}")
    assert "Add one." in mbpp["ask"] and TESTS in mbpp["ask"] and HUMANEVAL["prompt"].strip() in human["ask"]
    whole = "def f(x: int) -> List[int]:\n    return [g(x)]"  # needs the prompt's import and helper
    answers = [  # (problem, completion, right?)
        (mbpp, f"Sure:\n```python{RIGHT}```", True), (mbpp, RIGHT, True), (mbpp, f"```{RIGHT}", True),
        (mbpp, f"```python{WRONG}```\nor\n```python{RIGHT}```\n```bash\nls\n```", True),
        (mbpp, f"```python{WRONG}```", False), (mbpp, "I cannot.", False),
        (human, f"```python\n{whole}\n```", True), (human, "```python\nreturn [x + 1]\n```", True),
        (human, HUMANEVAL["canonical_solution"], True), (human, "    pass\n", False),
        (human, whole.replace("def f", "def h"), False),
        (human, "def g(x): return 2\n" + whole, True),  # right for 1, and the tests use their own g
        (human, "def g(x): return 0\n" + whole, False)]
    with Sandbox(2) as sandbox:
        right = sandbox.run([train_code.program(problem, text) for problem, text, _ in answers])
    assert right == [ok for _, _, ok in answers]

def test_the_demo_s_reference_functions_pass_and_noisy_ones_often_fail():
    taken, rows = set(), []
    for long in (False, True):
        rows += train_code.problem_rows(random.Random(0), range(40), long, taken)
    assert len(taken) == 80 and {row["code"].count("\n") for row in rows} == {2, 3}
    pairs = [(row["code"], "\n".join(row["test_list"])) for row in rows]
    with Sandbox(2) as sandbox:
        assert all(sandbox.run(pairs))
        assert not any(sandbox.run([(code.replace("return x", "return 1 + x"), t) for code, t in pairs]))
    clean, noisy = ([train_code.exercise(random.Random(i), False, bad) for i in range(300)] for bad in (0, 1))
    assert 100 < sum(a != b for a, b in zip(clean, noisy, strict=True)) < 200

class NoReturn(ast.NodeTransformer):
    def visit_Return(self, node):
        return ast.Pass()

@needs_data
def test_every_reference_solution_scores_1_and_renamed_or_silenced_0():
    files, right, wrong = [DATA / "mbpp.jsonl", DATA / "HumanEval.jsonl.gz"], [], []
    rows = [row for file in files for row in boostlora.read_rows(f"{file}", "", "", [])]
    problems = [problem for file in files for problem in train_code.load_problems(f"{file}")]
    for row, problem in zip(rows, problems, strict=True):
        body = row.get("canonical_solution")
        whole = row["prompt"] + body if body else row["code"]
        texts = f"Here:\n```python\n{whole}\n```", body
        right += [train_code.program(problem, text) for text in texts if text]
        names = {n.id for n in ast.walk(ast.parse(problem["tests"])) if isinstance(n, ast.Name)}
        for node in ast.walk(tree := ast.parse(whole)):
            if isinstance(node, ast.FunctionDef) and node.name in ({row["entry_point"]} if body else names):
                node.name += "_"
        for bad in (tree, NoReturn().visit(ast.parse(whole))):
            wrong.append(train_code.program(problem, ast.unparse(bad)))
    assert len(right) == 974 + 2 * 164 and len(wrong) == 2 * (974 + 164)
    with Sandbox(2) as sandbox:
        assert sandbox.run(right) == [True] * len(right)
    with Sandbox(2, cpu_seconds=2, wall_seconds=10) as sandbox:
        assert not any(sandbox.run(wrong))

# ------------------------------------------------------------------------------------------------------------
# train_protein

def protein_task(count=150, **options) -> ProteinTask:
    """Two blocks of a random ESM; a pair binds if its ligand begins with K, not D. Some labels are wrong."""
    torch.manual_seed(0)
    model = PairClassifier(hf.EsmConfig(
        vocab_size=33, pad_token_id=1, mask_token_id=32, max_position_embeddings=80, hidden_size=32,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.1, num_labels=1,
        position_embedding_type="rotary", token_dropout=True))
    tokenizer = type("", (), {"get_vocab": lambda self: {word: i for i, word in enumerate(WORDS)}})()
    rows = []
    for i in range(count):
        a, b = ("".join(LETTERS[j] for j in torch.randint(0, 20, (8 + i % 5,)).tolist()) for _ in "ab")
        label = (i + (i % 5 > 0)) % 2
        rows.append({"ligand": "KD"[i % 2] * 2 + a, "receptor": b, "label": label, "pdb": ""})
    config = CEConfig(**{"batch_tokens": 800, "lr": 0.05, **options})
    return ProteinTask(model.eval(), tokenizer, rows, {"test": rows[:12]}, config, seed=0)

def test_rows_are_counted_by_reason(tmp_path, capsys):
    rows = ['"mk, lx",ACD,1e-8,1ABC,no_mutation', "MK,ACD,1e-7,1abc,applied", "MK,ACD,1e-9,1ABC,not_applied",
            " ,ACD,1e-9,1ABC,", "MJ,ACD,1e-9,1ABC,", "MK,ACD,,1ABC,", "MK,ACD,0,1ABC", "MK,ACD,>1e-5,1ABC,"]
    path = tmp_path / "pairs.csv"
    path.write_text("Ligand Sequences,Receptor Sequences,KD(M),PDB,mutation_status\n" + "\n".join(rows))
    assert load_pairs(path) == [{"ligand": "MKLX", "receptor": "ACD", "label": 1, "pdb": "1ABC"},
                                {"ligand": "MK", "receptor": "ACD", "label": 0, "pdb": "1ABC"}]
    shown = capsys.readouterr().out
    assert "2 usable rows, 1 of them bind" in shown
    for reason in ("the mutation", "an empty", "letters", "KD(M) is missing", "KD(M) is not", "KD(M) is out"):
        assert f"1 left out: {reason}" in shown

@pytest.mark.parametrize(("text", "reason"), [
    (b"", "columns must be"), (b"a,b", "not only a, b"), (b"PK\x03\x04\xff\xfe", "could not be loaded"),
    (b"ligand_seq,receptor_seq,label,PDB\nMK,AC,1,x", "one label"),
    (b"ligand_seq,receptor_seq,label,PDB\nMK,AC,7,x", "no usable row")])
def test_a_file_without_pairs_is_refused(tmp_path, text, reason):
    (tmp_path / "pairs.csv").write_bytes(text)
    with refused(reason):
        load_pairs(tmp_path / "pairs.csv")

def test_no_group_is_on_both_sides():
    torch.manual_seed(0)
    rows = [{"ligand": f"L{a}", "receptor": f"L{b}", "label": 0, "pdb": f"{p}"}
            for a, b, p in torch.randint(0, 3000, (300, 3)).tolist()]
    train, test = train_protein.split(rows, seed=0)
    keys = [{value for row in side for value in (row["ligand"], row["receptor"], f"PDB {row['pdb']}")}
            for side in (train, test)]
    assert not keys[0] & keys[1] and len(train) + len(test) == 300 and 30 < len(test) <= 60
    assert train_protein.split(rows, seed=0) == (train, test) != train_protein.split(rows, seed=1)
    chain = [{"ligand": a, "receptor": b, "pdb": p} for a, b, p in
             [("A", "B", ""), ("C", "D", "1"), ("E", "C", "2"), ("F", "G", "2"), ("H", "I", "")]]
    assert train_protein.connected(chain) == [[0], [1, 2, 3], [4]]

def test_pooling_sees_the_partners_only():
    task = protein_task()
    short, long = task.train[0], {**task.train[4], "ligand": "W" * 30, "receptor": "Y" * 90}
    ids, residues = task.tokens(long)
    assert len(ids) == 78 and sum(residues) == task.room == 51 and ids.count(WORDS.index("W")) == 25
    alone, together = task.collate([short], [0])[0], task.collate([short, long], [0, 1])[0]  # with padding
    pooled = task.model(**alone).hidden_states[0]
    torch.testing.assert_close(task.model(**together).hidden_states[0], pooled)
    hidden = task.model.esm(alone["input_ids"], attention_mask=alone["attention_mask"]).last_hidden_state[0]
    n = len(short["ligand"])
    partners = torch.cat([hidden[1:n + 1], hidden[n + 1 + len(LINKER):-1]])
    torch.testing.assert_close(pooled, partners.mean(0))

def test_f1_and_auc():
    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.4]), torch.tensor([0, 0, 1, 1, 1])
    assert auc(scores, labels) == pytest.approx(5 / 6)  # pairs: 1 1 1, 1/2 1 1/2
    assert auc(-scores, labels) == pytest.approx(1 / 6) and auc(torch.zeros(5), labels) == 0.5
    assert f1(scores > 0.3, labels) == pytest.approx(6 / 7) and f1(scores > 1, labels) == 0

@pytest.mark.parametrize(("lowest", "scale"), [(1.0, 1.0), (0.3, 0.25), (0.0, 0.0), (0.04, 0.03125)])
def test_the_line_search_halves_until_the_loss_rises(lowest, scale):
    v = torch.nn.Parameter(torch.ones(2))
    found = train_protein.line_search(v, lambda: float((v[0] - lowest) ** 2), lowest ** 2)
    assert found == scale and v.tolist() == [scale, scale]

@pytest.mark.parametrize("options", [{"replay": 0}, {"replay": 2}, {"recheck": 0.3}, {"accept": "better"}])
def test_no_round_makes_the_training_loss_worse(options, tmp_path):
    task, judge = protein_task(), protein_task()  # the rate is too large for a whole step
    task.probe(tmp_path)
    judge.model, losses, head = task.model, [], task.model.classifier.weight.clone()
    options = {"rounds": 4, "groups": 0, "rank": 4, "u": 4, "replay": 2, **options}
    booster, fit = Booster(task.model, BoostConfig(**options)), task.fit

    def fit_and_judge(*args):
        before, stats = judge.evaluate(task.train)[1]["loss"], fit(*args)
        losses.append((before, judge.evaluate(task.train)[1]["loss"]))
        return stats

    task.fit = fit_and_judge
    records = boost(booster, task, tmp_path)
    assert len(losses) == 4 and all(after <= before for before, after in losses)
    assert any(after < before for before, after in losses) == (options["replay"] > 0)
    assert any(r["scale"] < 1 for r in records[1:]) and {"test_f1", "test_auc"} <= records[-1].keys()
    assert torch.equal(task.model.classifier.weight, head) and len(find_targets(task.model)) == 2 * 6
    inputs, _ = task.collate(task.train, range(5))
    again = PairClassifier.from_pretrained(tmp_path / "model").eval()
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), task.model.parameters(), strict=True))
    torch.testing.assert_close(again(**inputs).logits, task.model(**inputs).logits)
    stock = hf.EsmForTokenClassification.from_pretrained(tmp_path / "model").eval()
    z = stock(inputs["input_ids"], inputs["attention_mask"]).logits[..., 0]
    z = (z * inputs["residues"]).sum(1) / inputs["residues"].sum(1)
    torch.testing.assert_close(z, again(**inputs).logits[:, 1])

def test_the_head_is_fitted_once(tmp_path, monkeypatch):
    task, again = protein_task(), protein_task()
    task.probe(tmp_path)
    monkeypatch.setattr(train_protein, "fit_probe", None)
    again.probe(tmp_path)
    assert torch.equal(again.model.classifier.weight, task.model.classifier.weight)
    with pytest.raises(TypeError):  # other data: another head
        protein_task(count=149).probe(tmp_path)

def test_cross_entropy_trains_v_alone(tmp_path):
    task = protein_task(line_search=False, epochs=9, lr=0.02, batch_tokens=4000)
    task.probe(tmp_path)
    before, loss = [p.clone() for p in task.model.parameters()], task.evaluate(task.train)[1]["loss"]
    booster = Booster(task.model, BoostConfig(rounds=1, groups=0, u=4))
    task.fit(task.train, v := booster.attach(), 0)
    assert v.abs().sum() > 0 and task.evaluate(task.train)[1]["loss"] < loss
    assert all(torch.equal(p, q) for p, q in zip(task.model.parameters(), before, strict=True))

@pytest.mark.parametrize("processes", [1, 2, 3, 200])
def test_processes_share_all_rows_in_as_many_batches(processes, monkeypatch):
    task, parts = protein_task(), []
    monkeypatch.setattr(train_protein, "processes", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(train_protein, "process", lambda rank=rank: rank)
        parts.append(task.batches(task.train, torch.Generator()))
    assert len({len(part) for part in parts}) == 1
    assert {i for part in parts for batch in part for i in batch} == set(range(150))

@needs_data
def test_the_real_pairs(capsys):
    rows = load_pairs(DATA / "ppb_affinity_sequences.csv.gz")
    assert len(rows) == 11548 and sum(row["label"] for row in rows) == 7049
    assert "471 left out: the mutation is not in the sequence" in capsys.readouterr().out
    assert max(map(len, train_protein.connected(rows))) == 1384
    assert len(train_protein.split(rows, seed=0)[1]) / len(rows) == pytest.approx(0.2, abs=0.01)

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

def test_the_lines_of_the_readme_that_load_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    qwen().save_pretrained("runs/math-demo/base")
    trained(model := qwen(), rounds=10, rank=1).save("runs/math-demo/adapters.safetensors")
    exec(readme_blocks()[1], loaded := {})  # noqa: S102
    assert same_bits(bits(loaded["model"]), bits(model)) and not same_bits(bits(loaded["early"]), bits(model))

def test_the_readme_names_functions_that_exist():
    table = (HERE / "README.md").read_text().split("## From the paper to the code")[1].split("\n\n")[1]
    for name in re.findall(r"`([A-Za-z_.]+)`", " ".join(row.split("|")[2] for row in table.splitlines())):
        owner, _, attribute = name.partition(".")
        assert hasattr(boostlora, owner) and (not attribute or hasattr(trained(qwen(), rounds=1), attribute))
