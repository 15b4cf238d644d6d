"""BoostLoRA in one file: fine-tune a network by boosting tiny adapters (arXiv 2604.27308).

The algorithm, in the paper's symbols. Each line is marked (paper), or (ours) where its sources are silent.

    U, S, V  <-  leading r T singular triplets of every target W_0 [out, in], computed once         (paper)
    for t = 0 .. T-1:
        F_t  <-  the training examples that the current model W_t gets wrong                        (paper)
                 answering greedily; an answer that is not in the asked format is wrong              (ours)
                 stop when F_t is empty                                                              (ours)
        U_t, S_t, V_t  <-  triplets [t r, (t+1) r): ROTATE; TOP takes [0, r) in every round         (paper)
        R_t  =   sum_i v_{t,i} P_{t,i}  [r, r]   v_t [groups, u]: the only numbers trained          (paper)
                 P_{t,i} ~ N(0, 1/(u r)), fixed by (seed, t, module)                                 (ours)
                 v_t = 0 at first; a group is a contiguous block of modules in depth order           (ours)
        train v_t on F_t only, all weights frozen, by                                               (paper)
            GRPO: n completions a prompt, A_i = (r_i - mean) / std inside the group                 (paper)
                  loss = - sum_i A_i log pi(y_i) / tokens, over the groups with variance             (ours)
                  one Adam step for each fresh batch, so the ratio is 1: no ratio, clip or KL        (ours)
                  Adam starts afresh each round                                                      (ours)
            or cross-entropy, for a classifier                                                      (paper)
                  then v_t <- a v_t, with a from a line search on all training data                  (ours)
            `replay` adds right examples to F_t (for the classifier; 0 in GRPO)                      (ours)
        W_{t+1}  <-  round(W_0 + sum_{s<=t} U_s S_s R_s V_s^T): merge, discard the adapter          (paper)
                  summed in fp32 from W_0 every round, rounded once to the weight's dtype            (ours)
                  a round that learned nothing, or was taken back, keeps its slice, with v_t = 0     (ours)
    return W_T: an ordinary model; the rank of the sum is r T                                       (paper)

Learning rate, steps and batch sizes are ours too: see `GRPOConfig`. TinyLoRA is the adapter of a round; GRPO
is from DeepSeekMath (arXiv 2402.03300). The file reads from top to bottom: settings, basis, layer, booster,
generation, GRPO, cross-entropy; then processes, run folder, loop, and the command line that scripts share.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import gzip
import hashlib
import inspect
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------------------
# Mistakes and randomness.


class InputError(ValueError):
    """A mistake in flags, files or data, told in one sentence that says how to mend it."""


def require(condition: Any, message: str) -> None:
    if not condition:
        raise InputError(message)


def at_least(config: Any, **least: int) -> None:
    for name, bound in least.items():
        value = getattr(config, name)
        require(value >= bound, f"--{name} {value}: must be at least {bound}")


def above_zero(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 < value < math.inf, f"--{name} {value}: must be above 0")


def generator(*key: Any) -> torch.Generator:
    """A CPU generator whose stream depends on `key` alone, such as (seed, "P", round, module)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


# ------------------------------------------------------------------------------------------------------------
# Settings. Every field is a flag of the scripts: HfArgumentParser reads its name, type, default and help.


def setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class BoostConfig:
    """What defines the adapters: with the base model and the vectors v it rebuilds the fine-tuned weights."""

    rounds: int = setting(10, "T: boosting rounds (the paper: 20)")
    rank: int = setting(2, "r: singular triplets per round; the sum reaches rank r T (the paper: 2)")
    u: int = setting(1, "numbers per group of modules")
    groups: int = setting(12, "groups of modules, in depth order, that share a vector; 0: one per module")
    basis: Literal["rotate", "top", "top-decayed"] = setting(
        "rotate", "rotate: a fresh slice each round; top: the first; top-decayed: that, scaled as rotate's")
    replay: float = setting(0.0, "right examples beside each failure; 0: failures only (the paper); -1: all")
    seed: int = setting(0, "all randomness follows from it and the round")

    def __post_init__(self):
        at_least(self, rounds=0, rank=1, u=1, groups=0)
        require(self.basis in ("rotate", "top", "top-decayed"), f"--basis {self.basis}: no such basis")
        require(self.replay >= 0 or self.replay == -1, f"--replay {self.replay}: must be 0 or more, or -1")


@dataclass
class GRPOConfig:
    """GRPO on fresh completions. The defaults are choices for a 3B model on one GPU; nobody tuned them."""

    steps: int = setting(8, "optimiser steps per round: of 32 prompts each, most of a pass over 375 failures")
    prompts: int = setting(32, "prompts per step; with fewer failures than this, a step takes them all")
    group_size: int = setting(8, "completions per prompt: failures are hard, 4 would often all be wrong")
    max_new_tokens: int = setting(512, "tokens per completion: enough for GSM8K; MATH-500 needs 2048")
    temperature: float = setting(1.0, "of sampling; 1: the policy itself")
    lr: float = setting(3e-3, "Adam's: 8 steps move v by up to .024, which one-round TinyLoRA takes 500 for")
    max_grad_norm: float = setting(1.0, "the gradient is clipped to this norm")
    micro_batch_tokens: int = setting(16384, "tokens per backward pass, padding included; less saves memory")
    recompute: bool = setting(True, "recompute activations in the backward pass: slower, saves memory")
    cache_tokens: int = setting(0, "key-value cache, in tokens of all rows together; 0: what fits in memory")

    def __post_init__(self):
        at_least(self, steps=1, prompts=1, group_size=2, max_new_tokens=1, cache_tokens=0)
        at_least(self, micro_batch_tokens=1)
        above_zero(self, "temperature", "lr", "max_grad_norm")


@dataclass
class CEConfig:
    """Cross-entropy on labelled batches, with gradient boosting's line search at the end of the round."""

    steps: int = setting(16, "optimiser steps per round")
    batch_tokens: int = setting(8192, "tokens per step, padding included")
    lr: float = setting(1e-2, "Adam's learning rate")
    max_grad_norm: float = setting(1.0, "the gradient is clipped to this norm")
    line_search: bool = setting(True, "scale v by 1, 1/2 ... or 0: the loss on all training data falls")
    recompute: bool = setting(True, "recompute activations in the backward pass: slower, saves memory")

    def __post_init__(self):
        at_least(self, steps=1, batch_tokens=1)
        above_zero(self, "lr", "max_grad_norm")


# ------------------------------------------------------------------------------------------------------------
# Basis: W_0 = U Sigma V^T, of which the leading k = r T triplets are kept.


@torch.no_grad()
def svd_basis(weight: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k leading singular triplets of weight [out, in]: U [out, k], S [k], V [in, k], fp32, on its device.

    They come from the eigenvectors of the smaller Gram matrix, in fp64, as forming it squares the condition:
    in fp32 the 40th value of a spectrum that decays to 1/100 would be off by 2e-5. `torch.svd_lowrank` is no
    alternative: it mixes neighbouring triplets, which breaks the slices. The sign is fixed: of each u_i the
    entry largest in magnitude is positive. Raises InputError where the weight is not finite, or fewer than k
    values exceed 1e-6 of the largest. """
    W = weight.detach().double()
    require(W.isfinite().all(), f"a weight of shape {list(weight.shape)} is not finite")
    wide = W.shape[0] < W.shape[1]
    W = W.T if wide else W
    require(k <= W.shape[1], f"a weight of shape {list(weight.shape)} has no {k} singular triplets")
    values, right = leading_eigenpairs(W.T @ W, k)
    S = values.clamp(min=0).sqrt()
    require((S > 1e-6 * S[:1]).all(), f"fewer than {k} singular values of {list(weight.shape)} are not zero")
    left = W @ right / S
    U, V = (right, left) if wide else (left, right)
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()  # [1, k]
    return (U * sign).float(), S.float(), (V * sign).float()


def leading_eigenpairs(G: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest eigenvalues [k], descending, and their eigenvectors [n, k] of G [n, n], fp64, symmetric
    and positive semi-definite.

    Chebyshev-filtered subspace iteration (Zhou, Saad, Tiago and Chelikowsky 2006): a polynomial of G that is
    small on [0, a] and grows fast above turns a few random vectors X towards the leading eigenvectors; a is
    what their span finds as its smallest eigenvalue. Pairs with a residual under 1e-7 of the k-th eigenvalue
    are taken out of G, largest first. Small matrices, and spectra too flat for 12 rounds of this, get all n
    pairs, which takes two to three times as long at n = 2048. """
    n, width = len(G), k + 24
    X = torch.randn(n, width, dtype=G.dtype, generator=generator("basis")).to(G.device)
    rest, values, vectors = G, G[:0, 0], G[:, :0]  # what is left of G; the pairs that are found
    for _ in range(12 if n > 4 * width else 0):
        X = torch.linalg.qr(torch.cat([vectors, X], 1)).Q[:, len(values):]
        GX = rest @ X
        # 1. The best approximations (Ritz pairs) in the span of X, largest first.
        ritz, turn = (x.flip(-1) for x in torch.linalg.eigh(X.T @ GX))
        X, GX = X @ turn, GX @ turn
        # 2. Those that are accurate are final, and leave G.
        missing, largest = k - len(values), values[0] if len(values) else ritz[0]
        accurate = (GX - X * ritz).norm(dim=0) <= 1e-7 * ritz[missing - 1] + 1e-14 * largest
        new = int(accurate[:missing].cumprod(0).sum())
        values, vectors = torch.cat([values, ritz[:new]]), torch.cat([vectors, X[:, :new]], 1)
        if new == missing:
            return values, vectors
        rest = rest - (X[:, :new] * ritz[:new]) @ X[:, :new].T
        X, GX, ritz = X[:, new:], GX[:, new:], ritz[new:]
        # 3. Filter the others. The gain is e^(degree * acosh(2 lambda / a - 1)); fp64 holds e^36, so a spread
        # of at most e^20 keeps the k-th vector well above rounding.
        a = ritz[-1].clamp(min=1e-15 * largest)
        gains = (2 * ritz / a - 1).clamp(min=1).acosh()
        degree = int((20 / (gains[0] - gains[missing - new - 1])).clamp(1, 12))
        before, X = X, GX * (2 / a) - X  # T_0 and T_1 of A = 2 G / a - 1; then T_(j+1) = 2 A T_j - T_(j-1)
        for _ in range(degree - 1):
            before, X = X, (rest @ X) * (4 / a) - 2 * X - before
    values, vectors = torch.linalg.eigh(G)  # ascending
    return values.flip(0)[:k], vectors.flip(1)[:, :k]


# ------------------------------------------------------------------------------------------------------------
# TinyLoRA layer: one module's update in one round, dW_t = U_t S_t R_t V_t^T with R_t = sum_i v_{t,i} P_{t,i}.


class TinyLoRA(nn.Module):
    """U [out, r], S [r], V [in, r] and P [u, r, r] are fixed, fp32, in no state dict; v [groups, u] is shared
    by all modules of a round, this one reads row `group`. `dtype` is that of inputs and output. Change v in
    place, not through v.data: its version tells when R V^T must be formed again."""

    def __init__(self, U: torch.Tensor, S: torch.Tensor, V: torch.Tensor, P: torch.Tensor, v: nn.Parameter,
                 group: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.US, self.Vt, self.P, self.v, self.group = U * S, V.T.contiguous(), P, v, group
        self.up, self.folded, self.folded_version = self.US.to(dtype), None, None

    def down(self) -> torch.Tensor:
        """R V^T [r, in], fp32: the half of the update that v changes."""
        return torch.einsum("u,urs->rs", self.v[self.group], self.P) @ self.Vt

    def forward(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., tokens, in] -> the update's output [..., tokens, out], added to `out` if given (in place
        where there is no gradient)."""
        down = self.folded
        if torch.is_grad_enabled():
            down = self.down().to(x.dtype)
        elif self.folded_version != self.v._version:  # sampling runs many forwards with one v: fold it once
            down = self.folded = self.down().to(x.dtype)
            self.folded_version = self.v._version
        if out is None:
            return F.linear(F.linear(x, down), self.up)
        add = torch.addmm if torch.is_grad_enabled() else torch.Tensor.addmm_
        return add(out.flatten(0, -2), x.flatten(0, -2) @ down.T, self.up.T).view_as(out)

    def delta(self) -> torch.Tensor:
        """The update as a matrix, fp32 [out, in]."""
        return self.US @ self.down()


# ------------------------------------------------------------------------------------------------------------
# Booster: W_T = round(W_0 + sum_t U_t S_t R_t V_t^T), a pure function of W_0 and the list of vectors v_t.
# Merge, rollback, load, the first k rounds and re-weighted rounds are this function, called with another
# list. Why not `weight += delta` each round: in bf16, after 20 rounds with |R| = 1e-2, that kept 58 % of the
# update, this 95 %. Of M modules in depth order, module j reads row floor(j groups / M) of v_t.


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the transformer blocks: the longest nn.ModuleList that is not inside another one."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    require(outer, f"{type(model).__name__} has no nn.ModuleList of transformer blocks")
    name = max(outer, key=lambda name: len(lists[name]))
    return name, lists[name]


def find_targets(model: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear inside the blocks, by name, in depth order: no embeddings, no head. Raises InputError
    where there is none."""
    prefix, blocks = find_blocks(model)
    targets = {f"{prefix}.{name}": m for name, m in blocks.named_modules() if isinstance(m, nn.Linear)}
    kinds = sorted({type(m).__name__ for m in blocks.modules() if getattr(m, "weight", None) is not None})
    require(targets, f"{type(model).__name__}: '{prefix}' holds no nn.Linear, only {', '.join(kinds)}")
    return targets


def check_fit(targets: dict[str, nn.Linear], config: BoostConfig) -> None:
    """Raises InputError where rank x rounds exceeds a target's smaller side, or `groups` their number."""
    rounds = 1 if config.basis == "top" else config.rounds
    k = config.rank * rounds
    for name, linear in sorted(targets.items(), key=lambda target: min(target[1].weight.shape)):
        side, weight = min(linear.weight.shape), linear.weight
        require(weight.is_floating_point(), f"{name} holds {weight.dtype}: load the model unquantised")
        if k > side:
            ways = [f"at most --rank {side // rounds}"] if rounds <= side else []
            ways += [f"at most --rounds {side // config.rank}"] if config.rank <= side else []
            advice = " or ".join(ways) or "lower both"
            raise InputError(f"--rank {config.rank} x --rounds {config.rounds} needs {k} singular triplets, "
                             f"but {name} {list(weight.shape)} has {side}: {advice}")
    require(config.groups <= len(targets), f"--groups {config.groups}: there are only {len(targets)} targets")


class Booster:
    """W_0 of the targets (once, on the CPU), their basis, and v of every round; it keeps the model's weights
    equal to the formula above. All parameters of the model are frozen. Raises InputError as `check_fit`."""

    def __init__(self, model: nn.Module, config: BoostConfig):
        self.model, self.config, self.targets = model, config, find_targets(model)
        self.k = config.rank * (1 if config.basis == "top" else config.rounds)  # triplets used of each target
        check_fit(self.targets, config)
        self.groups = config.groups or len(self.targets)
        self.group_of = {name: i * self.groups // len(self.targets) for i, name in enumerate(self.targets)}
        model.requires_grad_(False)
        self.checksum = checksum(model)
        self.base = {name: m.weight.detach().to("cpu", copy=True) for name, m in self.targets.items()}
        self.basis = {}  # name -> U [out, k], S [k] (on the CPU), V [in, k]
        for name, linear in progress(self.targets.items(), "basis"):
            try:
                U, S, V = svd_basis(linear.weight, self.k)
            except InputError as error:
                raise InputError(f"{name}: {error}; lower --rank or --rounds") from None
            self.basis[name] = U, S.cpu(), V
        self.fingerprint = fingerprint(self.basis.values(), self.k)
        self.vectors: list[torch.Tensor] = []  # v of each finished round, fp32 [groups, u], on the CPU
        self.v, self.hooks = None, []

    def slices(self, t: int) -> tuple[slice, slice]:
        """Which columns of U and V, and which entries of S, make up round t's update."""
        r, basis = self.config.rank, self.config.basis
        top, rotated = slice(0, r), slice(t * r, (t + 1) * r)
        return (rotated if basis == "rotate" else top), (top if basis == "top" else rotated)

    def P(self, name: str, t: int) -> torch.Tensor:
        """P_i [u, r, r] of round t: with std 1/sqrt(u r) one learning rate serves every u and r."""
        u, r = self.config.u, self.config.rank
        random = generator(self.config.seed, "P", t, list(self.targets).index(name))
        return torch.randn(u, r, r, generator=random) / math.sqrt(u * r)

    def attach(self) -> nn.Parameter:
        """A fresh adapter for the next round, active in the model's forward: v, fp32 zeros [groups, u]. One
        that was attached and not merged is dropped. Raises RuntimeError where all rounds are done."""
        self.detach()
        t = len(self.vectors)
        if t >= self.config.rounds:
            raise RuntimeError(f"all {t} rounds are done")
        device = next(iter(self.targets.values())).weight.device
        self.v = nn.Parameter(torch.zeros(self.groups, self.config.u, device=device))
        columns, values = self.slices(t)
        for name, linear in self.targets.items():
            U, S, V = self.basis[name]
            adapter = TinyLoRA(U[:, columns], S[values].to(device), V[:, columns], self.P(name, t).to(device),
                               self.v, self.group_of[name], linear.weight.dtype)

            def add(_, inputs: tuple, out: torch.Tensor, adapter: TinyLoRA = adapter) -> torch.Tensor:
                return adapter(inputs[0], out)

            self.hooks.append(linear.register_forward_hook(add))
        return self.v

    def detach(self) -> None:
        """Take the adapter out of the model's forward."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def merge(self) -> None:
        """Detach the adapter, keep its v, and write the sum of all rounds into the weights. Raises
        RuntimeError where none is attached."""
        if not self.hooks:
            raise RuntimeError("merge: no adapter is attached")
        self.detach()
        self.vectors.append(self.v.detach().cpu())
        self.write()

    def rollback(self, n: int = 1) -> None:
        """Take the last n rounds back: their v becomes 0, and the weights get the bits of before. Raises
        InputError where there are fewer."""
        require(0 <= n <= len(self.vectors), f"rollback({n}): there are {len(self.vectors)} rounds")
        for t in range(len(self.vectors) - n, len(self.vectors)):
            self.vectors[t] = torch.zeros_like(self.vectors[t])
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """weight <- round(W_0 + delta), in place, for every target."""
        learned = any(v.any() for v in self.vectors)
        for name, linear in self.targets.items():
            W0 = self.base[name].to(linear.weight.device)
            linear.weight.copy_(W0.float() + self.delta(name) if learned else W0)  # -0.0 + 0 has other bits

    def SR(self, name: str, t: int) -> torch.Tensor:
        """S_t R_t [r, r] of a finished round, fp32 on the CPU."""
        S = self.basis[name][1][self.slices(t)[1], None]
        return S * torch.einsum("u,urs->rs", self.vectors[t][self.group_of[name]], self.P(name, t))

    def core(self, name: str) -> torch.Tensor:
        """C [k, k] with delta = U C V^T: the blocks S_t R_t along its diagonal (top: all in one place). U and
        V are orthonormal, so the norm and the singular values of delta are those of C."""
        C = torch.zeros(self.k, self.k)
        for t in range(len(self.vectors)):
            columns, _ = self.slices(t)
            C[columns, columns] += self.SR(name, t)
        return C

    @torch.no_grad()
    def delta(self, name: str) -> torch.Tensor:
        """The exact sum of the finished rounds for a target, fp32 [out, in]."""
        U, _, V = self.basis[name]
        return U @ self.core(name).to(U.device) @ V.T

    def rank(self, eps: float = 1e-6) -> dict[str, int]:
        """Per target, how many singular values of delta exceed eps x the largest. Of the fp32 sum: W_T - W_0
        of a bf16 weight has full rank, from rounding."""
        values = {name: torch.linalg.svdvals(self.core(name).double()) for name in self.targets}
        return {name: int((s > eps * s[0]).sum()) if s.any() else 0 for name, s in values.items()}

    @torch.no_grad()
    def fidelity(self) -> float:
        """<W_T - W_0, dW> / |dW|^2 over all targets: the share of the update that survives rounding."""
        kept = total = 0.0
        for name, linear in self.targets.items():
            delta = self.delta(name)
            kept += float(((linear.weight.float() - self.base[name].to(delta.device).float()) * delta).sum())
            total += float(delta.square().sum())
        return kept / total if total else 1.0

    def summary(self) -> dict[str, Any]:
        """For the record: norm of the last round's update, all targets; of the sum, norm, rank, fidelity."""
        last = range(len(self.vectors))[-1:]
        norm = sum(float(self.SR(name, t).square().sum()) for name in self.targets for t in last)
        total = sum(float(self.core(name).square().sum()) for name in self.targets)
        ranks = self.rank().values()
        return {"norm": norm**0.5, "total_norm": total**0.5, "rank": {"min": min(ranks), "max": max(ranks)},
                "fidelity": self.fidelity()}

    def save(self, path: str | Path) -> None:
        """Write v of all rounds [rounds, groups, u] and what rebuilds the rest: a few KB in all."""
        v = torch.stack(self.vectors) if self.vectors else torch.zeros(0, self.groups, self.config.u)
        about = {"format": 1, "config": dataclasses.asdict(self.config), "base": self.checksum}
        tensors = {"v": v, "fingerprint": self.fingerprint}
        replace_file(Path(path), safetensors.torch.save(tensors, {"boostlora": json.dumps(about)}))

    def resume(self, path: str | Path, rounds: int | None = None,
               weights: Sequence[float] | None = None) -> None:
        """Take over a file's vectors (the first `rounds`; each scaled by weights[t], as R is linear in v) and
        write the weights. Raises InputError for a damaged file or another base model, configuration or
        basis."""
        about, v, theirs = read_adapters(path)
        require(about["base"] == self.checksum, f"{path} is of another base model, or of another --dtype")
        mine = dataclasses.asdict(self.config)
        differing = [f"{f} {about['config'].get(f)}, not {mine[f]}" for f in mine
                     if f not in ("rounds", "replay") and mine[f] != about["config"].get(f)]
        require(not differing, f"{path} has {', '.join(differing)}")
        require(v.shape[1:] == (self.groups, self.config.u) and v.isfinite().all(),
                f"{path} is damaged: v is {list(v.shape)} or not finite")
        require(len(v[:rounds]) <= self.config.rounds,
                f"{path} has {len(v)} rounds, more than {self.config.rounds}")
        k = min(self.k, theirs.shape[1])
        require(torch.allclose(self.fingerprint[:, :k], theirs[:, :k], rtol=0, atol=1e-2),
                f"{path}: this machine's linear algebra finds another singular basis of these weights; use "
                "the LoRA that --export_lora writes where the file was made")
        require(rounds is None or 0 <= rounds <= len(v), f"{path} has {len(v)} rounds, not {rounds}")
        require(weights is None or len(weights) == len(v), f"{path} has {len(v)} rounds: as many weights")
        self.vectors = [v[t] * (1.0 if weights is None else weights[t]) for t in range(len(v))][:rounds]
        self.write()

    @classmethod
    def load(cls, model: nn.Module, path: str | Path, rounds: int | None = None,
             weights: Sequence[float] | None = None) -> Booster:
        """The fine-tuned model from the base model and the file: the same bits on the same machine and
        library versions. rounds=k: the model after k rounds; weights=[...]: re-weighted rounds. Raises as
        `resume`."""
        booster = cls(model, BoostConfig(**read_adapters(path)[0]["config"]))
        booster.resume(path, rounds, weights)
        return booster

    def export_lora(self, folder: str | Path) -> None:
        """The exact fp32 sum as one LoRA in PEFT's format: B = U C [out, k], A = V^T [k, in], alpha = r."""
        require(self.k, "--export_lora: there is no round to export")
        tensors = {}
        for name in self.targets:
            U, _, V = self.basis[name]
            tensors[f"base_model.model.{name}.lora_A.weight"] = V.T.contiguous().cpu()
            tensors[f"base_model.model.{name}.lora_B.weight"] = (U @ self.core(name).to(U.device)).cpu()
        base = getattr(getattr(self.model, "config", None), "_name_or_path", None)
        config = {"peft_type": "LORA", "r": self.k, "lora_alpha": self.k, "lora_dropout": 0.0,
                  "target_modules": list(self.targets), "bias": "none", "inference_mode": True,
                  "base_model_name_or_path": base}

        def fill(path: Path) -> None:
            safetensors.torch.save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
            (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

        replace_folder(Path(folder), fill)


def fingerprint(bases: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], k: int) -> torch.Tensor:
    """[2, k] fp32: each u_i and v_i, projected on fixed random vectors and summed over the targets. Another
    machine's linear algebra that mixes or flips near-equal singular vectors changes these numbers."""
    sums = torch.zeros(2, k, dtype=torch.float64)
    for i, (U, _, V) in enumerate(bases):
        for side, vectors in enumerate((U, V)):
            probe = torch.randn(len(vectors), generator=generator("fingerprint", side, i)).double()
            sums[side] += probe @ vectors.double().cpu()
    return sums.float()


def checksum(model: nn.Module) -> str:
    """SHA-256 of names and bits of the backbone's parameters (a task may train a head on it)."""
    digest = hashlib.sha256()
    for name, p in getattr(model, "base_model", model).named_parameters():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_adapters(path: str | Path) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Metadata, v and fingerprint of a file that `Booster.save` wrote; InputError where it is not one."""
    require(Path(path).is_file(), f"{path} is missing")
    try:
        with safetensors.safe_open(path, "pt") as f:
            about = json.loads((f.metadata() or {})["boostlora"])
            about = {"config": dataclasses.asdict(BoostConfig(**about["config"])), "base": about["base"]}
            return about, f.get_tensor("v"), f.get_tensor("fingerprint")
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged, or not a BoostLoRA file ({error})") from None


# ------------------------------------------------------------------------------------------------------------
# Generation: argmax for F_t; y_1 .. y_n ~ pi(. | x)^(1/temperature) for GRPO. Why not model.generate: it
# keeps finished rows in the batch, encodes a prompt once for each of its completions, and inherits the
# model's generation_config (top_k, top_p, repetition_penalty), while a policy gradient needs the untruncated
# distribution and a greedy evaluation no penalty.


class Completion(NamedTuple):
    text: str
    tokens: list[int]  # with the end token, where it was reached
    logprobs: list[float]  # of the tokens, in the distribution they were drawn from (greedy: temperature 1)


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: Qwen2.5's instruct models have two, in the generation_config."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = ids if isinstance(ids, (list, tuple)) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def cache_budget(model: nn.Module) -> int:
    """Tokens of key-value cache, all rows together: half of the free GPU memory, as a power of two up to
    2^19, so that batches, and with them the last bits, seldom change between two runs on one machine; on a
    CPU 2^17."""
    if model.device.type != "cuda":
        return 2**17
    c = model.config.get_text_config()
    head_size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    token_bytes = 2 * c.num_hidden_layers * heads * head_size * model.dtype.itemsize  # Qwen2.5-3B: 36 KiB
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return 2 ** min(19, int(math.log2(max(free / 2 / token_bytes, 1024))))


def sample(logits: torch.Tensor, temperature: float,
           uniform: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [B, V] -> tokens [B] and their log-probabilities [B]. Temperature 0 takes the largest; otherwise
    the distribution function is inverted at `uniform` [B] in [0, 1): a row's draw does not depend on its
    neighbours."""
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        tokens = logits.float().argmax(-1)
    else:
        cdf = logprobs.exp().cumsum(-1)
        point = (1 - uniform) * cdf[:, -1]  # in (0, 1]: never a token of probability 0
        tokens = torch.searchsorted(cdf, point[:, None]).squeeze(-1).clamp(max=cdf.shape[1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


@contextlib.contextmanager
def without_dropout(model: nn.Module, recompute: bool = False) -> Iterator[None]:
    """In training too: the policy that learns must be the one that was sampled. `recompute`: keep a block's
    input only, and run the block again in the backward pass. The model is as before afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    forwards = [(block, vars(block).get("forward")) for block in find_blocks(model)[1]] if recompute else []
    model.eval()
    for block, _ in forwards:  # reentrant checkpoints would lose the gradient, as their inputs are frozen
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block, forward in forwards:
            del block.forward
            if forward is not None:
                block.forward = forward
        for m, mode in modes:
            m.training = mode


def generate(model: nn.Module, tokenizer: Any, prompts: Sequence[str], n: int = 1, temperature: float = 0.0,
             max_new_tokens: int = 1024, seed: Any = 0, cache_tokens: int = 0,
             label: str = "generate") -> list[Completion]:
    """n completions of every prompt, in order: those of prompts[i] are at [i n, (i + 1) n).

    prompts: formatted strings, tokenised without adding special tokens. Temperature 0 is greedy; otherwise
    the draws follow from `seed`, the shape of the call and the place in it, not from batches. cache_tokens:
    see `cache_budget`.
    Under torchrun the prompts are shared out, and every process gets all completions. The global random state
    stays as it is. Raises FloatingPointError where the model's output is not finite. """
    ids = tokenizer(list(prompts), add_special_tokens=False)["input_ids"] if prompts else []
    require(all(ids), "generate: a prompt has no token")
    budget, stops = cache_tokens or cache_budget(model), end_tokens(model, tokenizer)
    shape = (len(ids) * n, max_new_tokens)
    uniforms = torch.rand(shape, generator=generator("sample", seed)) if temperature else None
    mine = range(len(ids))[process()::processes()]
    queue = sorted(mine, key=lambda i: -len(ids[i]))  # like lengths together; the longest come first
    rows: dict[int, tuple[list[int], list[float]]] = {}
    with without_dropout(model), progress(total=len(queue) * n, label=label) as bar:
        while queue:
            size = max(1, budget // (n * (len(ids[queue[0]]) + max_new_tokens)))
            chunk, queue = queue[:size], queue[size:]
            numbers = [i * n + j for i in chunk for j in range(n)]
            draws = uniforms[numbers].to(model.device) if temperature else None
            batch = [ids[i] for i in chunk]
            decoded = decode(model, batch, n, temperature, max_new_tokens, stops, draws, bar)
            rows.update(zip(numbers, decoded, strict=True))
    rows = {number: row for part in gather(rows) for number, row in part.items()}
    ordered = [rows[number] for number in range(len(rows))]
    return [Completion(tokenizer.decode(row[0], skip_special_tokens=True), *row) for row in ordered]


def growing_cache(model: nn.Module) -> Any:
    """A key-value cache with room for more tokens: transformers' own copies itself whole for each one."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):  # keys and values are buffers [rows, heads, length + room, head size]
        length = 0

        def get_seq_length(self) -> int:
            return self.length

        def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple:
            start, self.length = self.length, self.length + keys.shape[2]
            if start == 0:
                return super().update(keys, values)
            if self.length > self.keys.shape[2]:
                room = max(8, keys.shape[2], start // 8)
                self.keys, self.values = (F.pad(x, (0, 0, 0, room)) for x in (self.keys, self.values))
            self.keys[:, :, start:self.length], self.values[:, :, start:self.length] = keys, values
            return self.keys[:, :, :self.length], self.values[:, :, :self.length]

        def batch_select_indices(self, rows: torch.Tensor) -> None:  # without the room
            if self.length:
                cut = (x[:, :, :self.length] for x in (self.keys, self.values))
                self.keys, self.values = (x.index_select(0, rows) for x in cut)

    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def takes_masks(model: nn.Module) -> bool:
    """Whether the model uses a 4-D mask and positions of ours as they are. Flash attention refuses them;
    sliding windows and ALiBi would be lost."""
    config = model.config.get_text_config()
    return (config._attn_implementation in ("sdpa", "eager")
            and "position_ids" in inspect.signature(model.base_model.forward).parameters
            and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
            and not any(getattr(config, name, None) for name in ("sliding_window", "window_size", "alibi")))


def additive(sees: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask to add to attention's scores: 0 where a position sees another one, else the least number."""
    zeros = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return zeros.masked_fill_(~sees, torch.finfo(dtype).min)


@torch.inference_mode()
def decode(model: nn.Module, prompts: list[list[int]], n: int, temperature: float, max_new_tokens: int,
           stops: list[int], uniforms: torch.Tensor | None, bar: Any) -> list[tuple[list[int], list[float]]]:
    """One batch, token by token. A row of it is a text, which completions of a prompt share while they are
    equal: so a prompt is encoded once, a row splits where its completions part, and leaves when they end."""
    device, width = model.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # padded on the left
    padding = torch.tensor([[width - len(p)] for p in prompts], device=device)
    mask = (torch.arange(width + max_new_tokens, device=device) >= padding).long()
    position = (mask[:, :width].cumsum(-1) - 1).clamp(min=0)
    cache = growing_cache(model)
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    logits = model(input_ids=ids, attention_mask=mask[:, :width], position_ids=position, **options).logits
    logits, position = logits[:, -1], position[:, -1:]  # [rows, vocabulary], [rows, 1]
    if takes_masks(model):  # else transformers makes a 4-D mask of the 2-D one at every step
        mask = additive(mask.bool(), model.dtype)[:, None, None]
    alive = torch.arange(len(prompts) * n, device=device)  # the completions that go on
    row = alive // n  # row[k]: the row of completion alive[k]; ascending
    tokens = torch.full((len(alive), max_new_tokens), stops[0] if stops else 0, device=device)
    logprobs = torch.zeros(len(alive), max_new_tokens, device=device)
    stops = torch.tensor(stops, dtype=torch.long, device=device)
    done = torch.zeros_like(alive, dtype=torch.bool)
    look = 8 if device.type == "cuda" else 1  # steps between looks at `done`, for which the host waits
    for step in range(max_new_tokens):
        shared = len(logits) < len(alive)
        draw = uniforms[alive, step] if temperature else None
        token, logprob = sample(logits[row] if shared else logits, temperature, draw)
        tokens[alive, step], logprobs[alive, step] = token, logprob
        done |= torch.isin(token, stops)
        if step + 1 == max_new_tokens:
            break
        # Leaving copies the cache. So, once no row is shared, an eighth waits for each other; what these add
        # meanwhile is cut below.
        if shared or (step + 1) % look == 0 and done.sum() >= max(1, len(alive) / 8):
            keep = (~done).nonzero().squeeze(-1)
            bar.update(len(alive) - len(keep))
            alive, row, token, done = (x[keep] for x in (alive, row, token, done))
            if not len(alive):
                break
            vocabulary = logits.shape[1]  # a text is its row of before, `parent`, and its token
            texts, row = (row * vocabulary + token).unique(return_inverse=True)
            parent, token = texts // vocabulary, texts % vocabulary
            row, order = row.sort()
            alive = alive[order]
            if not torch.equal(parent, torch.arange(len(logits), device=device)):
                cache.batch_select_indices(parent)
                mask, position = mask[parent], position[parent]
        position = position + 1
        logits = model(input_ids=token[:, None], attention_mask=mask[..., :width + step + 1],
                       position_ids=position, **options).logits[:, -1]
    bar.update(len(alive))
    if not logprobs.isfinite().all():
        raise FloatingPointError("the model's output is not finite: in a new --out, lower --lr or try "
                                 "--dtype float32")
    after_end = torch.isin(tokens, stops).int().cummax(-1).values.sum(-1)  # positions from the first end on
    lengths = (max_new_tokens - after_end + 1).clamp(max=max_new_tokens).tolist()
    return [(t[:end], p[:end]) for t, p, end in zip(tokens.tolist(), logprobs.tolist(), lengths, strict=True)]


# ------------------------------------------------------------------------------------------------------------
# GRPO (arXiv 2402.03300): A_i = (r_i - mean) / std in a group of completions y_i of a prompt x;
# loss = - sum_i A_i sum_j log pi(y_ij | x, y_i,<j) / sum_i |y_i|, over the groups with variance; Adam on v_t.
# What a reader may look for in vain: the ratio pi/pi_old, its clip, the KL term. Each batch is sampled from
# the current weights and used for one step, so the ratio is 1 and a clip never acts (`logprob_gap` in the
# record measures it); nothing ties the policy to a reference, as v starts from 0 and a round is short.
# The completions of a prompt form a tree, in which each beginning stands once. The training pass runs over
# trees: the same gradient from fewer tokens, as the A_i of all completions that share a token are added up.


def token_logprobs(head: nn.Module, states: torch.Tensor, tokens: torch.Tensor,
                   temperature: float) -> torch.Tensor:
    """log pi(token) [N] from the states [N, d] that predict them: gather - logsumexp, fp32."""
    logits = head(states).float() / temperature
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)


class Tree(NamedTuple):
    """A prompt and completions of it as one sequence: what they have in common is there once, depth first."""

    tokens: list[int]
    last: list[int]  # of each token, the last one below it: position i sees j where j <= i <= last[j]
    above: list[int]  # of each token after the prompt, the position that it follows, and that predicts it
    paths: dict[int, list[int]]  # completion -> its tokens, as indices into `above`


def token_trees(prompt: list[int], completions: Sequence[list[int]], limit: int = 0) -> list[Tree]:
    """A prompt's completions as trees of at most `limit` tokens, or of one completion (and its equals) where
    that has more."""
    trees, before, below = [], None, {}
    # In this order those that begin alike are neighbours, and a beginning precedes what continues it.
    for i in sorted(range(len(completions)), key=completions.__getitem__):
        completion = completions[i]
        if not trees or completion != before and len(trees[-1].tokens) + len(completion) > limit:
            trees.append(Tree(list(prompt), [0] * len(prompt), [], {}))
            below = {}  # (position, token) -> the position of that token below it
        (tokens, last, above, paths), before = trees[-1], completion
        path = list(range(len(prompt)))  # positions, from the root down
        for token in completion:
            position = below.setdefault((path[-1], token), len(tokens))
            if position == len(tokens):  # a new one
                tokens.append(token)
                last.append(position)
                above.append(path[-1])
            path.append(position)
        for position in path:
            last[position] = path[-1]
        paths[i] = [position - len(prompt) for position in path[len(prompt):]]
    return trees


def completion_logprobs(model: nn.Module, trees: Sequence[Tree], temperature: float = 1.0,
                        max_logits: int = 2**25) -> torch.Tensor:
    """log pi of every completion token, in the order of the trees' `above`, fp32 [tokens].

    The head sees completion positions alone, for at most `max_logits` numbers at a time, and again in the
    backward pass: the logits of a batch (8 x 1,024 x 151,936 in fp32: 4.6 GiB, several times over) never
    exist. Trees are padded on the right; without branches they need no mask. """
    device, width = model.device, max(len(t.tokens) for t in trees)
    ids = torch.tensor([t.tokens + [0] * (width - len(t.tokens)) for t in trees], device=device)
    options = {}
    if any(min(t.last) < len(t.tokens) - 1 for t in trees):
        # Padding sees itself alone, at position 0: others may be outside the model's context.
        last = torch.tensor([t.last + list(range(len(t.tokens), width)) for t in trees], device=device)
        i = torch.arange(width, device=device)
        sees = (i <= i[:, None]) & (i[:, None] <= last[:, None])  # [trees, position, position]
        options = {"attention_mask": additive(sees, model.dtype)[:, None], "position_ids": sees.sum(-1) - 1}
    states = model.base_model(input_ids=ids, use_cache=False, **options).last_hidden_state.flatten(0, 1)
    above = [row * width + i for row, t in enumerate(trees) for i in t.above]
    tokens = [token for t in trees for token in t.tokens[len(t.tokens) - len(t.above):]]
    states, tokens = states[torch.tensor(above, device=device)], torch.tensor(tokens, device=device)
    head = model.get_output_embeddings()
    chunk = max(1, max_logits // model.config.get_text_config().vocab_size)
    return torch.cat([checkpoint(token_logprobs, head, s, t, temperature, use_reentrant=False)
                      for s, t in zip(states.split(chunk), tokens.split(chunk), strict=True)])


def group_advantages(rewards: Sequence[float], group_size: int) -> torch.Tensor:
    """A_i = (r_i - mean) / std (the population's) in each group, fp32 [groups, group_size]; flat ones: 0."""
    r = torch.tensor(rewards, dtype=torch.float32).view(-1, group_size)
    flat = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)
    return ((r - r.mean(1, keepdim=True)) / r.std(1, correction=0, keepdim=True)).masked_fill(flat, 0.0)


def micro_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices, shortest first, in batches of at most `budget` tokens, padding included."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def grpo(model: nn.Module, tokenizer: Any, prompts: Sequence[str],
         reward: Callable[[list[int], list[str]], list[float]], v: nn.Parameter | list[nn.Parameter],
         config: GRPOConfig, round: int = 0, seed: int = 0) -> dict[str, Any]:
    """Train v for one round: `config.steps` times sample, reward, advantages, one Adam step.

    reward(indices, texts): a number for each completion; indices point into prompts. v: an adapter's, or a
    list of parameters. Returns steps (taken), completions, flat_groups (without variance: nothing to learn
    from), reward (the mean), logprob_gap (the mean |log pi in training - log pi in sampling| over the tokens
    trained on) and seconds of "generate" and "train". Where no group of the round has variance, v stays 0 and
    a `note` says so. Raises FloatingPointError where the gradient is not finite, InputError where a reward is
    not, or where the model's training pass is not the policy that was sampled. """
    parameters = [v] if isinstance(v, nn.Parameter) else v
    optimizer = torch.optim.Adam(parameters, lr=config.lr)
    prompt_tokens = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    n, size = config.group_size, min(config.prompts, len(prompts))
    # Attention costs the square of a tree's tokens, so 2,048; 0: each completion is a tree of its own.
    limit = min(2048, config.micro_batch_tokens) if takes_masks(model) else 0
    shuffle, queue = generator(seed, "order", round), []
    steps = completed = flat = trained = 0
    reward_sum = gap_sum = 0.0
    seconds = {"generate": 0.0, "train": 0.0}
    for step in progress(range(config.steps), label=f"round {round + 1}"):
        start = time.perf_counter()
        if len(queue) < size:
            queue += torch.randperm(len(prompts), generator=shuffle).tolist()
        chosen, queue = queue[:size], queue[size:]
        done = generate(model, tokenizer, [prompts[i] for i in chosen], n, config.temperature,
                        config.max_new_tokens, (seed, round, step), config.cache_tokens, label="sample")
        owners = [i for i in chosen for _ in range(n)]
        rewards = on_first_process(partial(reward, owners, [c.text for c in done]))
        require(len(rewards) == len(done) and all(map(math.isfinite, rewards)),
                "reward must return a finite number for each completion")
        advantages = group_advantages(rewards, n)
        completed, reward_sum = completed + len(rewards), reward_sum + sum(rewards)
        total, trees = 0, []  # trees: each with A, and log pi as sampled, of its completion tokens
        for g, i in enumerate(chosen):
            group, A = done[g * n:(g + 1) * n], advantages[g].tolist()
            if not any(A):
                flat += 1
                continue
            total += sum(len(c.tokens) for c in group)  # end tokens included
            for tree in token_trees(prompt_tokens[i], [c.tokens for c in group], limit):
                advantage, sampled = [0.0] * len(tree.above), [0.0] * len(tree.above)
                for j, path in tree.paths.items():
                    for k, logprob in zip(path, group[j].logprobs, strict=True):
                        advantage[k], sampled[k] = advantage[k] + A[j], logprob
                trees.append((tree, advantage, sampled))
        seconds["generate"] += time.perf_counter() - start
        if not trees:
            continue
        start = time.perf_counter()
        mine = trees[process()::processes()]
        optimizer.zero_grad()
        gap = 0.0
        with without_dropout(model, config.recompute):
            for batch in micro_batches([len(t.tokens) for t, _, _ in mine], config.micro_batch_tokens):
                part = [mine[i] for i in batch]
                logprobs = completion_logprobs(model, [t for t, _, _ in part], config.temperature)
                advantage = logprobs.new_tensor([a for _, As, _ in part for a in As])
                old = logprobs.new_tensor([q for _, _, qs in part for q in qs])
                (-(advantage * logprobs).sum()).backward()
                gap += float((logprobs.detach() - old).abs().sum())
        tokens = sum(len(t.above) for t, _, _ in mine)
        # One nat a token is no rounding. A gap that is NaN passes: `descend` names it.
        require(not gap >= max(tokens, 1), f"{type(model).__name__} changes its logits after the head "
                "(soft-capping, scaling): training would see another policy than sampling")
        descend(optimizer, parameters, config.max_grad_norm, total)
        steps, gap_sum, trained = steps + 1, gap_sum + gap, trained + tokens
        seconds["train"] += time.perf_counter() - start
    note = {} if steps else {"note": "nothing could be learned: in no group did the rewards differ"}
    return {"steps": steps, "completions": completed, "flat_groups": flat, "reward": reward_sum / completed,
            "logprob_gap": sum(gather(gap_sum)) / max(sum(gather(trained)), 1), "seconds": seconds, **note}


def descend(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], max_grad_norm: float,
            total: float) -> None:
    """One step on the gradients: summed over the processes (4 bytes a trained number), divided by `total`
    (here, as in the backward pass fp16 would underflow), clipped."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if processes() > 1:
            dist.all_reduce(p.grad)
        p.grad /= total
    if not nn.utils.clip_grad_norm_(parameters, max_grad_norm).isfinite():
        raise FloatingPointError("the gradient is not finite: in a new --out, lower --lr or try "
                                 "--dtype float32")
    optimizer.step()


# ------------------------------------------------------------------------------------------------------------
# Cross-entropy, for a classifier: ascend the mean of log p(label).


def cross_entropy(model: nn.Module,
                  batches: Callable[[], Iterable[tuple[dict[str, torch.Tensor], torch.Tensor]]],
                  v: nn.Parameter | list[nn.Parameter], config: CEConfig, round: int = 0) -> dict[str, Any]:
    """Train v for one round: `config.steps` Adam steps, each on the mean cross-entropy of one batch.

    batches() starts a pass over the data, an iterator of (the model's keyword inputs, labels [B]); it is
    called again when a pass ends. Returns steps, first_loss, last_loss and seconds. Raises FloatingPointError
    as `grpo`. """
    parameters = [v] if isinstance(v, nn.Parameter) else v
    optimizer = torch.optim.Adam(parameters, lr=config.lr)
    start, losses, data = time.perf_counter(), [], iter(())
    with without_dropout(model, config.recompute):
        for _ in progress(range(config.steps), label=f"round {round + 1}"):
            batch = next(data, None)
            if batch is None:
                data = iter(batches())
                batch = next(data, None)
            require(batch is not None, "cross_entropy: batches() gives no batch")
            inputs, labels = batch
            optimizer.zero_grad()
            loss = F.cross_entropy(model(**inputs).logits.float(), labels)
            loss.backward()
            losses.append(float(loss.detach()))
            descend(optimizer, parameters, config.max_grad_norm, processes())
    return {"steps": config.steps, "first_loss": losses[0], "last_loss": losses[-1],
            "seconds": {"train": time.perf_counter() - start}}


@torch.no_grad()
def line_search(v: nn.Parameter, loss: Callable[[], float], before: float, halvings: int = 5) -> float:
    """v_t <- a v_t, a = argmin over {1, 1/2, .. 2^-halvings, 0} of the loss: gradient boosting's step length,
    not in the paper. Halves until a loss is below `before` and the next one is not lower still. Returns a.

    loss() measures the model with the adapter as it stands, `before` is its value at v = 0; so the round
    cannot make it worse. Cross-entropy on failures alone does: they all pull one way, and nothing holds the
    right answers. R is linear in v, so a trial is one pass over the data and no new factor."""
    direction, best = v.clone(), 0.0
    lowest = before - 1e-5 * abs(before)  # a smaller gain is rounding, not learning
    for a in (0.5 ** i for i in range(halvings + 1)):
        v.copy_(a * direction)
        if (value := loss()) < lowest:
            best, lowest = a, value
        elif best:
            break
    v.copy_(best * direction)
    return best


# ------------------------------------------------------------------------------------------------------------
# Processes. Without torchrun nothing is initialised, and these are the identity.


def process() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: Any) -> list[Any]:
    """The value of every process, on every process."""
    values = [value]
    if processes() > 1:
        values = [None] * processes()
        dist.all_gather_object(values, value)
    return values


def on_first_process(f: Callable[[], Any]) -> Any:
    """f(), called by the first process alone: for files, and for rewards (a sandbox's could differ)."""
    return gather(f() if process() == 0 else None)[0]


def say(*lines: Any) -> None:
    if process() == 0:
        print(*lines, flush=True)


def progress(iterable: Iterable | None = None, label: str = "", total: int | None = None) -> Any:
    """A bar on a terminal, nothing in a log."""
    from tqdm import tqdm
    return tqdm(iterable, label, total, leave=False, disable=True if process() else None, dynamic_ncols=True)


# ------------------------------------------------------------------------------------------------------------
# The run folder. The state of a run is two files: adapters.safetensors, the vectors, and rounds.jsonl, what
# was measured. Each is replaced atomically, the vectors first. A round counts once its line is there; one
# without a line is done again, with the same random numbers.


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; under torchrun, the first process alone."""
    if process():
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"could not write {path} ({error.strerror}); what was there before is whole: make "
                         "room and start again") from None


def replace_folder(path: Path, fill: Callable[[Path], Any]) -> None:
    """Write a folder whole or not at all, as `replace_file`: `fill` writes into an empty one beside it."""
    if process():
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"could not write {path} ({error}): make room and start again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


LOCKED: set[Path] = set()  # the run folders that this process works in


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time works in a run folder. Raises InputError where another one does."""
    import fcntl
    folder = Path(folder).resolve()
    if process() or folder in LOCKED:  # under torchrun the first process holds it for all
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder} is in use by another process: choose another --out") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be used ({error.strerror}): choose another --out") from None
    LOCKED.add(folder)
    try:
        yield
    finally:
        LOCKED.remove(folder)
        os.close(handle)
        with contextlib.suppress(OSError):
            folder.rmdir()  # only an empty one goes: a run that was refused leaves nothing


# What may differ when a run goes on: more rounds continue it (they refine the basis, and so the weights, in
# the last bits), the others change what is learned in the last bits alone.
FREE = ("rounds", "versions", "test_every", "export_lora", "cache_tokens", "micro_batch_tokens", "recompute")


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raises InputError, with the fields, where the folder holds a run with other settings than these."""
    path = folder / "config.json"
    if not path.exists():
        require(not (folder / "rounds.jsonl").exists(), f"{path} is missing: choose another --out")
        return
    try:
        old = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise InputError(f"{path} is damaged: choose another --out") from None
    new = json.loads(json.dumps(settings))
    differing = [f"{key} {old[key]!r} there, {new[key]!r} here" for key in new
                 if key in old and key not in FREE and old[key] != new[key]]
    require(not differing, f"{folder} holds another run ({'; '.join(differing)}): choose another --out")


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The lines of rounds.jsonl, [] before the first. Raises InputError at one that is damaged."""
    path, records = folder / "rounds.jsonl", []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else []):
        try:
            record = json.loads(line)
            whole = record["round"] == number and record["failures"] == len(record["failed"])
        except (ValueError, KeyError, TypeError):
            whole = False
        require(whole, f"{path}, line {number + 1} is damaged: delete it and all lines after it, and those "
                "rounds are computed again")
        records.append(record)
    return records


def read_state(folder: Path, learner: Any) -> list[dict[str, Any]]:
    """The records of the finished rounds, with the learner brought to the last of them."""
    records, path, rounds = read_records(folder), folder / "adapters.safetensors", learner.config.rounds
    done = len(records) - 1
    require(done <= rounds, f"{folder} has {done} rounds, more than --rounds {rounds}; for a shorter model "
            f"use Booster.load(model, '{path}', rounds={rounds})")
    require(records or not path.exists(), f"{folder / 'rounds.jsonl'} is missing: choose another --out")
    if done > 0:
        learner.resume(path, rounds=done)
    return records


# ------------------------------------------------------------------------------------------------------------
# The loop: F_t = {x : W_t is wrong on x}, v_t = fit(F_t), W_{t+1} = merge(v_0 .. v_t), until T or F_t = {}.


def boost(booster: Any, task: Any, out: str | Path, test_every: int = 0,
          settings: dict[str, Any] | None = None, tokenizer: Any = None) -> list[dict[str, Any]]:
    """Boost a learner (a Booster, or what has its attach, merge, save, resume, summary, model, config) on a
    task:

        task.train                       a sequence of examples
        task.tests                       dict: name -> examples
        task.evaluate(examples)          -> (list of bool: right?, dict of further metrics)
        task.fit(examples, v, round)     -> dict of statistics; trains v in place
        task.completions                 optional: how many a round samples, for the estimate of time

    The run folder gets config.json, rounds.jsonl, adapters.safetensors and at the end model/ (and the
    tokenizer). Tests run at the start, at the end and every `test_every` rounds. The same call again
    continues a run that was broken off. Returns the lines of rounds.jsonl. Raises InputError where the folder
    holds another run. """
    out, rounds, train = Path(out), booster.config.rounds, task.train
    require(len(train) and all(map(len, task.tests.values())), "there is no training example, or a test set "
            "without any")
    data = hashlib.sha256(repr(list(train)).encode()).hexdigest()[:16]
    settings = {**dataclasses.asdict(booster.config), **(settings or {})}
    settings |= {"data": data, "versions": versions()}
    with locked(out):
        check_settings(out, settings)
        records = read_state(out, booster)
        gather(None)  # all processes have read the state before the first one changes it
        replace_file(out / "config.json", (json.dumps(settings, indent=2) + "\n").encode())
        if records:
            say(f"{out} has {len(records) - 1} of {rounds} rounds")
        while not records or (len(records) <= rounds and records[-1]["failures"]):
            t = len(records) - 1  # the round that is trained now; -1: the base model is evaluated
            seconds, stats = {"evaluate": 0.0, "generate": 0.0, "train": 0.0, "merge": 0.0}, {}
            if t >= 0:
                v = booster.attach()
                stats = task.fit(select(train, records[-1]["failed"], booster.config, t), v, t)
                seconds.update(stats.pop("seconds", {}))
                start = time.perf_counter()
                booster.merge()
                seconds["merge"] = time.perf_counter() - start
            start = time.perf_counter()
            right, metrics = gather(task.evaluate(train))[0]  # of one process: a grader may use a clock
            evaluation = time.perf_counter() - start
            failed = [i for i, ok in enumerate(right) if not ok]  # F_t
            before = set(records[-1]["failed"] if records else failed)
            record = {"round": t + 1, "failures": len(failed), "fixed": len(before.difference(failed)),
                      "regressed": len(set(failed) - before), "train_accuracy": 1 - len(failed) / len(right),
                      **{f"train_{name}": value for name, value in metrics.items()}}
            if t < 0 or t + 1 == rounds or not failed or (test_every and (t + 1) % test_every == 0):
                for name, examples in task.tests.items():
                    right, metrics = gather(task.evaluate(examples))[0]
                    record |= {f"{name}_accuracy": sum(right) / len(right)}
                    record |= {f"{name}_{metric}": value for metric, value in metrics.items()}
            seconds["evaluate"] = time.perf_counter() - start
            record |= {**booster.summary(), **stats, "seconds": seconds, "failed": failed}
            records.append(record)
            if t >= 0:
                booster.save(out / "adapters.safetensors")
            replace_file(out / "rounds.jsonl", "".join(json.dumps(r) + "\n" for r in records).encode())
            say(describe(records, rounds))
            if t < 0 and failed and rounds:  # a completion that is trained on costs twice as much
                training = 2 * getattr(task, "completions", len(train)) / len(train)
                estimate = rounds * evaluation * (1 + training) + seconds["evaluate"] - evaluation
                say(f"          about {clock(estimate)} to go")
        save_model(booster.model, tokenizer, out / "model")
    say(table(records))
    if len(records) > 1 and not any(r.get("steps", 1) for r in records[1:]):
        say("\nNothing could be learned: in no round did the rewards inside a group differ, so all v are 0.")
    return records


def select(train: Sequence[Any], failed: list[int], config: BoostConfig, t: int) -> list[Any]:
    """The examples of round t: F_t, and floor(replay |F_t|) right ones (-1: all), by (seed, t)."""
    right = sorted(set(range(len(train))).difference(failed))
    wanted = len(right) if config.replay == -1 else min(len(right), int(config.replay * len(failed)))
    chosen = torch.randperm(len(right), generator=generator(config.seed, "replay", t))[:wanted].tolist()
    return [train[i] for i in sorted(failed + [right[i] for i in chosen])]


def save_model(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """The merged model (and its tokenizer) for from_pretrained; of a plain nn.Module the state dict."""
    def fill(path: Path) -> None:
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(path)
        else:
            torch.save(model.state_dict(), path / "model.pt")
        if tokenizer is not None:
            tokenizer.save_pretrained(path)

    replace_folder(folder, fill)


def versions() -> dict[str, str]:
    names = [name for name in ("torch", "transformers", "safetensors") if name in sys.modules]
    found = {name: str(sys.modules[name].__version__) for name in names}
    return {"python": platform.python_version(), **found}


def clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe(records: list[dict[str, Any]], rounds: int) -> str:
    """The line of the last round."""
    r = records[-1]
    line = f"round {r['round']:2d}/{rounds}  failures {r['failures']:4d}"
    line += f" ({r['fixed']} fixed, {r['regressed']} regressed)" if r["round"] else ""
    line += "".join(f"  {key.removesuffix('_accuracy')} {100 * value:.1f} %" for key, value in r.items()
                    if key.endswith("_accuracy") and not key.endswith("_lenient_accuracy"))
    if r["round"]:
        if "norm" in r:
            line += f"  norm {r['norm']:.3g}  rank {r['rank']['max']}  fidelity {r['fidelity']:.2f}"
        average = sum(sum(x["seconds"].values()) for x in records[1:]) / r["round"]
        left = (rounds - r["round"]) * average if r["failures"] else 0
        line += f"  {clock(sum(r['seconds'].values()))}" + (f", about {clock(left)} left" if left else "")
    if r.get("fidelity", 1) < 0.5:
        line += "\n          rounding the weights loses more than half of the update: try --dtype float32"
    return line + (f"\n          {r['note']}" if "note" in r else "")


def table(records: list[dict[str, Any]]) -> str:
    """The run, a line per round; accuracies in percent."""
    accuracies = [key for key in records[-1] if key.endswith(("_accuracy", "_f1", "_auc"))]
    head = ["round", "failures", "fixed", "regressed",
            *[key.removesuffix("_accuracy").replace("_", " ") for key in accuracies],
            "norm", "rank", "steps", "completions", "seconds"]
    rows = [[r["round"], r["failures"], r["fixed"], r["regressed"],
             *[f"{100 * r[key]:.1f}" if key in r else "" for key in accuracies],
             f"{r['norm']:.3g}" if "norm" in r else "", r["rank"]["max"] if "rank" in r else "",
             r.get("steps", ""), r.get("completions", ""), f"{sum(r['seconds'].values()):.0f}"]
            for r in records]
    widths = [max(len(str(cell)) for cell in column) for column in zip(head, *rows, strict=True)]
    return "\n" + "\n".join("  ".join(str(cell).rjust(width) for cell, width in zip(row, widths, strict=True))
                            for row in [head, *rows])


class FullFineTuning:
    """The baseline: the same loop trains all weights in place (--method full, in fp32). It is what `boost`
    asks of a learner, and no more. A run that is broken off between its two files starts over."""

    def __init__(self, model: nn.Module, config: BoostConfig):
        self.model, self.config, self.done = model.requires_grad_(False), config, 0

    def attach(self) -> list[nn.Parameter]:
        return list(self.model.requires_grad_(True).parameters())

    def merge(self) -> None:
        self.model.requires_grad_(False)
        self.done += 1

    def save(self, path: str | Path) -> None:
        weights = {name: p.detach().contiguous() for name, p in self.model.named_parameters()}
        replace_file(Path(path), safetensors.torch.save(weights, {"rounds": str(self.done)}))

    def resume(self, path: str | Path, rounds: int) -> None:
        require(Path(path).is_file(), f"{path} is missing")
        try:
            with safetensors.safe_open(path, "pt") as f:
                found = (f.metadata() or {}).get("rounds")
                weights = {name: f.get_tensor(name) for name, _ in self.model.named_parameters()}
        except safetensors.SafetensorError as error:
            raise InputError(f"{path} is damaged ({error})") from None
        require(found == str(rounds), f"{path} is of round {found}, not {rounds}: choose another --out")
        self.model.load_state_dict(weights, strict=False)
        self.done = rounds

    def summary(self) -> dict[str, Any]:
        return {}


# ------------------------------------------------------------------------------------------------------------
# What the scripts share of the command line.


@dataclass
class RunConfig:
    """The flags of every script, beside those of BoostConfig and of its trainer."""

    model: str = setting("", "a model on the Hub, or a folder that save_pretrained wrote")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "of the weights; auto: bfloat16, but float32 with --demo and --method full")
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
        at_least(self, limit=0, test_limit=0, test_every=0)
        require(not (self.export_lora and self.method == "full"), "--export_lora: not with --method full")
        require(not (self.demo and (self.train_file or self.test_file)), "--demo makes its own data files")
        self.model = "demo" if self.demo else self.model
        require(not self.model.startswith((".", "/", "~")) or Path(self.model).is_dir(),
                f"--model {self.model}: there is no such folder; name a model on the Hub, or try --demo")
        if self.dtype == "auto":
            self.dtype = "float32" if self.demo or self.method == "full" else "bfloat16"
        require(self.method == "boost" or self.dtype == "float32",
                f"--method full: not in --dtype {self.dtype}, which rounds small steps away")


def parse(kinds: Sequence[type], description: str, defaults: dict[str, Any], demo: dict[str, Any]) -> tuple:
    """The flags, as one instance of each dataclass. --demo changes defaults, not what the user says, and uses
    one CPU thread."""
    from transformers import HfArgumentParser
    from transformers.utils.logging import disable_progress_bar

    class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    if not sys.stderr.isatty():
        disable_progress_bar()
    parser = HfArgumentParser(kinds, description=description, formatter_class=Help, allow_abbrev=False)
    given, _ = parser.parse_known_args([flag for flag in sys.argv[1:] if flag not in ("-h", "--help")])
    parser.set_defaults(**{**defaults, **(demo if given.demo else {})})
    if given.demo:
        torch.set_num_threads(1)  # a toy's matrices are too small to share, and bits would follow the cores
    *configs, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True,
                                                           look_for_args_file=False)
    flags = [f"--{field.name}" for kind in kinds for field in dataclasses.fields(kind)]
    near = difflib.get_close_matches(unknown[0], flags, 1) if unknown else []
    hint = "".join(f": did you mean {name}?" for name in near)
    require(not unknown, f"unknown flag {''.join(unknown[:1])}{hint}")
    return tuple(configs)


@contextlib.contextmanager
def run_folder(*configs: Any) -> Iterator[dict[str, Any]]:
    """The settings of a run (all flags but --out), in its locked folder, checked before anything slow."""
    settings = {key: value for config in configs for key, value in dataclasses.asdict(config).items()}
    out = Path(settings.pop("out"))
    with locked(out):
        check_settings(out, settings)
        yield settings


def run(main: Callable[[], None]) -> None:
    """Call main, alone or under torchrun. A user's mistake and Ctrl-C end in one sentence."""
    try:
        if "RANK" in os.environ:
            if torch.cuda.is_available():
                torch.cuda.set_device(device())
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo",
                                    timeout=timedelta(hours=2))  # the first process may download or grade
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except InputError as error:
        code, message = 2, f"error: {error}"
    except FloatingPointError as error:
        code, message = 1, f"error: {error}; the rounds before this one are kept"
    except torch.OutOfMemoryError:
        code, message = 1, ("error: not enough GPU memory: lower --cache_tokens if it happened in sampling "
                            "or evaluating, --micro_batch_tokens in training; the finished rounds are kept")
    except KeyboardInterrupt:
        code, message = 130, "\nstopped: the same command goes on after the last finished round, if any"
    print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(code)  # an orderly end would wait for the others, who may wait for this process
    sys.exit(code)


def device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def loading(what: str, instead: str) -> Iterator[None]:
    """Turns what a library raises for a missing or unreadable thing into one sentence."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{what} could not be loaded ({reason}): {instead}") from None


def pretrained(kind: Any, name: str, **options: Any) -> Any:
    """kind.from_pretrained(name). Raises InputError where there is no such model or no network."""
    with loading(f"--model {name}", "name a folder or a model on the Hub, or try --demo, which needs neither "
                 "network nor GPU"):
        return kind.from_pretrained(name, **options)


def load_language_model(args: RunConfig, boosting: BoostConfig) -> tuple[nn.Module, Any]:
    """The causal language model and its tokenizer, checked before the weights are loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    config = pretrained(AutoConfig, args.model)
    tokenizer = pretrained(AutoTokenizer, args.model)
    require(tokenizer.chat_template, f"--model {args.model} has no chat template: use an instruct model")
    with torch.device("meta"), loading(f"--model {args.model}", "use a causal language model"):
        shell = AutoModelForCausalLM.from_config(config)
    targets = find_targets(shell)
    if args.method == "boost":
        check_fit(targets, boosting)
    size = sum(p.numel() for p in shell.parameters())
    if size > 3e8 and not torch.cuda.is_available():
        seconds = 300 * 2 * size / 1e11  # 300 tokens at 100 GFLOP/s
        say(f"warning: {size / 1e9:.1f} billion weights and no GPU: expect about {clock(seconds)} for each "
            "of thousands of completions; --demo shows the method in minutes")
    model = pretrained(AutoModelForCausalLM, args.model, dtype=getattr(torch, args.dtype))
    return model.to(device()), tokenizer


def chat(tokenizer: Any, questions: Iterable[str]) -> list[str]:
    """The questions in the model's chat template, ready for its answer."""
    return [tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                          add_generation_prompt=True) for question in questions]


def fits_context(model: nn.Module, tokenizer: Any, prompts: list[str], max_new_tokens: int) -> list[bool]:
    """Whether each prompt and its completion fit the model's context."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    fits = [length + max_new_tokens <= limit for length in lengths]
    require(any(fits), f"no prompt fits: the model's context is {limit} tokens, the shortest prompt has "
            f"{min(lengths)} and --max_new_tokens is {max_new_tokens}: lower that")
    return fits


def subset(rows: list[Any], limit: int, seed: int) -> list[Any]:
    """A seeded sample of `limit` rows in their order; 0: all."""
    chosen = torch.randperm(len(rows), generator=generator(seed, "subset"))[:limit or None]
    return [rows[i] for i in sorted(chosen.tolist())]


def hub_rows(name: str, split: str) -> list[dict[str, Any]]:
    """The rows of a Hub data set, `owner/name` or `owner/name:config`; InputError without network."""
    from datasets import load_dataset
    with loading(f"the Hub's {name}", "give --train_file and --test_file, or try --demo"):
        return list(load_dataset(*name.split(":"), split=split))


def read_jsonl(path: str | Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a .jsonl or .jsonl.gz file; InputError, with the line, where one lacks a field."""
    require(Path(path).is_file(), f"{path}: there is no such file")
    rows = []
    opened = gzip.open if str(path).endswith(".gz") else open
    with loading(path, "it must be JSONL in UTF-8"), opened(path, "rt", encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            require(isinstance(row, dict), f"{path}, line {number}: not a JSON object, one a line")
            missing = [field for field in fields if field not in row]
            require(not missing, f"{path}, line {number}: the field '{''.join(missing[:1])}' is missing")
            rows.append(row)
    require(rows, f"{path}: the file is empty")
    return rows


def finish(args: RunConfig, config: BoostConfig, settings: dict[str, Any], model: nn.Module, tokenizer: Any,
           task: Any) -> None:
    """Boost, export, and say what came of it and what to do next."""
    booster = Booster(model, config) if args.method == "boost" else FullFineTuning(model, config)
    boost(booster, task, args.out, args.test_every, settings, tokenizer)
    say(f"\n{args.out}/model is the merged model, for from_pretrained; {args.out}/rounds.jsonl the record.")
    adapters = Path(args.out) / "adapters.safetensors"
    if args.method == "boost" and adapters.exists():
        say(f"{adapters} ({adapters.stat().st_size / 1000:.1f} kB) is the whole fine-tune: "
            "Booster.load(base_model, path) rebuilds it.")
    if args.export_lora:
        booster.export_lora(Path(args.out) / "lora")
        say(f"{args.out}/lora is the same as a LoRA of rank {booster.k}, for any engine that takes LoRA.")
    if args.demo:
        say("Next: the same script without --demo on a GPU, or your own task: README, 'Boost your own task'.")
