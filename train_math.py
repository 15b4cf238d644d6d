"""BoostLoRA on grade-school math: Qwen2.5-3B-Instruct learns GSM8K by GRPO, tested on GSM8K and MATH-500.

    python train_math.py --demo                                     a toy: 2 CPU cores, no download
    python train_math.py                                            a quick run on one GPU: 1,500 problems
    python train_math.py --rounds 1 --replay -1 --steps 80          single-shot TinyLoRA on all examples
    python train_math.py --rounds 1 --replay -1 --steps 80 --rank 20            the monolithic ablation
    python train_math.py --rounds 1 --replay -1 --steps 80 --method full --lr 1e-6     full fine-tuning
    python train_math.py --rounds 20 --limit 0 --test_every 1 --max_new_tokens 2048     the paper's run
    torchrun --nproc-per-node 8 train_math.py                       the quick run on 8 GPUs

The reward and the failure set are strict: the answer must stand in \\boxed{}, as the prompt asks (in the demo
after ####). Lenient accuracy, where the last number counts too, is logged beside it: much of the gain that is
published for GSM8K is format.
"""

import cmath
import json
import math
import random
import re
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from boostlora import (
    BoostConfig,
    GRPOConfig,
    RunConfig,
    chat,
    check_fit,
    completion_logprobs,
    find_targets,
    finish,
    fits_context,
    generate,
    grpo,
    hub_rows,
    load_language_model,
    on_first_process,
    parse,
    progress,
    read_jsonl,
    replace_folder,
    require,
    run,
    run_folder,
    say,
    subset,
    token_trees,
)

INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
DEFAULTS = {"model": "Qwen/Qwen2.5-3B-Instruct", "out": "runs/math", "limit": 1500}
DEMO = {"out": "runs/math-demo", "limit": 0, "rounds": 10, "rank": 4, "u": 16, "groups": 0, "steps": 8,
        "prompts": 32, "lr": 0.01, "max_new_tokens": 40, "recompute": False}


@dataclass
class MathConfig(RunConfig):
    demo_wrong: list[str] = field(default_factory=lambda: ["loses", "gives"], metadata={
        "help": "the verbs that the demo's corpus does wrongly in 62 of 100 cases; more make a harder base"})

    def __post_init__(self):
        super().__post_init__()
        for verb in self.demo_wrong:
            require(verb in VERBS, f"--demo_wrong {verb}: the verbs are {', '.join(VERBS)}")


# ------------------------------------------------------------------------------------------------------------
# The task: problems, prompt, reward.


def load_problems(path: str, hub: str, split: str) -> list[dict[str, str]]:
    """Problems {"question", "answer"} from a JSONL file with the Hub's fields, or from the Hub where path is
    empty.

    GSM8K has `question` and `answer` (a worked solution that ends in `#### 42`), MATH-500 `problem` and
    `answer`; the answer kept is the final one alone. Raises InputError, with the row, where one cannot be
    graded. """
    source, rows = path or hub, read_jsonl(path, ["answer"]) if path else hub_rows(hub, split)
    problems = []
    for number, row in enumerate(rows, 1):
        question = row.get("question", row.get("problem"))
        require(question and isinstance(question, str), f"{source}, row {number}: no 'question' or 'problem'")
        answer = str(row["answer"]).split("####")[-1].strip()
        require(answer and grade(f"\\boxed{{{answer}}}", answer, strict=True),
                f"{source}, row {number}: the answer {answer[:40]!r} cannot be graded")
        problems.append({"question": question, "answer": answer})
    return problems


def solved(text: str, answer: str, demo: bool = False) -> bool:
    """The strict grade, which is the reward and decides the failure set."""
    return "####" in text and grade(text, answer) if demo else grade(text, answer, strict=True)


class MathTask:
    """What `boost` asks of a task: train, tests, evaluate, fit."""

    def __init__(self, model: nn.Module, tokenizer: Any, train: list, tests: dict[str, list],
                 config: GRPOConfig, seed: int, demo: bool):
        self.model, self.tokenizer, self.config, self.seed, self.demo = model, tokenizer, config, seed, demo
        self.skipped = 0
        self.train = self.fitting(train)
        self.tests = {name: self.fitting(rows) for name, rows in tests.items()}
        self.completions = config.steps * min(config.prompts, len(self.train)) * config.group_size

    def prompts(self, examples: list[dict[str, str]]) -> list[str]:
        return chat(self.tokenizer, [e["question"] + ("" if self.demo else INSTRUCTION) for e in examples])

    def fitting(self, examples: list[dict[str, str]]) -> list[dict[str, str]]:
        """The examples whose prompt and completion fit the model's context; the others are counted."""
        fits = fits_context(self.model, self.tokenizer, self.prompts(examples), self.config.max_new_tokens)
        self.skipped += len(fits) - sum(fits)
        return [example for example, ok in zip(examples, fits, strict=True) if ok]

    def evaluate(self, examples: list[dict[str, str]]) -> tuple[list[bool], dict[str, float]]:
        config = self.config
        completions = generate(self.model, self.tokenizer, self.prompts(examples), label="evaluate",
                               max_new_tokens=config.max_new_tokens, cache_tokens=config.cache_tokens)
        pairs = [(c.text, e["answer"]) for c, e in zip(completions, examples, strict=True)]
        right = [solved(text, answer, self.demo) for text, answer in pairs]
        lenient = sum(ok or grade(*pair) for ok, pair in zip(right, pairs, strict=True)) / len(pairs)
        return right, {"lenient_accuracy": lenient}

    def fit(self, examples: list[dict[str, str]], v: nn.Parameter, round: int) -> dict[str, Any]:
        def reward(indices: list[int], texts: list[str]) -> list[float]:
            pairs = zip(texts, indices, strict=True)
            return [float(solved(text, examples[i]["answer"], self.demo)) for text, i in pairs]

        prompts = self.prompts(examples)
        return grpo(self.model, self.tokenizer, prompts, reward, v, self.config, round, self.seed)


def main() -> None:
    args, boosting, training = parse((MathConfig, BoostConfig, GRPOConfig), __doc__, DEFAULTS, DEMO)
    with run_folder(args, boosting, training) as settings:
        if args.demo:
            base = Path(args.out) / "base"
            on_first_process(lambda: base.exists() or make_demo(base, boosting, args.demo_wrong))
            args.model, args.train_file = str(base), f"{base}/train.jsonl"
            args.test_file = f"{base}/test.jsonl"
        train = load_problems(args.train_file, "openai/gsm8k:main", "train")
        sources = {Path(args.test_file).stem: (args.test_file, "")} if args.test_file else {
            "gsm8k": ("", "openai/gsm8k:main"), "math500": ("", "HuggingFaceH4/MATH-500")}
        tests = {name: load_problems(path, hub, "test")[:args.test_limit or None]
                 for name, (path, hub) in sources.items()}
        model, tokenizer = load_language_model(args, boosting)
        train = subset(train, args.limit, boosting.seed)
        task = MathTask(model, tokenizer, train, tests, training, boosting.seed, args.demo)
        finish(args, boosting, settings, model, tokenizer, task)
        if task.skipped:
            say(f"{task.skipped} examples were skipped: with --max_new_tokens they exceed the context.")


# ------------------------------------------------------------------------------------------------------------
# Grading. Find the final answer, give it one spelling, then compare text, shape and value. Values are exact
# fractions or complex numbers at three fixed random points of the variables, from a small evaluator: a
# model's text is never run.

LONGEST = 500  # characters; a longer answer is compared as text only, so that no input is slow
OPEN, CLOSE = "([{⦃", ")]}⦄"  # ⦃ ⦄ stand for \{ \}, which leaves { } to grouping

BOX = re.compile(
    r"\\(?:boxed|fbox)\s*(?:(\{)|([-+\w.,/]+))|(?:\\(?!boxed|fbox)(?:[a-z]+|.))+|(?:\{[^{}\\]*\})+|\{+|\}+",
    re.DOTALL,
)
SPOKEN = re.compile(r"####(?!\s*\**[A-Za-z]{2})|answer\b[^\n.:=]{0,20}?(?:\bis\b|:)", re.IGNORECASE)
NUMBER = re.compile(r"(?:(?<![\w)}])[-−])?\$?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?")
# x, f(x), total, (x, y)
NAME = re.compile(r"\s*(?:\\?[a-zA-Z]+(?:_\w+)?\s*(?:\([^()]*\))?|\([a-zA-Z, ]+\))\s*")
TEXT = re.compile(r"\\(?:text\w*|mbox|hbox|mathrm|mathbf|mathit|mathsf|operatorname)\*?\s*\{([^{}]*)\}")
MATRIX = re.compile(r"(.*?)\\begin\{\w*matrix\}(.*)\\end\{\w*matrix\}", re.DOTALL)

COMMANDS = r"""
    \{=⦃ \}=⦄ \lbrace=⦃ \rbrace=⦄ \langle=( \rangle=) \|=| \lvert=| \rvert=| \%=% \pi=π \infty=∞ \sqrt=√
    \circ=° \degree=° \cup=∪ \in=∈ \pm=± \mp=∓ \le=≤ \leq=≤ \ge=≥ \geq=≥ \lt=< \gt=> \approx=≈ \times=*
    \cdot=* \div=/ \dfrac=\frac \tfrac=\frac \cfrac=\frac \varnothing=\emptyset \boxed= \left= \right=
    \big= \Big= \quad= \displaystyle= \!= \,= \;= \:= \(= \)= \[= \]="""
SYMBOLS = {r"\ ": " "} | {old: new or " " for old, new in (pair.split("=") for pair in COMMANDS.split())}
CHARACTERS = str.maketrans({"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "²": "^2", "³": "^3",
                            "½": r"\frac12 ", "~": " ", "$": " "})  # fmt: skip
TIDY = [(re.compile(old, re.IGNORECASE), new) for old, new in [  # in turn
    (r"\*\*(?=[\w(-])", "^"),
    (r"\s+(?:and|or)\s+|;", ","),
    (r"\b([ap])\.m\b\.?", r"\1m"),
    (r"(?<=\d):00(?!\d)", ""),
    (r"\^\s*\{\s*°\s*\}|\^?\s*°", " "),
    (r"^\s*[a-z]\s*∈", ""),
    (r"_\{(\w+)\}", r"_\1"),
    (r"(\\frac)\s*(\d)", r"\1{\2}"),
    (r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}"),
    (r"(?<=[\d})%])(?:\s+(?![ap]m)[a-z/.]{2,})+(?:\s*\^(?:\d|\{\d\}))?[\s.]*$", ""),  # 5 square cm^2
    (r"^[\s*:]+|[\s*.:,]+$", ""),
    (r"^\(\s*([a-z])\s*\)$", r"\1"),  # choice (C)
    (r"^(\s*-?\s*)(\d+) *(\\frac\{\d+\}\{\d+\}|(?<= )\d+/\d+)$", r"\1(\2+\3)"),  # 1 1/2
]]  # fmt: skip

CONSTANTS = {"π": math.pi, "∞": math.inf, "e": math.e, "i": 1j}
FUNCTIONS = {"sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "cot": lambda x: 1 / cmath.tan(x),
             "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x), "arcsin": cmath.asin,
             "arccos": cmath.acos, "arctan": cmath.atan, "log": cmath.log,
             "ln": cmath.log, "exp": cmath.exp}  # fmt: skip
CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|"}
LEVELS = dict.fromkeys(["", *")]}|"], 0) | {"+": 1, "-": 1, "*": 2, "/": 2, "^": 4}  # 3: factors side by side
TOKEN = re.compile(
    r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?|√(?:\[\d+\])?"
    r"|(?:[a-zA-Z]{4,}|[a-zA-Z]|\\[a-zA-Z]+)(?:_\w)?|\S"  # 4 letters are one word, not a product
)


def grade(completion: str, answer: str, strict: bool = False) -> bool:
    r"""Whether the completion's final answer equals the gold answer; never raises.

    strict: only the last \boxed{} counts; else, without one, "#### ...", "answer is ..." or the last number.
    """
    try:
        found = boxed(completion)
        if found is None and not strict:
            found = spoken(completion, answer)
        if found is None or "".join(found.split()) == "".join(answer.split()):
            return found is not None
        if max(len(found), len(answer)) > LONGEST:
            return False
        gold = clean(answer)
        choice = re.match(r"(?:\\\w+\{|\W)*?\(?([A-Z])[).:}]", found)
        if choice and re.fullmatch("[A-Z]", gold):
            return choice[1] == gold
        return same(clean(found), gold)
    except Exception:  # noqa: BLE001 - the text is anyone's: what breaks is no answer
        return False


def boxed(text: str) -> str | None:
    r"""Content of the box that closes last (of two nested, the outer one), or None; one pass over braces."""
    span, opened = None, []
    for token in BOX.finditer(text) if "box" in text else ():
        if token[2]:
            span = token.span(2)
        elif token[1]:
            opened.append(token.end())
        elif token[0][0] == "}":
            for end in range(*token.span()):
                start = opened.pop() if opened else None
                span = (start, end) if start else span
        elif not token[0].strip("{"):
            opened += [None] * len(token[0])
    return span and text[slice(*span)]


def spoken(text: str, answer: str) -> str | None:
    """What follows the last "####" or "answer is"; without either, for a gold number, the last number."""
    numeric = NUMBER.fullmatch(clean(answer))
    marks = [*SPOKEN.finditer(text)]
    if not marks:
        return NUMBER.findall(text)[-1] if numeric else None
    tail = text[marks[-1].end() :][:LONGEST].lstrip(" \t\r\n*:")
    if maths := re.match(r"(?:\$\$|\\\[)(.+?)(?:\$\$|\\\])", tail, re.DOTALL):
        return maths[1]
    line = re.split(r"\n|\.\s|\*\*|,\s(?!and|or)[a-zA-Z]{2}", tail, maxsplit=1)[0]
    if numeric:
        return line if values(words_off(last_side(clean(line)))) else NUMBER.findall(line)[0]
    maths = re.findall(r"\$[^$]+\$|\\\(.+?\\\)", line)
    return maths[0] if len(maths) == 1 else line


@lru_cache(4096)  # gold answers and short completions come again and again
def clean(text: str) -> str:
    """The answer with one spelling per symbol, no layout, no thousands separators and no marked units."""
    text = " ".join(text.translate(CHARACTERS).split()).replace("\\\\", "\n")
    text = re.sub(r"\{,\}|,\\!\s*(?=\d{3})|(?<=\d)\\[,!;](?=\d{3})", "", text)
    text = re.sub(r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln)(?![a-zA-Z])", r"\\\1", text)
    text = re.sub(r"\\([a-zA-Z]+|.)", lambda match: SYMBOLS.get(match[0], match[0]), text)
    while (unwrapped := TEXT.sub(unwrap, text)) != text:
        text = unwrapped
    bare = re.sub(r"\s*“[^”]*”(?:\s*\^(?:\d|\{\d\}))?", " ", text)
    text = re.sub("[“”]", "", bare if re.search(r"\w", bare) else text)
    for old, new in TIDY:
        text = old.sub(new, text)
    if not re.search(r"[(\[⦃]", text):  # in (1,100) the comma separates
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)", lambda match: match[0].replace(",", ""), text)
    return text


def unwrap(match: re.Match) -> str:
    """Words of a text command: in “ ” where they may be a unit, bare where they hold more than that."""
    words = re.sub("[“”]", "", match[1])
    return (
        f" {words} "
        if re.search(r"(?<!\^)\d|\b(?:and|or|[ap]\.?m)\b", words, re.IGNORECASE)
        else f"“{words}”"
    )


def words_off(text: str) -> str:
    """Text without plain words; only for a number's counterpart, as xy may be a product elsewhere."""
    return re.sub(
        r"(?<![\\a-zA-Z])(?:[a-zA-Z]{2,}|(?<=[\d ])[mgshLCF]$)(?:\s*\^(?:\d|\{\d\}))?|\([a-z ]*\)", " ", text
    )


def fold(text: str) -> str:
    """Text for a plain comparison: no blanks, words (not variables) in lower case."""
    text = re.sub(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}|^[a-zA-Z]$", lambda match: match[0].lower(), text)
    return "".join(text.split())


@lru_cache(maxsize=4096)  # the completions of a prompt often end in the same answer
def same(found: str, gold: str) -> bool:
    """Whether two cleaned answers are equal: parts one by one, in any order for lists, sets and unions."""
    if "≈" in found:
        return any(same(side, gold) for side in found.split("≈")[:3])
    (kind, ours), (wanted, theirs) = shape(found), shape(gold)
    if len(ours) != len(theirs) or len(ours) > 30:
        return False
    if kind == wanted == "":
        return same_atom(ours[0], theirs[0])
    if {kind, wanted} <= {"", ",", "⦃⦄", "∪"}:
        for part in theirs:
            match = next((our for our in ours if same(our, part)), None)
            if match is None:
                return False
            ours.remove(match)
        return True
    return (kind == wanted or {kind, wanted} == {",", "()"}) and all(map(same, ours, theirs))


def shape(text: str) -> tuple[str, list[str]]:
    """Kind and parts: "" atom, "," list, "⦃⦄" set, "()" tuple, "(]" ... interval, "∪" union, ":" time."""
    text = text.strip()
    if "=" in text and (inner := shape(last_side(text).replace("=", "")))[0]:
        return inner
    if matrix := MATRIX.fullmatch(text):
        rows = [row.split("&") for row in matrix[2].strip().split("\n")]
        scale = f"({matrix[1]})*" if matrix[1].strip() else ""
        kind = "()" if len(rows[0]) == 1 else f"{len(rows[0])} columns"
        return kind, [f"{scale}({cell})" for row in rows for cell in row]
    kind, parts = next(((mark, parts) for mark in "∪,:" if len(parts := split(text, mark)) > 1), ("", [text]))
    if not kind and text[:1] in [*OPEN] and text[-1:] in [*CLOSE]:
        inner = split(text[1:-1], ",")
        if inner and text[0] == "{":
            return shape(text[1:-1])
        if len(inner) > 1 or inner and text[0] == "⦃":
            kind, parts = text[0] + text[-1], inner
    if "±" in text:
        parts = [
            part.replace("±", a).replace("∓", b)
            for part in parts
            for a, b in ("+-", "-+")[: 1 + ("±" in part)]
        ]
        return kind or ",", parts
    sides = re.split("([<>≤≥])", text)
    if ">" in sides or "≥" in sides:
        sides = [{">": "<", "≥": "≤"}.get(side, side) for side in reversed(sides)]
    if len(sides) == 3:
        sides = ["-∞", "<", *sides] if NAME.fullmatch(sides[0]) else [*sides, "<", "∞"]
    if len(sides) == 5 and NAME.fullmatch(sides[2]):
        return "(["[sides[1] == "≤"] + ")]"[sides[3] == "≤"], [sides[0], sides[4]]
    return kind, parts


def split(text: str, mark: str) -> list[str]:
    """Parts of text between the marks outside brackets; none where a bracket closes that was not opened."""
    depth, parts = 0, [""]
    for character in text:
        depth += (character in OPEN) - (character in CLOSE)
        if depth < 0:
            return []
        if character == mark and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def last_side(text: str) -> str:
    """The last side of an equation that is not a bare name: 5 of x = 5, of 5 = x and of x = 2 + 3 = 5."""
    sides = [side for side in text.split("=") if not NAME.fullmatch(side)]
    return sides[-1] if sides and "=" in text else text


def same_atom(found: str, gold: str) -> bool:
    """Whether two answers without parts are equal: as text, as equations or in value."""
    if fold(found) == fold(gold):
        return True
    if "=" in gold and "=" in found:  # the same equation up to a factor
        ours, theirs = (
            values("({})-({})".format(*text.split("=")[:: text.count("=")])) for text in (found, gold)
        )
        if not ours or not theirs or 0 in ours + theirs:
            return False
        return close([our * theirs[0] for our in ours], [their * ours[0] for their in theirs])
    if "=" in gold and not NAME.fullmatch(gold.split("=")[0]):
        return False
    shifts = {0, 2 * ("%" in gold) - 2 * ("%" in found)}  # 70% may be meant as 0.7 or as 70
    found, gold = (last_side(text).replace("%", "").strip() for text in (found, gold))
    if ("_" in found) != ("_" in gold):  # the base of 52_8 may go without saying
        found, gold = (re.sub(r"^(-?[\dA-F]+)_\d+$", r"\1", text) for text in (found, gold))
    if fold(found) == fold(gold):
        return True
    theirs = values(gold)
    ours = values(words_off(found) if theirs and theirs[0] == theirs[1] else found)
    if not ours or not theirs:
        return False
    exact = "." not in found + gold
    return any(close([our * Fraction(10) ** shift for our in ours], theirs, exact) for shift in shifts)


def close(ours: list, theirs: list, exact: bool = False) -> bool:
    """Whether all are equal: Fractions exactly if exact, the rest to 6 decimals or to float precision."""
    for a, b in zip(ours, theirs, strict=True):
        fractions = exact and isinstance(a, Fraction) and isinstance(b, Fraction)
        if a != b and (fractions or not abs(a - b) <= max(min(6e-7, 1e-4 * abs(b)), 1e-11 * abs(b))):
            return False
    return True


@lru_cache(maxsize=4096)
def values(text: str) -> list | None:
    """The expression at 3 fixed random points (all equal: a number), or None where it is none."""
    try:
        return [evaluate(["", ")", *reversed(TOKEN.findall(text)), "("], seed) for seed in range(3)]
    except (ArithmeticError, LookupError, ValueError, TypeError, RecursionError):
        return None


def evaluate(tokens: list[str], seed: int, binding: int = 1) -> complex:
    """Value read off the end of tokens up to a level below binding: exact (Fraction), float or complex."""
    token = tokens.pop()
    if token in CLOSING:
        value = evaluate(tokens, seed)
        if tokens.pop() != CLOSING[token]:
            raise ValueError("open bracket")
        value = abs(value) if token == "|" else value
    elif token in ("+", "-"):
        value = evaluate(tokens, seed, 4) * int(token + "1")
    elif token[0] in ".0123456789":
        value = Fraction(token)
    elif token == r"\frac":
        value = evaluate(tokens, seed, 5) / evaluate(tokens, seed, 5)
    elif token[0] == "√":
        root, value = Fraction(token[2:-1] or 2), evaluate(tokens, seed, 5)
        value = -power(-value, 1 / root) if root % 2 and value == -abs(value) else power(value, 1 / root)
    elif token[1:] in FUNCTIONS:
        exponent = tokens.pop() and evaluate(tokens, seed, 5) if tokens[-1] == "^" else 1
        value = FUNCTIONS[token[1:]](evaluate(tokens, seed, 5 if tokens[-1] in CLOSING else 3)) ** exponent
    elif token in CONSTANTS:
        value = CONSTANTS[token]
    elif token[-1].isalnum():
        value = random.Random(f"{token}{seed}").uniform(-2, 2)
    else:
        raise ValueError("not an expression")
    while (level := LEVELS.get(token := tokens[-1], 3)) >= binding:
        if token[0].isdigit():
            raise ValueError("a number straight after a factor, as in 2 hours 30")
        if token[1:] in FUNCTIONS and binding == 3:  # \sin x \cos x
            break
        operator = tokens.pop() if level != 3 else "*"
        right = evaluate(tokens, seed, 2 if level == 1 else 4)
        if operator == "^":
            value = power(value, right)
        elif operator in "*/":
            value = value * right if operator == "*" else value / right
        else:
            value = value + right if operator == "+" else value - right
    return value


def power(base: complex, exponent: complex) -> complex:
    """base ** exponent, exact while under 5,000 bits, else in floats, which overflow and do not hang."""
    exact = isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1
    if exact and max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent) < 5000:
        return base ** int(exponent)
    if isinstance(base, complex) or isinstance(exponent, complex) or base < 0:
        return complex(base) ** complex(exponent)
    return float(base) ** float(exponent)


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


def make_demo(folder: Path, boosting: BoostConfig, wrongly: list[str], steps: int = 400,
              batch_size: int = 128) -> None:
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
    with torch.random.fork_rng():
        torch.manual_seed(boosting.seed)
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=31, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=240, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
            max_position_embeddings=128, initializer_range=0.1))
    check_fit(find_targets(model), boosting)
    say("Pre-training the demo's base model: about a minute.")
    stories = random.Random(boosting.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.05)
    for _ in progress(range(steps), "pre-training"):
        rows = [story(stories, wrongly) for _ in range(batch_size)]
        questions = tokenizer([row["question"] for row in rows])["input_ids"]
        answers = [ids + [1] for ids in tokenizer([row["answer"] for row in rows])["input_ids"]]
        trees = [token_trees(prompt, [answer])[0] for prompt, answer in zip(questions, answers)]
        logprobs = completion_logprobs(model, trees)
        optimizer.zero_grad()
        (-logprobs.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    def fill(path: Path) -> None:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        for name, count in [("train", 600), ("test", 512)]:
            lines = [json.dumps(story(stories)) + "\n" for _ in range(count)]
            (path / f"{name}.jsonl").write_text("".join(lines))

    replace_folder(folder, fill)


if __name__ == "__main__":
    run(main)
