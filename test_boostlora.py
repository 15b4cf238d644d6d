"""The paper's claims and the README's promises as tests, in the order of the files they test.

    pytest                                 some minutes on 2 cores: one runs the demo, meanwhile
    BOOSTLORA_DATA=folder pytest           also on the real data sets, from the files in that folder"""

# isort: off
import ast, contextlib, dataclasses, inspect, itertools, json, math, os, random, re, shutil, signal, socket
import subprocess, sys, tempfile, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, tokenizers, torch, transformers as hf
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, AutoTokenizer

import boostlora, train_code, train_math, train_protein
from boostlora import (
    BoostConfig, Booster, CEConfig, FullFineTuning, GRPOConfig, InputError, RunConfig, TextTask, TinyLoRA,
    batch_size, boost, cross_entropy, find_targets, generate, generator, group_advantages, grpo, svd_basis)
from train_code import Sandbox
from train_math import grade
from train_protein import PairClassifier, ProteinTask, load_pairs

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
    return qwen(dtype, kind=hf.EsmForSequenceClassification, position_embedding_type="rotary",
                mask_token_id=30, pad_token_id=1, token_dropout=False, **options)

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

# Settings, basis, targets, layer ----------------------------------------------------------------------------

@pytest.mark.parametrize(("kind", "name", "value"), [
    (BoostConfig, "rank", 0), (BoostConfig, "replay", -2), (BoostConfig, "basis", "bottom"),
    (GRPOConfig, "group_size", 1), (GRPOConfig, "temperature", 0.0), (GRPOConfig, "lr", math.inf),
    (GRPOConfig, "lr", math.nan), (CEConfig, "epochs", 0), (RunConfig, "dtype", "int8"),
    (BoostConfig, "rounds", 2.0), (BoostConfig, "seed", None), (GRPOConfig, "lr", "1e-3")])  # as YAML reads
def test_flags_out_of_range_are_refused_by_name(kind, name, value):
    with refused(f"--{name} {value!r}: must be (one of|at least)"):
        kind(**{name: value})

@pytest.mark.parametrize("shape", [(200, 96), (96, 200), (128, 128)])
@pytest.mark.parametrize("decay", [100.0, 1.5])  # of the spectrum, from the first to the 40th
def test_svd_basis_agrees_with_float64_svd(shape, decay):
    side, k, stream = min(shape), 40, generator("svd", shape)
    left, right = (torch.linalg.qr(torch.randn(n, side, generator=stream).double()).Q for n in shape)
    weight = (left * decay ** (-torch.arange(side) / 39.0) @ right.T).float()
    U, S, V = svd_basis(weight, k)
    exact = torch.linalg.svd(weight.double(), full_matrices=False)
    assert U.dtype == S.dtype == V.dtype == fp32 and (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    assert ((S - exact.S[:k]).abs() / exact.S[:k]).max() < 1e-6
    sign = exact.U[:, :k].gather(0, exact.U[:, :k].abs().argmax(0, keepdim=True)).sign()
    for vectors, theirs in ((U, exact.U), (V, exact.Vh.T)):  # another machine's are the same
        assert (vectors.T @ vectors - torch.eye(k)).abs().max() < 1e-5
        assert (vectors - sign * theirs[:, :k]).abs().max() < 1e-6
    for bad in (torch.ones(shape), weight / 0, weight[:k - 1]):
        with refused("the weight .* (not finite|no 40|fewer than 40)"):
            svd_basis(bad, k)

def test_targets_are_the_linears_of_the_language_model_s_blocks():
    names = list(find_targets(qwen()))
    assert len(names) == 2 * 7 and names[0] == "model.layers.0.self_attn.q_proj" and "lm_head" not in names
    assert len(find_targets(esm())) == 2 * 6 and "esm.encoder.layer.1.output.dense" in find_targets(esm())
    seeing, many = nn.Module(), nn.ModuleList(nn.Identity() for _ in range(9))  # a vision tower and experts
    seeing.tower, seeing.text = nn.ModuleList(nn.Linear(4, 4) for _ in range(99)), qwen()
    seeing.get_decoder, seeing.text.model.layers[0].experts = lambda: seeing.text.model, many
    seeing.text.model.ears = nn.ModuleList(nn.Linear(4, 4) for _ in range(99))  # as in Phi-4-multimodal
    assert list(find_targets(seeing)) == [f"text.{name}" for name in names]
    with refused("GPT2LMHeadModel has no .*Conv1D"):
        find_targets(hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=31)))

def test_the_layer_is_the_equation():
    U, S, V = svd_basis(torch.randn(7, 5, generator=generator(1)), 2)
    P, x = torch.randn(3, 2, 2, generator=generator(2)), torch.randn(6, 5, generator=generator(4))
    v = nn.Parameter(torch.randn(4, 3, generator=generator(3)))
    layer = TinyLoRA(U, S, V, P, v, group=1)
    for _ in range(2):
        expected = U @ torch.diag(S) @ sum(v[1, i] * P[i] for i in range(3)) @ V.T
        with torch.no_grad():  # the folded copy must follow
            assert torch.allclose(layer(x), x @ expected.T, atol=1e-5)
        assert torch.allclose(layer.delta(), expected, atol=1e-6)
        assert torch.allclose(layer(x), x @ expected.T, atol=1e-5)
        v.detach().mul_(-2)

# Booster ----------------------------------------------------------------------------------------------------

def test_what_does_not_fit_is_refused_before_the_basis(monkeypatch):
    monkeypatch.setattr(boostlora, "svd_basis", None)
    linear = find_targets(whole := qwen())["model.layers.1.mlp.up_proj"]
    linear.weight = nn.Parameter(torch.eye(32).char(), requires_grad=False)
    for model, config, message in [
            (qwen(), {"rank": 3, "rounds": 6}, "layers.0.self_attn.k_proj has 16 singular triplets, not 18"),
            (qwen(), {"rank": 1, "groups": 999}, "--groups 999.*14 target"), (whole, {}, "int8.*unquantised"),
            (qwen(), {"basis": "top", "rank": 17}, "16 .* not 17")]:
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
        v.data.zero_()  # its own: what was merged is a copy
        assert booster.vectors[t].any()
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
    for _ in range(2):
        for drop in booster.write, booster.attach:
            draw(booster.attach(), 99)  # dropped, as the weights are written, or another is attached
            assert drop() is booster.v  # None, or zeros
            assert torch.equal(logits(booster.model), logits(qwen()))
        assert not booster.v.any()
        booster.merge()
        with refused("no adapter"):
            booster.merge()
    assert len(booster.vectors) == 2 and same_bits(bits(booster.model), bits(qwen()))
    with refused("all 2 rounds"):
        booster.attach()

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
        U, _, V = rotate.basis[name]
        rotated, moved = ([U @ booster.core(name, [t]) @ V.T for t in range(3)]
                          for booster in (rotate, decayed))
        for one, other in itertools.combinations(rotated, 2):
            assert max((one.T @ other).abs().max(), (one @ other.T).abs().max()) < 1e-5
        for one, other in zip(rotated, moved, strict=True):
            assert torch.allclose(*(torch.linalg.svdvals(x)[:2] for x in (one, other)), atol=1e-5)
            assert torch.allclose(U[:, :2] @ (U[:, :2].T @ other), other, atol=1e-5)

@pytest.mark.parametrize("dtype", [fp32, bf16, fp16])
def test_merging_is_one_rounding_of_targets_and_the_summary_tells_what_was_lost(dtype):
    base = bits(model := qwen(dtype, tie_word_embeddings=True))
    booster = trained(model, rounds=2, scale=0.01)
    deltas = {f"{name}.weight": booster.delta(name) for name in booster.targets}
    kept = 0.0
    for name, p in model.named_parameters():
        merged = (base[name].float() + deltas[name]).to(dtype) if name in deltas else base[name]
        assert torch.equal(p, merged) and not p.requires_grad
        kept += float(((p.float() - base[name].float()) * deltas[name]).sum()) if name in deltas else 0
    assert not any(m._forward_hooks for m in model.modules())
    squares, summary = sum(float(delta.square().sum()) for delta in deltas.values()), booster.summary()
    assert summary["total_norm"] == pytest.approx(squares ** 0.5, rel=1e-4)
    assert summary["fidelity"] == pytest.approx(kept / squares, rel=1e-4)
    assert (summary["fidelity"] < 0.99) == (dtype == bf16)

@pytest.mark.parametrize("dtype", [fp32, bf16])
def test_rollback_save_load_give_the_same_bits(tmp_path, dtype):
    path, history = tmp_path / "adapters.safetensors", [bits(qwen(dtype))]
    booster = Booster(model := qwen(dtype), BoostConfig(rounds=np.int64(3), u=3, groups=4))
    for t in range(3):
        draw(booster.attach(), t)
        model.requires_grad_(True)  # as a program of one's own may have left it
        booster.merge()
        history.append(bits(model))
    booster.save(path)
    loaded = [Booster.load(qwen(dtype), path, rounds=rounds) for rounds in range(4)]
    assert all(same_bits(bits(one.model), weights) for one, weights in zip(loaded, history, strict=True))
    shrunk = Booster.load(qwen(dtype), path, weights=[1, 0.5, 0])
    for name in shrunk.targets:
        half = (loaded[1].delta(name) + loaded[2].delta(name)) / 2
        assert torch.allclose(shrunk.delta(name), half, atol=1e-5)
    for back, left in ((1, 2), (3, 0)):
        booster.rollback(back)
        assert same_bits(bits(model), history[left]) and len(booster.vectors) == 3
    with refused("there are 3 rounds"):
        booster.rollback(4)

def test_a_file_that_does_not_fit_is_refused(tmp_path):
    path, booster = tmp_path / "adapters.safetensors", trained(qwen())
    booster.save(path)
    whole = path.read_bytes()
    assert len(whole) < 20_000
    for model, options, message in [
            (qwen(seed=1), {}, "another base model"), (qwen(bf16), {}, "another --dtype"),
            (qwen(), {"rounds": 4}, "3 rounds: 4 of"), (qwen(), {"weights": [1.0]}, "3 .* 1 weights")]:
        with refused(message):
            Booster.load(model, path, **options)
    with refused("is of .*seed=0"):
        Booster(qwen(), dataclasses.replace(booster.config, seed=1)).resume(path)
    for content, message in [(whole[:-10], "damaged"), (b"", "damaged"),
                             (whole.replace(b"boostlora", b"postflora"), "foreign")]:
        path.write_bytes(content)
        with refused(message):
            Booster.load(qwen(), path)

@pytest.mark.parametrize("make", [qwen, esm])
def test_the_lora_export_is_the_exact_sum(tmp_path, recwarn, make):  # peft warns
    booster = trained(model := make())
    booster.export_lora(tmp_path / "lora")
    tensors = boostlora.safetensors.torch.load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name in booster.targets:
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert torch.allclose(B @ A, booster.delta(name), atol=1e-6) and A.shape[0] == 2 * 3
    peft = pytest.importorskip("peft", reason="peft is not installed: its loader is not tried on the export")
    lora = peft.PeftModel.from_pretrained(make(), tmp_path / "lora")
    assert torch.allclose(logits(lora), logits(model), atol=1e-5)

# Generation -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("make", "length", "size"), [
    (None, 24, 9), (None, 24, 2), (None, 24, 1), (qwen, 90, 9), (llama, 90, 9), (sliding, 90, 9)])
def test_greedy_equals_transformers_token_for_token(talker, monkeypatch, make, length, size):
    model, tokenizer = make() if make else talker[0], talker[1]
    model.generation_config.eos_token_id = [1] if make else [1, tokenizer.convert_tokens_to_ids("7")]
    questions, expected = [*QUESTIONS, "has 1, " + "buys 2, " * 10], []
    for text in (tokenizer(question, return_tensors="pt") for question in questions):
        done = model.generate(**text, max_new_tokens=length, do_sample=False)
        expected += done[:, text["input_ids"].shape[1]:].tolist()
    monkeypatch.setattr(boostlora, "batch_size", lambda *_: size)
    tokenizer.pad_token = None  # none is needed
    ours = generate(model, tokenizer, questions, max_new_tokens=length)
    assert [c.tokens for c in ours] == expected and len({len(c.tokens) for c in ours}) > 1
    assert [c.text for c in ours] == [tokenizer.decode(c.tokens, skip_special_tokens=True) for c in ours]

def test_a_batch_fits_in_memory_and_is_hardly_padded():
    model = qwen()
    left = sorted([3752, 900, 480, *range(60, 430, 4)] * 5, reverse=True)
    real, padded = sum(left), 0
    while left:
        size = batch_size(model, left, 1, 160)
        padded, left = padded + size * left[0], left[size:]
    assert padded < 1.3 * real
    assert batch_size(model, [430] + [150] * 7, 8, 160) == 8 and batch_size(model, [3752, 300], 8, 160) == 1
    model.config.vocab_size = 2**31 // 16 // 7  # so that 6 rows fit
    assert [batch_size(model, [20] * 9, n, 5) for n in (1, 2, 3, 7)] == [6, 3, 2, 1]

@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # from transformers 5.24 on, and before
def test_prompts_are_encoded_once_into_a_cache_of_either_name_and_finished_rows_leave(talker, name):
    def inside(cache=None, **more):
        shapes.append((*more["input_ids"].shape, int(more["position_ids"].min())))
        return inner(**{**more, own: more.get(own, cache)})
    model, tokenizer = talker
    expected = [c.tokens for c in generate(model, tokenizer, QUESTIONS, 8, 1.0, 20)]
    outer, inner, shapes = model.forward, (forgetful := model.base_model.forward), []
    own, = {"cache", "past_key_values"} & inspect.signature(inner).parameters.keys()
    if name == "cache":
        model.forward, model.base_model.forward = lambda cache, **more: outer(**{own: cache}, **more), inside
    else:
        model.forward = lambda past_key_values, **more: outer(**{own: past_key_values}, **more)
        model.base_model.forward = lambda past_key_values=0, **x: inside(**{"cache": past_key_values, **x})
    done = [c.tokens for c in generate(model, tokenizer, QUESTIONS, 8, 1.0, 20)]
    lengths, rows = [len(ids) for ids in tokenizer(QUESTIONS)["input_ids"]], [n for n, _, _ in shapes[1:]]
    assert done == expected and shapes[:2] == [(4, max(lengths) - 1, 0), (32, 1, min(lengths) - 1)]
    going = [sum(len(tokens) > step for tokens in done) for step in range(len(rows))]
    assert rows[0] == 32 and all(n <= count < 8 / 7 * n + 1 for n, count in zip(going, rows))
    inner = lambda cache=None, past_key_values=None, **more: forgetful(**more)
    with refused("does not use its cache"):
        generate(model, tokenizer, QUESTIONS, max_new_tokens=9)

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_the_untruncated_distribution(talker, temperature):
    def logprobs(ids):
        with torch.no_grad():
            return (model(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)
    model, tokenizer = talker
    model.generation_config.top_k = 1
    prompts = tokenizer(QUESTIONS)["input_ids"]
    for i, c in enumerate(generate(model, tokenizer, QUESTIONS, 30, temperature, 20)):
        every = logprobs(prompts[i // 30] + c.tokens)[len(prompts[i // 30]) - 1:-1]
        expected = every.gather(1, torch.tensor(c.tokens)[:, None]).squeeze(1)
        assert (torch.tensor(c.logprobs) - expected).abs().max() < 1e-4
        assert c.tokens.index(1) == len(c.tokens) - 1 if 1 in c.tokens else len(c.tokens) == 20
    first = [c.tokens[0] for c in generate(model, tokenizer, QUESTIONS[:1], 4000, temperature, 1)]
    p = logprobs(prompts[0])[-1].exp()
    frequency = torch.bincount(torch.tensor(first), minlength=len(p)) / len(first)
    assert (frequency - p).abs().max() < 0.03 and (p > 0.01).sum() > 1

def test_a_draw_depends_on_seed_and_prompt_not_on_the_batch_or_the_random_state(talker, monkeypatch):
    state = torch.get_rng_state()
    one, third = ([c.tokens for c in generate(*talker, QUESTIONS, 3, 1.0, 20, seed)] for seed in (5, 6))
    monkeypatch.setattr(boostlora, "batch_size", lambda *_: 1)
    assert one == [c.tokens for c in generate(*talker, QUESTIONS, 3, 1.0, 20, 5)]
    assert one != third and len(set(map(tuple, one[:3]))) > 1
    monkeypatch.setattr(boostlora, "batch_size", lambda *_: 999)  # encoded in pieces of 8 columns
    assert [c.tokens for c in generate(*talker, QUESTIONS * 249, 3, 1.0, 20, 5)][:12] == one
    assert torch.equal(state, torch.get_rng_state()) and generate(*talker, []) == []
    with refused("no token"):
        generate(*talker, ["has 1?", ""])

# GRPO and cross-entropy -------------------------------------------------------------------------------------

def test_advantages_by_hand():
    r = [0.5, 0.1, 0.2, 0.4]
    a = group_advantages([1, 0, 0, 0, *r, 1, 1, 1, 1, 0.1 + 0.2, 0.3, 0.3, 0.3 + 1e-6], 4)
    assert torch.allclose(a[0], torch.tensor([3.0, -1, -1, -1]) / math.sqrt(3))
    assert torch.allclose(a[1], (torch.tensor(r) - 0.3) / np.std(r)) and not a[2:].any()  # nor float noise

def parity(indices, texts):
    """A reward with some variance, and none for the first prompt."""
    return [0.0 if i == 0 else float(len(text) % 2) for i, text in zip(indices, texts, strict=True)]

def dropping():  # the dropout that generate switches off
    return qwen(kind=hf.LlamaForCausalLM, attn_implementation="eager", attention_dropout=0.9).train()
def capped():
    return qwen(kind=hf.Gemma2ForCausalLM, head_dim=8, final_logit_softcapping=1.0)

@pytest.mark.parametrize(("make", "budget"), [
    (None, 10**6), (None, 60), (None, 1), (dropping, 10**6), (sliding, 10**6), (capped, 10**6)])
def test_the_gradient_is_the_hand_computed_one(talker, make, budget):
    def note(_, args, options):
        if not options["use_cache"]:
            sizes.append(options["input_ids"].numel())
    model, tokenizer = make() if make else talker[0], talker[1]
    model.config.vocab_size = 2**25 // 8  # so large that the head takes 8 tokens at a time
    v = Booster(model, BoostConfig(rounds=1, u=2, groups=3)).attach()
    config = GRPOConfig(prompts=4, group_size=6, max_new_tokens=12, micro_batch_tokens=budget,
                        temperature=0.8, lr=1e-9)
    seen, sizes, heights, trained, loss = [], [], [], [], 0.0
    with (model.base_model.register_forward_pre_hook(note, with_kwargs=True),
          model.lm_head.register_forward_hook(
              lambda _, x, out: heights.append(len(out) * out.requires_grad))):
        stats = grpo(model, tokenizer, QUESTIONS, lambda *x: seen.append(x) or parity(*x), v, config, 2, 7)
    ours, order = v.grad.clone(), torch.randperm(4, generator=generator(7, "order", 2)).tolist()
    done = generate(model, tokenizer, [QUESTIONS[i] for i in order], 6, 0.8, 12, (7, 2, 0))
    assert seen == [([i for i in order for _ in range(6)], [c.text for c in done])]
    rewards = torch.tensor(parity(*seen[0])).view(4, 6)
    for g, r in enumerate(rewards):
        ids = tokenizer(QUESTIONS[order[g]])["input_ids"]
        for c, a in zip(done[6 * g:6 * g + 6], (r - r.mean()) / r.std(correction=0), strict=True):
            logprobs = (model(torch.tensor([ids + c.tokens])).logits[0] / 0.8).log_softmax(-1)
            if r.any() and not r.all():
                loss = loss - a * logprobs[len(ids) - 1:-1].gather(1, torch.tensor(c.tokens)[:, None]).sum()
                trained.append((len(ids), len(c.tokens)))
    theirs, = torch.autograd.grad(loss / sum(new for _, new in trained), v)
    theirs *= min(1, 1 / theirs.norm())  # clipped
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max() and ours.abs().min() > 0
    assert stats["steps"] == 1 and stats["completions"] == 24
    assert 1 <= stats["flat_groups"] == 4 - len(trained) / 6 < 4
    assert stats["reward"] == pytest.approx(float(rewards.mean()))
    assert max(heights) == 8
    if budget == 1 or make in (sliding, capped):  # no mask of ours: one completion a row
        assert sorted(sizes) == sorted(prompt + new - 1 for prompt, new in trained)
    elif budget == 60:
        assert max(sizes) <= budget and len(sizes) < len(trained)
    else:  # in one sequence each prompt stands once
        assert sizes == [sum(new for _, new in trained[i:i + 6]) + trained[i][0] - 1
                         for i in range(0, len(trained), 6)]

SHORT = GRPOConfig(group_size=4, max_new_tokens=8)

@pytest.mark.parametrize("dtype", [fp32, bf16, fp16])
@pytest.mark.parametrize("make", [qwen, llama, sliding])
def test_a_grpo_round_moves_v_alone(talker, make, dtype):
    before, v = bits(model := make(dtype)), Booster(model, BoostConfig(rounds=1)).attach()
    stats = grpo(model, talker[1], QUESTIONS, lambda _, texts: [1.0] * len(texts), v, SHORT)
    assert not v.any() and (stats["steps"], stats["flat_groups"]) == (0, 4)
    assert "nothing could be learned" in stats["note"]  # without variance
    grpo(model, talker[1], QUESTIONS, parity, v, dataclasses.replace(SHORT, epochs=2))
    assert v.abs().min() > 0 and same_bits(before, bits(model))
    assert all(p.grad is None for p in model.parameters())

@pytest.mark.parametrize(("epochs", "prompts", "steps", "kind"), [  # kind: of rewards
    (1, 2, 2, list), (1.5, 3, 2, np.array), (2.25, 3, 3, torch.tensor), (2, 9, 2, list)])
def test_steps_follow_from_epochs_and_failures(talker, epochs, prompts, steps, kind):
    asked, v = [], Booster(talker[0], BoostConfig(rounds=1)).attach()
    stats = grpo(*talker, QUESTIONS, lambda i, _: asked.append(i) or kind([0.0, 1, 1, 1] * (len(i) // 4)), v,
                 dataclasses.replace(SHORT, epochs=epochs, prompts=prompts))
    assert stats["steps"] == len(asked) == steps and json.dumps(stats)
    assert stats["completions"] == sum(map(len, asked)) == steps * min(prompts, 4) * 4
    assert prompts != 2 or sorted(asked[0] + asked[1]) == sorted([*range(4)] * 4)  # a pass sees each once

def test_a_wrong_reward_gradient_policy_or_model_stops_the_round(talker):
    model = talker[0]
    v = Booster(model, BoostConfig(rounds=1)).attach()
    for reward in (lambda _, texts: [math.nan] * len(texts), lambda _, texts: [1.0]):
        with refused("finite number for each"):
            grpo(*talker, QUESTIONS, reward, v, SHORT)
    with v.register_hook(lambda grad: grad * math.nan), refused("--lr"):
        grpo(*talker, QUESTIONS, parity, v, SHORT)
    assert not v.any()
    model.register_forward_hook(lambda m, x, out: [out.logits.mul_(-4), out][1])  # as soft-capping does
    with refused("another policy"):
        grpo(*talker, QUESTIONS, parity, v, SHORT)
    model.lm_head.weight.data.fill_(math.nan)
    with refused("float32"):
        generate(*talker, QUESTIONS, max_new_tokens=2)

def test_cross_entropy_lowers_the_loss_and_moves_v_alone():
    model, labels, passes = esm(hidden_dropout_prob=0.9).train(), torch.tensor([0, 1, 1]), []
    before, v = bits(model), Booster(model, BoostConfig(rounds=1, u=4, groups=0)).attach()
    batch = (inputs(), labels)
    with v.register_hook(lambda grad: grad * 1e3):
        stats = cross_entropy(model, lambda: passes.append(1) or iter([batch] * 2), v, CEConfig(epochs=6))
    assert v.grad.norm() == pytest.approx(1)  # clipped
    first = nn.functional.cross_entropy(logits(esm()), labels)
    assert stats["first_loss"] == pytest.approx(float(first), abs=1e-5)  # without dropout
    assert stats["last_loss"] < stats["first_loss"] and len(passes) == 6 and stats["steps"] == 12
    assert v.any() and same_bits(before, bits(model))
    with refused("no batch"):
        cross_entropy(model, lambda: iter([]), v, CEConfig())
    with v.register_hook(lambda grad: grad * math.nan), refused("--lr"):
        cross_entropy(model, lambda: iter([batch]), v, CEConfig())

# The loop and the run folder --------------------------------------------------------------------------------

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
        return right, {"half": np.float32(0.5)}

    def fit(self, examples, v, round):
        batch = ({"input_ids": torch.cat([x for x, _ in examples])}, torch.tensor([y for _, y in examples]))
        stats = cross_entropy(self.model, lambda: iter([batch]), v, CEConfig(epochs=6, lr=self.lr))
        if next(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        return {**stats, "loss": torch.tensor(0.5), "round": 99, "failures": -1}

CONFIG = BoostConfig(rounds=4, u=4, groups=0, replay=1.0)
SOME, WARY = (dataclasses.replace(CONFIG, **x) for x in ({"recheck": 0.5}, {"accept": "better", "seed": 2}))

def run_words(out, learner=Booster, stop_at=None, config=CONFIG, **options):
    model, lr = esm(), {FullFineTuning: 1e-4, BoRA: 0.03}.get(learner, 0.05)
    return boost(learner(model, config), Words(model, stop_at, lr), out, **options), model
def saved(out):
    return hf.EsmForSequenceClassification.from_pretrained(out / "model")
def state(out):
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    times = [line.pop("seconds") for line in lines]
    assert all(time.keys() >= {"evaluate", "generate", "train", "merge"} for time in times)
    return lines, [path.read_bytes() for path in sorted(out.glob("*.safetensors"))]

def test_the_record_is_complete_and_adds_up(tmp_path, capsys):
    records, model = run_words(tmp_path, test_every=2, settings={"lr": 0.05})
    lines, _ = state(tmp_path)
    assert len(records) == 5 and [r["round"] for r in lines] == [0, 1, 2, 3, 4]
    for before, after in itertools.pairwise(lines):
        assert after["failures"] == len(after["failed"])
        assert after["failures"] == before["failures"] - after["fixed"] + after["regressed"]
        assert after["train_accuracy"] == pytest.approx(1 - after["failures"] / 12)
        assert after["steps"] == 6 and after["norm"] > 0
        assert after["loss"] == after["train_half"] == 0.5  # were a tensor and a number of numpy
    assert ["held_accuracy" in r for r in lines] == [True, False, True, False, True]
    assert [r["rank"]["max"] for r in lines] == [0, 2, 4, 6, 8]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.items() >= {**vars(CONFIG), "lr": 0.05}.items() and config["versions"]["torch"]
    again = saved(tmp_path)
    assert same_bits(bits(again), bits(model)) and torch.allclose(logits(again), logits(model), atol=2e-6)
    assert re.search(r"to go\nround  1/4 .* regressed\).*\nround  2/4", capsys.readouterr().out)

@pytest.mark.parametrize(("learner", "config"), [
    (Booster, SOME), (Booster, WARY), (FullFineTuning, CONFIG)])
def test_broken_off_anywhere_it_continues_to_the_same_bits(tmp_path, learner, config):
    records, model = run_words(tmp_path / "whole", learner, config=config)
    expected = state(tmp_path / "whole")
    assert any("note" in record for record in records) == (config is WARY)  # some rounds are taken back
    for stop_at in range(1, 12):
        with pytest.raises(KeyboardInterrupt):
            run_words(tmp_path / f"{stop_at}", learner, stop_at, config)
        _, again = run_words(tmp_path / f"{stop_at}", learner, config=config)
        assert state(tmp_path / f"{stop_at}") == expected and same_bits(bits(model), bits(again))
    record = tmp_path / "whole" / "rounds.jsonl"  # what was learned may be there before its line is
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:-1]))
    _, again = run_words(tmp_path / "whole", learner, config=config)
    assert state(tmp_path / "whole") == expected and same_bits(bits(model), bits(again))

def test_more_rounds_continue_a_finished_run_and_fewer_are_refused(tmp_path):
    longer = dataclasses.replace(CONFIG, rounds=6)
    for name, config in (("short", CONFIG), ("short", longer), ("long", longer)):
        run_words(tmp_path / name, config=config)
    one, other = (torch.stack(Booster.load(esm(), tmp_path / name / "adapters.safetensors").vectors)
                  for name in ("short", "long"))
    assert len(one) == 6 and torch.allclose(one, other, atol=1e-4)
    with refused("6 rounds, more than --rounds 4"):
        run_words(tmp_path / "short")

def test_damaged_or_foreign_state_is_named_and_nothing_is_overwritten(tmp_path):
    def files():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert boostlora.to_json([Path("a")]) != boostlora.to_json([Path("b")])  # data of any kind count
    def check(message, **options):
        before = files()
        with refused(message):
            run_words(tmp_path, **{"settings": {"lr": 1}, **options})
        assert files() == before
    run_words(tmp_path, settings={"lr": 1})
    check("seed 0 there, 1 here", config=dataclasses.replace(CONFIG, seed=1))
    check("lr 1 there, None here.*top_p None there, 1 here", settings={"top_p": 1})
    check("another run .base '[0-9a-f]+' there", learner=lambda _, config: Booster(esm(bf16), config))
    check("weights-4.safetensors could not be opened", learner=FullFineTuning)
    run_words(tmp_path, settings={"lr": 1, "workers": 9, "micro_batch_tokens": 9})  # these change no result
    for name, change, message in [
            ("adapters.safetensors", None, "missing"), ("rounds.jsonl", None, "missing"),
            ("config.json", None, "choose"), ("config.json", lambda old: b"5", "'data' is missing"),
            ("adapters.safetensors", lambda old: old[:-7], "damaged"),
            ("rounds.jsonl", lambda old: old[:-30], "line 5 .*one JSON object a line"),
            ("rounds.jsonl", lambda old: old.replace(b'"round": 1', b'"round": 3'), "line 2 is damaged")]:
        path = tmp_path / name
        whole = path.read_bytes()
        path.write_bytes(change(whole)) if change else path.unlink()
        check(f"{name}.* {message}")
        path.write_bytes(whole)

def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch):
    def full(tensors, path, *_):
        path.touch()
        raise OSError(28, "No space left on device")
    run_words(tmp_path)
    before = state(tmp_path)
    monkeypatch.setattr(boostlora.safetensors.torch, "save_file", full)
    with refused("No space left", OSError):  # which `run` tells
        run_words(tmp_path, config=dataclasses.replace(CONFIG, rounds=5))
    assert state(tmp_path) == before and saved(tmp_path)

def test_a_folder_in_use_is_refused_until_its_process_ends(tmp_path):
    hold = f"import boostlora as b; b.claim({str(tmp_path)!r}, {vars(CONFIG)}); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], cwd=HERE, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with refused("in use by another process"):
            run_words(tmp_path)
        other.kill()
    (tmp_path / "own" / "model").mkdir(parents=True)  # anyone's: `boost` would write over it
    with refused("no .*config.json"):
        run_words(tmp_path / "own")
    boostlora.claim(tmp_path, vars(CONFIG))  # as a script does, from its first check on
    assert len(run_words(tmp_path)[0]) == 5

class Script:
    """A task by the book: after round t wrong[t] are wrong, whatever the model says."""
    def __init__(self, *wrong):
        self.train, self.tests, self.wrong, self.t = [*range(12)], {"held": [*range(50, 54)]}, wrong, 0
        self.model, self.asked, self.trained = esm(), [], []

    def evaluate(self, examples):
        self.asked.append(examples)
        return [example not in self.wrong[self.t] for example in examples], {}

    def fit(self, examples, v, round):
        self.t, self.trained = round + 1, [*self.trained, examples]
        draw(v, round)
        return {}

    def run(self, out, **options):
        self.booster = Booster(self.model, BoostConfig(**options))
        return boost(self.booster, self, out)

def test_the_loop_stops_when_nothing_fails_and_refuses_no_data(tmp_path, capsys):
    task = Script({3, 4}, {50}, {})
    records = task.run(tmp_path, rounds=9)
    assert len(records) == 2 and task.trained == [[3, 4]] and records[1]["held_failed"] == [0]
    assert same_bits(bits(task.model), bits(saved(tmp_path)))
    assert len(Script({3, 4}).run(tmp_path / "evaluated", rounds=0)) == 1
    Script(set()).run(tmp_path / "right", rounds=9)  # with the first: said at once, and in the table
    assert capsys.readouterr().out.count("all are right: nothing is left to learn") == 4
    task.evaluate = lambda examples: ([True], {})
    with refused("1 labels for 12 examples"):
        task.run(tmp_path / "short", rounds=9)
    for tests, message in ([51], "another run.*data"), ([], "empty training or test set"):
        task.tests = {"held": tests}
        with refused(message):
            task.run(tmp_path, rounds=9)

def test_test_figures_are_paired_with_those_of_the_base_model(tmp_path):
    first, middle, last = Script({0, 50, 51, 53}, {0, 51, 52, 53}, {0, 50, 52}).run(tmp_path, rounds=2)
    for r, figures in (first, [0, 0, [0, 1, 3], 0.25]), (last, [2, 1, [0, 2], 0.5]), (middle, [None] * 4):
        assert [r.get(f"held_{x}") for x in ("fixed", "regressed", "failed", "accuracy")] == figures

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

def test_a_worse_round_is_taken_back_where_accept_is_better(tmp_path):
    wrong = {0, 1, 2}, {1, 2, 3, 4}, {2, 7, 8}, {0, 1, 2, 3}
    records = (task := Script(*wrong)).run(tmp_path / "better", rounds=3, accept="better")
    assert [r["failed"] for r in records] == [[0, 1, 2], [0, 1, 2], [2, 7, 8], [2, 7, 8]]
    assert ["taken back" in r.get("note", "") for r in records] == [False, True, False, True]
    assert [(r["fixed"], r["regressed"]) for r in records] == [(0, 0), (0, 0), (2, 2), (0, 0)]
    assert [bool(v.any()) for v in task.booster.vectors] == [False, True, False]
    only = Booster.load(esm(), tmp_path / "better" / "adapters.safetensors", weights=[9, 1, 9])
    assert same_bits(bits(only.model), bits(task.model)) and not same_bits(bits(only.model), bits(esm()))
    assert [r["failures"] for r in Script(*wrong).run(tmp_path / "all", rounds=3)] == [3, 4, 3, 4]
    with refused("this Booster has rounds"):
        boost(task.booster, task, tmp_path / "new")
    with refused("--accept better needs --recheck 1"):  # what was not looked at cannot be compared
        task.run(tmp_path / "both", rounds=3, accept="better", recheck=0.5)

def test_failures_only_or_with_right_examples_and_how_long_that_takes():
    train, failed = list("abcdefghij"), [1, 4, 7]
    none, some, other, every = (boostlora.select(train, failed, BoostConfig(replay=replay), t)
                                for replay, t in ((0, 0), (1, 0), (1, 1), (-1, 0)))
    assert none == list("beh") and every == train and some != other
    assert len(some) == 6 and set("beh") < set(some) and some == sorted(some)
    task = SimpleNamespace(train=range(80), tests={"a": range(15), "b": range(5)}, effort=3)
    seconds = 6 * (10 * (3 * 40 + 40 + 20) + 20)  # with half of the 40 right ones looked at again
    assert boostlora.estimate(task, BoostConfig(recheck=0.5), 6 * 100, 40).seconds == seconds

class Blocks(nn.Module):
    """BoRA (arXiv 2508.06953): B [out, r] and A [r, in] are cut into b blocks each, and block (i, j) of the
    update is B_i diag(Sigma_ij) A_j, so its rank reaches b r."""
    def __init__(self, weight, r=2, b=4):
        super().__init__()
        B, A = (torch.randn(b, n // b, r, generator=generator(n)) / 10 for n in weight.shape)
        self.B, self.Sigma, self.A = map(nn.Parameter, (B, torch.zeros(b, b, r), A.flip(0)))

    def forward(self, weight):
        return weight + torch.einsum("ior,ijr,jnr->iojn", self.B, self.Sigma, self.A).reshape(weight.shape)

class BoRA(FullFineTuning):
    """A learner for `boost` that is not TinyLoRA; it saves and loads all weights."""
    def attach(self):
        for linear in find_targets(self.model).values():
            parametrize.register_parametrization(linear, "weight", Blocks(linear.weight))
        return [p for p in self.model.parameters() if p.requires_grad]

    def merge(self):
        for module in [m for m in self.model.modules() if parametrize.is_parametrized(m)]:
            parametrize.remove_parametrizations(module, "weight")
        super().merge()

def test_the_loop_boosts_another_weak_learner(tmp_path):
    records, model = run_words(tmp_path, BoRA, config=BoostConfig(rounds=1, replay=1.0))
    for name, linear in find_targets(model).items():
        update = linear.weight - find_targets(esm())[name].weight
        assert torch.linalg.matrix_rank(update, rtol=1e-4) == 2 * 4
    assert records[1]["failures"] < records[0]["failures"] and same_bits(bits(saved(tmp_path)), bits(model))
    assert len(run_words(tmp_path, BoRA, config=BoostConfig(rounds=3, replay=1.0))[0]) > 2  # it goes on

def test_a_task_of_one_s_own_is_a_prompt_and_a_grade(talker, tmp_path):
    def grade(texts, examples):  # rewarded by degrees: right from three on
        return [text.count("+") / 3 for text in texts]
    model, tokenizer = talker
    config = GRPOConfig(epochs=2, prompts=4, group_size=4, max_new_tokens=12, lr=0.1)
    data = [f"has {n}, buys {n}?" for n in range(2, 9)]
    task = TextTask(model, tokenizer, data, {"same": data}, config, prompt=str, grade=grade,
                    lenient=lambda texts, examples: [float("####" in text) for text in texts])
    records = boost(Booster(model, BoostConfig(rounds=2, groups=0, u=4)), task, tmp_path, tokenizer=tokenizer)
    texts = [c.text for c in generate(model, tokenizer, data, max_new_tokens=12)]
    assert records[-1]["failed"] == [i for i, text in enumerate(texts) if text.count("+") < 3]
    assert records[-1]["train_lenient_accuracy"] == sum("####" in text for text in texts) / 7
    task.grade = lambda texts, examples: 1.0
    with refused("a number for each text, not 1.0"):
        task.evaluate(data)
    task.config.lr = 0.2
    with refused("lr 0.1 there, 0.2 here"):
        boost(Booster(model, BoostConfig(rounds=2, groups=0, u=4, seed=3)), task, tmp_path)
    assert task.seed == 3  # each run's own
    assert records[-1]["failures"] < records[0]["failures"] == 7
    assert (tmp_path / "model" / "tokenizer.json").exists()
    tokenizer.chat_template = "{{ messages[0]['role'] }}: {{ messages[0]['content'] }}" \
                              "{% if add_generation_prompt %} say:{% endif %}"
    assert task.prompts(["1", "2"]) == ["user: 1 say:", "user: 2 say:"]
    tokenizer.chat_template = None
    assert task.prompts(["1", "2"]) == ["1", "2"]
    begin = tokenizers.processors.TemplateProcessing("####:0 $A", special_tokens=[("####", 19)])
    tokenizer.backend_tokenizer.post_processor = begin  # as Llama's begins with <s>
    assert task.prompts(["1", "2"]) == ["####1", "####2"]

# train_math: the command line, grading, the demo ------------------------------------------------------------

def run_math(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train_math.py", *map(str, flags)])
    train_math.main()

def write_jsonl(path, rows):  # a byte-order mark and a blank end, as editors leave
    path.write_text("\ufeff" + "".join(f"{x if type(x) is str else json.dumps(x)}\n" for x in rows) + "\n")
    return path

ROWS = [{"question": f"has {n}, triples?", "answer": f"#### {3 * n}"} for n in range(2, 11)]

@pytest.fixture()
def flags(toy, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    return ("--rounds", 1, "--prompts", 3, "--group_size", 2, "--max_new_tokens", 6, "--train_file", data,
            "--test_file", data, "--test_limit", 4, "--out", tmp_path / "run", "--model", toy)

def test_the_real_path_on_a_small_model_that_cannot_learn(toy, flags, tmp_path, monkeypatch, capsys):
    run_math(monkeypatch, *flags, "--export_lora")
    printed = capsys.readouterr().out
    for said in ("nothing could be learned", "no GPU: about", "merged model", "LoRA of rank 2"):
        assert said in printed
    lines, _ = state(tmp_path / "run")
    assert [line["failures"] for line in lines] == [9, 9] and lines[1]["flat_groups"] == 9
    assert lines[0].keys() >= {"rows_accuracy", "rows_lenient_accuracy", "train_lenient_accuracy"}
    base, merged = (AutoModelForCausalLM.from_pretrained(f) for f in (toy, tmp_path / "run" / "model"))
    assert same_bits(bits(base), bits(merged)) and (tmp_path / "run/lora/adapter_config.json").exists()
    run_math(monkeypatch, *flags, "--micro_batch_tokens", 99)
    assert "has 1 of 1 rounds, so nothing is run" in capsys.readouterr().out  # memory flags may change
    with refused("lr 0.01 there, 0.1 here"):
        run_math(monkeypatch, *flags, "--lr", 0.1)

@pytest.mark.parametrize(("method", "lr", "moves"), [("boost", 0.1, 21), ("full", 0.001, 38)])
def test_the_real_path_learns(toy, flags, tmp_path, monkeypatch, method, lr, moves):
    monkeypatch.setattr(train_math, "grades", lambda texts, _, strict=1: [i % 2 for i in range(len(texts))])
    run_math(monkeypatch, *flags, "--method", method, "--lr", lr, "--limit", 5)
    base, merged = (bits(AutoModelForCausalLM.from_pretrained(folder))
                    for folder in (toy, tmp_path / "run" / "model"))
    assert sum(not torch.equal(p, merged[name]) for name, p in base.items()) == moves
    assert state(tmp_path / "run")[0][0]["train_accuracy"] == 0.4

@pytest.mark.parametrize(("rows", "named"), [
    (None, "No such file"), ([], "is empty"), (['{"question": '], "line 1 column .*one JSON object a line"),
    ([ROWS[0], {"question": "why?"}], "line 2: the field 'answer' is missing"),
    ([ROWS[0], {"question": "why?", "answer": "####  "}], "row 2: the answer '' cannot be graded"),
    ([ROWS[0], {"question": "why?", "answer": None}], "row 2: 'answer' is neither")])
def test_bad_data_is_refused_by_file_and_row(flags, tmp_path, monkeypatch, rows, named):
    path = tmp_path / "rows.jsonl"
    path.unlink() if rows is None else write_jsonl(path, rows)
    monkeypatch.setattr(train_math, "load_language_model", None)  # before anything slow
    with refused(f"rows.jsonl.*{named}"):
        run_math(monkeypatch, *flags)

def test_bad_models_and_flags_are_refused_with_a_way_out(toy, flags, tmp_path, monkeypatch):
    silent, gpt2, cut, other = (shutil.copytree(toy, tmp_path / n) for n in ("silent", "gpt2", "cut", "esm"))
    (silent / "chat_template.jinja").unlink()
    (cut / "model.safetensors").write_bytes(b"{")
    hf.EsmConfig(vocab_size=31).save_pretrained(other)
    hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=400)).save_pretrained(gpt2)
    for message, *more in [
            ("nowhere.*--demo", "--model", tmp_path / "nowhere"), ("no chat template", "--model", silent),
            ("Conv1D", "--model", gpt2), ("cut could not be opened.*--demo", "--model", cut),
            ("esm could not be opened", "--model", other),
            ("called train", "--test_file", shutil.copy(tmp_path / "rows.jsonl", tmp_path / "train.jsonl")),
            ("lower --rank", "--rank", 99), ("its own", "--demo"), ("wrong steals", "--demo_wrong", "steals"),
            ("rounds small steps away", "--method", "full", "--dtype", "bfloat16"),
            ("room for", "--max_new_tokens", 128), ("not with", "--method", "full", "--export_lora")]:
        with refused(message):
            run_math(monkeypatch, *flags, *more)

@pytest.mark.parametrize("script", [train_math, train_code, train_protein])
def test_help_explains_every_flag_and_the_demo_is_checked_first(tmp_path, monkeypatch, capsys, script):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with refused("0", SystemExit):
        script.main()
    flags = re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]
    assert len(flags) > 20 and all(re.search(r"(  |\n)\s*\w.* ", flag) for flag in flags)
    monkeypatch.setattr(torch.optim, "AdamW", None)
    monkeypatch.setattr(sys, "argv", ["train.py", "--demo", "--rank", "99", "--out", str(tmp_path / "run")])
    with refused("lower --rank or --rounds"):
        script.main()
    assert not (tmp_path / "run" / "base").exists()

GRADES = [  # completion, answer, only boxed answers count?, right?
    (r"so \boxed{18}", "18", True, True), ("so 18", "18", True, False),
    ("so 3 + 15 = 18.", "18", False, True), (r"\boxed{5} no, \boxed{6} of 7", "6", True, True),
    (r"\boxed{5} no, \boxed{6}", "5", False, False), (r"\boxed{\boxed{(1, 2)}}", "(1,2)", True, True),
    ("1 + 1\n#### 1,000", "1000", False, True), ("#### 2\nThe answer is 3", "3", False, True),
    ("The answer is x^2. We are done.", "x^2", False, True), ("so it is x^2", "x^2", False, False),
    (r"\boxed{\$18.00}", "18", True, True), (r"\boxed{18 \text{ dollars}}", "18", True, True),
    (r"\boxed{1{,}080}", r"1,\!080", True, True), (r"\boxed{70\%}", "70", True, True),
    (r"\boxed{2 \text{ hours } 30 \text{ minutes}}", "2", True, False),
    ("The answer is 5 apples for 2 days", "5", False, True), (r"\boxed{5 \text{ of } 7}", "5", True, False),
    (r"\boxed{-5}", "5", True, False), (r"\boxed{1.5 \times 10^{3}}", "1500", True, True),
    (r"\boxed{0.333333}", r"\frac13", True, True), (r"\boxed{0.33}", r"\frac13", True, False),
    (r"\boxed{-q + p}", "p - q", True, True), (r"\boxed{q - p}", "p - q", True, False),
    (r"\boxed{2x + 3}", "y = 2x + 3", True, True), (r"\boxed{2x = y - 3}", "2x + y = 3", True, False),
    (r"\boxed{x=7 \text{ or } x=5}", "5,7", True, True), (r"\boxed{5}", "5,7", True, False),
    (r"\boxed{(2,1)}", "(1,2)", True, False), (r"\boxed{-1, 1}", r"\{\pm 1\}", True, True),
    (r"\boxed{[-2,7)}", r"x \in [-2,7]", True, False), (r"\boxed{[-2, 7]}", r"x \in [-2,7]", True, True),
    (r"\boxed{(3, +\infty) \cup (-\infty,2)}", r"(-\infty, 2) \cup (3, \infty)", True, True),
    (r"\boxed{\begin{bmatrix}\frac12&0.5\end{bmatrix}}", r"\begin{pmatrix}1/2&1/2\end{pmatrix}", True, True),
    (r"\boxed{(A), (B)}", "(A)", True, False), (r"\boxed{(B), (A)}", "(B), (A)", True, True),
    (r"\boxed{5:30 \text{ a.m.}}", "5:30 p.m.", True, False), (r"\boxed{(D) P(A)}", "D", True, True),
    (r"\boxed{evelyn}", r"\text{Evelyn}", True, True), (r"\boxed{\text{(C)}}", "C", True, True)]

@pytest.mark.parametrize(("completion", "answer", "strict", "expected"), GRADES)
def test_grade(completion, answer, strict, expected):
    assert grade(completion, answer, strict) is expected

@pytest.mark.parametrize("text", [
    "9**9**9**9", "2^{10^{10}}", "9!!!!!", r"\frac{1}{0}", "1e999999999", "-" * 400 + "1", "9" * 400,
    *(piece * 20_000 for piece in ("\\boxed{", "{", "}", "answer is ", "####", "\0", ",", "(", "\ud800"))])
def test_hostile_text_is_only_wrong(text):
    for answer in "42", r"(3, \frac{\pi}{2})":
        assert not grade(text, answer) and not grade(f"\\boxed{{{text}}}", answer, strict=True)
    assert grade(text.replace("{", "") + " \\boxed{42}", "42")

@needs_data
@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test", "math500"])
def test_every_gold_solution_is_right_for_its_own_answer_only(name):
    rows, strict = list(map(json.loads, (DATA / f"{name}.jsonl").open())), name == "math500"
    answers = [row["answer"].split("####")[-1].strip() for row in rows]
    for row, answer, other in zip(rows, answers, answers[1:] + answers[:1], strict=True):
        solution = row.get("solution", row["answer"])
        assert grade(solution, answer) and (not strict or grade(solution, answer, strict=True))
        assert grade(solution, other, strict) == grade(f"\\boxed{{{other}}}", answer, strict=True)

def demo(out, *flags, threads=1):
    command = [sys.executable, HERE / "train_math.py", "--demo", "--out", out, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)})
def end_after(process, out, rounds, signal):
    """Signal the process somewhere in a round; what it printed."""
    record = out / "rounds.jsonl"
    while process.poll() is None and (not record.exists() or record.read_text().count("\n") <= rounds):
        time.sleep(0.05)
    time.sleep(random.Random(rounds).uniform(0, 2))
    process.send_signal(signal)
    return process.communicate(timeout=60)[0]

DEMO = ("--rounds", "3", "--limit", "200", "--epochs", "2", "--micro_batch_tokens", "512")

@pytest.fixture(scope="session", autouse=True)
def whole(request, tmp_path_factory):
    """The demo, begun beside the first test, if its own, the last, is chosen: two minutes of a core."""
    if not any("killed_it_ends" in item.name for item in request.session.items):
        return (yield)
    with demo(out := tmp_path_factory.mktemp("demo") / "whole", *DEMO) as process:
        yield out, process
        process.kill()

def test_ctrl_c_and_mistakes_end_in_one_sentence(toy, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a child ignores it where pytest was told to
    shutil.copytree(toy, tmp_path / "run" / "base")
    process = demo(tmp_path / "run", "--limit", "100", "--test_limit", "8")
    printed = end_after(process, tmp_path / "run", 0, signal.SIGINT)
    assert process.returncode == 130 and "the same command goes on" in printed and "Traceback" not in printed
    process = demo(tmp_path / "run", "--rank", "0")
    assert process.communicate(timeout=60)[0].strip() == "error: --rank 0: must be at least 1, of type int"
    assert process.returncode == 2

def test_two_processes_find_the_same_failures_and_learn_the_same(toy, tmp_path, monkeypatch):
    flags = ("--demo", "--rounds", "2", "--epochs", "0.5", "--prompts", "3", "--limit", "40")
    for name in ("one", "two"):
        shutil.copytree(toy, tmp_path / name / "base")
    run_math(monkeypatch, "--out", tmp_path / "one", *flags)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.run([*torchrun, HERE / "train_math.py", "--out", tmp_path / "two", *flags],
                         capture_output=True, text=True, timeout=300, check=False)
    assert two.returncode == 0, two.stderr
    ours, theirs = state(tmp_path / "one")[0], state(tmp_path / "two")[0]
    assert [line["failed"] for line in ours] == [line["failed"] for line in theirs]
    assert 0 < ours[2]["total_norm"] == pytest.approx(theirs[2]["total_norm"], rel=1e-3)

# train_code: the sandbox. Linux, as root or not. ------------------------------------------------------------

RIGHT, WRONG = "\ndef f(x): return x + 1\n", "\ndef f(x): return 0\n"
TESTS = "assert f(1) == 2\nassert f(2) == 3"
IMPORTS = "import builtins, ctypes, gc, os, socket, sys, time\n"
both_ways = pytest.mark.parametrize("namespaces", [True, False])

# Each stands before a right function, if it says no `f` itself: only the attack can be why it fails.
ATTACKS = {
    "loop": "while True: pass", "loop in f": "def f(x):\n    while True: pass", "sleep": "time.sleep(99)",
    "4 GB": "import mmap\nx = mmap.mmap(-1, 4 << 30)", "print": "print('x' * 10**8)",
    "disk": "for n in range(9999): open(str(n), 'w').write('x' * 10**6)",
    "many files": "for n in range(2000): open(str(n), 'w')",
    "many threads": "import threading\nthreading.stack_size(32768)\nfor n in range(99): "
        "threading.Thread(target=time.sleep, args=(9,)).start()",
    "fork bomb": "while True: os.fork()", "bare fork": "assert ctypes.CDLL(None).syscall(57) >= 0",
    "spawn": "os.posix_spawn('/usr/bin/true', ['true'], {})", "exec": "os.execv('/usr/bin/true', ['true'])",
    "daemon": "if os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(99)",
    "outlive": "assert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0", "crash": "ctypes.string_at(0)",
    "os._exit": "os._exit(0)", "kill all": "os.kill(-1, 9)", "kill trainer": "os.kill({pid}, 9)",
    "stop judge": "os.kill(os.getppid(), 19)", "SIGIO": "import fcntl\nfcntl.fcntl(3, fcntl.F_SETOWN, {pid})",
    "trace": "assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "judge's memory": "open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "trainer's environment": "assert 'SECRET' in open('/proc/{pid}/environ').read()",
    "tests in memory": "n = 'ass' + 'ert '\nassert [x for y in gc.get_objects() for x in "
        "gc.get_referents(y) if type(x) in (str, bytes) and n + 'f(' in str(x)]",
    "environment": "assert os.environ", "root": "assert os.getuid() == 0", "stdin": "assert os.read(0, 1)",
    "loopback": "socket.create_connection(('127.0.0.1', {port}))", "write": "open('{tmp}/evil', 'w')",
    "read secret": "open('{tmp}/secret').read()", "stat": "os.stat('{file}')",
    "link": "os.symlink('{tmp}/secret', 's')\nopen('s').read()", "list": "os.listdir('{project}')",
    "write library": "open(os.__file__, 'a')", "chmod library": "os.chmod(os.__file__, 0o777)",
    "fchmod": "os.fchmod(os.open('own', 66), 0o444)", "empty": "os.open('own', 66)\nos.open('own', 512)",
    "closed folder": "os.mkdir('d', 0o300)\nopen('d/x', 'w')\n1/0", "datagram": "socket.socketpair(1, 2)",
    "shmctl": "c = ctypes.CDLL(None, use_errno=True)\nc.shmctl(-1, 2, 0)\nassert ctypes.get_errno() != 1"}
EQUAL = """class Same{0}:
    __eq__ = __contains__ = __lt__ = __gt__ = __le__ = __ge__ = lambda a, b: True
    __hash__, __ne__ = None, lambda a, b: False
    __sub__ = __rsub__ = __abs__ = __getattr__ = lambda *a: a[0]
"""
CHEATS = {  # each stands after a wrong function: it wants a verdict that it has not earned
    "equal": EQUAL.format("") + "def f(x): return Same()",
    "equal class": EQUAL.format("(type)") + "class f(metaclass=Same): __new__ = lambda c, x: c",
    "builtins": "for n in 'AssertionError compile exec'.split(): setattr(builtins, n, lambda *a: 0)",
    "exit": "sys.exit = os._exit = exit = lambda *a: None",
    "frames": "frame = sys._getframe()\nwhile frame:\n    for k, v in [*frame.f_locals.items()]:\n"
        "        if isinstance(v, int): frame.f_locals[k] = 1\n    frame = frame.f_back",
    "objects": "for x in gc.get_objects():\n    if isinstance(x, dict) and 'tests' in x: x['tests'] = 'pass'",
    "write": "for n in range(100):\n    try: os.write(n, b'1\\npass')\n    except OSError: pass",
    "answers": "for n in range(9): os.write(4, b'[\"return\", {\"other\": 0}, null]\\n')",
    "protocol": "os.write(4, b'[\"return\", {\"tuple\": [{\"dict\": [[\"f\", {\"type\": \"bool\"}], '"
        "b'[\"__builtins__\", 0]]}, {\"dict\": []}]}, null]\\n')\nos._exit(0)"}
POINT = """class P:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x == getattr(other, 'x', other)
    def __iter__(self): return iter(range(self.x))"""
WITH = "from collections import *\nfrom datetime import *\nfrom fractions import Fraction\n"
VALUES = [  # code, tests, verdict: the tests see what they would see without a sandbox
    ("def f(x): os._exit(0)", "try: f(1)\nexcept BaseException: pass", False),
    ("def f(x): return range(x)", "assert f(2) == [0, 1]", False), ("f = 2", "f += 1\nassert f == 3", True),
    ("def f(x): return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}", True),
    ("def f(x): return x", "assert f(1) is True", False), ("import math", "assert math.pi > 3", True),
    ("f = lambda x: 2 ** x", "assert f(99999) >> 99999 == 1", True),
    ("def f(x): x.append(3)", "x = []\nf(x=x)\nassert x == [3]", True),
    ("def f(x): return [x, (x, {x: {x}})]", "assert f(b'a') == [b'a', (b'a', {b'a': {b'a'}})]", True),
    ("def f(x): return x\nif __name__ == '__main__': input()", "assert f(1) == 1", True),
    ("set = lambda x: 0\ndef f(x): return 9", "assert set([f(1)]) == set([2])", False),
    ("def f(x): raise KeyError('no', x)", "try: f(1)\nexcept KeyError as e: assert e.args[1] == 1", True),
    (POINT, "assert P(1) == P(1) and P(1) != P(2) and P(1) != 1 and [*P(2)] == [0, 1]", True),
    (POINT + "\ndef f(p): return p.x", "p = P(3)\np.y = 4\nassert f(p) + p.y == 7", True),
    ("def f(x): return datetime(2020, 1, x, tzinfo=timezone.utc), Fraction(x, 3), 1j, None, int",
     "assert f(2) == (datetime(2020, 1, 2, tzinfo=timezone.utc), Fraction(2, 3), 1j, None, int)", True),
    ("def f(x):\n    for n in range(x): yield n", "assert sum(f(4)) == 6 and set(f(2)) == {0, 1}", True),
    ("def f(x): return [s.close() for s in socket.socketpair()]", "assert f(1) == [None, None]", True),
    ("def f(x): return 'x' * 10**8", "f(1)", False)]

def alive(folder):
    """Judges and candidates with temporary folders in `folder` (not `rm`); a pair has one command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"{folder}/sandbox-".encode() in path.read_bytes().partition(b"PASSED")[2]:
                found.append(int(path.parent.name))
    return sorted(found)

@both_ways
def test_no_attack_passes_harms_or_outlives_its_time(namespaces, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "SECRET")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "secret").touch(mode=0o600)
    codes = {name: IMPORTS + code + ("" if "def f" in code else RIGHT) for name, code in ATTACKS.items()}
    codes |= {f"cheat: {name}": IMPORTS + WRONG + code for name, code in CHEATS.items()}
    if not namespaces:  # what the warning says
        codes = {name: code for name, code in codes.items() if name.split()[0] not in ("stat", "many")}
    with socket.create_server(("127.0.0.1", 0)) as server, Sandbox(2, 1, 3, namespaces=namespaces) as sandbox:
        for name, value in {"pid": os.getpid(), "port": server.getsockname()[1], "project": HERE,
                            "tmp": tmp_path, "file": train_code.__file__}.items():
            codes = {key: code.replace("{" + name + "}", str(value)) for key, code in codes.items()}
        start = time.monotonic()
        verdicts = sandbox.run([(code, TESTS) for code in codes.values()])
        assert [name for name, verdict in zip(codes, verdicts, strict=True) if verdict] == []
        assert time.monotonic() - start < 3.5 * len(codes) and not alive(tmp_path)
        pairs = [(RIGHT, TESTS), (RIGHT, ""), (WRONG, TESTS), (RIGHT, TESTS + "\nassert 0"), (RIGHT, "def"),
                 ("", "while True: pass")]
        assert sandbox.run(pairs) == [True, True, False, False, False, False]
    start = time.monotonic()
    assert Sandbox(1, 1, 60, namespaces=namespaces).run([("while True: pass", "")]) == [False]
    assert time.monotonic() - start < 30 and not alive(tmp_path) and os.listdir(tmp_path) == ["secret"]

@both_ways
def test_values_cross_the_processes_as_they_are(namespaces):
    with Sandbox(2, namespaces=namespaces) as sandbox:
        verdicts = sandbox.run([(f"{IMPORTS}{WITH}{code}", WITH + tests) for code, tests, _ in VALUES])
    assert [row for row, ok in zip(VALUES, verdicts, strict=True) if ok != row[2]] == []

def test_the_sandbox_refuses_what_it_cannot_do(monkeypatch):
    with pytest.warns(UserWarning, match="empty program"), refused("raise --wall_seconds"):
        Sandbox(1, wall_seconds=0.001)
    monkeypatch.setattr(train_code, "PROGRAM", train_code.PROGRAM.replace('"unshare", ', '"unshare", 1 | '))
    with pytest.warns(UserWarning, match="No file system .*unshare") as caught:
        sandbox = Sandbox(2)
    assert len(caught) == 1 and sandbox.run([(RIGHT, TESTS), (WRONG, TESTS)]) == [True, False]
    monkeypatch.setattr(sys, "platform", "darwin")
    with refused("needs Linux"):
        Sandbox()

def test_a_virtual_environment_does_not_show_the_project_around_it(tmp_path):
    environment, file = tmp_path / "environment", tmp_path / "train_code.py"
    for name in "train_code.py", "boostlora.py":
        shutil.copy(HERE / name, tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    site, = environment.glob("lib/python*/site-packages")
    (site / "extra.py").write_text("x = 7")
    (site / "extra.py").chmod(0o666)
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    steps = ["extra.x", f"os.listdir({str(tmp_path)!r})", f"open({str(file)!r})", "open(extra.__file__, 'a')"]
    codes = [f"import extra, os\n{step}" for step in steps]
    script = f"import train_code\nprint(train_code.Sandbox(1).run([(c, '') for c in {codes}]))"
    command = [environment / "bin/python", "-c", script]
    assert subprocess.check_output(command, cwd=tmp_path) == b"[True, False, False, False]\n"

@both_ways
@pytest.mark.parametrize("victim", ["trainer", "judge"])
def test_nothing_outlives_a_killed_trainer_or_judge(namespaces, victim, tmp_path):
    def wait(count):
        end = time.monotonic() + 60
        while len(alive(tmp_path)) != count and time.monotonic() < end:
            time.sleep(0.1)
        return alive(tmp_path)
    run = (f"from train_code import Sandbox; box = Sandbox(1, namespaces={namespaces}); print(flush=True); "
           "box.run([('while 1: 0', '')])")
    trainer = subprocess.Popen([sys.executable, "-W", "ignore", "-c", run], cwd=HERE, stdout=subprocess.PIPE,
                               env=os.environ | {"TMPDIR": str(tmp_path)})
    trainer.stdout.readline()  # the sandbox has tried itself out
    judge, _ = wait(2)  # the candidate is its child
    os.kill(trainer.pid if victim == "trainer" else judge, signal.SIGKILL)
    start = time.monotonic()
    assert wait(0) == [] and time.monotonic() - start < 10  # the candidate may take 12 s
    trainer.kill()
    trainer.wait()

# train_code: the task ---------------------------------------------------------------------------------------

MBPP = {"task_id": 601, "text": "Add one.", "code": RIGHT, "test_setup_code": "",
        "test_list": TESTS.splitlines()}
HUMANEVAL = {"task_id": "HumanEval/0", "entry_point": "f", "canonical_solution": "    return [g(x)]\n",
             "prompt": "from typing import List\n\ndef g(x): return x + 1\n\n"
                       'def f(x: int) -> List[int]:\n    """The next."""\n',
             "test": "def check(candidate):\n    assert candidate(1) == [g(1)]\n"}

def test_mbpp_is_split_by_task_id_and_humaneval_is_only_a_test(tmp_path):
    rows = [MBPP | {"task_id": i} for i in (1, 11, 510, 511, 600, 601, 974)]
    mbpp, human = (tmp_path / name for name in ("mbpp.jsonl", "HumanEval.jsonl"))
    write_jsonl(mbpp, rows), write_jsonl(human, [HUMANEVAL])
    train, tests = train_code.load_data(RunConfig(train_file=f"{mbpp}", test_file=f"{mbpp},{human}"))
    assert [p["task_id"] for p in train] == [601, 974] and [*tests] == ["mbpp", "humaneval"]
    assert [p["task_id"] for p in tests["mbpp"]] == [11, 510]
    with refused("two files have one name"):
        train_code.load_data(RunConfig(train_file=f"{mbpp}", test_file=f"{human},{human}"))
    with refused("training task_ids, 601 to 974"):
        train_code.load_data(RunConfig(train_file=f"{human}", test_file=f"{human}"))

@pytest.mark.parametrize(("row", "message"), [
    ({"text": "Add."}, "line 2: the field 'task_id'"), (MBPP | {"text": ""}, "row 2: .*'text' or"),
    ({"task_id": 11, "text": "Add."}, "row 2: .*KeyError.'test_list'"), (MBPP | {"text": 5}, "row 2: .*str"),
    (HUMANEVAL | {"test": "pass"}, "row 2: .*'test' does not define check"),
    (MBPP | {"test_list": ["assert f(1) == "]}, "row 2: .*SyntaxError"),
    (HUMANEVAL | {"entry_point": "h"}, "row 2: .*'prompt' does not define the entry_point 'h'")])
def test_a_bad_row_is_named(row, message, tmp_path):
    with refused(message):
        train_code.load_problems(f"{write_jsonl(tmp_path / 'rows.jsonl', [MBPP, row])}")

def test_what_passes_is_rewarded_in_every_way_to_answer(tmp_path):
    row, = train_code.problem_rows(random.Random(0), [1])
    mbpp, human, demo = train_code.load_problems(f"{write_jsonl(tmp_path / 'rows', [MBPP, HUMANEVAL, row])}")
    assert "Add one." in mbpp["ask"] and TESTS in mbpp["ask"] and HUMANEVAL["prompt"].strip() in human["ask"]
    whole = "def f(x: int) -> List[int]:\n    return [g(x)]"  # needs the prompt's import and helper
    answers = [  # problem, completion, right?
        (demo, row["code"], True), (demo, row["code"].replace("return x", "return 1 + x"), False),
        (mbpp, RIGHT, True), (mbpp, f"```{RIGHT}", True), (mbpp, f"```python{WRONG}```", False),
        (mbpp, f"```python{WRONG}```\nor\n```python{RIGHT}```\n```bash\nls\n```", True),
        (mbpp, f"```python{RIGHT}```\nUse it:\n```python\nprint(f(1))\n```", True),
        (human, f"```python\n{whole}\n```", True), (human, HUMANEVAL["canonical_solution"], True),
        (human, f"```python\r\nfrom __future__ import annotations\r\n{whole}\r\n```", True),
        (human, "    pass\n", False), (human, whole.replace("def f", "def h"), False),
        (human, "def g(x): return 2\n" + whole, True),  # right for 1, and the tests use their own g
        (human, "def g(x): return 0\n" + whole, False)]
    with Sandbox(2) as sandbox:
        right = sandbox.run([train_code.program(problem, text) for problem, text, _ in answers])
    assert right == [ok for _, _, ok in answers]

class NoReturn(ast.NodeTransformer):
    def visit_Return(self, node):
        return ast.Pass()

@needs_data
def test_every_reference_solution_scores_1_and_renamed_or_silenced_0():
    files, right, wrong = [DATA / "mbpp.jsonl", DATA / "HumanEval.jsonl.gz"], [], []
    rows = [row for file in files for row in boostlora.read_rows(f"{file}", [])]
    problems = [problem for file in files for problem in train_code.load_problems(f"{file}")]
    for i, (row, problem) in enumerate(zip(rows, problems, strict=True)):
        body = row.get("canonical_solution")
        code = row["prompt"] + body if body else row["code"]
        text = body if body and i % 2 else f"Here:\n```python\n{code}\n```"
        right.append(train_code.program(problem, text))
        renamed = re.sub(r"(?m)^def \w+", r"\g<0>_", code)
        silent = ast.unparse(NoReturn().visit(ast.parse(code)))
        wrong.append(train_code.program(problem, renamed if i % 2 else silent))
    assert len(right) == len(wrong) == 974 + 164
    with Sandbox(2) as sandbox:
        assert sandbox.run(right) == [True] * len(right)
    with Sandbox(2, cpu_seconds=1, wall_seconds=5) as sandbox:
        assert not any(sandbox.run(wrong))

# train_protein ----------------------------------------------------------------------------------------------

def protein_task():
    """Two blocks of a random ESM; a pair binds if its ligand begins with K, not D. Some labels are wrong."""
    torch.manual_seed(0)
    model = PairClassifier(hf.EsmConfig(
        **SIZES | {"vocab_size": 33, "initializer_range": 0.1}, max_position_embeddings=80, num_labels=1,
        pad_token_id=1, mask_token_id=32, position_embedding_type="rotary", token_dropout=True)).eval()
    rows, words = [], {word: i for i, word in enumerate(train_protein.WORDS)}
    for i in range(150):
        draws = torch.randint(0, 20, (2, 8 + i % 5)).tolist()
        a, b = ("".join(train_protein.LETTERS[j] for j in side) for side in draws)
        label = (i + (i % 5 > 0)) % 2
        rows.append({"ligand": "KD"[i % 2] * 2 + a, "receptor": b, "label": label, "pdb": ""})
    tokenizer, config = SimpleNamespace(get_vocab=lambda: words), CEConfig(batch_tokens=800, lr=0.05)
    return ProteinTask(model, tokenizer, rows, {"test": rows[:12]}, config, seed=0)

def test_rows_are_counted_by_reason(tmp_path, capsys):
    rows = ['"mk, lx",ACD,1e-8,1ABC,no_mutation', "MK,ACD,1e-7,1abc,applied", "MK,ACD,1e-9,1ABC,not_applied",
            " ,ACD,1e-9,1ABC,", "MJ,ACD,1e-9,1ABC,", "MK,ACD,,1ABC,", "MK,ACD,0,1ABC", "MK,ACD,>1e-5,1ABC,",
            "MK,ACD,DFG,1e-9,1ABC,"]
    path = tmp_path / "pairs.csv"
    path.write_text("Ligand Sequences,Receptor Sequences,KD(M),PDB,mutation_status\n" + "\n".join(rows))
    assert load_pairs(path) == [{"ligand": "MKLX", "receptor": "ACD", "label": 1, "pdb": "1ABC"},
                                {"ligand": "MK", "receptor": "ACD", "label": 0, "pdb": "1ABC"}]
    shown = capsys.readouterr().out
    assert "2 usable rows, 1 of them bind" in shown
    for reason in ("the mutation", "an empty", "letters", "more fields", *(f"KD(M) is {s}" for s in
                   ("missing", "not", "out"))):
        assert f"1 left out: {reason}" in shown

@pytest.mark.parametrize(("text", "reason"), [
    ("a,b", "columns must be .* not only a"), ("ligand_seq,receptor_seq,label,PDB\nMK,AC,1,x", "one label"),
    ("ligand_seq,receptor_seq,label,PDB\nMK,AC,1,\"x\nMK,AC,0,x\n", "could not be opened .unexpected end")])
def test_a_file_without_pairs_is_refused(tmp_path, text, reason):
    (tmp_path / "pairs.csv").write_text(text)
    with refused(reason):
        load_pairs(tmp_path / "pairs.csv")

def test_no_group_is_on_both_sides():
    rows = [{"ligand": f"L{a}", "receptor": f"L{b}", "label": 0, "pdb": f"{p}"} for a, b, p in
            torch.randint(0, 3000, (300, 3), generator=generator("rows")).tolist()]
    train, test = train_protein.split(rows, seed=0)
    keys = [{value for row in side for value in (row["ligand"], row["receptor"], f"PDB {row['pdb']}")}
            for side in (train, test)]
    assert not keys[0] & keys[1] and len(train) + len(test) == 300 and 30 < len(test) <= 60
    assert train_protein.split(rows, seed=0) == (train, test) != train_protein.split(rows, seed=1)

def test_pooling_sees_the_partners_only():
    task, linker = protein_task(), train_protein.LINKER
    short, long = task.train[0], {**task.train[4], "ligand": "W" * 30, "receptor": "Y" * 90}
    ids, residues = task.tokens(long)
    assert len(ids) == 78 and sum(residues) == 51 and ids.count(train_protein.WORDS.index("W")) == 25
    alone, together = task.collate([short], [0])[0], task.collate([short, long], [0, 1])[0]  # with padding
    pooled = task.model(**alone).hidden_states[0]
    torch.testing.assert_close(task.model(**together).hidden_states[0], pooled)
    hidden = task.model.esm(alone["input_ids"], attention_mask=alone["attention_mask"]).last_hidden_state[0]
    n = len(short["ligand"])
    partners = torch.cat([hidden[1:n + 1], hidden[n + 1 + len(linker):-1]])
    torch.testing.assert_close(pooled, partners.mean(0))

def test_f1_and_auc():
    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.4]), torch.tensor([0, 0, 1, 1, 1])
    assert train_protein.auc(scores, labels) == pytest.approx(5 / 6)  # pairs: 1 1 1, 1/2 1 1/2
    assert train_protein.auc(torch.zeros(5), labels) == 0.5
    assert train_protein.f1(scores > 0.3, labels) == pytest.approx(6 / 7)
    assert train_protein.f1(scores > 1, labels) == 0

@pytest.mark.parametrize("options", [{}, {"replay": 0}, {"accept": "better"}])
def test_no_round_makes_the_training_loss_worse(options, tmp_path):
    task = protein_task()  # the rate is too large for a whole step
    task.probe(tmp_path)
    head = task.model.classifier.weight.clone()
    config = BoostConfig(**{"rounds": 3, "groups": 0, "rank": 4, "u": 4, "replay": 2, **options})
    records = boost(Booster(task.model, config), task, tmp_path)
    losses = [record["train_loss"] for record in records]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)
    assert (losses[3] < losses[0]) == ("replay" not in options)
    assert any(r["scale"] < 1 for r in records[1:]) and {"test_f1", "test_auc"} <= records[-1].keys()
    assert torch.equal(task.model.classifier.weight, head) and len(find_targets(task.model)) == 2 * 6
    inputs, _ = task.collate(task.train, range(5))
    logits = task.model(**inputs).logits
    again = PairClassifier.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(again(**inputs).logits, logits)
    stock = hf.EsmForTokenClassification.from_pretrained(tmp_path / "model").eval()
    z = stock(inputs["input_ids"], inputs["attention_mask"]).logits[..., 0]
    torch.testing.assert_close((z * inputs["residues"]).sum(1) / inputs["residues"].sum(1), logits[:, 1])

@pytest.mark.parametrize("count", [1, 3, 200])
def test_processes_share_all_rows_in_as_many_batches(count, monkeypatch):
    task, parts = protein_task(), []
    monkeypatch.setattr(train_protein, "processes", lambda: count)
    for rank in range(count):
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

# The README -------------------------------------------------------------------------------------------------

def test_the_programs_of_the_readme_run_as_they_stand(toy, tmp_path, monkeypatch):
    own, load = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    shutil.copytree(toy, tmp_path / "runs" / "math-demo" / "base")
    monkeypatch.chdir(tmp_path)
    exec(own, {"__name__": "example"})  # noqa: S102 - the README's own program
    assert len((tmp_path / "runs" / "mine" / "rounds.jsonl").read_text().splitlines()) == 3
    model = AutoModelForCausalLM.from_pretrained(toy)
    trained(model, rounds=10, rank=1).save("runs/math-demo/adapters.safetensors")
    exec(load, loaded := {})  # noqa: S102
    assert same_bits(bits(loaded["model"]), bits(model)) and not same_bits(bits(loaded["early"]), bits(model))

def test_the_demo_learns_and_killed_it_ends_with_the_same_bits(whole, tmp_path):
    out, process = whole
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    lines, vectors = state(out)
    assert 0.6 < lines[0]["test_accuracy"] < 0.75 and lines[-1]["test_accuracy"] > 0.78
    assert lines[-1]["failures"] <= lines[0]["failures"] * 0.7
    assert [line["rank"] for line in lines] == [{"min": 4 * t, "max": 4 * t} for t in range(4)]
    base, merged = (AutoModelForCausalLM.from_pretrained(out / name) for name in ("base", "model"))
    assert same_bits(bits(Booster.load(base, out / "adapters.safetensors").model), bits(merged))
    shutil.copytree(out / "base", tmp_path / "base")
    for rounds in (0, 1):
        end_after(demo(tmp_path, *DEMO), tmp_path, rounds, signal.SIGKILL)
        assert (tmp_path / "rounds.jsonl").read_text().count("\n") < 4
    printed, _ = (last := demo(tmp_path, *DEMO, threads=2)).communicate(timeout=900)  # it takes one thread
    assert last.returncode == 0, printed
    assert state(tmp_path) == (lines, vectors)
