"""BoostLoRA on protein binding: ESM2-650M learns from PPB-Affinity which pairs bind, by cross-entropy.

    python train_protein.py --demo                                   a toy: 2 CPU cores, no download
    python train_protein.py                                          ESM2-650M on the Hub's PPB-Affinity
    python train_protein.py --train_file pairs.csv.gz                your own pairs: see `load_pairs`
    python train_protein.py --rounds 0                               the linear probe
    python train_protein.py --replay 0 --line_search False           failures only, as in the paper
    python train_protein.py --rounds 1 --replay -1 --steps 160       single-shot TinyLoRA on all examples
    python train_protein.py --method full --replay -1 --lr 1e-5      full fine-tuning

Two phases, as in the paper. Phase 1: a head of 1,280 + 1 numbers on mean-pooled features of the frozen
encoder, the linear probe; line 0 of the record measures it. Phase 2: the head is frozen, and every round
trains one adapter on the encoder's 33 x 6 = 198 linears. What the paper's sources leave open, and our choice:

    a pair        ligand, a linker of 25 G, receptor: one sequence; pooled over the partners' residues only
    too long      both keep their first residues; the shorter one is cut only once the longer is down to it
    phase 1       logistic regression on standardised features, penalised as scikit-learn does (C = 1)
    held out      a fifth of the rows; rows connected by a PDB id or an identical sequence stay on one side
    phase 2       two right examples join each failure, and a line search on the loss of the whole training
                  set sets the length of the step: a round cannot make that loss worse. Cross-entropy on
                  failures alone can, and does: they pull all logits one way (README, the demo's table)
    threshold     p(binds) > 1/2 in accuracy, F1 (of the pairs that bind) and the failure set

Nobody has tuned steps and learning rate on ESM2-650M. With --train_file and --test_file the split is yours.
"""

import csv
import gzip
import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    EsmConfig,
    EsmForMaskedLM,
    EsmForTokenClassification,
    EsmTokenizer,
    logging,
)
from transformers.modeling_outputs import TokenClassifierOutput

from boostlora import (
    BoostConfig,
    CEConfig,
    RunConfig,
    check_fit,
    checksum,
    cross_entropy,
    device,
    find_targets,
    finish,
    gather,
    generator,
    line_search,
    loading,
    micro_batches,
    on_first_process,
    parse,
    pretrained,
    process,
    processes,
    progress,
    replace_file,
    replace_folder,
    require,
    run,
    run_folder,
    say,
    subset,
    without_dropout,
)

LINKER = "G" * 25  # flexible in nature, and what is put between chains for ESM, which knows no chain break
LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO"  # the residues ESM knows, in its order; X: unknown
HUB = "proteinea/ppb_affinity", "filtered.csv"  # loads through a script there, so its file is read directly
DEFAULTS = {"model": "facebook/esm2_t33_650M_UR50D", "out": "runs/protein", "dtype": "float32", "replay": 2.0}
DEMO = {"out": "runs/protein-demo", "rounds": 6, "rank": 4, "u": 16, "groups": 0, "steps": 48, "lr": 0.03,
        "batch_tokens": 2048, "recompute": False}
Pair = dict[str, Any]  # {"ligand": str, "receptor": str, "label": 0 or 1, "pdb": str}


# ------------------------------------------------------------------------------------------------------------
# Data.


def load_pairs(path: str | Path) -> list[Pair]:
    """The usable rows of a CSV or CSV.gz file: {"ligand", "receptor", "label": 0 or 1, "pdb"}.

    Columns: `ligand_seq` and `receptor_seq` (or the Hub's `Ligand Sequences` and `Receptor Sequences`, whose
    commas separate chains; chains are joined), `PDB`, and `label` (0 or 1) or `KD(M)` in mol/l: below 1e-7
    binds. Rows without use are counted by reason and shown; X stays, and so do identical pairs of conflicting
    labels: both were measured. Raises InputError where a column is missing, no row is left or all have one
    label. """
    require(Path(path).is_file(), f"{path}: there is no such file")
    spellings = {"ligand": ("ligand_seq", "Ligand Sequences"), "pdb": ("PDB",), "answer": ("label", "KD(M)"),
                 "receptor": ("receptor_seq", "Receptor Sequences")}
    rows, dropped, column = [], Counter(), {}
    unpack = gzip.open if str(path).endswith(".gz") else open
    with unpack(path, "rt", encoding="utf-8-sig", newline="") as f:
        table = csv.DictReader(f)
        for name, names in spellings.items():
            column[name] = next((n for n in names if n in (table.fieldnames or ())), None)
            require(column[name], f"{path}: there is no column {' or '.join(names)}, only "
                    f"{', '.join(table.fieldnames or ['an empty file'])}")
        for row in table:
            ligand, receptor = ("".join((row[column[side]] or "").upper().replace(",", " ").split())
                                for side in ("ligand", "receptor"))
            label, reason = read_label(row[column["answer"]] or "", column["answer"])
            if row.get("mutation_status") == "not_applied":
                reason = "the mutation is not in the sequence"
            elif not ligand or not receptor:
                reason = "an empty sequence"
            elif not set(ligand + receptor) <= set(LETTERS):
                reason = "letters that ESM does not know"
            if reason:
                dropped[reason] += 1
            else:
                pdb = (row[column["pdb"]] or "").strip().upper()
                rows.append({"ligand": ligand, "receptor": receptor, "label": label, "pdb": pdb})
    say(f"{path}: {len(rows):,} usable rows, {sum(row['label'] for row in rows):,} of them bind",
        *(f"\n    {count:,} left out: {reason}" for reason, count in dropped.most_common()))
    require(len({row["label"] for row in rows}) == 2, f"{path}: " + (
        f"all usable rows have the label {rows[0]['label']}" if rows else "there is no usable row"))
    return rows


def read_label(text: str, column: str) -> tuple[int, str]:
    """(label, "") or (0, why there is none)."""
    try:
        number = float(text)
    except ValueError:
        return 0, f"{column} is not a number" if text.strip() else f"{column} is missing"
    if column == "label":
        return int(number == 1), "" if number in (0, 1) else "label is neither 0 nor 1"
    return int(number < 1e-7), "" if 0 < number < math.inf else "KD(M) is not above 0"


def connected(rows: list[Pair]) -> list[list[int]]:
    """Indices in groups: connected, also over several steps, by a PDB id or an identical sequence."""
    parent, first = list(range(len(rows))), {}  # union-find

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, row in enumerate(rows):
        for key in {row["ligand"], row["receptor"], row["pdb"] and f"PDB {row['pdb']}"} - {""}:
            a, b = root(i), root(first.setdefault(key, i))
            parent[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for i in range(len(rows)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def split(rows: list[Pair], seed: int, share: float = 0.2) -> tuple[list[Pair], list[Pair]]:
    """(train, test): whole groups, in a seeded order, are held out where they fit in `share` of the rows."""
    groups, test = connected(rows), set()
    for g in torch.randperm(len(groups), generator=generator(seed, "split")).tolist():
        if len(test) + len(groups[g]) <= share * len(rows):
            test.update(groups[g])
    say(f"{len(groups):,} groups of connected rows, the largest of {max(map(len, groups)):,}; "
        f"{len(test):,} rows are held out")
    return [r for i, r in enumerate(rows) if i not in test], [r for i, r in enumerate(rows) if i in test]


# ------------------------------------------------------------------------------------------------------------
# Model, phase 1 and metrics.


class PairClassifier(EsmForTokenClassification):
    """ESM2, the mean over residues, a linear layer of d + 1 numbers; pooled and classified in fp32.

    A mean and a linear layer commute: the saved model is also transformers' own EsmForTokenClassification,
    and the mean of its logits over the residues is the pair's logit. """

    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor,
                 residues: torch.Tensor) -> torch.Tensor:
        """All inputs [B, L]; residues: 1.0 where a token is a residue of a partner -> [B, d] fp32."""
        hidden = self.esm(input_ids, attention_mask=attention_mask).last_hidden_state
        return torch.einsum("bld,bl->bd", hidden.float(), residues / residues.sum(1, keepdim=True))

    def forward(self, **inputs: torch.Tensor) -> TokenClassifierOutput:
        """Logits [B, 2]: 0 and z, so that softmax is the sigmoid of z."""
        z = F.linear(self.features(**inputs), self.classifier.weight.float(), self.classifier.bias.float())
        return TokenClassifierOutput(logits=F.pad(z, (1, 0)))


def fit_probe(features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Phase 1: logistic regression of labels [N] on features [N, d] -> weight [1, d], bias [1], fp32.

    On standardised features, as ESM's differ by orders of magnitude; the penalty |w|^2 / 2N keeps 1,281
    numbers from separating a few hundred rows. LBFGS on all rows: no random numbers. """
    X, y = features.double(), labels.double()
    mean, std = X.mean(0), X.std(0, correction=0).clamp(min=1e-6)
    X = (X - mean) / std
    w = torch.zeros(X.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(X @ w[1:] + w[0], y) + w[1:].square().sum() / (2 * len(y))
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = w.detach()[1:] / std
    return {"weight": weight[None].float(), "bias": (w.detach()[:1] - weight @ mean).float()}


def f1(claims: torch.Tensor, labels: torch.Tensor) -> float:
    """F1 of the pairs that bind, from claims [N] bool and labels [N] in {0, 1}; 0 without any of either."""
    return 2 * int((claims & (labels == 1)).sum()) / max(int(claims.sum()) + int(labels.sum()), 1)


def auc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Area under the ROC curve, from the ranks of scores [N] (Mann-Whitney); ties share their mean rank."""
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2).double()[place]  # from 1
    positives = int(labels.sum())
    above = float(ranks[labels == 1].sum()) - positives * (positives + 1) / 2
    return above / max(positives * (len(labels) - positives), 1)


# ------------------------------------------------------------------------------------------------------------
# The task.


class ProteinTask:
    """What `boost` asks for: train, tests, evaluate, fit. `probe` is phase 1."""

    def __init__(self, model: PairClassifier, tokenizer: Any, train: list[Pair], tests: dict[str, list[Pair]],
                 config: CEConfig, seed: int):
        self.model, self.vocabulary, self.train, self.tests = model, tokenizer.get_vocab(), train, tests
        self.config, self.seed, self.loss = config, seed, None
        self.room = model.config.max_position_embeddings - 4 - len(LINKER)  # ESM2: 997 of its 1,024 tokens

    def tokens(self, pair: Pair) -> tuple[list[int], list[float]]:
        """<cls> ligand linker receptor <eos> as ids, and 1.0 where a token is a residue of a partner."""
        half, room, (a, b) = self.room // 2, self.room, (pair["ligand"], pair["receptor"])
        a, b = a[:max(half, room - len(b))], b[:max(room - half, room - len(a))]
        ids = [self.vocabulary[letter] for letter in ["<cls>", *a, *LINKER, *b, "<eos>"]]
        return ids, [0.0] + [1.0] * len(a) + [0.0] * len(LINKER) + [1.0] * len(b) + [0.0]

    def collate(self, pairs: list[Pair]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """(the model's inputs [B, L], labels [B])"""
        rows, pad = [self.tokens(pair) for pair in pairs], self.vocabulary["<pad>"]
        width, where = max(len(ids) for ids, _ in rows), self.model.device
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows], device=where)
        residues = torch.tensor([ones + [0.0] * (width - len(ones)) for _, ones in rows], device=where)
        return ({"input_ids": ids, "attention_mask": (ids != pad).long(), "residues": residues},
                torch.tensor([pair["label"] for pair in pairs], device=where))

    def batches(self, pairs: list[Pair], order: torch.Generator | None = None) -> list[list[int]]:
        """This process's share of the batches, as indices of rows of like lengths. `order` shuffles batches,
        and rows of one length."""
        rows = torch.randperm(len(pairs), generator=order).tolist() if order else list(range(len(pairs)))
        lengths = [min(len(pairs[i]["ligand"] + pairs[i]["receptor"]), self.room) + 27 for i in rows]
        batches = [[rows[i] for i in batch] for batch in micro_batches(lengths, self.config.batch_tokens)]
        if order:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=order).tolist()]
            batches *= -(-processes() // len(batches))  # every process needs one
        return batches[process()::processes()]

    @torch.no_grad()
    def apply(self, f: Callable[..., torch.Tensor], pairs: list[Pair], label: str) -> torch.Tensor:
        """f(**inputs) of every pair, in order, on the CPU."""
        mine: dict[int, torch.Tensor] = {}
        with without_dropout(self.model):
            for batch in progress(self.batches(pairs), label):
                mine.update(zip(batch, f(**self.collate([pairs[i] for i in batch])[0]).cpu(), strict=True))
        rows = {i: row for part in gather(mine) for i, row in part.items()}
        return torch.stack([rows[i] for i in range(len(pairs))])

    def measure(self, pairs: list[Pair], label: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(z [N], labels [N], the mean cross-entropy)"""
        z = self.apply(lambda **inputs: self.model(**inputs).logits[:, 1], pairs, label)
        labels = torch.tensor([pair["label"] for pair in pairs])
        return z, labels, float(F.binary_cross_entropy_with_logits(z.double(), labels.double()))

    def evaluate(self, pairs: list[Pair]) -> tuple[list[bool], dict[str, float]]:
        z, labels, loss = self.measure(pairs, "evaluate")
        if pairs is self.train:
            self.loss = loss
        right = (z > 0) == (labels == 1)
        return right.tolist(), {"f1": f1(z > 0, labels), "auc": auc(z, labels), "loss": loss}

    def fit(self, pairs: list[Pair], v: nn.Parameter | list[nn.Parameter], round: int) -> dict[str, Any]:
        order = generator(self.seed, "order", round)

        def batches() -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
            return (self.collate([pairs[i] for i in batch]) for batch in self.batches(pairs, order))

        search = self.config.line_search and isinstance(v, nn.Parameter)  # not for all weights
        if search and self.loss is None:  # the run was continued: no evaluation yet
            self.loss = self.measure(self.train, "evaluate")[2]
        stats = cross_entropy(self.model, batches, v, self.config, round)
        if search:
            stats["scale"] = line_search(v, lambda: self.measure(self.train, "line search")[2], self.loss)
        return stats

    def probe(self, folder: Path) -> None:
        """Phase 1. The head is kept in the folder: computed again on a GPU, its last bits may differ."""
        key = hashlib.sha256(repr((checksum(self.model), self.train)).encode()).hexdigest()[:16]
        path = folder / f"head-{key}.safetensors"  # of this model and data alone
        if not on_first_process(path.exists):
            features = self.apply(self.model.features, self.train, "features")
            labels = torch.tensor([pair["label"] for pair in self.train])
            on_first_process(lambda: replace_file(path, safetensors.torch.save(fit_probe(features, labels))))
        self.model.classifier.load_state_dict(safetensors.torch.load_file(path))


def main() -> None:
    args, boosting, training = parse((RunConfig, BoostConfig, CEConfig), __doc__, DEFAULTS, DEMO)
    with run_folder(args, boosting, training) as settings:
        out = Path(args.out)
        if args.demo:
            on_first_process(lambda: (out / "base").exists() or make_demo(out / "base", boosting))
            args.model, args.train_file = f"{out}/base", f"{out}/base/pairs.csv"
        train = load_pairs(args.train_file or on_first_process(from_hub))
        train, test = (train, load_pairs(args.test_file)) if args.test_file else split(train, boosting.seed)
        train, test = subset(train, args.limit, boosting.seed), test[:args.test_limit or None]
        for name, rows in {"training": train, "test": test}.items():
            require(len({row["label"] for row in rows}) == 2,
                    f"the {len(rows)} {name} rows do not have both labels: use more rows or another --seed")
        model, tokenizer = load_esm(args, boosting)
        task = ProteinTask(model, tokenizer, train, {"test": test}, training, boosting.seed)
        task.probe(out)
        finish(args, boosting, settings, model, tokenizer, task)


def load_esm(args: RunConfig, boosting: BoostConfig) -> tuple[PairClassifier, EsmTokenizer]:
    """The model, its head not yet trained, and the tokenizer; checked before the weights are loaded."""
    config = pretrained(AutoConfig, args.model, num_labels=1)
    require(config.model_type == "esm", f"--model {args.model} is {config.model_type}: use an ESM2 model")
    with torch.device("meta"):
        check_fit(find_targets(PairClassifier(config)), boosting)
    logging.set_verbosity_error()  # it would warn that the head is new
    model = pretrained(PairClassifier, args.model, config=config, dtype=getattr(torch, args.dtype))
    return model.to(device()), pretrained(EsmTokenizer, args.model)


def from_hub() -> str:
    from huggingface_hub import hf_hub_download
    with loading(f"the Hub's {HUB[0]}", "give --train_file, or try --demo"):
        return hf_hub_download(*HUB, repo_type="dataset")


# ------------------------------------------------------------------------------------------------------------
# The demo: families of pairs whose touching residues fit each other in nature (+ beside -, greasy beside
# greasy), as they evolved together. A small ESM reads such pairs by masked language modelling, so it knows
# what fits; how many of the touching residues fit decides KD. A linear probe sees that only faintly.

FITS = {"K": "DE", "R": "DE", "D": "KR", "E": "KR", "L": "VI", "V": "LI", "I": "LV", "S": "TN", "T": "SN",
        "N": "ST"}  # fmt: skip
TOUCHING = 8  # the last residues of the ligand and the first of the receptor


def make_pair(draw: random.Random, family: list[str], fit: float) -> tuple[str, str, int]:
    """A mutated ligand and receptor of the family, and how many touching residues fit: each does with
    probability `fit`, or by chance."""
    a, b = ([draw.choice(LETTERS[:20]) if draw.random() < 0.1 else c for c in side] for side in family)
    for i in range(TOUCHING):
        a[i - TOUCHING] = draw.choice([*FITS])
        b[i] = draw.choice(FITS[a[i - TOUCHING]] if draw.random() < fit else [*FITS])
    return "".join(a), "".join(b), sum(b[i] in FITS[a[i - TOUCHING]] for i in range(TOUCHING))


def make_demo(folder: Path, boosting: BoostConfig, steps: int = 320, batch_size: int = 48,
              count: int = 2400) -> None:
    """Pre-train the demo's base model and write it, its tokenizer and pairs.csv to `folder`. Raises as
    `check_fit`."""
    draw = random.Random(boosting.seed)
    families = [["".join(draw.choices(LETTERS[:20], k=draw.randint(12, 16))) for _ in "ab"]
                for _ in range(60)]

    def fill(path: Path) -> None:
        words = ["<cls>", "<pad>", "<eos>", "<unk>", *LETTERS, ".", "-", "<null_1>", "<mask>"]  # ESM2's 33
        (path / "vocab.txt").write_text("\n".join(words))
        tokenizer = EsmTokenizer(str(path / "vocab.txt"))
        masked = words.index("<mask>")
        with torch.random.fork_rng():
            torch.manual_seed(boosting.seed)
            model = EsmForMaskedLM(EsmConfig(
                vocab_size=len(words), pad_token_id=1, mask_token_id=masked, max_position_embeddings=128,
                position_embedding_type="rotary", token_dropout=True, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
                intermediate_size=128, initializer_range=0.125))
            check_fit(find_targets(model), boosting)
            say("Pre-training the demo's base model: about a minute.")
            task = ProteinTask(model, tokenizer, [], {}, CEConfig(), boosting.seed)
            optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
            for _ in progress(range(steps), "pre-training"):
                natural = [make_pair(draw, draw.choice(families), 0.95) for _ in range(batch_size)]
                inputs, _ = task.collate([{"ligand": a, "receptor": b, "label": 0} for a, b, _ in natural])
                ids = inputs["input_ids"]
                hidden = torch.rand(ids.shape) < 0.15 * inputs["residues"]
                output = model(ids.masked_fill(hidden, masked), attention_mask=inputs["attention_mask"])
                optimizer.zero_grad()
                F.cross_entropy(output.logits[hidden], ids[hidden]).backward()
                optimizer.step()
                schedule.step()
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        with open(path / "pairs.csv", "w", newline="") as f:
            table = csv.writer(f)
            table.writerow(["ligand_seq", "receptor_seq", "KD(M)", "PDB"])
            for _ in range(count):
                family = draw.randrange(len(families))
                a, b, fitting = make_pair(draw, families[family], draw.uniform(0.2, 0.7))
                exponent = TOUCHING / 2 - 6.5 - fitting + draw.gauss(0, 0.3)  # 5 of 8 bind
                table.writerow([a, b, 10 ** exponent, f"F{family:03d}"])

    replace_folder(folder, fill)


if __name__ == "__main__":
    run(main)
