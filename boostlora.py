"""BoostLoRA in one file: fine-tune a network by boosting tiny adapters (arXiv 2604.27308).

The algorithm, in the paper's symbols. Each line is marked (paper), or (ours) where its sources are silent.

    U, S, V  <-  leading r T singular triplets of every target W_0 [out, in], computed once         (paper)
    for t = 0 .. T-1:
        F_t  <-  the training examples that the current model W_t gets wrong; stop if none is       (paper)
                 answering greedily; an answer that is not in the asked format is wrong              (ours)
        U_t, S_t, V_t  <-  triplets [t r, (t+1) r): ROTATE; TOP takes [0, r) in every round         (paper)
        R_t  =   sum_i v_{t,i} P_{t,i}  [r, r]   v_t [groups, u]: the only numbers trained          (paper)
                 P_{t,i} ~ N(0, 1/(u r)), fixed by (seed, t, module); v_t = 0 at first               (ours)
                 a group is a contiguous block of modules in depth order                             (ours)
        train v_t on F_t only, all weights frozen, by                                               (paper)
            GRPO: n completions a prompt, A_i = (r_i - mean) / std among them                       (paper)
                  loss = - sum_i A_i log pi(y_i) / tokens, over the groups with variance             (ours)
                  Adam anew each round; one step a fresh batch, so the ratio is 1: no clip; no KL    (ours)
            or cross-entropy, for a classifier                                                      (paper)
            `replay` adds right examples to F_t: 0, but for the classifier                           (ours)
        W_{t+1}  <-  round(W_0 + sum_{s<=t} U_s S_s R_s V_s^T): merge, discard the adapter          (paper)
                  summed in fp32 from W_0 every round, rounded once to the weight's dtype            (ours)
                  a round that learned nothing, or was taken back, keeps its slice, with v_t = 0     (ours)
    return W_T: an ordinary model; under ROTATE the rank of the sum is r T                          (paper)
"""
import ctypes
import dataclasses
import gzip
import hashlib
import inspect
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, linalg, nn

File, Record, Trained = str | Path, dict[str, Any], nn.Parameter | list[nn.Parameter]

# Settings ---------------------------------------------------------------------------------------------------

class InputError(ValueError):
    """A mistake in flags, files, data or calls, told in one sentence. Whatever does not fit raises it."""

def require(condition: Any, message: str) -> None:
    if not condition:
        raise InputError(message)

def setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})

class Settings:
    """Refuses what is not among the choices of a Literal, and a number below its `least` (without one, 0)."""
    least: ClassVar = {"rank": 1, "u": 1, "replay": -1, "epochs": 1e-6, "prompts": 1, "group_size": 2,
                       "max_new_tokens": 1, "temperature": 1e-6, "lr": 1e-12, "max_grad_norm": 1e-12,
                       "micro_batch_tokens": 1, "batch_tokens": 1}
    def __post_init__(self):
        for name, kind in [(field.name, field.type) for field in dataclasses.fields(self)]:
            value, least, choices = getattr(self, name), self.least.get(name, 0), get_args(kind)
            require(not choices or value in choices, f"--{name} {value!r}: must be one of {choices}")
            if kind in (int, float):
                fits = (hasattr(value, "__index__") or isinstance(value, kind)) and least <= value < math.inf
                require(fits, f"--{name} {value!r}: must be at least {least}, of type {kind.__name__}")

@dataclasses.dataclass
class BoostConfig(Settings):
    """The boosting. With the base model and the vectors v it rebuilds the fine-tuned weights."""
    rounds: int = setting(10, "T: boosting rounds (the paper: 20)")
    rank: int = setting(2, "r: singular triplets per round; rotate's sum reaches rank r T (the paper: 2)")
    u: int = setting(1, "numbers per group of modules")
    groups: int = setting(12, "groups of modules, in depth order, that share a vector; 0: one per module")
    basis: Literal["rotate", "top", "top-decayed"] = setting(
        "rotate", "rotate: a fresh slice each round; top: the first; top-decayed: that, scaled as rotate's")
    replay: float = setting(0.0, "right examples beside each failure; 0: failures only (paper); -1: all")
    recheck: float = setting(1.0, "share of the right examples that a round evaluates again (the paper: 1)")
    accept: Literal["all", "better"] = setting("all", "better: a round that adds failures is taken back")
    seed: int = setting(0, "all randomness follows from it and the round")

@dataclasses.dataclass
class GRPOConfig(Settings):
    """GRPO on fresh completions."""
    epochs: float = setting(1.0, "passes over the round's examples, rounded up to whole steps")
    prompts: int = setting(16, "prompts per optimiser step; with fewer failures, a step takes all")
    group_size: int = setting(8, "completions per prompt: failures are hard, 4 would often all be wrong")
    max_new_tokens: int = setting(512, "tokens per completion: a longer one is cut, and then mostly wrong")
    temperature: float = setting(1.0, "of sampling; 1: the policy itself")
    lr: float = setting(1e-2, "Adam's learning rate: about how far each number moves in a step")
    max_grad_norm: float = setting(1.0, "the gradient is clipped to this norm")
    micro_batch_tokens: int = setting(2048, "tokens of a prompt and completions per backward pass")

@dataclasses.dataclass
class CEConfig(Settings):
    """Cross-entropy on labelled batches; the task makes them, and does the line search (train_protein)."""
    epochs: int = setting(1, "passes over the round's examples")
    batch_tokens: int = setting(8192, "tokens per step, padding included")
    lr: float = setting(1e-2, "Adam's learning rate: about how far each number moves in a step")
    max_grad_norm: float = setting(1.0, "the gradient is clipped to this norm")
    line_search: bool = setting(True, "scale v by 1, 1/2 ... or 0: the loss on all training data falls")

def generator(*key: Any) -> torch.Generator:
    """A CPU generator whose stream depends on `key` alone, such as (seed, "P", round, module)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))

# Basis: W_0 = U Sigma V^T, of which the leading k = r T triplets are kept -----------------------------------

def svd_basis(weight: Tensor, k: int, name: str = "the weight") -> tuple[Tensor, ...]:
    """The k leading singular triplets of weight [out, in]: U [out, k], S [k], V [in, k], fp32, on its device;
    of each u_i the entry largest in magnitude is positive. They come from the smaller Gram matrix, in fp64,
    as forming it squares the condition; `torch.svd_lowrank` would mix neighbours, which breaks the slices."""
    W, shape = weight.detach().double(), list(weight.shape)
    require(W.isfinite().all() and k <= min(shape), f"{name} {shape} is not finite, or has no {k} triplets")
    W = W.T if (wide := shape[0] < shape[1]) else W
    values, vectors = linalg.eigh(W.T @ W)  # ascending
    S, right = values.flip(0)[:k].clamp(min=0).sqrt(), vectors.flip(1)[:, :k]
    require((S > 1e-6 * S[:1]).all(), f"{name} {shape} has fewer than {k} triplets: lower --rank or --rounds")
    left = W @ right / S
    U, V = (right, left) if wide else (left, right)
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()  # [1, k]
    return (U * sign).float(), S.float(), (V * sign).float()

# TinyLoRA layer: U S R V^T, R = sum_i v_i P_i ---------------------------------------------------------------

class TinyLoRA(nn.Module):
    """One module's update in one round, U S R V^T with R = sum_i v_i P_i: U [out, r], S [r], V [in, r] and
    P [u, r, r] are fixed, fp32; v_i is in row `group` of v [groups, u], which is changed in place."""
    def __init__(self, U: Tensor, S: Tensor, V: Tensor, P: Tensor, v: Tensor, group: int, dtype=torch.float):
        super().__init__()
        self.US, self.Vt, self.P, self.v, self.group = U * S, V.T.contiguous(), P, v, group
        self.up, self.folded, self.version = self.US.to(dtype), None, None

    def down(self) -> Tensor:
        """R V^T [r, in], fp32: the half of the update that v changes."""
        return torch.einsum("u,urs->rs", self.v[self.group], self.P) @ self.Vt

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> the update's output [..., out]."""
        if torch.is_grad_enabled() or self.version != self.v._version:  # torch counts the changes of v
            self.folded, self.version = self.down().to(x.dtype), self.v._version  # so once while sampling
        return nn.functional.linear(nn.functional.linear(x, self.folded), self.up)

    def delta(self) -> Tensor:
        """The update as a matrix, fp32 [out, in]."""
        return self.US @ self.down()

# Booster ----------------------------------------------------------------------------------------------------
# W_t is a pure function of the vectors v_0 .. v_{t-1}: merge, rollback and load change them and call `write`.
# Of 20 updates, |R| = 1e-2, a bf16 weight keeps 58 % if each is added and rounded, 95 % if their sum is.

def find_targets(model: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear inside the transformer blocks, by name, in depth order: no embeddings, no head. The
    blocks are the nn.ModuleList with the most weights: of a multimodal model, the language model's."""
    inside = [{f"{prefix}.{name}": m for name, m in part.named_modules() if isinstance(m, nn.Linear)}
              for prefix, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    targets = max(inside, key=lambda linears: sum(m.weight.numel() for m in linears.values()), default={})
    require(targets, f"{type(model).__name__} has no nn.ModuleList of blocks with an nn.Linear (not Conv1D)")
    return targets

def check_fit(model: nn.Module, config: BoostConfig) -> int:
    """How many triplets k are used, if every target has as many."""
    targets, k = find_targets(model), config.rank * (1 if config.basis == "top" else config.rounds)
    require(config.groups <= len(targets), f"--groups {config.groups}: there are {len(targets)} targets")
    for name, linear in targets.items():
        kind, most = linear.weight.dtype, min(linear.weight.shape)
        require(kind.itemsize > 1, f"{name} has {kind} weights: load the model unquantised")
        require(k <= most, f"{name} has {most} singular triplets, not {k}: lower --rank or --rounds")
    return k

def checksum(model: nn.Module) -> str:
    """SHA-256 of names and bits of the backbone's parameters (a task may train a head on it)."""
    digest = hashlib.sha256()
    for name, p in getattr(model, "base_model", model).named_parameters():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

class Booster:
    """W_0 of the targets, their basis, and v of every round; keeps the weights of the model, all of it
    frozen, equal to W_t between rounds. Raises InputError where model and configuration do not fit."""
    def __init__(self, model: nn.Module, config: BoostConfig):
        self.model, self.config, self.targets = model.requires_grad_(False), config, find_targets(model)
        self.k = check_fit(model, config)  # triplets used of each target
        self.groups = config.groups or len(self.targets)
        self.group_of = {name: i * self.groups // len(self.targets) for i, name in enumerate(self.targets)}
        self.checksum = checksum(model)
        self.base = {name: m.weight.detach().to("cpu", copy=True) for name, m in self.targets.items()}
        self.basis = {name: svd_basis(linear.weight, self.k, name)  # U [out, k], S [k], V [in, k]
                      for name, linear in progress(self.targets.items(), "basis")}
        self.vectors: list[Tensor] = []  # v of each finished round, fp32 [groups, u], on the CPU
        self.v, self.hooks, self.kept, self.total = None, ExitStack(), 0.0, 0.0

    def slices(self, t: int) -> tuple[slice, slice]:
        """Round t's columns of U and V, and its entries of S: of another slice for top-decayed alone."""
        r, basis = self.config.rank, self.config.basis
        top, rotated = slice(0, r), slice(t * r, (t + 1) * r)
        return (rotated if basis == "rotate" else top), (top if basis == "top" else rotated)

    def P(self, name: str, t: int) -> Tensor:
        """P [u, r, r] of round t. With std 1/sqrt(u r) a random v gives an R as large for every u and r."""
        u, r = self.config.u, self.config.rank
        random = generator(self.config.seed, "P", t, list(self.targets).index(name))
        return torch.randn(u, r, r, generator=random) / math.sqrt(u * r)

    def attach(self) -> nn.Parameter:
        """v of a fresh adapter for the next round, active in the forward; one not merged is dropped."""
        self.hooks.close()
        t, device = len(self.vectors), next(iter(self.targets.values())).weight.device
        require(t < self.config.rounds, f"attach: all {t} rounds are done")
        self.v = nn.Parameter(torch.zeros(self.groups, self.config.u, device=device))
        columns, values = self.slices(t)
        for name, linear in self.targets.items():
            U, S, V = self.basis[name]
            adapter = TinyLoRA(U[:, columns], S[values], V[:, columns], self.P(name, t).to(device), self.v,
                               self.group_of[name], linear.weight.dtype)
            self.hooks.enter_context(linear.register_forward_hook(
                lambda _, inputs, out, adapter=adapter: out + adapter(inputs[0])))
        return self.v

    def merge(self) -> None:
        """Detach the adapter, keep its v, write the weights."""
        require(self.v is not None, "merge: no adapter is attached")
        self.vectors.append(self.v.detach().to("cpu", copy=True))
        self.write()

    def rollback(self, n: int = 1) -> None:
        """Take the last n rounds back: their v becomes 0, the weights get the bits of before."""
        require(0 <= n <= len(self.vectors), f"rollback({n}): there are {len(self.vectors)} rounds")
        for v in self.vectors[len(self.vectors) - n:]:
            v.zero_()
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """weight <- round(W_0 + delta), in place, for every target; and how much of delta that keeps."""
        self.hooks.close()
        self.v = None  # an adapter that was not merged is dropped
        learned, self.kept, self.total = any(v.any() for v in self.vectors), 0.0, 0.0
        for name, linear in self.targets.items():
            W0, delta = self.base[name].to(linear.weight.device), self.delta(name)
            linear.weight.copy_(W0.float() + delta if learned else W0)  # -0.0 + 0 would lose its sign
            self.kept += float(((linear.weight.float() - W0.float()) * delta).sum())
            self.total += float(delta.square().sum())

    def core(self, name: str, rounds: Iterable[int] | None = None) -> Tensor:
        """C [k, k], on the CPU, with delta = U C V^T: the blocks S_t R_t along its diagonal (top: all in one
        place). As U and V are orthonormal, delta's norm and singular values are those of C."""
        C, S = torch.zeros(self.k, self.k), self.basis[name][1].cpu()
        for t in range(len(self.vectors)) if rounds is None else rounds:
            columns, values = self.slices(t)
            R = torch.einsum("u,urs->rs", self.vectors[t][self.group_of[name]], self.P(name, t))
            C[columns, columns] += S[values, None] * R
        return C

    def delta(self, name: str) -> Tensor:
        """The exact sum of the finished rounds for a target, fp32 [out, in]."""
        U, _, V = self.basis[name]
        return U @ self.core(name).to(U.device) @ V.T

    def rank(self, eps: float = 1e-6) -> dict[str, int]:
        """Per target, how many singular values of delta (not of W_T - W_0, rounded) exceed eps x the top."""
        return {name: int(linalg.matrix_rank(self.core(name).double(), rtol=eps)) for name in self.targets}

    def fidelity(self) -> float:
        """<W_T - W_0, dW> / |dW|^2 over all targets: the share of the update that survived rounding."""
        return self.kept / self.total if self.total else 1.0

    def summary(self) -> Record:
        """For the record: norm of the last round's update, all targets; of the sum, norm, rank, fidelity."""
        ranks, last = self.rank().values(), [len(self.vectors) - 1] if self.vectors else []
        squares = sum(float(self.core(name, last).square().sum()) for name in self.targets)
        return {"norm": math.sqrt(squares), "total_norm": math.sqrt(self.total),
                "rank": {"min": min(ranks), "max": max(ranks)}, "fidelity": self.fidelity()}

    def save(self, path: File) -> None:
        """Write v of all rounds [rounds, groups, u], 4 bytes a number, and what rebuilds the rest."""
        v = torch.stack(self.vectors) if self.vectors else torch.zeros(0, self.groups, self.config.u)
        about = to_json({"format": 2, "config": vars(self.config), "base": self.checksum})
        replace(path, lambda new: safetensors.torch.save_file({"v": v}, new, {"boostlora": about}))

    @staticmethod
    def read(path: File) -> tuple[BoostConfig, Tensor, str]:
        """A file's configuration, v, checksum of the base model."""
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["boostlora"])
            return BoostConfig(**about["config"]), file.get_tensor("v"), about["base"]

    def resume(self, path: File, rounds: int | None = None, weights: list[float] | None = None) -> "Booster":
        """Take over a file's vectors (the first `rounds`; each scaled by weights[t], as R is linear in v) and
        write the weights. InputError for a damaged file, another base model or configuration."""
        theirs, v, base = load(self.read, path)
        require(base == self.checksum, f"{path} is of another base model: other weights, or another --dtype")
        require(theirs == dataclasses.replace(self.config, rounds=theirs.rounds), f"{path} is of {theirs}")
        rounds, weights = len(v) if rounds is None else rounds, weights or [1.0] * len(v)
        require(0 <= rounds <= min(len(v), self.config.rounds) and len(weights) == len(v),
                f"{path} has {len(v)} rounds: {rounds} of them and {len(weights)} weights do not fit")
        self.vectors = [v[t] * weights[t] for t in range(rounds)]
        self.write()
        return self

    @classmethod
    def load(cls, model: nn.Module, path: File, rounds: int | None = None,
             weights: list[float] | None = None) -> "Booster":
        """A base model fine-tuned by the file, as `resume`: same bits on the same machine, elsewhere near."""
        return cls(model, load(cls.read, path)[0]).resume(path, rounds, weights)

    def export_lora(self, folder: File) -> None:
        """The exact fp32 sum as one LoRA in PEFT's format: B = U C [out, k], A = V^T [k, in], alpha = k."""
        tensors = {}
        for name, (U, _, V) in self.basis.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = V.T.contiguous().cpu()
            tensors[f"base_model.model.{name}.lora_B.weight"] = (U @ self.core(name).to(U.device)).cpu()
        config = {"peft_type": "LORA", "r": self.k, "lora_alpha": self.k, "target_modules": [*self.targets],
                  "bias": "none", "base_model_name_or_path": getattr(self.model, "name_or_path", None)}
        file, about = Path(folder) / "adapter_model.safetensors", Path(folder) / "adapter_config.json"
        replace(file, lambda new: safetensors.torch.save_file(tensors, new, {"format": "pt"}))
        replace(about, lambda new: new.write_text(json.dumps(config, indent=2) + "\n"))

# The loop: F_t = {x : W_t is wrong on x}, v_t = fit(F_t), W_{t+1} = merge(v_0 .. v_t) -----------------------

def boost(booster: Any, task: Any, out: File, test_every: int = 0, settings: Record | None = None,
          tokenizer: Any = None) -> list[Record]:
    """Boost a learner (a Booster, or what has its attach, merge, save, resume, model and config, may have its
    summary and checksum, and has its rollback where accept="better") on a task:

        task.train, task.tests           a sequence of examples; dict: name -> examples
        task.evaluate(examples)          -> (list of bool: right?, dict of further metrics)
        task.fit(examples, v, round)     -> dict of statistics; trains v in place, not v.data
        task.effort, task.seed           optional: what training on an example costs, in evaluations; is set

    Tests first, last, every `test_every` rounds. Continues the run in the folder `out`, with a new learner;
    InputError where its `settings`, data or base model differ. Returns the records, one a round."""
    out, config = Path(out), booster.config
    require(all(map(len, [task.train, *task.tests.values()])), "there is an empty training or test set")
    require(config.accept == "all" or hasattr(booster, "rollback"), "--accept better: not with this learner")
    if hasattr(task, "seed"):  # a TextTask's: its samples follow from it
        task.seed = config.seed
    data = hashlib.sha256(to_json([list(task.train), task.tests]).encode()).hexdigest()[:16]
    trainer = vars(task.config) if dataclasses.is_dataclass(getattr(task, "config", None)) else {}
    identity = {"data": data, "base": getattr(booster, "checksum", "")[:16]}
    settings = claim(out, {**vars(config), **trainer, **(settings or {}), **identity})
    records = read_state(out, booster)
    replace(out / "config.json", lambda new: new.write_text(to_json(settings)))
    while not records or (len(records) <= config.rounds and records[-1]["failures"]):
        t = len(records) - 1  # the round that is trained now; -1: the base model is evaluated
        stats, clock = {}, time.perf_counter
        start = trained = merged = clock()  # before round 0, both take 0 seconds
        if t >= 0:
            stats = task.fit(select(task.train, records[-1]["failed"], config, t), booster.attach(), t) or {}
            trained = clock()
            booster.merge()
            merged = clock()
        found = measure(booster, task, records, t, test_every)
        seconds = {"evaluate": clock() - merged, "generate": 0.0, **stats.pop("seconds", {})}
        seconds |= {"train": trained - start - seconds["generate"], "merge": merged - trained}
        records.append({**stats, **getattr(booster, "summary", dict)(), **found, "seconds": seconds})
        if t >= 0:
            booster.save(out / "adapters.safetensors")
        replace(out / "rounds.jsonl", lambda new: new.write_text("".join(to_json(r) + "\n" for r in records)))
        say(describe(records[-1], config.rounds))
        if t < 0 and found["failures"] and config.rounds:
            say(f"          about {estimate(task, config, seconds['evaluate'], found['failures'])} to go")
    if hasattr(booster.model, "save_pretrained"):  # of transformers
        replace(out / "model", lambda new: [x.save_pretrained(new) for x in (booster.model, tokenizer) if x])
    say("\n" + "\n".join(describe(record, config.rounds) for record in records))
    return records

def select(train: Sequence[Any], failed: list[int], config: BoostConfig, t: int) -> list[Any]:
    """The examples of round t: F_t, and floor(replay |F_t|) right ones (-1: all), by (seed, t)."""
    right = sorted({*range(len(train))} - {*failed})
    wanted = len(right) if config.replay < 0 else int(config.replay * len(failed))
    return [train[i] for i in sorted(failed + sampled(right, wanted, config.seed, "replay", t))]

def sampled(items: Sequence[Any], count: int, *key: Any) -> list[Any]:
    """`count` of the items (all where there are fewer), in their order; which ones follows from the key."""
    chosen = torch.randperm(len(items), generator=generator(*key))[:count]
    return [items[i] for i in sorted(chosen.tolist())]

def failures(task: Any, examples: Sequence[Any], looked: Sequence[int]) -> tuple[list[int], Record]:
    """Which of those looked at are wrong, and metrics: of one process, as a grader may use a clock."""
    right, metrics = gather(task.evaluate([examples[i] for i in looked]))[0]
    require(len(right) == len(looked), f"evaluate gave {len(right)} labels for {len(looked)} examples")
    return [i for i, ok in zip(looked, right, strict=True) if not ok], metrics

def measure(booster: Any, task: Any, records: list[Record], t: int, test_every: int) -> Record:
    """The record after round t (-1: before any): F_{t+1}, and tests. `accept` may take the round back."""
    config, everything, last = booster.config, [*range(len(task.train))], t + 1 == booster.config.rounds
    before = records[-1]["failed"] if records else everything  # line 0: none is fixed or regressed
    right, found = sorted({*everything} - {*before}), {"round": t + 1}
    share = 1 if last else config.recheck
    looked = sorted(before + sampled(right, math.ceil(len(right) * share), config.seed, "recheck", t))
    failed, metrics = failures(task, task.train, looked)  # right ones not looked at are taken to stay right
    if not failed and looked != everything:  # before the run ends, look at all
        looked, (failed, metrics) = everything, failures(task, task.train, everything)
    if config.accept == "better" and len(failed) > len(before):
        booster.rollback()
        found["note"], failed = f"taken back: it left {len(failed)} failures", before
    elif looked == everything:
        found |= {f"train_{name}": value for name, value in metrics.items()}
    found |= {"failures": len(failed), "fixed": len({*before} - {*failed}) if records else 0,
              "regressed": len({*failed} - {*before}), "train_accuracy": 1 - len(failed) / len(everything)}
    due = t < 0 or last or not failed or (test_every and (t + 1) % test_every == 0)
    for name, examples in (task.tests if due else {}).items():
        wrong, metrics = failures(task, examples, range(len(examples)))
        base = records[0][f"{name}_failed"] if records else wrong
        figures = {"accuracy": 1 - len(wrong) / len(examples), **metrics, "fixed": len({*base} - {*wrong}),
                   "regressed": len({*wrong} - {*base}), "failed": wrong}
        found |= {f"{name}_{figure}": value for figure, value in figures.items()}
    return {**found, "failed": failed}

def estimate(task: Any, config: BoostConfig, seconds: float, failed: int) -> timedelta:
    """How long the rounds take, if the evaluation of all examples took these seconds, and as many fail."""
    train, tests = len(task.train), sum(map(len, task.tests.values()))
    count = train if config.replay < 0 else min(train, int((1 + config.replay) * failed))
    each_round = getattr(task, "effort", 1) * count + failed + config.recheck * (train - failed)
    return timedelta(seconds=round(seconds * (config.rounds * each_round + tests) / (train + tests)))

def describe(r: Record, rounds: int) -> str:
    """The line of a round."""
    changed = f"({r['fixed']:3d} fixed, {r['regressed']:3d} regressed)"
    parts = [f"round {r['round']:2d}/{rounds}", f"failures {r['failures']:4d} {changed}"]
    parts += [f"{name.removesuffix('_accuracy').replace('_', ' ')} {100 * value:.1f} %"
              for name, value in r.items() if name.endswith("_accuracy")]
    parts += [f"{name} {r[name]:.2f}" for name in ("norm", "fidelity") if name in r]
    parts += [f"rank {r['rank']['max']}"] if "rank" in r else []
    parts += [f"{timedelta(seconds=round(sum(r['seconds'].values())))}"]
    lines = ["  ".join(parts), r.get("note"), not r["failures"] and "all are right: nothing is left to learn",
             r.get("fidelity", 1) < 0.5 and "rounding loses most of the update: try --dtype float32"]
    return "\n          ".join(filter(None, lines))

# Generation: argmax for F_t; y_1 .. y_n ~ pi(. | x)^(1/temperature) for GRPO --------------------------------
# Why not model.generate: it keeps finished rows in the batch, encodes a prompt once for each completion, and
# takes top_k, top_p and penalties from the model's files; a policy gradient needs the whole distribution.

class Completion(NamedTuple):
    text: str
    tokens: list[int]  # with the end token, where it was reached
    logprobs: list[float]  # of the tokens, in the distribution they were drawn from (greedy: temperature 1)

def generate(model: nn.Module, tokenizer: Any, prompts: Sequence[str], n: int = 1, temperature: float = 0.0,
             max_new_tokens: int = 1024, seed: Any = 0, label: str = "generate") -> list[Completion]:
    """n completions of every prompt, those of prompts[i] at [i n, (i + 1) n). Prompts are formatted strings,
    tokenised without adding special tokens. Temperature 0 is greedy; else the draws follow from `seed`, the
    call's shape and the place in it, not from batches. torchrun shares the work."""
    model.eval()  # what is sampled must be the policy that learns
    ids = tokenizer(list(prompts), add_special_tokens=False)["input_ids"] if prompts else []
    require(all(ids), "generate: a prompt has no token")
    ends = model.generation_config.eos_token_id  # Qwen2.5 has two
    stops = sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
    uniforms = torch.rand(len(ids) * n, max_new_tokens, generator=generator("sample", seed)).to(model.device)
    queue = sorted(range(len(ids))[process()::processes()], key=lambda i: -len(ids[i]))  # the longest first
    rows = []  # (number, tokens, log-probabilities)
    while queue:
        size = batch_size(model, [len(ids[i]) for i in queue], n, max_new_tokens)
        batch, queue = queue[:size], queue[size:]
        numbers = [i * n + j for i in batch for j in range(n)]
        done = decode(model, [ids[i] for i in batch], n, temperature, stops, uniforms[numbers], label)
        rows += [(number, *row) for number, row in zip(numbers, done, strict=True)]
    rows = sorted(row for part in gather(rows) for row in part)
    return [Completion(tokenizer.decode(t, skip_special_tokens=True), t, p) for _, t, p in rows]

def batch_size(model: nn.Module, lengths: list[int], n: int, max_new_tokens: int) -> int:
    """How many of the prompts, by their lengths, longest first, make a batch of n rows each. Keys, values and
    four fp32 copies of the logits fit in half of a GPU's free memory, as a power of two, so that batches, and
    with them roundings, seldom change; on a CPU in 2 GiB. Padding is at most an eighth, and 2,048 tokens."""
    c, d, memory, longest = model.config.get_text_config(), model.device, 2**31, lengths[0]
    if d.type == "cuda":
        free = torch.cuda.mem_get_info(d)[0] + torch.cuda.memory_reserved(d) - torch.cuda.memory_allocated(d)
        memory = 2 ** int(math.log2(max(free / 2, 1)))
    head_size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    token = 2 * c.num_hidden_layers * heads * head_size * model.dtype.itemsize  # bytes; Qwen2.5-3B: 36 KiB
    fit = memory // ((longest + max_new_tokens) * token + 16 * c.vocab_size) // n
    alike = [size for size in range(1, min(fit, len(lengths)) + 1)
             if size * longest - sum(lengths[:size]) <= 2048 + size * longest / 8]
    return max(alike, default=1)

@torch.inference_mode()
def decode(model: nn.Module, prompts: list[list[int]], n: int, temperature: float, stops: list[int],
           uniforms: Tensor, label: str) -> list[tuple[list[int], list[float]]]:
    """(tokens, log-probabilities) of a batch's rows, by uniforms [rows, tokens]; prompts: longest first."""
    from transformers import DynamicCache
    device, width, cache = model.device, len(prompts[0]), DynamicCache(config=model.config)
    accepted = inspect.signature(model.base_model.forward).parameters
    options = {"use_cache": True, "cache" if "cache" in accepted else "past_key_values": cache}  # before 5.24
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # padded on the left
    positions = torch.tensor([range(len(p) - width, len(p) + uniforms.shape[1]) for p in prompts]).to(device)
    mask, positions = (positions >= 0).long(), positions.clamp(min=0)  # padding is before 0
    size = max(1, 8192 // len(prompts))  # each prompt once, but for its last token, without the head
    for first in range(0, width - 1, size):
        end = min(first + size, width - 1)
        model.base_model(input_ids=ids[:, first:end], attention_mask=mask[:, :end],
                         position_ids=positions[:, first:end], **options)
    require(not any(hasattr(x, "conv_states") for x in cache.layers), "recurrent layers are not supported")
    cache.batch_repeat_interleave(n)
    token, mask, positions = (x.repeat_interleave(n, 0) for x in (ids[:, -1], mask, positions))
    stops = torch.tensor(stops, dtype=torch.long, device=device)
    alive = torch.arange(len(token), device=device)  # the rows that go on
    tokens, logprobs = torch.zeros_like(uniforms, dtype=torch.long), torch.zeros_like(uniforms)
    for step in progress(range(uniforms.shape[1]), f"{label}, {len(alive)} rows, tokens"):
        seen = width + step
        logits = model(input_ids=token[:, None], attention_mask=mask[:, :seen],
                       position_ids=positions[:, seen - 1:seen], **options).logits[:, -1]
        pi = logits.float().div_(temperature or 1.0).softmax(-1)  # [rows, vocabulary]
        if temperature:  # invert the distribution function: so a row's draw is its own
            cdf = pi.cumsum(-1)
            point = (1 - uniforms[alive, step])[:, None] * cdf[:, -1:]  # > 0: never a token of probability 0
            token = torch.searchsorted(cdf, point)[:, 0].clamp(max=cdf.shape[1] - 1)  # NaN is refused below
        else:
            token = logits.argmax(-1)
        tokens[alive, step], logprobs[alive, step] = token, pi.gather(-1, token[:, None]).squeeze(-1).log()
        ended = torch.isin(tokens[alive, :step + 1], stops).any(-1)
        if ended.all():
            break
        if ended.float().mean() >= 1 / 8:  # leaving copies the cache, so an eighth leaves together
            keep = (~ended).nonzero().squeeze(-1)
            alive, token, mask, positions = (x[keep] for x in (alive, token, mask, positions))
            cache.batch_select_indices(keep)
    require(cache.get_seq_length() == seen, f"{type(model).__name__} does not use its cache")
    require(logprobs.isfinite().all(), "output is not finite: in a new --out, lower --lr or --dtype float32")
    ends = (torch.isin(tokens, stops).int().cummax(-1).values == 0).sum(-1) + 1  # through the first stop
    return [(t[:end], p[:end]) for t, p, end in zip(tokens.tolist(), logprobs.tolist(), ends.tolist())]

# GRPO (arXiv 2402.03300): loss = - sum_i A_i log pi(y_i | x) / tokens, A_i = (r_i - mean) / std -------------

def group_advantages(rewards: Sequence[float], group_size: int) -> Tensor:
    """A_i = (r_i - mean) / std (the population's) by group, fp32 [groups, group_size]; 0 in flat ones."""
    r = torch.tensor(rewards, dtype=torch.float32).view(-1, group_size)
    flat = r.amax(1, keepdim=True) - r.amin(1, keepdim=True) < 1e-4  # less is float noise
    return ((r - r.mean(1, keepdim=True)) / r.std(1, correction=0, keepdim=True)).masked_fill(flat, 0.0)

def policy_gradient(model: nn.Module, prompt: list[int], completions: Sequence[Completion],
                    advantages: Sequence[float], temperature: float) -> None:
    """Backward pass of - sum_i A_i log pi(y_i) on one sequence: the prompt, its completions side by side,
    each seeing the prompt and itself. The head's comes first, in chunks: all logits never exist at once."""
    row, start, predicted = [(token, 0, i) for i, token in enumerate(prompt[:-1])], len(prompt) - 1, []
    for j, (c, a) in enumerate(zip(completions, advantages, strict=True), 1):
        # (token, owner, position), from the prompt's last token on: it predicts the completion's first.
        row += [(token, j, start + k) for k, token in enumerate(prompt[-1:] + c.tokens[:-1])]
        predicted += [(token, logprob, a) for token, logprob in zip(c.tokens, c.logprobs, strict=True)]
    ids, owner, position = (torch.tensor([x], device=model.device) for x in zip(*row, strict=True))
    tokens, drawn, advantage = (torch.tensor(x, device=model.device) for x in zip(*predicted, strict=True))
    options, about, gap = {}, model.config.get_text_config(), 0.0
    if len(completions) > 1:  # else the model's own causal mask does
        sees = ((owner == 0) | (owner == owner.T)).tril()  # [position, position]
        mask = torch.where(sees, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
        options = {"attention_mask": mask[None, None], "position_ids": position}
    states = model.base_model(input_ids=ids, use_cache=False, **options).last_hidden_state[0, start:]
    size, cap = max(1, 2**25 // about.vocab_size), getattr(about, "final_logit_softcapping", None)  # Gemma 2
    leaf = states.detach().requires_grad_()
    for x, token, log_pi, a in zip(*(y.split(size) for y in (leaf, tokens, drawn, advantage)), strict=True):
        logits = model.get_output_embeddings()(x).float()
        logits = (cap * (logits / cap).tanh() if cap else logits).div_(temperature)
        losses = nn.functional.cross_entropy(logits, token, reduction="none")  # - log pi
        gap += float((losses.detach() + log_pi).abs().sum())  # by bf16 .03 a token; NaN: see `descend`
        (a * losses).sum().backward()
    require(not gap * temperature > len(tokens) / 3, "GRPO saw another policy: logits change after the head")
    states.backward(leaf.grad)

def grpo(model: nn.Module, tokenizer: Any, prompts: Sequence[str], reward: Callable, v: Trained,
         config: GRPOConfig, round: int = 0, seed: int = 0) -> Record:
    """Train v (an adapter's, or a list of parameters) for one round: `epochs` passes, config.prompts a step:
    sample, reward(indices into prompts, texts) -> a number for each, advantages, one step of Adam."""
    optimizer = torch.optim.Adam([v] if isinstance(v, nn.Parameter) else v, lr=config.lr)
    ids = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    shuffle, every, steps, generating = generator(seed, "order", round), [], 0, 0.0
    n, size, passes = config.group_size, min(config.prompts, len(ids)), math.ceil(config.epochs) + 1
    order = [i for _ in range(passes) for i in torch.randperm(len(ids), generator=shuffle).tolist()]
    about = model.config.get_text_config()  # flash attention and sliding windows take no mask of ours
    masked = about._attn_implementation in ("sdpa", "eager") and not getattr(about, "sliding_window", None)
    for step in progress(range(math.ceil(config.epochs * len(ids) / size)), f"round {round + 1}"):
        start = time.perf_counter()
        chosen = order[step * size:(step + 1) * size]
        done = generate(model, tokenizer, [prompts[i] for i in chosen], n, config.temperature,
                        config.max_new_tokens, (seed, round, step), label="sample")
        owners, texts = [i for i in chosen for _ in range(n)], [completion.text for completion in done]
        rewards = [float(r) for r in on_first_process(reward, owners, texts)]
        require(len(rewards) == len(done) and all(map(math.isfinite, rewards)),
                "reward must return a finite number for each completion")
        generating += time.perf_counter() - start
        every += rewards
        advantages = group_advantages(rewards, n)
        parts = []  # (prompt, completions, advantages): a group, cut to --micro_batch_tokens
        for j in advantages.any(1).nonzero().flatten().tolist():  # groups with variance
            prompt, group = ids[chosen[j]], done[j * n:(j + 1) * n]
            room = (config.micro_batch_tokens - len(prompt)) // max(len(c.tokens) for c in group)
            row = max(1, room) if masked else 1  # completions side by side
            parts += [(prompt, group[k:k + row], advantages[j, k:k + row].tolist()) for k in range(0, n, row)]
        if parts:
            optimizer.zero_grad()
            for part in parts[process()::processes()]:
                policy_gradient(model, *part, config.temperature)
            tokens = sum(len(completion.tokens) for part in parts for completion in part[1])
            descend(optimizer, config.max_grad_norm, tokens)
            steps += 1
            getattr(ctypes.CDLL(None), "malloc_trim", abs)(0)  # else Linux keeps the holes in the heap
    note = {} if steps else {"note": "nothing could be learned: try more --max_new_tokens or --group_size"}
    flat = len(every) // n - int(group_advantages(every, n).any(1).sum())
    return {"steps": steps, "completions": len(every), "flat_groups": flat, "reward": sum(every) / len(every),
            "seconds": {"generate": generating}, **note}

def descend(optimizer: torch.optim.Optimizer, max_grad_norm: float, total: float) -> None:
    """One step on the gradients, summed over processes, divided by `total` (at last, for fp16), clipped."""
    parameters = optimizer.param_groups[0]["params"]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if processes() > 1:
            dist.all_reduce(p.grad)
        p.grad /= total
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    require(norm.isfinite(), "the gradient is not finite: in a new --out, lower --lr or --dtype float32")
    optimizer.step()

# Cross-entropy, for a classifier: loss = - mean log p(label | x) --------------------------------------------

def cross_entropy(model: nn.Module, batches: Callable[[], Iterable[tuple]], v: Trained, config: CEConfig,
                  round: int = 0) -> Record:
    """Train v for one round: `config.epochs` passes, an Adam step on the loss of each batch.
    batches() -> an iterator of (the model's keyword inputs, labels [B]), as many on every process."""
    model.eval()  # without dropout, as in evaluation
    optimizer = torch.optim.Adam([v] if isinstance(v, nn.Parameter) else v, lr=config.lr)
    losses, data = [], (batch for _ in range(config.epochs) for batch in batches())
    for inputs, labels in progress(data, f"round {round + 1}"):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(**inputs).logits.float(), labels)
        loss.backward()
        losses.append(float(loss.detach()))
        descend(optimizer, config.max_grad_norm, processes())
    require(losses, "cross_entropy: batches() gives no batch")
    return {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}

# Processes --------------------------------------------------------------------------------------------------

def process() -> int:
    return dist.get_rank() if dist.is_initialized() else 0

def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1

def gather(value: Any) -> list[Any]:
    """The value of every process, on every process."""
    values = [value] * processes()
    if processes() > 1:
        dist.all_gather_object(values, value)
    return values

def on_first_process(f: Callable, *args: Any, **options: Any) -> Any:
    """f(*args), called by the first process alone: for files, and for rewards (a sandbox's could differ)."""
    return gather(f(*args, **options) if process() == 0 else None)[0]

def say(text: str) -> None:
    if process() == 0:
        print(text, flush=True)

def progress(items: Iterable, label: str) -> Iterable:
    """A bar on a terminal, nothing in a log."""
    from tqdm import tqdm
    return tqdm(items, label, leave=False, disable=True if process() else None, dynamic_ncols=True)

# The state of a run -----------------------------------------------------------------------------------------
# adapters.safetensors and rounds.jsonl are replaced atomically, in this order. A round counts once its line
# is there; one without is done again, with the same random numbers, on one machine to the same bits.

def replace(path: File, write: Callable[[Path], Any]) -> None:
    """write(new) makes a file or a folder beside `path`; once it is whole, it takes the place of `path`."""
    path, new = Path(path), Path(f"{path}.tmp")
    if process():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(new, ignore_errors=True)
    write(new)
    shutil.rmtree(path, ignore_errors=True)  # does nothing to a file
    os.replace(new, path)

def to_json(value: Any) -> str:
    """JSON; tensors and numpy's numbers as plain ones, sets in order, Datasets as rows, objects as fields."""
    return json.dumps(value, default=lambda x: (
        sorted(x, key=repr) if isinstance(x, (set, frozenset)) else x.tolist() if hasattr(x, "tolist")
        else x.to_list() if hasattr(x, "to_list") else getattr(x, "__dict__", repr(x))))

def claim(out: File, settings: Record) -> Record:
    """Lock a run folder until the process ends; its next config.json. InputError where settings differ."""
    import fcntl
    def lock(path: Path) -> None:  # of this process, for writing: NFS has no other; the file stays open
        path.parent.mkdir(parents=True, exist_ok=True)
        fcntl.lockf(os.open(path, os.O_WRONLY | os.O_CREAT), fcntl.LOCK_EX | fcntl.LOCK_NB)
    require(settings["accept"] == "all" or settings["recheck"] >= 1, "--accept better needs --recheck 1: all")
    path = Path(out) / "config.json"
    on_first_process(load, lock, path.with_name(".lock"), advice=f"is {out} in use by another process?")
    there = read_rows(path, ["data"])[0] if path.exists() else {}
    require(there or not {"rounds.jsonl", "model"} & {*os.listdir(out)}, f"no {path}: choose another --out")
    here = {x: there.get(x) for x in ("data", "base")} | json.loads(to_json(settings))  # a script's: not yet
    may_change = {"rounds", "versions", "test_every", "export_lora", "micro_batch_tokens", "workers"}
    differing = [f"{key} {there.get(key)!r} there, {here.get(key)!r} here"
                 for key in sorted({*there, *here} - may_change) if there and there.get(key) != here.get(key)]
    require(not differing, f"{out} holds another run ({'; '.join(differing)}): choose another --out")
    loaded = [name for name in ("torch", "transformers", "safetensors", "datasets") if name in sys.modules]
    return here | {"versions": {name: sys.modules[name].__version__ for name in loaded}}

def read_state(out: Path, learner: Any) -> list[Record]:
    """The lines of rounds.jsonl, [] before the first, with the learner brought to the last of them."""
    path = out / "rounds.jsonl"
    records = read_rows(path, ["round", "failures", "failed"]) if path.exists() else []
    for t, r in enumerate(records):
        require(t == r["round"] and r["failures"] == len(r["failed"]), f"{path}, line {t + 1} is damaged: "
                "delete it and all lines after it, and those rounds are computed again")
    done, rounds = len(records) - 1, learner.config.rounds
    require(done <= rounds, f"{out} has {done} rounds, more than --rounds {rounds}: choose another --out")
    require(records or not [*out.glob("*.safetensors")], f"{path} is missing: choose another --out")
    require(done > 0 or not getattr(learner, "vectors", 0), "this Booster has rounds: make one from the base")
    if done > 0:
        learner.resume(out / "adapters.safetensors", rounds=done)
    say(f"{out} has {max(done, 0)} of {rounds} rounds{', so nothing is run' if done == rounds else ''}")
    gather(None)  # all processes have read the state before the first one changes it
    return records

class FullFineTuning:
    """The baseline, --method full: all weights are trained in place. It is what `boost` asks of a learner."""
    def __init__(self, model: nn.Module, config: BoostConfig):
        self.model, self.config, self.done = model.requires_grad_(False), config, 0
        self.checksum = checksum(model)

    def attach(self) -> list[nn.Parameter]:
        return [*self.model.requires_grad_(True).parameters()]

    def merge(self) -> None:
        self.model.requires_grad_(False)
        self.done += 1

    def save(self, path: Path) -> None:  # the round before's stays, until the record has this one
        file, past = (path.with_name(f"weights-{t}.safetensors") for t in (self.done, self.done - 2))
        replace(file, lambda new: safetensors.torch.save_file(dict(self.model.named_parameters()), new))
        past.unlink(missing_ok=True)

    def resume(self, path: Path, rounds: int) -> None:
        weights = load(safetensors.torch.load_file, path.with_name(f"weights-{rounds}.safetensors"))
        self.model.load_state_dict(weights, strict=False)
        self.done = rounds

# What the scripts share -------------------------------------------------------------------------------------

@dataclasses.dataclass
class RunConfig(Settings):
    """The flags of every script, beside those of BoostConfig and of its trainer."""
    model: str = setting("", "a model on the Hub, or a folder that save_pretrained wrote")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "of the weights; auto: bfloat16 on a GPU, float32 on a CPU and with --method full")
    method: Literal["boost", "full"] = setting("boost", "full: the same trainer on all weights, a baseline")
    out: str = setting("", "the run folder; the same command again continues the run in it")
    train_file: str = setting("", "training data in a file, instead of the Hub's")
    test_file: str = setting("", "test data in a file, instead of the Hub's")
    limit: int = setting(0, "train on a seeded sample of this many examples; 0: all")
    test_limit: int = setting(0, "test on this many examples of each test set, the first ones; 0: all")
    test_every: int = setting(0, "test every so many rounds; 0: at the start and at the end")
    export_lora: bool = setting(False, "also write the fine-tune as one LoRA in PEFT's format, to OUT/lora")
    demo: bool = setting(False, "a toy that needs neither download nor GPU, through the same code")
    def __post_init__(self):
        super().__post_init__()
        full, gpu = self.method == "full", torch.cuda.is_available()
        require(not (full and self.export_lora), "--export_lora: not with --method full")
        require(not (self.demo and self.model + self.train_file + self.test_file), "--demo has its own files")
        if self.dtype == "auto":
            self.dtype = "bfloat16" if gpu and not (self.demo or full) else "float32"
        require(not full or self.dtype == "float32", f"--method full: {self.dtype} rounds small steps away")

def parse(kinds: Sequence[type], description: str, defaults: dict[str, Any], demo: dict[str, Any]) -> tuple:
    """The flags, as one instance of each dataclass. --demo changes defaults, not what the user says, and uses
    one CPU thread: a toy's matrices are too small to share, and the bits would follow the number of cores."""
    from transformers import HfArgumentParser
    parser = HfArgumentParser(kinds, description=description.split("\n\n")[0], allow_abbrev=False,
                              usage="%(prog)s [flags]    (--help explains them)")
    parser.set_defaults(**defaults)
    if parser.parse_args().demo:
        torch.set_num_threads(1)
        parser.set_defaults(**demo, model="")
    return parser.parse_dict(vars(parser.parse_args()))

def run(main: Callable[[], None]) -> None:
    """Call main, alone or under torchrun. A user's mistake and Ctrl-C end in one sentence."""
    try:
        if "LOCAL_RANK" in os.environ:  # two hours, as the others wait while the first may download or grade
            if gpu := torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=2))
        return main()
    except (InputError, torch.OutOfMemoryError, OSError, safetensors.SafetensorError) as error:
        code, message = 2, f"error: {error}"
    except KeyboardInterrupt:
        code, message = 130, "\nstopped: the same command goes on after the last finished round, if any"
    print(message, file=sys.stderr, flush=True)
    os._exit(code) if dist.is_initialized() else sys.exit(code)  # an orderly end would wait for the others

def load(f: Callable, *args: Any, advice: str = "it is missing, damaged or foreign", **options: Any) -> Any:
    """f(*args), a model on this process's device, where a library's error becomes one sentence."""
    try:
        loaded = f(*args, **options)
    except Exception as error:  # noqa: BLE001 - of whatever library opens the user's file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{args[0]} could not be opened ({reason}): {advice}") from None
    if isinstance(loaded, nn.Module) and loaded.device.type != "meta":
        loaded.to("cuda" if torch.cuda.is_available() else "cpu")
        for p in loaded.parameters():
            p.data = p.data.clone()  # not where the file lies in memory: its alignment decides the last bits
    return loaded

def load_language_model(args: RunConfig, boosting: BoostConfig) -> tuple[nn.Module, Any]:
    """The causal language model and its tokenizer, checked before the weights are loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    advice = "--model takes a folder or a name on the Hub of a causal language model; --demo needs neither"
    base = load(AutoConfig.from_pretrained, args.model, advice=advice)
    tokenizer = load(AutoTokenizer.from_pretrained, args.model, advice=advice)
    require(tokenizer.chat_template, f"--model {args.model} has no chat template: use an instruct model")
    with torch.device("meta"):
        check_fit(load(lambda _: AutoModelForCausalLM.from_config(base), args.model, advice=advice), boosting)
    return load(AutoModelForCausalLM.from_pretrained, args.model, dtype=args.dtype, advice=advice), tokenizer

class TextTask:
    """A task for `boost`, learned by GRPO. prompt(example) -> what is asked, in the chat template, if there
    is one; grade(texts, examples) -> rewards, right from 1 on; lenient: a grade for the record alone."""
    def __init__(self, model: nn.Module, tokenizer: Any, train: Sequence, tests: dict[str, Sequence],
                 config: GRPOConfig, prompt: Callable, grade: Callable, lenient: Callable | None = None):
        self.model, self.tokenizer, self.config, self.seed = model, tokenizer, config, 0  # see `boost`
        self.train, self.tests, self.prompt, self.grade, self.lenient = train, tests, prompt, grade, lenient
        require("train" not in tests, "a test set cannot be called train, as the training set's figures are")
        self.effort = 1.5 * config.epochs * config.group_size  # training costs half of sampling
        prompts = self.prompts([example for examples in (train, *tests.values()) for example in examples])
        longest = max(map(len, tokenizer(prompts, add_special_tokens=False)["input_ids"]), default=0)
        room = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf) - longest
        require(config.max_new_tokens <= room, f"--max_new_tokens: the longest prompt leaves room for {room}")

    def prompts(self, examples: Sequence[Any]) -> list[str]:
        chats = [[{"role": "user", "content": self.prompt(example)}] for example in examples]
        if not self.tokenizer.chat_template:  # a base model's texts may begin with a token, as Llama's
            begin = self.tokenizer.decode(self.tokenizer("")["input_ids"])
            return [begin + chat[0]["content"] for chat in chats]
        return self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)

    def evaluate(self, examples: Sequence[Any]) -> tuple[list[bool], dict[str, float]]:
        texts = [c.text for c in generate(self.model, self.tokenizer, self.prompts(examples), 1, 0.0,
                                          self.config.max_new_tokens, label="evaluate")]
        grades = on_first_process(self.grade, texts, examples)
        require(hasattr(grades, "__len__"), f"grade must return a number for each text, not {grades!r}")
        more = {"lenient_accuracy": sum(self.lenient(texts, examples)) / len(texts)} if self.lenient else {}
        return [grade >= 1 for grade in grades], more

    def fit(self, examples: Sequence[Any], v: Trained, round: int) -> Record:
        return grpo(self.model, self.tokenizer, self.prompts(examples),
                    lambda indices, texts: self.grade(texts, [examples[i] for i in indices]),
                    v, self.config, round, self.seed)

def read_rows(path: File, fields: Sequence[str], hub: str = "", split: str = "") -> list[Record]:
    """Rows of a .jsonl(.gz) file, each with these fields; without a path, of the Hub's `owner/name:part`."""
    if not path:
        from datasets import load_dataset
        advice = "give --train_file and --test_file, or try --demo"
        return list(load(load_dataset, *hub.split(":"), split=split, advice=advice))
    def read(path: File) -> list[Any]:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            rows = file.read().rstrip().replace("\n", ",\n")  # an error's line is the file's
            return json.loads(f"[{rows}]")
    rows = load(read, path, advice="it takes one JSON object a line, in UTF-8")
    require(rows, f"{path}: the file is empty")
    for number, row in enumerate(rows, 1):
        missing = ", ".join(sorted(set(fields).difference(row if isinstance(row, dict) else ())))
        require(not missing, f"{path}, line {number}: the field '{missing}' is missing")
    return rows

def pretrain(model: nn.Module, batch: Callable[[], dict[str, Tensor]], steps: int) -> None:
    """A demo's base model: AdamW on the model's own loss of batch(), its keyword inputs with `labels`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.05)
    say("pre-training the demo's base model, about a minute")
    for _ in progress(range(steps), "pre-training"):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

def finish(args: RunConfig, config: BoostConfig, settings: Record, task: Any, tokenizer: Any) -> None:
    """Boost, export, and say what came of it."""
    if not (args.demo or torch.cuda.is_available() or (Path(args.out) / "rounds.jsonl").exists()):
        some, start = sampled(task.train, 64, "estimate"), time.perf_counter()  # a batch like those to come
        failed = task.evaluate(some)[0].count(False) * len(task.train) // len(some)
        whole = (time.perf_counter() - start) / len(some) * sum(map(len, [task.train, *task.tests.values()]))
        left = timedelta(seconds=round(whole)) + estimate(task, config, whole, failed)
        say(f"no GPU: about {left} for this run, by a first batch; --demo shows the method in minutes")
    booster = (Booster if args.method == "boost" else FullFineTuning)(task.model, config)
    boost(booster, task, args.out, args.test_every, settings, tokenizer)
    say(f"\n{args.out}/model is the merged model, for from_pretrained; {args.out}/rounds.jsonl the record")
    if args.export_lora:
        booster.export_lora(Path(args.out) / "lora")
        say(f"{args.out}/lora is the same as a LoRA of rank {booster.k}, for any engine that takes LoRA")
