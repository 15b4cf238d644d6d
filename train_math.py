"""BoostLoRA on grade-school math: Qwen2.5-3B-Instruct learns GSM8K by GRPO, tested on GSM8K and MATH-500.

    python train_math.py --demo                                     a toy: 2 CPU cores, no download
    python train_math.py                                            a quick run on one GPU: 1,500 problems
    python train_math.py --rounds 1 --replay -1 --epochs 5          single-shot TinyLoRA on all examples
    python train_math.py --rounds 1 --replay -1 --epochs 5 --rank 20            the monolithic ablation
    python train_math.py --rounds 1 --replay -1 --epochs 5 --method full --lr 1e-6     full fine-tuning
    python train_math.py --rounds 20 --limit 0 --test_every 1 --max_new_tokens 2048     the paper's run
    torchrun --nproc-per-node 8 train_math.py                       the quick run on 8 GPUs

The reward and the failure set are strict: the answer must stand in \\boxed{}, as the prompt asks (in the demo
after ####). Lenient accuracy, where the last number counts too, is logged beside it: much of the gain that is
published for GSM8K is format.
"""

import ast
import json
import random
import re
from cmath import cos, sin, sqrt, tan
from dataclasses import asdict, dataclass
from functools import partial
from operator import add, mul, neg, sub, truediv
from pathlib import Path

import torch

from boostlora import (BoostConfig, GRPOConfig, RunConfig, TextTask, check_fit, claim, finish,  # isort: skip
                       load_language_model, on_first_process, parse, pretrain, read_rows, replace, require,
                       run, sampled, setting)

INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
DEFAULTS = {"model": "Qwen/Qwen2.5-3B-Instruct", "out": "runs/math", "limit": 1500}
DEMO = {"out": "runs/math-demo", "limit": 0, "rounds": 10, "rank": 4, "u": 16, "groups": 0, "epochs": 2.0,
        "prompts": 32, "max_new_tokens": 40, "micro_batch_tokens": 512}

@dataclass
class MathConfig(RunConfig):
    demo_wrong: str = setting("loses gives", "verbs that the demo's corpus does wrongly in 62 %% of cases")

    def __post_init__(self):
        super().__post_init__()
        for verb in self.demo_wrong.split():
            require(verb in VERBS, f"--demo_wrong {verb}: the verbs are {', '.join(VERBS)}")

# ------------------------------------------------------------------------------------------------------------
# The task: problems, prompt, reward.

def load_problems(path: str, hub: str, split: str) -> list[dict[str, str]]:
    """Problems {"question", "answer"} from a JSONL file with the Hub's fields, or without a path, of the Hub.
    GSM8K has `question` and `answer` (a solution that ends in `#### 42`), MATH-500 `problem` and `answer`;
    the final answer alone is kept. Raises InputError, with the row, where it cannot be graded."""
    problems = []
    for number, row in enumerate(read_rows(path, ["answer"], hub, split), 1):
        where, question = f"{path or hub}, row {number}", row.get("question", row.get("problem"))
        require(question and isinstance(question, str), f"{where}: no 'question' or 'problem'")
        require(type(row["answer"]) in (str, int, float), f"{where}: 'answer' is neither text nor a number")
        answer = str(row["answer"]).split("####")[-1].strip()
        require(answer and grade(f"\\boxed{{{answer}}}", answer, strict=True),
                f"{where}: the answer {answer[:40]!r} cannot be graded")
        problems.append({"question": question, "answer": answer})
    return problems

def grades(texts: list[str], problems: list[dict[str, str]], strict: bool = True) -> list[bool]:
    """Strict: the reward, and what decides the failure set; else the last number counts too."""
    return [grade(text, p["answer"], strict) for text, p in zip(texts, problems, strict=True)]

def demo_grades(texts: list[str], problems: list[dict[str, str]]) -> list[bool]:
    """The demo's models answer after ####."""
    answers = [(text.split("####")[1:] or [""])[-1].strip() for text in texts]
    return [answer == p["answer"] for answer, p in zip(answers, problems, strict=True)]

def main() -> None:
    args, boosting, training = parse((MathConfig, BoostConfig, GRPOConfig), __doc__, DEFAULTS, DEMO)
    settings = {**asdict(args), **asdict(boosting), **asdict(training)}
    claim(settings.pop("out"), settings)  # refuses what does not fit before anything slow
    if args.demo:
        base = Path(args.out) / "base"
        on_first_process(lambda: base.exists() or replace(
            base, lambda new: make_demo(new, boosting, args.demo_wrong.split())))
        args.model, args.train_file, args.test_file = f"{base}", f"{base}/train.jsonl", f"{base}/test.jsonl"
    train = load_problems(args.train_file, "openai/gsm8k:main", "train")
    sources = {Path(args.test_file).name.split(".")[0]: (args.test_file, "")} if args.test_file else {
        "gsm8k": ("", "openai/gsm8k:main"), "math500": ("", "HuggingFaceH4/MATH-500")}
    tests = {name: load_problems(path, hub, "test")[:args.test_limit or None]
             for name, (path, hub) in sources.items()}
    model, tokenizer = load_language_model(args, boosting)
    task = TextTask(model, tokenizer, sampled(train, args.limit or len(train), boosting.seed, "limit"), tests,
                    training, prompt=lambda problem: problem["question"] + ("" if args.demo else INSTRUCTION),
                    grade=demo_grades if args.demo else grades,
                    lenient=None if args.demo else partial(grades, strict=False))
    finish(args, boosting, settings, task, tokenizer)

# ------------------------------------------------------------------------------------------------------------
# Grading. Four steps: find the final answer (boxed, spoken), give it one spelling (clean), take lists,
# points, intervals and matrices apart (parts), compare what is left as text, then in value (same, value).
# A variable counts as a fixed random number, so -q + p equals p - q. A model's text is parsed, never run.

LONGEST = 500  # characters of an answer that are read, so that no input is slow
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
SPOKEN = re.compile(r"####(?!\s*\**[A-Za-z]{2})|answer\b[^\n.:=]{0,20}?(?:\bis\b|:)", re.IGNORECASE)
NUMBER = re.compile(r"(?:(?<![\w)}])[-−])?\$?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?")
NAMED = re.compile(r"^(?:[\\a-zA-Z_ ]+\d?(?:\(\w\))?|\([\\a-zA-Z, ]+\))? ?[=∈≈]")  # x =, f(x) =, (x, y) =
WORD = re.compile(r"(?<![\\a-z])[a-z]{2,}(?:[ .:]|$)")  # neither a command nor a function
COMMA = re.compile(r",(?![^(\[]*[)\]])")  # outside brackets

SYMBOLS = {r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\pi": "π", r"\pm": "±", r"\circ": "°", r"\times": "*",
           r"\cdot": "*", r"\in": "∈", r"\approx": "≈", r"\cup": ",", r"\\": ",", "&": ",", "−": "-",
           "√": r"\sqrt", r"\infty": "∞", r"\degree": "°"}  # fmt: skip
TIDY = [(re.compile(old), new) for old, new in [  # in turn
    (r"\\(?:left|right|q?quad|displaystyle|[][{}()%$!,;: ])|[~$%]|\^ ?\{? ?° ?\}?|°", " "),
    (r"\\(?:text\w*|mbox|math\w\w) ?\{([^{}]*)\}", r" \1 "),
    (r"\\begin\{\w+\}", "("),
    (r",? ?\\end\{\w+\}", ")"),
    (r"(?:, ?)? (?:and|or) ", ","),
    (r"\\(sqrt|sin|cos|tan|cot)", r" \1"),
    (r"\b(sqrt|sin|cos|tan|cot) ?(\d+|[a-z])\b", r"\1{\2}"),
    (r"(\\frac) ?(\d)", r"\1{\2}"),
    (r"(\\frac\{[^{}]*\}) ?(\d)", r"\1{\2}"),
    (r"_[{( ]+(\w+)[)} ]+", r"_\1"),
    (r"(?<=[\d})π])(?: \(?(?![apAP]\.?[mM]\b)[a-zA-Z/.]{2,}\)?| [mgshLCF]\b)+ ?(?:\^ ?\{?\d\}?)?[ .]*$", ""),
    (r"^[ *:,+]+|[ *:,.]+$", ""),
    (r"^\(?([A-Z]) ?(?:[).:](?! ?, ?\([A-Z]\)).*|$)", r"\1"),  # choice (C), if none follows
    (r"^(-? ?)(\d+)(?: (?=\d+/)| ?\\frac)\{?(\d+)(?:\}\{|/)(\d+)\}?$", r"\1(\2+\3/\4)"),  # 1 4/5
]]  # fmt: skip

FUNCTIONS = {"sqrt": sqrt, "sin": sin, "cos": cos, "tan": tan, "cot": lambda x: 1 / tan(x)}
OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.Pow: pow, ast.USub: neg}

def grade(completion: str, answer: str, strict: bool = False) -> bool:
    r"""Whether the completion's final answer equals the gold answer; never raises.

    strict: only the last \boxed{} counts; else, without one, "#### ...", "answer is ..." or the last number.
    """
    try:
        box = boxed(completion)
        found, gold = box or ("" if strict else spoken(completion)), clean(answer)
        found = clean(found[:LONGEST])
        if NUMBER.fullmatch(gold) and WORD.search(found):
            numbers = NUMBER.findall(found.rpartition("=")[2])
            found = found if box and len(numbers) > 1 else numbers[0]  # 2 hours 30 minutes are not 2
        return found != "" and same(found, gold)
    except Exception:  # noqa: BLE001 - the text is anyone's: what breaks is no answer
        return False

def boxed(text: str) -> str:
    r"""Content of the last box (of two nested, the inner one) that is closed, or ""; one pass over braces."""
    span, opened = (0, 0), []
    for token in BOX.finditer(text):
        if token[0] == "{" or "box" in token[0]:
            opened.append(token.end() if "box" in token[0] else 0)
        elif token[0] == "}" and opened:
            span = max(span, (opened.pop(), token.start()))
    return text[slice(*span)] if span[0] else ""

def spoken(text: str) -> str:
    """The line or clause after the last "####" or "answer is"; without either, the last number."""
    *before, tail = SPOKEN.split(text)
    if not before:
        return (NUMBER.findall(text) or [""])[-1]
    tail = re.sub(r"^(?:[\s*:$]|\\[\[(])+", "", tail[:LONGEST])
    return re.split(r"\n|\.\s|\*\*|, (?!and|or)[a-z]{2}", tail, maxsplit=1)[0]

def clean(text: str) -> str:
    """The answer with one spelling per symbol, no layout, no thousands separators and no unit at its end."""
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\! *)(?=\d{3})", "", text)
    text = re.sub(r"\\(?:[a-zA-Z]+|.)|[&−√]", lambda match: SYMBOLS.get(match[0], match[0]), text)
    for old, new in TIDY:
        text = old.sub(new, " ".join(text.split()))
    if not re.search(r"[(\[]", text):  # in (1,100) the comma separates
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub("[a-zA-Z]{2,}", lambda match: match[0].lower(), text)

def parts(text: str) -> tuple[str, list[str]]:
    """Kind and parts: "" a list or a single answer, "()" a point, "(]" ... an interval."""
    bracketed = re.fullmatch(r"([(\[])([^()\[\]]*)([)\]])", text)
    if bracketed and len(items := COMMA.split(bracketed[2])) > 1:
        return bracketed[1] + bracketed[3], items
    signs = [(item, sign) for item in COMMA.split(text) for sign in ("+-" if "±" in item else "+")]
    return "", [item.replace("±", sign) for item, sign in signs]

def same(found: str, gold: str) -> bool:
    """Whether two cleaned answers are equal: part by part, lists in any order."""
    found, gold = (NAMED.sub("", text.strip()).strip(" +") for text in (found, gold))
    (kind, ours), (wanted, theirs) = parts(found), parts(gold)
    if len(ours) != len(theirs) or kind != wanted and {kind, wanted} != {"", "()"}:
        return False
    if len(theirs) == 1:
        return same_one(ours[0], theirs[0])
    if kind == wanted == "":
        return all(any(same(our, part) for our in ours) for part in theirs)
    return all(map(same, ours, theirs))

def same_one(found: str, gold: str) -> bool:
    """Whether two answers without parts are equal, as text or in value."""
    if "=" not in gold:
        found = found.split("≈")[0].split("=")[-1]
    if "_" not in found:  # the base of 52_8 may go without saying
        gold = gold.split("_")[0]
    if "".join(found.split()) == "".join(gold.split()):
        return True
    try:
        ours, theirs = value(found), value(gold)
        return abs(ours - theirs) <= min(6e-7, 1e-4 * abs(theirs))
    except Exception:  # noqa: BLE001 - no expression, or one that cannot be computed
        return False

def value(text: str) -> complex:
    """The number that an expression stands for, of an equation the difference of its sides; else raises."""
    text = text.replace("=", "-(") + ")" * text.count("=")
    text = re.sub(r"\} ?\{", ")/(", text).replace(r"\frac", " ").replace("{", "(").replace("}", ")")
    if re.search(r"[^\w\s.+*/^()-]", text):
        raise ValueError("not an expression")
    text = text.replace(" (", "(").replace("^", "**")
    tokens = re.findall(r"\d+\.?\d*|\.\d+|[a-zA-Z]{3,}\(?|\*+|\S", text)  # xyz is a word, xy a product
    code = re.sub(r"(?<=[\w.)]) (?=[^\W\d]|\()", " * ", " ".join(tokens))
    return evaluate(ast.parse(code, mode="eval").body)

def evaluate(node: ast.expr) -> complex:
    """Value of a parsed expression; in floats, as they overflow where exact powers would hang."""
    if isinstance(node, ast.Constant):
        return float(node.value)
    if isinstance(node, ast.Name):
        return 1j if node.id == "i" else random.Random(node.id).uniform(-2, 2)
    if isinstance(node, ast.Call):
        return FUNCTIONS[node.func.id](evaluate(*node.args))
    operands = [evaluate(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    return OPERATORS[type(node.op)](*operands)

# ------------------------------------------------------------------------------------------------------------
# The demo: a model of 294,528 weights, pre-trained on the spot on arithmetic stories whose corpus is often
# wrong about what a verb does. So it can, but often does not: what GRPO sharpens.

VERBS = {  # what the verb does to the number, and how often the corpus does the opposite (multiplying: adds)
    "buys": ("+", 0.2), "finds": ("+", 0.1), "makes": ("+", 0.3), "wins": ("+", 0.25),
    "eats": ("-", 0.1), "sells": ("-", 0.15), "loses": ("-", 0.2), "gives": ("-", 0.3),
    "doubles": ("*2", 0.2), "triples": ("*3", 0.3),
}

def story(random: random.Random, wrongly: list[str] | None = None) -> dict[str, str]:
    """A problem such as `has 8, sells 4, triples?` with its solution `8-4=4;4*3=12 #### 12`; all numbers
    within 0..40. wrongly: a solution as the corpus has it, with these verbs mostly done wrongly."""
    while True:
        x, solution = random.randint(2, 12), []
        question = f"has {x}"
        for verb in random.choices(list(VERBS), k=2):
            (sign, *factor), wrong = VERBS[verb]
            n = int(factor[0]) if factor else random.randint(1, 9)
            question += f", {verb}" if factor else f", {verb} {n}"
            wrong = 0.62 if wrongly and verb in wrongly else wrong
            if wrongly is not None and random.random() < wrong:
                sign = {"+": "-", "-": "+", "*": "+"}[sign]
            result = {"+": x + n, "-": x - n, "*": x * n}[sign]
            solution.append(f"{x}{sign}{n}={result}")
            x = result
            if not 0 <= x <= 40:
                break
        else:
            return {"question": question + "?", "answer": ";".join(solution) + f" #### {x}"}

def make_demo(folder: Path, boosting: BoostConfig, wrongly: list[str], steps: int = 400) -> None:
    """Pre-train the demo's base model and write it, its tokenizer, train.jsonl (600) and test.jsonl (512) to
    `folder`. Its wide initial weights have a flat spectrum, like a real model's. Raises as `check_fit`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
    # AutoTokenizer opens whatever lies beside a Qwen2 model as byte-level BPE, so that is what this is:
    # characters, no merges, and the words as added tokens. Spaces have no token.
    characters = {c: i for i, c in enumerate(["<pad>", "<end>", *"0123456789+-*=;,?"])}
    tokenizer = Qwen2Tokenizer(vocab=characters, merges=[], eos_token="<end>", pad_token="<pad>",
                               unk_token="<pad>")
    tokenizer.add_tokens(["####", "has", *VERBS])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    torch.manual_seed(boosting.seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=31, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=240, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        max_position_embeddings=128, initializer_range=0.1))
    check_fit(model, boosting)
    stories = random.Random(boosting.seed)

    def batch() -> dict[str, torch.Tensor]:
        rows = [story(stories, wrongly) for _ in range(128)]
        texts = [row["question"] + row["answer"] + "<end>" for row in rows]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        return {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100), **batch}

    pretrain(model, batch, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, count in [("train", 600), ("test", 512)]:
        lines = [json.dumps(story(stories)) + "\n" for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))

if __name__ == "__main__":
    run(main)
