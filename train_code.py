"""BoostLoRA on code: Qwen2.5-3B-Instruct learns MBPP by GRPO, tested on MBPP and on HumanEval.

    python train_code.py --demo                                     a toy: 2 CPU cores, no download
    python train_code.py                                            a quick run on one GPU: 374 tasks
    python train_code.py --rounds 1 --replay -1 --steps 80          single-shot TinyLoRA on all examples
    python train_code.py --rounds 1 --replay -1 --steps 80 --rank 20            the monolithic ablation
    python train_code.py --rounds 1 --replay -1 --steps 80 --method full --lr 1e-6     full fine-tuning
    python train_code.py --rounds 20 --test_every 1                 the paper's run
    torchrun --nproc-per-node 8 train_code.py                       the quick run on 8 GPUs

HumanEval is never trained on. The reward is 1 if the code passes every test of its task, else 0. What the
model writes runs in the sandbox of this file, on Linux alone: in a process and namespaces of its own, without
network, files or rights, and apart from the tests, so that no code can give itself a verdict.
"""

import builtins
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import decimal
import fractions
import functools
import gc
import importlib
import inspect
import itertools
import json
import marshal
import math
import operator
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import types
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from torch import nn

from boostlora import (
    BoostConfig,
    GRPOConfig,
    InputError,
    RunConfig,
    above_zero,
    at_least,
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
    process,
    progress,
    read_jsonl,
    replace_folder,
    require,
    run,
    run_folder,
    say,
    setting,
    subset,
    token_trees,
)

MBPP, HUMANEVAL = "google-research-datasets/mbpp:full", "openai/openai_humaneval"
TRAIN_IDS, TEST_IDS = range(601, 975), range(11, 511)  # MBPP's task_ids
FIELDS = {  # that a row must have, beside its task_id
    "mbpp": {"text": str, "test_setup_code": str, "test_list": list},
    "humaneval": {"prompt": str, "entry_point": str, "test": str}}
ASK_MBPP = """You are an expert Python programmer, and here is your task: {}

Your code should pass these tests:

{}

Put the whole code in one ```python block."""
ASK_HUMANEVAL = """You are an expert Python programmer. Complete this function:

```python
{}
```

Put the whole function, with its imports, in one ```python block."""
DEFAULTS = {"model": "Qwen/Qwen2.5-3B-Instruct", "out": "runs/code"}
DEMO = {"out": "runs/code-demo", "rounds": 8, "rank": 4, "u": 16, "groups": 0, "steps": 8, "prompts": 32,
        "lr": 0.01, "max_new_tokens": 48, "recompute": False}


@dataclass
class SandboxConfig:
    """What a candidate, the code of one completion, may take."""

    workers: int = setting(0, "candidates that run at a time; 0: one for each CPU of this process")
    cpu_seconds: float = setting(12.0, "CPU time of a candidate; MBPP's slowest solution takes 4.7 s")
    wall_seconds: float = setting(30.0, "time by the clock of a candidate and its tests together")
    memory_mb: int = setting(1024, "address space of a candidate, in MiB")

    def __post_init__(self):
        at_least(self, workers=0, memory_mb=128)
        above_zero(self, "cpu_seconds", "wall_seconds")


# ------------------------------------------------------------------------------------------------------------
# The task: problems, prompt, program, reward.


def load_problems(path: str, hub: str = "", split: str = "") -> list[dict[str, Any]]:
    """Problems from a JSONL file of MBPP or HumanEval, or from the Hub where path is empty.

    A problem: task_id, ask (what the model is asked), text (the task alone), tests (what must run to its end
    after the code); of HumanEval also prompt (code to complete), head (its imports and helpers) and
    entry_point. Raises InputError, with the row, for a row that is neither of the two. """
    source, rows = path or hub, read_jsonl(path, ["task_id"]) if path else hub_rows(hub, split)
    problems = []
    for number, row in enumerate(rows, 1):
        kind, where = "humaneval" if "entry_point" in row else "mbpp", f"{source}, row {number}"
        for field, type_ in FIELDS[kind].items():
            require(isinstance(row.get(field), type_), f"{where}: '{field}' is not a {type_.__name__}")
        if kind == "mbpp":
            tests = row["test_list"]
            require(isinstance(row["task_id"], int), f"{where}: 'task_id' is not a number")
            require(row["text"].strip(), f"{where}: 'text' is empty")
            require(tests and all(isinstance(t, str) for t in tests), f"{where}: 'test_list' holds no tests")
            problem = {"text": row["text"], "ask": ASK_MBPP.format(row["text"].strip(), "\n".join(tests)),
                       "tests": "\n".join([row["test_setup_code"], *tests])}
        else:
            prompt, name = row["prompt"], row["entry_point"]
            start = re.search(rf"^def {re.escape(name)}\(", prompt, re.MULTILINE)
            require(start, f"{where}: 'prompt' does not define the entry_point '{name}'")
            head = prompt[:start.start()]
            problem = {"text": prompt, "ask": ASK_HUMANEVAL.format(prompt.strip()), "prompt": prompt,
                       "head": head, "entry_point": name,
                       # Some tests call the head's helpers: those of the tests, not the candidate's.
                       "tests": f"{head}\n{row['test']}\ncheck({name})"}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # MBPP has invalid escapes
                compile(problem["tests"], "", "exec")
        except (SyntaxError, ValueError) as error:
            raise InputError(f"{where}: the tests are not Python ({error})") from None
        problems.append({"task_id": row["task_id"], **problem})
    return problems


def load_data(args: RunConfig) -> tuple[list, dict[str, list]]:
    """The training problems and the test sets. MBPP is split by task_id, wherever it comes from, so that no
    file can mix the two."""
    def within(ids: range, problems: list) -> list:
        return [p for p in problems if p["task_id"] in ids]

    rows = load_problems(args.train_file, MBPP, "train")
    train, tests = within(TRAIN_IDS, rows), {}
    require(train, f"{args.train_file}: no row has one of MBPP's training task_ids, 601 to 974")
    if held_out := within(TEST_IDS, rows):
        tests["mbpp"] = held_out
    for path in map(str.strip, filter(None, args.test_file.split(","))):
        name, rows = Path(path).name.split(".")[0].lower(), load_problems(path)
        tests[name] = [p for p in rows if "entry_point" in p] or within(TEST_IDS, rows)
        require(tests[name], f"{path}: no row has one of MBPP's test task_ids, 11 to 510")
    if not args.test_file:
        tests = tests or {"mbpp": within(TEST_IDS, load_problems("", MBPP, "test"))}
        tests["humaneval"] = load_problems("", HUMANEVAL, "test")
    return train, tests


def extract_code(completion: str) -> str:
    """The last fenced Python block of a completion (which may break off in it), or the whole text."""
    completion = completion.replace("\r\n", "\n")
    blocks = re.findall(r"```[ \t]*(\w*)[^\n`]*\n(.*?)(?:```|\Z)", completion, re.DOTALL)
    tagged = [code for language, code in blocks if language.lower() in ("python", "python3", "py")]
    plain = [code for language, code in blocks if not language]
    return textwrap.dedent((tagged or plain or [completion])[-1])


def program(problem: dict[str, Any], completion: str) -> tuple[str, str]:
    """What the sandbox runs for a completion: (code, tests). HumanEval's function may have been repeated,
    as is asked for, or just continued."""
    code = extract_code(completion)
    if name := problem.get("entry_point"):
        whole = re.search(rf"^(?:def\s+{re.escape(name)}\b|{re.escape(name)}\s*=)", code, re.MULTILINE)
        code = problem["head"] + code if whole else problem["prompt"] + textwrap.indent(code, "    ")
    return code, problem["tests"]


class CodeTask:
    """What `boost` asks of a task: train, tests, evaluate, fit. The sandbox is used by the first process
    alone."""

    def __init__(self, model: nn.Module, tokenizer: Any, train: list, tests: dict[str, list],
                 config: GRPOConfig, seed: int, demo: bool, sandbox: "Sandbox | None"):
        self.model, self.tokenizer, self.config, self.seed, self.demo = model, tokenizer, config, seed, demo
        self.sandbox, self.skipped = sandbox, 0
        self.train = self.fitting(train)
        self.tests = {name: self.fitting(problems) for name, problems in tests.items()}
        self.completions = config.steps * min(config.prompts, len(self.train)) * config.group_size

    def prompts(self, examples: list[dict[str, Any]]) -> list[str]:
        return chat(self.tokenizer, [e["text" if self.demo else "ask"] for e in examples])

    def fitting(self, examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The examples whose prompt and completion fit the model's context; the others are counted."""
        fits = fits_context(self.model, self.tokenizer, self.prompts(examples), self.config.max_new_tokens)
        self.skipped += len(fits) - sum(fits)
        return [example for example, ok in zip(examples, fits, strict=True) if ok]

    def passed(self, examples: list[dict[str, Any]], texts: list[str]) -> list[bool]:
        """Whether each completion passes all tests of its problem; the same program is run once."""
        programs = [program(example, text) for example, text in zip(examples, texts, strict=True)]
        different = list(dict.fromkeys(programs))
        verdicts = dict(zip(different, self.sandbox.run(different), strict=True))
        return [verdicts[p] for p in programs]

    def evaluate(self, examples: list[dict[str, Any]]) -> tuple[list[bool], dict[str, float]]:
        config = self.config
        completions = generate(self.model, self.tokenizer, self.prompts(examples), label="evaluate",
                               max_new_tokens=config.max_new_tokens, cache_tokens=config.cache_tokens)
        return on_first_process(lambda: self.passed(examples, [c.text for c in completions])), {}

    def fit(self, examples: list[dict[str, Any]], v: nn.Parameter, round: int) -> dict[str, Any]:
        def reward(indices: list[int], texts: list[str]) -> list[float]:
            return [float(ok) for ok in self.passed([examples[i] for i in indices], texts)]

        prompts = self.prompts(examples)
        return grpo(self.model, self.tokenizer, prompts, reward, v, self.config, round, self.seed)


def main() -> None:
    kinds = (RunConfig, BoostConfig, GRPOConfig, SandboxConfig)
    args, boosting, training, limits = parse(kinds, __doc__, DEFAULTS, DEMO)
    with contextlib.ExitStack() as stack:
        settings = stack.enter_context(run_folder(args, boosting, training, limits))
        del settings["workers"]  # may differ when a run goes on
        sandbox = stack.enter_context(Sandbox(**dataclasses.asdict(limits))) if process() == 0 else None
        if args.demo:
            base = Path(args.out) / "base"
            on_first_process(lambda: base.exists() or make_demo(base, boosting))
            args.model, args.train_file = str(base), f"{base}/train.jsonl"
            args.test_file = f"{base}/test.jsonl,{base}/other_shapes.jsonl"
        train, tests = load_data(args)
        tests = {name: problems[:args.test_limit or None] for name, problems in tests.items()}
        model, tokenizer = load_language_model(args, boosting)
        train = subset(train, args.limit, boosting.seed)
        task = CodeTask(model, tokenizer, train, tests, training, boosting.seed, args.demo, sandbox)
        finish(args, boosting, settings, model, tokenizer, task)
        if task.skipped:
            say(f"{task.skipped} examples were skipped: with --max_new_tokens they exceed the context.")


# ------------------------------------------------------------------------------------------------------------
# The sandbox (Linux, standard library only).
#
#     trainer  ->  helper  ->  judge    <->  candidate
#                  (warm)      (tests)       (code)
#
# The helper is a clean interpreter, one per worker, in namespaces of its own. For each job it forks a judge,
# the first process of a new PID namespace, and a candidate in it; only then does the judge read the job. The
# code runs in the candidate, the tests run in the judge. Where the tests call a function of the candidate's,
# the judge sends the arguments and gets back the result as a plain value, rebuilt from JSON as an exact
# builtin type. So nothing of the candidate's ever runs where values are compared and the verdict is given:
# whatever it does to its own interpreter, all that it can do is to answer calls, rightly or wrongly.
#
# A job costs two forks, and a copy of each page of memory that one of them then writes to, be it to count a
# reference. So the helper is small, has rehearsed both parts, and prepares all that it can before it forks.

# What helpers import before they fork: what they need and what candidates import most often; and what they
# add without namespaces, where candidates may have no right to read the library. What random, threading and
# logging want to do after a fork is left out: there is one thread, and equal random numbers do no harm.
PRELOAD = [
    "builtins", "collections", "copy", "ctypes", "datetime", "decimal", "enum", "fractions", "functools",
    "gc", "heapq", "importlib", "itertools", "json", "marshal", "math", "numbers", "operator", "os", "re",
    "select", "signal", "string", "struct", "sys", "time", "types", "typing"]
RARER = [
    "array", "bisect", "calendar", "cmath", "concurrent.futures.thread", "dataclasses", "hashlib", "logging",
    "queue", "random", "resource", "socket", "statistics", "tempfile", "textwrap", "threading", "traceback"]
NO_HOOKS = "import os; os.register_at_fork = lambda **_: None"
MAX_SOURCE = 1_000_000  # characters
FILTERED = ("x86_64", "aarch64")  # where `system_calls` knows their numbers
LINUX_ONLY = "the sandbox for generated code works on Linux only"
HELPERS = itertools.count()
REMAINS = """No namespaces here ({}). Candidates still run under limits of time, memory, file size, open
files and processes, without signals, tracing and sockets, and as a user of their own if you are root; but
they see the names and sizes of this machine's files, and can fill its temporary folder for as long as
they may run."""
NO_LANDLOCK = "\nThis kernel has no Landlock either: what {} may read and write, they may read and write."
NO_LIBRARY = "\n{} is closed to them: right answers that import its rarer modules will count as wrong."


# The functions from here to `system_calls` run in the helper, which gets their source: they may use nothing
# of this file but each other and the modules of PRELOAD.


@functools.cache
def plain_types():
    """name: (type, its parts, the type from its parts); and the builtin types by name."""
    views = [type(view) for view in ({}.keys(), {}.values(), {}.items())]
    table = {
        "int": (int, hex, lambda text: int(text, 16)),  # only those too long for JSON
        "complex": (complex, lambda x: [x.real, x.imag], lambda parts: complex(*parts)),
        "bytes": (bytes, bytes.hex, bytes.fromhex),
        "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
        "tuple": (tuple, lambda x: [*tuple.__iter__(x)], tuple),
        "set": (set, lambda x: [*set.__iter__(x)], set),
        "frozenset": (frozenset, lambda x: [*frozenset.__iter__(x)], frozenset),
        "dict": (dict, lambda x: [[*item] for item in x.items()], dict),
        "deque": (collections.deque, list, collections.deque),
        "range": (range, lambda x: [x.start, x.stop, x.step], lambda parts: range(*parts)),
        "keys": (views[0], list, lambda parts: dict.fromkeys(parts).keys()),
        "values": (views[1], list, lambda parts: dict(enumerate(parts)).values()),
        "items": (views[2], lambda x: [[*item] for item in x], lambda parts: dict(parts).items()),
        "Decimal": (decimal.Decimal, str, decimal.Decimal),
        "Fraction": (fractions.Fraction, lambda x: [x.numerator, x.denominator],
                     lambda parts: fractions.Fraction(*parts)),
        "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
        "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
        "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
        "timedelta": (datetime.timedelta, lambda x: [x.days, x.seconds, x.microseconds],
                      lambda parts: datetime.timedelta(*parts)),
    }
    return table, {name: x for name, x in vars(builtins).items() if isinstance(x, type) and name[0] != "_"}


def codec(other, thing):
    """Plain values to JSON and back; `other` numbers what is not plain, `thing` looks the number up."""
    table, types_ = plain_types()
    kinds = {kind: (name, parts) for name, (kind, parts, _) in table.items()}
    load = {name: build for name, (_, _, build) in table.items()}
    load |= {"type": types_.__getitem__, "other": thing}

    def pack(x):
        """An instance of a subclass becomes its base's value: an `__eq__` of its own stays behind."""
        if x is None or isinstance(x, (bool, float, str)) or isinstance(x, int) and int.bit_length(x) < 64:
            return x
        if isinstance(x, list):
            return [pack(y) for y in list.__iter__(x)]
        for kind in type(x).__mro__:
            if kind in kinds:
                name, parts = kinds[kind]
                return {name: pack(parts(x))}
        if isinstance(x, type) and types_.get(x.__name__) is x:
            return {"type": x.__name__}
        if type(x).__module__ == "numpy" and getattr(x, "shape", None) == ():
            return pack(x.item())
        return {"other": other(x)}

    def unpack(tagged):
        (name, value), = tagged.items()
        return load[name](value)

    decode = json.JSONDecoder(object_hook=unpack).decode
    return lambda x: json.dumps(pack(x)).encode() + b"\n", lambda line: decode(line.decode())


def receive(file):
    """A line, from a descriptor at which no other follows unasked; a part of it at its end or if too long."""
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < 1 << 24 and (part := os.read(file, 1 << 16)):
        line += part
    return line


@functools.cache
def libc():
    return ctypes.CDLL(None, use_errno=True)


def c_function(name, *args):
    """A call of a C function, to be made later; its failure is an OSError."""
    function, args = libc()[name], [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]

    def call():
        result = function(*args)
        if result < 0:
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
        return result
    return call


def c_call(name, *args):
    return c_function(name, *args)()


def limits(**wanted):
    """Calls that set these limits, or those that are there if they are lower."""
    import resource  # not on every system that may import this file
    for name, limit in wanted.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard < 0 else min(limit, hard)
        yield functools.partial(resource.setrlimit, kind, (limit, limit))


def isolate(conf):
    """Become PID 1 in new namespaces with only Python's and the C library's files, read-only, and /box."""
    uid, gid, root = os.getuid(), os.getgid(), conf["folder"]
    user = 0x10000000 if uid else 0  # CLONE_NEWUSER: root can change the candidate's user id instead
    c_call("unshare", user | 0x20000 | 0x20000000 | 0x40000000)  # CLONE_NEWNS, NEWPID, NEWNET (no loopback)
    if user:
        for name, text in ("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    child = os.fork()  # the namespace's PID 1: all in there die with it
    if child:
        os.close(0)
        os.waitpid(child, 0)
        os._exit(0)
    c_call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    c_call("mount", b"none", b"/", None, 0x4000 | 0x80000, None)  # MS_REC, MS_SLAVE: unseen by the host
    c_call("mount", b"tmpfs", root.encode(), b"tmpfs", 6, b"size=1m,mode=755")  # MS_NOSUID, MS_NODEV
    seen = []
    for path in filter(os.path.lexists, conf["see"]):
        if any(f"{path}/".startswith(f"{above}/") for above in seen):
            continue
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
            continue
        os.mkdir(root + path) if os.path.isdir(path) else open(root + path, "w").close()
        c_call("mount", path.encode(), (root + path).encode(), None, 0x1000 | 0x4000, None)  # MS_BIND, MS_REC
        seen.append(path)
    os.mkdir(f"{root}/box")
    pids = os.open("/proc/self/ns/pid", os.O_RDONLY)
    with open("/proc/self/mountinfo", "rb") as file:  # where a space in a path is \040
        mounts = [line.split()[4].decode("unicode_escape").encode("latin-1") for line in file]
    for path in mounts:
        if (path + b"/").startswith(root.encode() + b"/"):
            kept = os.statvfs(path).f_flag & 0b1100  # MS_NODEV, MS_NOEXEC
            c_call("mount", None, path, None, kept | 0x1023, None)  # MS_BIND, REMOUNT, NOSUID, RDONLY
    os.chroot(root)  # in which the kernel refuses new user namespaces
    os.chdir("/")
    return pids


def helper_main(conf):
    """The helper: a judge and a candidate for each job that comes in on descriptor 0, and the verdict out
    there, 1 or 0."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number in 3, 4, 5:  # where the two will have their pipes
        os.dup2(1, number)
    sys.path += conf["packages"]
    os.environ.clear()
    os.putenv("OPENBLAS_NUM_THREADS", "1")  # (not in os.environ) else NumPy, if any, starts threads
    try:
        os.sched_setaffinity(0, [conf["cpu"]])  # its forks share memory: another CPU is slow to get at it
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if memory gets short, it is these processes that go
        pids = isolate(conf) if conf["namespaces"] else None
    except OSError as error:
        os.write(0, f"{error}\n".encode())
        os._exit(1)
    for name in [] if pids else conf["modules"]:
        importlib.import_module(name)
    c_call("prctl", 36, 1)  # PR_SET_CHILD_SUBREAPER: orphans come to this process
    c_call("prctl", 4, 0)  # PR_SET_DUMPABLE: no tracing of the helper and its judges by others of this user
    c_call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    for limit in limits(AS=conf["memory_mb"] << 20, FSIZE=16 << 20, NOFILE=64, CORE=0):
        limit()
    rehearse(conf)
    judge, candidate = judging(conf), confining(conf)
    renew = pids and [
        c_function("mount", b"tmpfs", b"/box", b"tmpfs", 6, b"size=16m,nr_inodes=1k,mode=777"),
        c_function("setns", pids, 0x20000000),
        c_function("unshare", 0x20000000 | 0x08000000)]  # CLONE_NEWPID, CLONE_NEWIPC
    unmount = c_function("umount2", b"/box", 2)  # MNT_DETACH
    gc.collect()
    gc.freeze()
    os.write(0, b"\n")
    while os.read(0, 1):  # this byte says that a job follows, which the judge will read
        box = "/box" if pids else f"{conf['folder']}/{os.getpid()}"
        if pids:
            for call in renew:
                call()
        else:
            os.mkdir(box, 0o700)
        requests, answers, verdict = os.pipe(), os.pipe(), os.pipe()
        judge_id = fork([requests[1], answers[0], verdict[1]], judge_main, conf, judge)
        candidate_id = fork([answers[1], requests[0]], candidate, box)
        for file in *requests, *answers, verdict[1]:
            os.close(file)
        poll = select.poll()
        poll.register(verdict[0], select.POLLIN)
        poll.register(0, 0)  # the trainer is gone
        events = dict(poll.poll(conf["wall_seconds"] * 1000))
        passed = verdict[0] in events and os.read(verdict[0], 4) == b"pass"
        os.close(verdict[0])
        for child in candidate_id, judge_id:  # PID 1 of its namespace: gone when the last one in it is
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if not pids:
            sweep(conf)
            os.waitpid(os.posix_spawnp("rm", ["rm", "-rf", box], {"PATH": os.defpath}), 0)
        if select.select([0], [], [], 0)[0]:
            os._exit(1)  # the job is still in the socket: better a new helper
        os.write(0, b"1" if passed else b"0")
        if pids:
            unmount()


def fork(files, part, *args):
    """Call a part in a child that has these descriptors as 3, 4, ... and none above them."""
    child = os.fork()
    if child == 0:
        try:
            for number, file in enumerate(files, 3):
                os.dup2(file, number)
            os.closerange(3 + len(files), 1 << 16)
            part(*args)
        finally:
            os._exit(0)
    return child


def rehearse(conf):
    """Play both parts here, so that what Python sets up when code first runs is there before the forks."""
    def judge():
        part = judging(conf)
        for _ in range(20):  # until Python has specialized the code
            part(conf["job"].encode())

    for judges in True, False:
        requests, answers = os.pipe(), os.pipe()
        parts = [(judge, requests[1], answers[0]), (serving(), answers[1], requests[0])]
        (here, *ours), (there, *theirs) = parts if judges else parts[::-1]
        child = fork(theirs, there)
        for number, file in enumerate(ours, 3):
            os.dup2(file, number)
        for file in *requests, *answers:
            os.close(file)
        here()
        for number in 3, 4:  # at which the child ends
            os.dup2(1, number)
        os.waitpid(child, 0)


def sweep(conf):
    """Without a PID namespace: kill all of the candidate's user, if it had a user of its own."""
    if os.getuid() == 0 and os.fork() == 0:
        try:
            os.setresuid(conf["uid"], conf["uid"], conf["uid"])
            if os.getresuid() == (conf["uid"],) * 3:
                os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass


def judge_main(conf, judge):
    """The judge: reads the job, runs the tests."""
    if not conf["namespaces"]:
        c_call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    judge(receive(0))
    os.write(5, b"pass")


def judging(conf):
    """Prepare `judge(job)`, which runs the tests, and raises or ends this process where they fail."""
    handles, numbers = {}, {}

    def ask(what, /, *args, **kwargs):
        """One request of the candidate: its result, or its exception raised here."""
        try:
            os.write(3, dump([what, kwargs, *args]))
            status, value, after = load(receive(4))
            if status == "raise":
                kind = getattr(builtins, value[0])
                assert issubclass(kind, Exception)
                value = kind.__new__(kind, str(value[1]))
            for old, new in zip(args, after or ()):  # the call changed its arguments: so do we
                if type(old) is type(new) is list:
                    old[:] = new
                elif type(old) is type(new) and type(old) in (dict, set):
                    old.clear()
                    old.update(new)
        except BaseException:  # noqa: BLE001
            os._exit(1)  # rather than an exception, which the tests could catch
        if status == "raise":
            raise value
        return value

    # Something of the candidate's that is not plain: used through the candidate, equal only to itself.
    Handle = type("Handle", (), {
        f"__{what}__": lambda *args, _what=what, **kwargs: ask(_what, *args, **kwargs)
        for what in ("call", "getattr", "setattr", "getitem", "iter", "next", "len", "bool", "str",
                     "repr")})

    def handle(number):
        if number not in handles:
            handles[number] = Handle()
            numbers[handles[number]] = number
        return handles[number]

    dump, load = codec(numbers.__getitem__, handle)

    def judge(job):
        code, own, others, program = marshal.loads(bytes.fromhex(job.decode()))
        found, modules = ask("exec", code, own + others)
        # Builtins are the tests' own, unless they use nothing else of the candidate's (MBPP 126 tests `sum`).
        for wanted in own, others:
            space = {name: found[name] for name in wanted if name in found}
            if space:
                break
        for name in set(space) & set(modules):
            if modules[name] in conf["modules"]:  # which candidate and tests share
                space[name] = importlib.import_module(modules[name])
        exec(program, space)  # noqa: S102 - the tests are the data set's

    return judge


def confining(conf):
    """Prepare `candidate(box)`, which gives up all rights, runs its code and answers the judge's requests."""
    root, namespaces, uid, serve = os.getuid() == 0, conf["namespaces"], conf["uid"], serving()
    # NPROC counts all of the user's processes and threads: this one's alone if it has a user of its own.
    threads = conf["threads"] if root or namespaces else 0
    own_limits = [*limits(CPU=conf["cpu_seconds"], NPROC=threads)]
    locks = [c_function("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))]  # no capabilities
    if rules := system_calls():
        program = struct.pack("@HP", len(rules) // 8, ctypes.cast(rules, ctypes.c_void_p).value)
        locks.append(c_function("prctl", 22, 2, program))  # PR_SET_SECCOMP

    def candidate(box):
        os.setsid()
        output = os.memfd_create("output")  # no longer than a file may be: then print fails
        for file, number in (1, 0), (output, 1), (output, 2):  # 1 was /dev/null
            os.dup2(file, number)
        os.chdir(box)
        for limit in own_limits:
            limit()
        if root:
            if not namespaces:
                os.chown(box, uid, uid)
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        if not namespaces:
            c_call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which a change of user undoes
            if has_landlock():
                landlock(conf["see"])
        os.closerange(5, 1 << 16)
        for lock in locks:
            lock()
        serve()

    return candidate


def serving():
    """Prepare `serve()`, which answers the judge's requests."""
    things, numbers, module = [], {}, types.ModuleType("candidate")  # not __main__
    space = vars(module)

    def number(x):
        if id(x) not in numbers:
            numbers[id(x)] = len(things)
            things.append(x)
        return numbers[id(x)]

    def execute(code, wanted):
        exec(compile(code, "<candidate>", "exec", dont_inherit=True), space)  # noqa: S102 - the purpose
        found = {name: space[name] for name in wanted if name in space}
        return found, {name: x.__name__ for name, x in found.items() if isinstance(x, types.ModuleType)}

    dump, load = codec(number, things.__getitem__)
    answer = {
        "exec": execute, "call": lambda f, /, *args, **kwargs: f(*args, **kwargs),
        "getattr": getattr, "setattr": setattr, "getitem": operator.getitem, "iter": iter, "next": next,
        "len": len, "bool": bool, "str": str, "repr": repr}

    def serve():
        sys.modules["candidate"] = module
        while line := receive(4):
            what, kwargs, *args = load(line)
            try:
                before = dump(args) if what == "call" else None
                value = answer[what](*args, **kwargs)
                reply = dump(["return", value, args if before and dump(args) != before else None])
            except Exception as error:  # noqa: BLE001
                kind = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
                reply = dump(["raise", [kind.__name__, str(error)], None])
            os.write(3, reply)

    return serve


def has_landlock():
    return libc().syscall(444, None, 0, 1) > 0


def landlock(see):
    """Open files below `see` only to read, and in the box, '.'; nowhere else (Linux 5.13, if switched on)."""
    every = (1 << 13) - 1  # right of the first version: execute 1, write 2, read 4, list 8, make, remove, ...
    ruleset = c_call("syscall", 444, struct.pack("Q", every), 8, 0)
    for path in [*filter(os.path.exists, see), "."]:
        rights = every if path == "." else 0b1101 if os.path.isdir(path) else 0b0111
        c_call("syscall", 445, ruleset, 1, struct.pack("=Qi", rights, os.open(path, os.O_PATH)), 0)
    c_call("syscall", 446, ruleset, 0)


@functools.cache
def system_calls():
    """The filter of system calls, or None where it knows no numbers. It refuses new processes (not threads),
    signals, tracing, sockets but for pairs, limits and priorities, new namespaces, memory that outlives its
    process, and changes to files that Landlock overlooks."""
    # call=its number on x86-64/on ARM64 (999: it has none)
    table = """
        fork=57/999 vfork=58/999 kill=62/129 tkill=200/130 tgkill=234/131 rt_sigqueueinfo=129/138
        rt_tgsigqueueinfo=297/240 pidfd_send_signal=424/424 ptrace=101/117 process_vm_readv=310/270
        process_vm_writev=311/271 prlimit64=302/261 setpriority=141/140 sched_setaffinity=203/122
        sched_setscheduler=144/119 sched_setparam=142/118 sched_setattr=314/274 ioprio_set=251/30
        socket=41/198 unshare=272/97 setns=308/268 shmget=29/194 semget=64/190 msgget=68/186
        mq_open=240/180 add_key=248/217 request_key=249/218 keyctl=250/219 bpf=321/280
        perf_event_open=298/241 userfaultfd=323/282 io_uring_setup=425/425 truncate=76/45
        chmod=90/999 fchmodat=268/53 fchmodat2=452/452 chown=92/999 lchown=94/999 fchownat=260/54
        utime=132/999 utimes=235/999 futimesat=261/999 utimensat=280/88 setxattr=188/5
        lsetxattr=189/6 removexattr=197/14 lremovexattr=198/15"""
    machines = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}
    if os.uname().machine not in machines:
        return None
    column, machine, clone = machines[os.uname().machine]
    # Instructions: (which, how many to skip if so, if not, value). Refusal is EPERM, but for clone3, whose
    # flags cannot be seen: ENOSYS, at which the C library takes clone.
    load, equal, least, bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    refuse, allow = (give, 0, 0, 0x50001), (give, 0, 0, 0x7FFF0000)
    rules = [(load, 0, 0, 4), (equal, 1, 0, machine), refuse, (load, 0, 0, 0), (least, 0, 1, 1 << 30), refuse]
    rules += [(equal, 0, 1, 435), (give, 0, 0, 0x50000 | 38)]
    rules += [(equal, 0, 4, clone), (load, 0, 0, 16), (bit, 1, 0, 0x10000), refuse, allow]  # CLONE_THREAD

    def search(numbers):
        if len(numbers) < 4:
            return [rule for number in numbers for rule in ((equal, 0, 1, number), refuse)] + [allow]
        middle = len(numbers) // 2
        low, high = search(numbers[:middle]), search(numbers[middle:])
        return [(least, len(low), 0, numbers[middle]), *low, *high]

    rules += search(sorted(int(numbers[column]) for numbers in re.findall(r"=(\d+)/(\d+)", table)))
    return b"".join(struct.pack("HBBI", *rule) for rule in rules)


HELPER = "\n".join([NO_HOOKS, f"import {', '.join(PRELOAD)}", *map(inspect.getsource, (
    plain_types, codec, receive, libc, c_function, c_call, limits, isolate, helper_main, fork, rehearse,
    sweep, judge_main, judging, confining, serving, has_landlock, landlock, system_calls)),
    "helper_main(json.loads(sys.argv.pop()))"])


class Sandbox:
    """Runs candidates against tests: `with Sandbox(workers=8) as sandbox: verdicts = sandbox.run(pairs)`.

    workers: candidates at a time (0: the CPUs of this process); cpu_seconds: what a candidate may take;
    wall_seconds: what it and its tests may take; memory_mb: its address space; namespaces: False does without
    them, as where the kernel refuses them, which is said in a warning. Raises InputError where it cannot
    start. """

    def __init__(self, workers: int = 0, cpu_seconds: float = 12, wall_seconds: float = 30,
                 memory_mb: int = 1024, namespaces: bool = True):
        require(sys.platform == "linux", LINUX_ONLY)
        paths = [sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
        see = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", f"{sys.base_prefix}/lib", *paths]
        self.folder, self.helpers, self.free = tempfile.mkdtemp(prefix="sandbox-"), [], Queue()
        os.chmod(self.folder, 0o711)
        self.conf = {
            "cpu_seconds": math.ceil(cpu_seconds), "wall_seconds": wall_seconds, "memory_mb": memory_mb,
            "threads": 32 if os.uname().machine in FILTERED else 1, "namespaces": namespaces,
            "folder": self.folder, "modules": PRELOAD + RARER, "packages": paths[2:], "see": see,
            "job": make_job("def f(x): return x", "assert f(1) == 1").decode()}
        try:
            self.start(workers or len(os.sched_getaffinity(0)))
        except BaseException:
            self.close()
            raise

    def start(self, workers: int) -> None:
        refusal, cpus = "switched off", sorted(os.sched_getaffinity(0))
        for slot in range(workers):
            self.helpers.append(Helper(self.conf, cpus[(os.getpid() + slot) % len(cpus)]))
            error = self.helpers[slot].start()
            if error and slot == 0 and self.conf["namespaces"]:
                self.conf["namespaces"], refusal = False, error
                error = self.helpers[0].start()
            require(not error, f"the sandbox cannot start: {error}")
            self.free.put(self.helpers[slot])
        namespaces, filtered = self.conf["namespaces"], os.uname().machine in FILTERED
        require(namespaces or filtered, f"the sandbox needs namespaces on this machine ({refusal})")
        works, reads = self.run([("def one(): return 1", "assert one() == 1"), ("import colorsys", "")])
        require(works, "the sandbox starts, but runs no candidate: may root change its user id?")
        if not namespaces:
            files = "" if has_landlock() else NO_LANDLOCK.format("this user" if os.getuid() else "anybody")
            modules = "" if reads else NO_LIBRARY.format(sysconfig.get_path("stdlib"))
            warnings.warn(REMAINS.format(refusal) + files + modules, stacklevel=3)

    def __enter__(self) -> "Sandbox":  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for helper in self.helpers:
            helper.stop()
        subprocess.run(["rm", "-rf", self.folder], check=False)

    def run(self, pairs: Iterable[tuple[str, str]]) -> list[bool]:
        """For each (code, tests): did `code` run, and then `tests` to its very end, without an exception?"""
        pairs = [*pairs]
        verdicts, todo = [False] * len(pairs), enumerate(pairs)

        def work(_):
            helper = self.free.get()
            try:
                for number, (code, tests) in todo:
                    verdicts[number] = len(code) <= MAX_SOURCE and helper.verdict(code, tests)
            finally:
                self.free.put(helper)

        with warnings.catch_warnings(), ThreadPoolExecutor(len(self.helpers)) as pool:
            for kind in SyntaxWarning, DeprecationWarning:  # MBPP has invalid escapes
                warnings.simplefilter("ignore", kind)
            try:
                list(pool.map(work, self.helpers))
            finally:
                list(todo)  # nothing is left to do after an error or Ctrl-C
        return verdicts


@functools.lru_cache(maxsize=4096)
def prepare(tests: str) -> tuple[list[str], list[str], types.CodeType] | None:
    """The names that the tests use, those of builtins apart, and the tests compiled."""
    try:
        program = compile(tests, "<tests>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    names, todo = set(), [program]
    while todo:
        part = todo.pop()
        names.update(name for name in part.co_names if not name.startswith("__"))
        todo += [const for const in part.co_consts if isinstance(const, types.CodeType)]
    others = {name for name in names if hasattr(builtins, name)}
    return [*names - others], [*others], program


def make_job(code: str, tests: str) -> bytes | None:
    """What the judge reads. It has the tests from here, so it may trust marshal."""
    prepared = prepare(tests)
    return prepared and marshal.dumps((code, *prepared)).hex().encode() + b"\n"


class Helper:
    """A helper process and the socket to it."""

    def __init__(self, conf: dict[str, Any], cpu: int):
        with open("/proc/self/uid_map") as file:  # in a container there may be few users
            plenty = sum(int(line.split()[2]) for line in file) > 1 << 31
        number = os.getpid() * 256 + next(HELPERS) % 256
        self.uid = (1 << 30) + number if plenty else 20000 + number % 40000  # nobody's, for root's candidates
        self.conf, self.cpu, self.process = conf, cpu, None

    def start(self) -> str:
        """Start it; returns what went wrong, or an empty string."""
        self.socket, theirs = socket.socketpair()
        kept = {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}
        conf = json.dumps(self.conf | {"uid": self.uid, "cpu": self.cpu})
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", HELPER, conf], stdin=theirs, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, env=kept, cwd="/", start_new_session=True)
        self.socket.settimeout(60)
        try:
            line = self.socket.recv(1000).decode()
        except OSError as error:
            line = str(error)
        if line != "\n":
            self.stop()
        return (line or "its helper process ended at once").strip()

    def stop(self) -> None:
        """Close the socket, at which the helper kills what it runs and ends."""
        if self.process:
            self.socket.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def verdict(self, code: str, tests: str) -> bool:
        """The judge's verdict; from a new helper if this one does not give it."""
        if not (job := make_job(code, tests)):
            return False  # the tests are not Python
        for _ in range(2):
            try:
                self.socket.settimeout(self.conf["wall_seconds"] + 10)
                self.socket.sendall(b"j" + job)
                answer = self.socket.recv(1)
            except OSError:
                answer = b""
            if answer:
                return answer == b"1"
            self.stop()
            if error := self.start():
                raise InputError(f"the sandbox cannot start again: {error}")
        warnings.warn("A candidate was given up as wrong: two helpers died of it.", stacklevel=2)
        return False


# ------------------------------------------------------------------------------------------------------------
# The demo: a model of 295,200 weights, pre-trained on the spot on tasks such as `double, lower 3` and the
# function for it, from a corpus that is often wrong about what a word means. So it can, but often does not:
# what GRPO sharpens, here with nothing but the verdicts of the sandbox.

WORDS = {  # the operation, and how often the corpus has the opposite one (for multiplying: addition)
    "add": ("+", 0.2), "raise": ("+", 0.1), "gain": ("+", 0.3), "lift": ("+", 0.25),
    "take": ("-", 0.1), "drop": ("-", 0.15), "lower": ("-", 0.62), "reduce": ("-", 0.63),
    "double": ("*2", 0.2), "triple": ("*3", 0.3),
}


def exercise(random: random.Random, long: bool, noisy: bool) -> tuple[str, str]:
    """A task such as `double, lower 3` and its function f(x). long: three operations, and f has a second
    argument y, which the second one uses: `double, lower y, add 4`. noisy: as the corpus has it."""
    words = random.choices(list(WORDS), k=2)
    numbers = [str(random.randint(1, 9)) for _ in words]
    if long:
        words.insert(1, random.choice([word for word in WORDS if len(WORDS[word][0]) == 1]))
        numbers.insert(1, "y")
    parts, lines = [], []
    for word, number in zip(words, numbers, strict=True):
        (sign, *factor), wrong = WORDS[word]
        parts.append(word if factor else f"{word} {number}")
        if noisy and random.random() < wrong:
            sign = {"+": "-", "-": "+", "*": "+"}[sign]
        lines.append(f"x = x {sign} {factor[0] if factor else number}")
    lines[-1] = lines[-1].replace("x =", "return", 1)
    head = "def f(x, y):" if long else "def f(x):"
    return ", ".join(parts), "\n    ".join([head, *lines])


def problem_rows(random: random.Random, ids: range, long: bool, taken: set[str]) -> Iterable[dict[str, Any]]:
    """Rows with MBPP's fields, of tasks that are not in `taken`, which grows by them."""
    for task_id in ids:
        while (task := exercise(random, long, noisy=False))[0] in taken:
            pass
        text, code = task
        taken.add(text)
        space: dict[str, Any] = {}
        exec(code, space)  # noqa: S102 - our own lines
        calls = [(x, x + 3) if long else (x,) for x in random.sample(range(-9, 20), 3)]
        tests = [f"assert f({', '.join(map(str, args))}) == {space['f'](*args)}" for args in calls]
        yield {"task_id": task_id, "text": text, "code": code, "test_setup_code": "", "test_list": tests}


def make_demo(folder: Path, boosting: BoostConfig, steps: int = 400, batch_size: int = 128) -> None:
    """Pre-train the demo's base model and write it, its tokenizer, train.jsonl (374 tasks), test.jsonl (500)
    and other_shapes.jsonl (500 of a shape that the corpus has and the boosting never sees) to `folder`.
    Raises as `check_fit`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
    # AutoTokenizer opens whatever lies beside a Qwen2 model as byte-level BPE, so that is what this is:
    # characters (Ġ is the space), no merges, and the words as added tokens.
    characters = {c: i for i, c in enumerate(["<pad>", "<end>", *"0123456789+-*=,():xyfĠĊ"])}
    tokenizer = Qwen2Tokenizer(vocab=characters, merges=[], eos_token="<end>", pad_token="<pad>",
                               unk_token="<pad>")
    tokenizer.add_tokens(["def", "return", "\n    ", *WORDS])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
    with torch.random.fork_rng():
        torch.manual_seed(boosting.seed)
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=240, tie_word_embeddings=True, pad_token_id=0,
            eos_token_id=1, max_position_embeddings=128, initializer_range=0.1))
    check_fit(find_targets(model), boosting)
    say("Pre-training the demo's base model: about a minute.")
    numbers = random.Random(boosting.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.05)
    for _ in progress(range(steps), "pre-training"):
        rows = [exercise(numbers, long=numbers.random() < 0.4, noisy=True) for _ in range(batch_size)]
        prompts = tokenizer(chat(tokenizer, [text for text, _ in rows]))["input_ids"]
        answers = [ids + [1] for ids in tokenizer([code for _, code in rows])["input_ids"]]
        trees = [token_trees(prompt, [answer])[0] for prompt, answer in zip(prompts, answers)]
        logprobs = completion_logprobs(model, trees)
        optimizer.zero_grad()
        (-logprobs.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    def fill(path: Path) -> None:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        taken: set[str] = set()
        for name, ids in [("train", TRAIN_IDS), ("test", TEST_IDS), ("other_shapes", TEST_IDS)]:
            rows = problem_rows(numbers, ids, name == "other_shapes", taken)
            (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    replace_folder(folder, fill)


if __name__ == "__main__":
    run(main)
