"""BoostLoRA on protein binding: ESM2-650M learns from PPB-Affinity which pairs bind, by cross-entropy.

    python train_protein.py --demo                                   a toy: 2 CPU cores, no download
    python train_protein.py                                          ESM2-650M on the Hub's PPB-Affinity
    python train_protein.py --train_file pairs.csv.gz                your own pairs: see `load_pairs`
    python train_protein.py --rounds 0                               the linear probe
    python train_protein.py --replay 0 --line_search False           failures only, as in the paper
    python train_protein.py --rounds 1 --replay -1 --epochs 10       single-shot TinyLoRA on all examples
    python train_protein.py --method full --replay -1 --lr 1e-5      full fine-tuning

Phase 1 fits a head of 1,281 numbers on mean-pooled features of the frozen encoder, the linear probe: line 0
of the record. Phase 2 freezes it and boosts the encoder's 198 linears. Where the paper is silent we chose
(epochs and lr are not tuned: nobody here has trained ESM2-650M):

    a pair        ligand, a linker of 25 G, receptor: one sequence; pooled over the partners' residues only
    too long      both keep their first residues; the shorter one is cut only once the longer is down to it
    phase 1       logistic regression on standardised features, penalised as scikit-learn does (C = 1)
    held out      a fifth of the rows; rows connected by a PDB id or an identical sequence stay on one side
    phase 2       two right examples join each failure, and a line search on the loss of the whole training
                  set sets the step's length: no round makes it worse, as failures alone do (README)
    threshold     p(binds) > 1/2 in accuracy, F1 (of the pairs that bind) and the failure set"""
import csv
import gzip
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers import AutoConfig, EsmForTokenClassification, EsmTokenizer, logging
from transformers.modeling_outputs import TokenClassifierOutput

from boostlora import (BoostConfig, CEConfig, RunConfig, check_fit, checksum, claim,  # isort: skip
                       cross_entropy, finish, gather, generator, load, on_first_process, parse, pretrain,
                       process, processes, progress, replace, require, run, sampled, say)

LINKER = "G" * 25  # flexible in nature, and what is put between chains for ESM, which knows no chain break
LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO"  # the residues ESM knows, in its order; X: unknown
HUB = "proteinea/ppb_affinity", "filtered.csv"  # loads through a script there, so its file is read directly
HUB_NAMES = {"Ligand Sequences": "ligand_seq", "Receptor Sequences": "receptor_seq"}
DEFAULTS = {"model": "facebook/esm2_t33_650M_UR50D", "out": "runs/protein", "dtype": "float32", "replay": 2.0}
DEMO = {"out": "runs/protein-demo", "rounds": 6, "rank": 4, "u": 16, "groups": 0, "epochs": 3,
        "batch_tokens": 2048}
Pair = dict[str, Any]  # {"ligand": str, "receptor": str, "label": 0 or 1, "pdb": str}

# ------------------------------------------------------------------------------------------------------------
# Data.

def load_pairs(path: str | Path) -> list[Pair]:
    """The usable rows of a CSV or CSV.gz file. Columns: `ligand_seq` and `receptor_seq` (or the Hub's names;
    commas between chains go), `PDB`, and `label` (0 or 1) or `KD(M)` in mol/l: below 1e-7 binds. Rows without
    use are counted by reason and shown; X stays, and so do identical pairs of conflicting labels: both were
    measured. Raises InputError where the file cannot be read, lacks a column, or has no two labels."""
    advice = "give --train_file a CSV or CSV.gz file in UTF-8, or try --demo"
    unpack = gzip.open if str(path).endswith(".gz") else open
    def read(path: str | Path) -> tuple[list[str], list[dict[str, str]]]:
        with unpack(path, "rt", encoding="utf-8-sig", newline="") as file:  # -sig: Excel's mark
            table = csv.DictReader(file, restval="", strict=True)  # a quote that is not closed is an error
            table.fieldnames = [HUB_NAMES.get(name, name) for name in table.fieldnames or []]
            return table.fieldnames, [*table]
    names, lines = load(read, path, advice=advice)
    answer = "label" if "label" in names else "KD(M)"
    require({"ligand_seq", "receptor_seq", "PDB", answer} <= set(names), f"{path}: the columns must be "
            f"ligand_seq, receptor_seq, PDB and label or KD(M), not only {', '.join(names)}")
    pairs = [read_pair(line, answer) for line in lines]
    rows = [pair for pair, reason in pairs if not reason]
    dropped = Counter(reason for _, reason in pairs if reason)
    say(f"{path}: {len(rows):,} usable rows, {sum(row['label'] for row in rows):,} of them bind" + "".join(
        f"\n    {count:,} left out: {reason}" for reason, count in dropped.most_common()))
    require(len({row["label"] for row in rows}) == 2, f"{path}: no usable row, or all have one label")
    return rows

def read_pair(line: dict[str, str], answer: str) -> tuple[Pair, str]:
    """(the pair, "") or (a pair, why it is of no use). answer: the column label, or KD(M)."""
    ligand, receptor = ("".join(line[f"{side}_seq"].upper().replace(",", " ").split())
                        for side in ("ligand", "receptor"))
    try:
        number = float(line[answer])
    except ValueError:
        number = math.nan
    useful = {
        "more fields than columns": None not in line,
        "the mutation is not in the sequence": line.get("mutation_status") != "not_applied",
        "an empty sequence": ligand and receptor,
        "letters that ESM does not know": set(ligand + receptor) <= set(LETTERS),
        f"{answer} is missing": line[answer].strip(),
        f"{answer} is not a number": not math.isnan(number),
        f"{answer} is out of range": number in (0, 1) if answer == "label" else 0 < number < math.inf}
    label = int(number == 1 if answer == "label" else number < 1e-7)
    pair = {"ligand": ligand, "receptor": receptor, "label": label, "pdb": line["PDB"].strip().upper()}
    return pair, next((reason for reason, fine in useful.items() if not fine), "")

def connected(rows: list[Pair]) -> list[list[int]]:
    """Indices in groups: connected, also over several steps, by a PDB id or an identical sequence."""
    number: dict[str, int] = {}  # of each sequence and id
    keys = [{r["ligand"], r["receptor"], f"PDB {r['pdb']}"} - {"PDB "} for r in rows]
    links = [(i, number.setdefault(key, len(number))) for i, mine in enumerate(keys) for key in mine]
    row, key = torch.tensor(links).T
    group, before = torch.arange(len(rows)), None  # group: the least row that a row is connected to
    while before is None or not torch.equal(group, before):
        least = torch.full([len(number)], len(rows)).scatter_reduce(0, key, group[row], "amin")
        before, group = group, group.scatter_reduce(0, row, least[key], "amin")
    return [(group == first).nonzero().flatten().tolist() for first in group.unique()]

def split(rows: list[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """(train, test): whole groups, in a seeded order, are held out where they fit in a fifth of the rows."""
    groups, test = connected(rows), set()
    for g in torch.randperm(len(groups), generator=generator(seed, "split")).tolist():
        if len(test) + len(groups[g]) <= 0.2 * len(rows):
            test.update(groups[g])
    say(f"{len(groups):,} groups of connected rows; {len(test):,} rows are held out")
    return [r for i, r in enumerate(rows) if i not in test], [r for i, r in enumerate(rows) if i in test]

# ------------------------------------------------------------------------------------------------------------
# Model, phase 1 and metrics.

class PairClassifier(EsmForTokenClassification):
    """ESM2, the mean over residues, a linear layer, both in fp32. As these commute, the saved model is also
    transformers' own EsmForTokenClassification: the mean of its logits over the residues is the pair's."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, residues: Tensor) -> TokenClassifierOutput:
        """All inputs [B, L]; residues: 1.0 where a token is a residue of a partner. Logits [B, 2]: 0 and z,
        so softmax is the sigmoid of z; hidden_states: the mean over residues [B, d]."""
        hidden = self.esm(input_ids, attention_mask=attention_mask).last_hidden_state.float()
        pooled = torch.einsum("bld,bl->bd", hidden, residues / residues.sum(1, keepdim=True))
        z = F.linear(pooled, self.classifier.weight.float(), self.classifier.bias.float())
        return TokenClassifierOutput(logits=F.pad(z, (1, 0)), hidden_states=pooled)

def fit_probe(features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Phase 1: logistic regression of labels [N] on features [N, d] -> weight [1, d], bias [1], fp32. On
    standardised features, as ESM's differ by orders of magnitude; the penalty |w|^2 / 2N keeps 1,281 numbers
    from separating a few hundred rows. LBFGS on all rows: no random numbers."""
    mean, std = features.double().mean(0), features.double().std(0, correction=0).clamp(min=1e-6)
    X, y = (features - mean) / std, labels.double()
    w = torch.zeros(X.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(X @ w[1:] + w[0], y) + w[1:].square().sum() / (2 * len(y))
        loss.backward()
        return loss
    optimizer.step(closure)
    weight, bias = w.detach()[1:] / std, w.detach()[:1]
    return {"weight": weight[None].float(), "bias": (bias - weight @ mean).float()}

def f1(claims: Tensor, labels: Tensor) -> float:
    """F1 of the pairs that bind, from claims [N] bool and labels [N] in {0, 1}; 0 without any of either."""
    return 2 * int((claims & (labels == 1)).sum()) / max(int(claims.sum()) + int(labels.sum()), 1)

def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve, from the ranks of scores [N] (Mann-Whitney); ties share their mean rank."""
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks, positives = (counts.cumsum(0) - (counts - 1) / 2).double()[place], int(labels.sum())  # from 1
    above = float(ranks[labels == 1].sum()) - positives * (positives + 1) / 2
    return above / max(positives * (len(labels) - positives), 1)

# ------------------------------------------------------------------------------------------------------------
# The task.

@torch.no_grad()
def line_search(v: nn.Parameter, loss: Callable[[], float], before: float) -> float:
    """v_t <- a v_t: gradient boosting's step length, not in the paper. a halves from 1 until the loss, once
    below `before`, that at v = 0, rises again; it is 0 where none down to 1/32 lowers it. Returns a."""
    direction, best, lowest = v.clone(), 0.0, before - 1e-5 * abs(before)  # a smaller gain is rounding
    for a in (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32):
        v.copy_(a * direction)
        if (value := loss()) < lowest:
            best, lowest = a, value
        elif best:
            break
    v.copy_(best * direction)
    return best

class ProteinTask:
    """What `boost` asks for: train, tests, evaluate, fit. `probe` is phase 1."""

    def __init__(self, model: PairClassifier, tokenizer: Any, train: list[Pair], tests: dict[str, list[Pair]],
                 config: CEConfig, seed: int):
        self.model, self.vocabulary, self.train, self.tests = model, tokenizer.get_vocab(), train, tests
        self.config, self.seed, self.known = config, seed, ("", 0.0)  # some weights and their training loss
        self.room = model.config.max_position_embeddings - 4 - len(LINKER)  # ESM2: 997 of its 1,024 tokens
        self.effort = 3 * config.epochs + 3 * config.line_search  # a step is some 3 evaluations, a search too

    def tokens(self, pair: Pair) -> tuple[list[int], list[float]]:
        """<cls> ligand linker receptor <eos> as ids, and 1.0 where a token is a residue of a partner."""
        half, room, (a, b) = self.room // 2, self.room, (pair["ligand"], pair["receptor"])
        a, b = a[:max(half, room - len(b))], b[:max(room - half, room - len(a))]
        ids = [self.vocabulary[letter] for letter in ["<cls>", *a, *LINKER, *b, "<eos>"]]
        return ids, [0.0] + [1.0] * len(a) + [0.0] * len(LINKER) + [1.0] * len(b) + [0.0]

    def collate(self, pairs: list[Pair], batch: Iterable[int]) -> tuple[dict[str, Tensor], Tensor]:
        """(the model's inputs [B, L], labels [B]) of the pairs at the indices in batch"""
        rows, pad = [self.tokens(pairs[i]) for i in batch], self.vocabulary["<pad>"]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in rows], True, pad)
        residues = nn.utils.rnn.pad_sequence([torch.tensor(ones) for _, ones in rows], True)
        inputs = {"input_ids": ids, "attention_mask": (ids != pad).long(), "residues": residues}
        labels, device = torch.tensor([pairs[i]["label"] for i in batch]), self.model.device
        return {name: x.to(device) for name, x in inputs.items()}, labels.to(device)

    def batches(self, pairs: list[Pair], order: torch.Generator) -> list[list[int]]:
        """This process's batches, shuffled, of rows of like lengths; every process has as many."""
        lengths = [min(len(pair["ligand"] + pair["receptor"]), self.room) + 27 for pair in pairs]
        batches: list[list[int]] = [[]]
        for i in sorted(torch.randperm(len(pairs), generator=order).tolist(), key=lambda i: lengths[i]):
            if batches[-1] and (len(batches[-1]) + 1) * lengths[i] > self.config.batch_tokens:
                batches.append([])
            batches[-1].append(i)
        turn, n = torch.randperm(len(batches), generator=order).tolist(), processes()
        return [batches[turn[i % len(turn)]] for i in range(process(), -(-len(turn) // n) * n, n)]

    @torch.no_grad()
    def apply(self, pairs: list[Pair], pick: Callable[[Any], Tensor], label: str) -> Tensor:
        """pick(the model's output) of every pair, in order, on the CPU."""
        mine: dict[int, Tensor] = {}
        for batch in progress(self.batches(pairs, generator("apply")), label):
            inputs, _ = self.collate(pairs, batch)
            mine.update(zip(batch, pick(self.model(**inputs)).cpu(), strict=True))
        rows = {i: row for part in gather(mine) for i, row in part.items()}
        return torch.stack([rows[i] for i in range(len(pairs))])

    def evaluate(self, pairs: list[Pair]) -> tuple[list[bool], dict[str, float]]:
        z = self.apply(pairs, lambda output: output.logits[:, 1], "evaluate")
        y = torch.tensor([pair["label"] for pair in pairs])
        loss = float(F.binary_cross_entropy_with_logits(z.double(), y.double()))
        if pairs == self.train:
            self.known = checksum(self.model), loss
        return ((z > 0) == (y == 1)).tolist(), {"f1": f1(z > 0, y), "auc": auc(z, y), "loss": loss}

    def fit(self, pairs: list[Pair], v: nn.Parameter | list[nn.Parameter], round: int) -> dict[str, Any]:
        order = generator(self.seed, "order", round)
        search = self.config.line_search and isinstance(v, nn.Parameter)  # not for all weights
        if search and self.known[0] != checksum(self.model):  # continued, taken back, or --recheck below 1
            self.evaluate(self.train)
        stats = cross_entropy(self.model, lambda: (
            self.collate(pairs, batch) for batch in self.batches(pairs, order)), v, self.config, round)
        if search:
            stats["scale"] = line_search(v, lambda: self.evaluate(self.train)[1]["loss"], self.known[1])
            self.known = "", 0.0  # the trials' adapters are not in the checksum
        return stats

    def probe(self, folder: Path) -> None:
        """Phase 1. The head is kept in the folder: computed again on a GPU, its last bits may differ."""
        path = folder / f"head-{generator(checksum(self.model), self.train).initial_seed()}.pt"  # of both
        if not on_first_process(path.exists):
            features = self.apply(self.train, lambda output: output.hidden_states, "features")
            head = fit_probe(features, torch.tensor([pair["label"] for pair in self.train]))
            on_first_process(lambda: replace(path, lambda new: torch.save(head, new)))
        self.model.classifier.load_state_dict(torch.load(path))

def load_esm(args: RunConfig, boosting: BoostConfig) -> tuple[PairClassifier, EsmTokenizer]:
    """The model, its head not yet trained, and the tokenizer; checked before the weights are loaded."""
    advice = "--model takes a folder or a name on the Hub of an ESM2 model; --demo needs neither"
    config = load(AutoConfig.from_pretrained, args.model, num_labels=1, advice=advice)
    require(config.model_type == "esm", f"--model {args.model} is {config.model_type}: use an ESM2 model")
    tokenizer = load(EsmTokenizer.from_pretrained, args.model, advice=advice)
    with torch.device("meta"):
        check_fit(PairClassifier(config), boosting)
    logging.set_verbosity_error()  # it would warn that the head is new
    options = {"config": config, "dtype": getattr(torch, args.dtype), "advice": advice}
    return load(PairClassifier.from_pretrained, args.model, **options), tokenizer

def main() -> None:
    args, boosting, training = parse((RunConfig, BoostConfig, CEConfig), __doc__, DEFAULTS, DEMO)
    settings = {**vars(args), **vars(boosting), **vars(training)}
    claim(settings.pop("out"), settings)  # refuses what does not fit before anything slow
    if args.demo:
        base = Path(args.out) / "base"
        on_first_process(lambda: base.exists() or replace(base, lambda new: make_demo(new, boosting)))
        args.model, args.train_file = f"{base}", f"{base}/pairs.csv"
    train = load_pairs(args.train_file or on_first_process(lambda: load(
        hf_hub_download, *HUB, repo_type="dataset", advice="give --train_file, or try --demo")))
    train, test = (train, load_pairs(args.test_file)) if args.test_file else split(train, boosting.seed)
    train, test = sampled(train, args.limit or len(train), boosting.seed), test[:args.test_limit or None]
    require(all(len({row["label"] for row in rows}) == 2 for rows in (train, test)),
            "the training or the test rows have but one label: use more rows or another --seed")
    model, tokenizer = load_esm(args, boosting)
    task = ProteinTask(model, tokenizer, train, {"test": test}, training, boosting.seed)
    task.probe(Path(args.out))
    finish(args, boosting, settings, task, tokenizer)

# ------------------------------------------------------------------------------------------------------------
# The demo: pairs whose touching residues fit each other in nature (+ beside -, greasy beside greasy). A small
# ESM reads many, masked; how many residues fit decides KD, which a linear probe sees but faintly.

FITS = {"K": "DE", "R": "DE", "D": "KR", "E": "KR", "L": "VI", "V": "LI", "I": "LV", "S": "TN", "T": "SN",
        "N": "ST"}
TOUCHING = 8  # the last residues of the ligand and the first of the receptor
WORDS = ["<cls>", "<pad>", "<eos>", "<unk>", *LETTERS, ".", "-", "<null_1>", "<mask>"]  # ESM2's 33

def make_row(draw: random.Random, families: list[list[list[str]]], fit: float) -> str:
    """A row of pairs.csv: a mutated pair; touching residues fit with probability `fit`, or by chance."""
    family = draw.randrange(len(families))
    a, b = ([draw.choice(LETTERS[:20]) if draw.random() < 0.1 else c for c in x] for x in families[family])
    for i in range(TOUCHING):
        a[i - TOUCHING] = draw.choice([*FITS])
        b[i] = draw.choice(FITS[a[i - TOUCHING]] if draw.random() < fit else [*FITS])
    fitting = sum(b[i] in FITS[a[i - TOUCHING]] for i in range(TOUCHING))
    kd = 10 ** (TOUCHING / 2 - 6.5 - fitting + draw.gauss(0, 0.3))  # 5 of 8 bind
    return f"{''.join(a)},{''.join(b)},{kd},F{family:03d}"

def make_demo(folder: Path, boosting: BoostConfig) -> None:
    """Pre-train the demo's base model; `folder`: it, its tokenizer and pairs.csv. Raises as `check_fit`."""
    from transformers import EsmConfig, EsmForMaskedLM
    torch.manual_seed(boosting.seed)
    model = EsmForMaskedLM(EsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32, num_hidden_layers=4,
        hidden_size=64, intermediate_size=128, num_attention_heads=2, max_position_embeddings=128,
        initializer_range=0.125, position_embedding_type="rotary", token_dropout=True)).eval()  # no dropout
    check_fit(model, boosting)
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer, draw = EsmTokenizer(str(folder / "vocab.txt")), random.Random(boosting.seed)
    families = [[draw.choices(LETTERS[:20], k=draw.randint(12, 16)) for _ in "ab"] for _ in range(60)]
    def natural_batch() -> dict[str, Tensor]:
        pairs = [make_row(draw, families, 1.0).split(",")[:2] for _ in range(48)]
        inputs = tokenizer([LINKER.join(pair) for pair in pairs], padding=True, return_tensors="pt")
        ids = inputs["input_ids"]
        hidden = (torch.rand(ids.shape) < 0.15) & (ids > 3) & (ids != WORDS.index("G"))  # not the linker
        return {**inputs, "input_ids": ids.masked_fill(hidden, 32), "labels": ids.masked_fill(~hidden, -100)}
    pretrain(model, natural_batch, steps=320)
    model.save_pretrained(folder)
    rows = [make_row(draw, families, draw.uniform(0.2, 0.7)) for _ in range(2400)]
    (folder / "pairs.csv").write_text("\n".join(["ligand_seq,receptor_seq,KD(M),PDB", *rows]))

if __name__ == "__main__":
    run(main)
