"""BoostLoRA on code: Qwen2.5-3B-Instruct learns MBPP by GRPO, tested on MBPP and on HumanEval.

    python train_code.py --demo                                     a toy: 2 CPU cores, no download
    python train_code.py                                            a quick run on one GPU: 374 tasks
    python train_code.py --rounds 1 --replay -1 --epochs 5          single-shot TinyLoRA on all examples
    python train_code.py --rounds 20 --test_every 1                 the paper's run

HumanEval is never trained on. The reward is 1 if the code passes every test of its task, else 0. What the
model writes runs in the sandbox of this file (Linux alone), apart from the tests: no code judges itself."""

# isort: off
import builtins, collections, ctypes, datetime, decimal, fractions, functools, importlib, inspect, json
import math, os, random, re, resource, signal, struct, subprocess, symtable, sys, sysconfig, tempfile
import textwrap, types, warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from boostlora import (
    BoostConfig, GRPOConfig, InputError, RunConfig, Settings, TextTask, check_fit, claim, finish, parse,
    load_language_model, on_first_process, pretrain, read_rows, replace, require, run, sampled, say, setting)

MBPP, HUMANEVAL = "google-research-datasets/mbpp:full", "openai/openai_humaneval"
TRAIN_IDS, TEST_IDS = range(601, 975), range(11, 511)  # MBPP's task_ids
ASK_MBPP = ("You are an expert Python programmer, and here is your task: {}\n\nYour code should pass these "
            "tests:\n\n{}\n\nPut the whole code in one ```python block.")
ASK_HUMANEVAL = ("You are an expert Python programmer. Complete this function:\n\n```python\n{}\n```\n\n"
                 "Put the whole function, with its imports, in one ```python block.")
DEFAULTS = {"model": "Qwen/Qwen2.5-3B-Instruct", "out": "runs/code"}
DEMO = {"out": "runs/code-demo", "rounds": 8, "rank": 4, "u": 16, "groups": 0, "epochs": 2.0, "prompts": 32,
        "max_new_tokens": 48, "micro_batch_tokens": 512}

@dataclass
class SandboxConfig(Settings):
    """What a candidate, the code of one completion, may take; and, apart, the judge of it."""
    workers: int = setting(0, "candidates that run at a time; 0: one for each CPU of this process")
    cpu_seconds: float = setting(12.0, "CPU time of a candidate, rounded up: MBPP's slowest takes 4.7")
    wall_seconds: float = setting(30.0, "time by the clock of a candidate and its tests together")
    memory_mb: int = setting(1024, "address space of a candidate, in MiB")
    least: ClassVar = {"cpu_seconds": 1e-3, "wall_seconds": 1e-3, "memory_mb": 128}

# The task: problems, prompt, program, reward ----------------------------------------------------------------

def load_problems(path: str, hub: str = "", split: str = "") -> list[dict[str, Any]]:
    """Problems of MBPP or HumanEval, from a JSONL file or, if path is empty, the Hub: task_id, ask (what the
    model is asked), tests (what must run to its end after the code); of MBPP text; of HumanEval prompt, head
    (its imports and helpers) and entry_point. Raises InputError for a row of neither."""
    problems = []
    warnings.filterwarnings("ignore", module="<the tests>")  # MBPP has invalid escapes
    for number, row in enumerate(read_rows(path, ["task_id"], hub, split), 1):
        try:
            problem = humaneval(row) if "entry_point" in row else mbpp(row)
            prepare(problem["tests"])
        except (SyntaxError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path or hub}, row {number}: not MBPP's or HumanEval's ({error!r})") from None
        problems.append({"task_id": row["task_id"], **problem})
    return problems

def mbpp(row: dict[str, Any]) -> dict[str, Any]:
    text, tests = row["text"], row["test_list"]
    require(text and tests and isinstance(tests, list), "'text' or 'test_list' is empty")
    return {"text": text, "ask": ASK_MBPP.format(text.strip(), "\n".join(tests)),
            "tests": "\n".join([row["test_setup_code"], *tests])}

def humaneval(row: dict[str, Any]) -> dict[str, Any]:
    prompt, name = row["prompt"], row["entry_point"]
    start = re.search(rf"^def {re.escape(name)}\(", prompt, re.MULTILINE)
    require(start, f"'prompt' does not define the entry_point '{name}'")
    require("def check(" in row["test"], "'test' does not define check")
    head = prompt[:start.start()]  # some tests call its helpers: those of the tests, not the candidate's
    return {"ask": ASK_HUMANEVAL.format(prompt.strip()), "prompt": prompt, "head": head, "entry_point": name,
            "tests": f"{head}\n{row['test']}\ncheck({name})"}

def load_data(args: RunConfig) -> tuple[list, dict[str, list]]:
    """The training problems and the test sets. MBPP is split by task_id, so that no file can mix the two."""
    rows = load_problems(args.train_file, MBPP, "train")
    train, held_out = ([p for p in rows if p["task_id"] in ids] for ids in (TRAIN_IDS, TEST_IDS))
    require(train, f"{args.train_file}: no row has one of MBPP's training task_ids, 601 to 974")
    tests = {"mbpp": held_out} if held_out else {}
    test = f", {len(held_out)} test (11 to 510)" if held_out else ""
    say(f"of {len(rows)} tasks {len(train)} train (task_ids 601 to 974){test}")
    sources = [(Path(f).name.split(".")[0].lower(), f, "") for f in args.test_file.split(",") if f]
    standard = [("mbpp", "", MBPP)] * (not held_out) + [("humaneval", "", HUMANEVAL)]
    require(len({name for name, *_ in sources}) == len(sources), "--test_file: two files have one name")
    for name, path, hub in sources or standard:
        rows = load_problems(path, hub, "test")
        tests[name] = [p for p in rows if "entry_point" in p or p["task_id"] in TEST_IDS]
        require(tests[name], f"{path}: no row has one of MBPP's test task_ids, 11 to 510")
    return train, {name: problems[:args.test_limit or None] for name, problems in tests.items()}

def extract_code(completion: str) -> str:
    """The last fenced Python block (which may break off), of those with a `def` if any, or the whole text."""
    blocks = re.findall(r"```[ \t]*(\w*)[^\n`]*\n(.*?)(?:```|\Z)", completion, re.DOTALL)
    tagged = [code for language, code in blocks if language.lower() in ("python", "python3", "py")]
    plain = [code for language, code in blocks if not language]
    found = tagged or plain or [completion]
    return textwrap.dedent(([code for code in found if "def " in code] or found)[-1])

def program(problem: dict[str, Any], completion: str) -> tuple[str, str]:
    """(code, tests) for the sandbox. HumanEval's function may have been repeated, as asked, or continued."""
    code = extract_code(completion)
    if name := problem.get("entry_point"):
        whole = re.search(rf"^(?:def\s+{re.escape(name)}\b|{re.escape(name)}\s*=)", code, re.MULTILINE)
        code = re.sub(r"^from __future__ .*$", "", code, flags=re.MULTILINE)  # it may not follow the head
        code = problem["head"] + code if whole else problem["prompt"] + textwrap.indent(code, "    ")
    return code, problem["tests"]

def main() -> None:
    args, boosting, training, limits = parse((RunConfig, BoostConfig, GRPOConfig, SandboxConfig), __doc__,
                                             DEFAULTS, DEMO)
    settings = {**asdict(args), **asdict(boosting), **asdict(training), **asdict(limits)}
    claim(settings.pop("out"), settings)  # refuses what does not fit before anything slow
    with Sandbox(**asdict(limits)) as sandbox:
        if args.demo:
            base = Path(args.out) / "base"
            on_first_process(lambda: base.exists() or replace(base, lambda new: make_demo(new, boosting)))
            args.model = f"{base}"
            args.train_file, args.test_file = f"{base}/train.jsonl", f"{base}/test.jsonl"
        train, tests = load_data(args)
        model, tokenizer = load_language_model(args, boosting)
        train = sampled(train, args.limit or len(train), boosting.seed, "limit")
        task = TextTask(model, tokenizer, train, tests, training,
                        prompt=lambda problem: problem["text" if args.demo else "ask"],
                        grade=lambda texts, problems: sandbox.run([*map(program, problems, texts)]))
        finish(args, boosting, settings, task, tokenizer)

# The sandbox (Linux, standard library only) -----------------------------------------------------------------
# Each job, (code, tests), has two new processes: trainer -> judge (runs the tests) <-> candidate (the code).
# The judge gives up its rights, forks the candidate, and only then reads the job. What its tests need of the
# candidate, it asks for, and gets as a plain value: JSON, rebuilt as exact builtin types; for what is not
# plain, a `Handle`, which equals no plain value. Its exit status is the verdict, and none can forge it, as
# nothing of the candidate's runs where values are compared. `codec` to `start` are the program of the two.

PASSED, FAILED = 40, 41  # the judge's exit status; any other: it could not start
SYSTEM = "/usr/lib /usr/lib64 /usr/local/lib /usr/share/zoneinfo /lib /lib64 /etc/ld.so.cache /dev/null"
REMAINS = "No file system of its own for the sandbox here ({}): see the README for what Landlock leaves open"
COMMON = """array bisect calendar cmath concurrent.futures.thread copy dataclasses gc hashlib heapq logging
    queue random socket statistics string tempfile textwrap threading time traceback typing"""
MACHINES = {  # column in CALLS, kernel's name, numbers of clone, socketpair, fcntl, ioctl, openat and open
    "x86_64": (0, 0xC000003E, 56, 53, 72, 16, 257, 2), "aarch64": (1, 0xC00000B7, 220, 199, 25, 29, 56, 999)}
CALLS = """
    fork=57/999 vfork=58/999 execve=59/221 execveat=322/281 kill=62/129 tkill=200/130 tgkill=234/131
    rt_sigqueueinfo=129/138 rt_tgsigqueueinfo=297/240 ptrace=101/117 process_vm_readv=310/270
    process_vm_writev=311/271 prctl=157/167 prlimit64=302/261 setpriority=141/140 sched_setaffinity=203/122
    sched_setscheduler=144/119 sched_setparam=142/118 sched_setattr=314/274 ioprio_set=251/30 socket=41/198
    unshare=272/97 setns=308/268 shmget=29/194 shmat=30/196 shmctl=31/195 semget=64/190 semop=65/193
    semctl=66/191 semtimedop=220/192 msgget=68/186 msgsnd=69/189 msgrcv=70/188 msgctl=71/187 mq_open=240/180
    mq_unlink=241/181 memfd_create=319/279 add_key=248/217 request_key=249/218 keyctl=250/219 bpf=321/280
    perf_event_open=298/241 userfaultfd=323/282 truncate=76/45 chmod=90/999 fchmod=91/52 fchmodat=268/53
    chown=92/999 fchown=93/55 lchown=94/999 fchownat=260/54 utime=132/999 utimes=235/999 futimesat=261/999
    utimensat=280/88 setxattr=188/5 lsetxattr=189/6 fsetxattr=190/7 removexattr=197/14 lremovexattr=198/15
    fremovexattr=199/16"""

def codec(number, thing):
    """Plain values to JSON and back; `number` numbers what is not plain, `thing` looks the number up."""
    def of(kind, *fields):
        return lambda x: [getattr(x, field) for field in fields], lambda parts: kind(*parts)
    keys, values, items = type({}.keys()), type({}.values()), type({}.items())
    dates = datetime.date, datetime.time, datetime.datetime
    plain = {  # type: (to what JSON or another of these can say, and from that)
        int: (hex, lambda text: int(text, 16)),  # those too long for JSON
        dict: (lambda x: [*x.items()], dict), keys: (list, lambda x: dict.fromkeys(x).keys()),
        values: (list, lambda x: dict(enumerate(x)).values()), items: (list, lambda x: dict(x).items()),
        range: of(range, "start", "stop", "step"), complex: of(complex, "real", "imag"),
        fractions.Fraction: of(fractions.Fraction, "numerator", "denominator"),
        datetime.timedelta: of(datetime.timedelta, "days", "seconds", "microseconds"),
        decimal.Decimal: (str, decimal.Decimal),
        **{kind: (kind.isoformat, kind.fromisoformat) for kind in dates},
        **{kind: (kind.hex, kind.fromhex) for kind in (bytes, bytearray)},
        **{kind: (list, kind) for kind in (tuple, set, frozenset, collections.deque)}}
    builtin = {name: x for name, x in vars(builtins).items() if isinstance(x, type)}
    load = {kind.__name__: build for kind, (_, build) in plain.items()}
    load |= {"type": builtin.__getitem__, "other": thing}
    def pack(x):
        """An instance of a subclass becomes its base's value: an `__eq__` of its own stays behind."""
        if x is None or isinstance(x, (bool, float, str)) or isinstance(x, int) and int.bit_length(x) < 64:
            return x
        if isinstance(x, list):
            return [pack(y) for y in x]
        for kind in type(x).__mro__:
            if kind in plain:
                return {kind.__name__: pack(plain[kind][0](x))}
        if isinstance(x, type) and builtin.get(x.__name__) is x:
            return {"type": x.__name__}
        if type(x).__module__ == "numpy" and getattr(x, "shape", None) == ():
            return pack(x.item())
        return {"other": number(x)}
    decoder = json.JSONDecoder(object_hook=lambda x: next(load[name](value) for name, value in x.items()))
    return lambda x: json.dumps(pack(x)).encode() + b"\n", decoder.decode

def prepare(tests: str) -> tuple[types.CodeType, set[str], set[str]]:
    """The tests compiled, the names that they have from the candidate, and those that both share if they are
    modules. Builtins and modules are the tests' own, unless they use nothing else (MBPP 126 tests `sum`)."""
    tables = [symtable.symtable(tests, "<the tests>", "exec")]
    for table in tables:
        tables += table.get_children()  # and so theirs
    names = {s.get_name() for table in tables for s in table.get_symbols() if s.is_global()}
    names -= {name for name in names if name.startswith("__")}
    bound = {s.get_name() for s in tables[0].get_symbols() if s.is_assigned() or s.is_imported()}
    builtin, modules = names & {*dir(builtins)}, names & sys.stdlib_module_names
    theirs = names - builtin - modules
    if not theirs - bound:
        theirs |= builtin or modules
    return compile(tests, "<the tests>", "exec"), theirs, modules

def judge(requests, answers, end):
    """Run the tests; it ends with PASSED only at their very end."""
    handles, answers = {}, os.fdopen(answers, encoding="utf-8")
    changeable = list, dict, set, bytearray, collections.deque
    def ask(thing, what, /, *args, **kwargs):
        """One request of the candidate: its result, or its exception raised here."""
        inputs = [thing, *args, *kwargs.values()]
        try:
            os.write(requests, dump([what, [thing, *args], kwargs]))
            status, value, changed = load(answers.readline(1 << 24))
            error = value[0](*value[1]) if status == "raise" else None
            for old, new in zip(inputs, changed or ()):  # the call changed its arguments
                if type(new) in changeable and isinstance(old, type(new)):
                    old.clear()
                    (old.update if isinstance(old, (dict, set)) else old.extend)(new)
        except BaseException:  # noqa: BLE001
            end(FAILED)  # rather than an exception, which the tests could catch
        if status == "raise":
            raise error
        return value
    class Handle:
        def __init__(self, number):
            object.__setattr__(self, "_thing", number)
        def __eq__(self, other):
            return ask(self, "eq", other) if type(other) is Handle else NotImplemented
    for what in "call", "getattr", "setattr", "getitem", "iter", "next", "len", "bool", "str", "repr", "hash":
        setattr(Handle, f"__{what}__", functools.partialmethod(ask, what))
    dump, load = codec(lambda x: x._thing, lambda number: handles.setdefault(number, Handle(number)))
    try:
        code, tests = json.load(sys.stdin)
        program, theirs, modules = prepare(tests)
        found, imported = ask(code, "exec", theirs | modules)
        space = {name: value for name, value in found.items() if name in theirs}
        for name in imported.keys() & (theirs | modules):
            if imported[name] in sys.stdlib_module_names:
                space[name] = importlib.import_module(imported[name])  # never the candidate's object
        exec(program, space)  # noqa: S102 - the tests are the data set's
    except BaseException:  # noqa: BLE001
        end(FAILED)
    end(PASSED)

def candidate(rules):
    """Give up the last rights, run the code and answer the judge's requests: from 3, on 4."""
    things, module = {}, types.ModuleType("candidate")  # not __main__
    def number(x):
        things[id(x)] = x
        return id(x)
    def execute(code, names):
        space = vars(module)
        exec(compile(code, "<candidate>", "exec"), space)  # noqa: S102 - the purpose
        found = {name: space[name] for name in names if name in space}
        return found, {name: x.__name__ for name, x in found.items() if isinstance(x, types.ModuleType)}
    dump, load = codec(number, things.__getitem__)
    does = {**vars(builtins), "exec": execute, "call": lambda f, /, *args, **kwargs: f(*args, **kwargs),
            "getitem": lambda x, key: x[key], "eq": lambda x, other: x == other}
    output = os.memfd_create("output")  # no longer than a file may be: then print fails
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(5, 64)
    rules = ctypes.create_string_buffer(bytes.fromhex(rules))
    c_call("prctl", 22, 2, struct.pack("@HP", len(rules) // 8, ctypes.addressof(rules)))  # PR_SET_SECCOMP
    sys.modules["candidate"] = module
    for line in os.fdopen(3, encoding="utf-8"):
        what, args, kwargs = load(line)
        inputs = [*args, *kwargs.values()]
        try:
            before = dump(inputs)
            value = does[what](*args, **kwargs)
            reply = dump(["return", value, inputs if dump(inputs) != before else None])
        except Exception as error:  # noqa: BLE001
            kind = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
            reply = dump(["raise", [kind, [*error.args]], None])
        os.write(4, reply)

def c_call(name, *args):
    """A call of the C library; its failure is an OSError."""
    args = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = ctypes.CDLL(None, use_errno=True)[name](*args)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result

def isolate(see, root):
    """Leave this process, of all files, those of `see`, read-only, and an empty /box of 16 MB."""
    uid, gid = os.getuid(), os.getgid()
    c_call("unshare", 0x20000 | (0x10000000 if uid else 0))  # CLONE_NEWNS; CLONE_NEWUSER, if not root
    if uid:
        for name, text in ("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    c_call("mount", None, b"/", None, 0x44000, None)  # MS_REC, MS_PRIVATE: unseen by the host
    c_call("mount", b"tmpfs", root.encode(), b"tmpfs", 6, b"size=1m,mode=111")  # MS_NOSUID, MS_NODEV
    os.umask(0o666)  # the folders on the way to what is seen cannot be listed
    for path, place in see.items():
        if os.path.exists(path) and not os.path.exists(root + place):
            os.makedirs(os.path.dirname(root + place), exist_ok=True)
            os.mkdir(root + place) if os.path.isdir(path) else open(root + place, "w").close()
            c_call("mount", path.encode(), (root + place).encode(), None, 0x5000, None)  # MS_BIND, MS_REC
    os.mkdir(f"{root}/box")
    c_call("syscall", 442, -100, root.encode(), 0x8000, struct.pack("4Q", 3, 0, 0, 0), 32)  # all read-only
    c_call("mount", b"tmpfs", f"{root}/box".encode(), b"tmpfs", 6, b"size=16m,nr_inodes=1k,mode=777")
    os.chroot(root)
    os.chdir("/box")
    os.umask(0o022)

def landlock(see, box):
    """Open files of `see` only to read, and in the box; nowhere else (Linux 5.13, if switched on)."""
    every = (1 << 12 + min(c_call("syscall", 444, None, 0, 1), 3)) - 1  # the rights that this version knows
    ruleset = c_call("syscall", 444, struct.pack("Q", every), 8, 0)
    for path in filter(os.path.exists, [*see, box]):
        rights = every if path == box else 0b1100 if os.path.isdir(path) else 0b0110  # list, read, write
        c_call("syscall", 445, ruleset, 1, struct.pack("=Qi", rights, os.open(path, os.O_PATH)), 0)
    c_call("syscall", 446, ruleset, 0)
    os.chdir(box)

def confine(conf):
    """Give up rights: files, user, capabilities, resources."""
    os.environ.clear()
    os.putenv("OPENBLAS_NUM_THREADS", "1")  # (not in os.environ) else NumPy, if any, starts threads
    for name in conf["modules"]:
        importlib.import_module(name)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory gets short, it is these processes that go
    c_call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    (isolate if conf["namespaces"] else landlock)(conf["see"] | conf["packages"], conf["folder"])
    sys.path += conf["packages"].values() if conf["namespaces"] else conf["packages"]
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(*[conf["user"]] * 3)
        os.setresuid(*[conf["user"]] * 3)
    c_call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))  # no capabilities
    for name, value in conf["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    os.closerange(3, 64)  # what Landlock needed

def start(conf):
    """Confine this process, fork the candidate, be the judge. What goes wrong before is said on stderr."""
    confine(conf)
    requests, answers, parent = os.pipe(), os.pipe(), os.getpid()  # 3 and 4, 5 and 6
    child = os.fork()
    c_call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG: when its parent dies; a change of user undoes it
    if os.getppid() != (conf["trainer"] if child else parent):
        os._exit(FAILED)
    os.dup2(1, 2)  # 1 is /dev/null
    if child == 0:
        os.dup2(answers[1], 4)
        return candidate(conf["filter"])
    os.close(requests[0])
    os.close(answers[1])
    def end(status):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os._exit(status)
    signal.signal(signal.SIGALRM, lambda *_: end(FAILED))
    signal.setitimer(signal.ITIMER_REAL, conf["wall_seconds"])
    return judge(requests[1], answers[0], end)

PROGRAM = "\n".join([
    "import builtins, collections, ctypes, datetime, decimal, fractions, functools, importlib, json",
    "import os, resource, signal, struct, symtable, sys, types", f"PASSED, FAILED = {PASSED}, {FAILED}",
    *map(inspect.getsource, (codec, prepare, judge, candidate, c_call, isolate, landlock, confine, start)),
    "start(json.loads(sys.argv[1]))"])

def system_calls() -> bytes:
    """The filter: no new processes (but threads), programs, signals, tracing, sockets (but pairs), limits,
    priorities, namespaces, memory that outlives its process, and changes to files that Landlock overlooks."""
    column, machine, clone, pair, fcntl, ioctl, *opens = MACHINES[os.uname().machine]
    load, equal, least, bit, mask, give = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06  # (which, skip if, not, value)
    refuse, absent, allow = ((give, 0, 0, value) for value in (0x50001, 0x50026, 0x7FFF0000))  # EPERM, ENOSYS
    rules = [(load, 0, 0, 4), (equal, 1, 0, machine), refuse, (load, 0, 0, 0)]
    rules += [(least, 0, 1, 424), absent]  # calls since Linux 5.1: the C library then takes older ones
    rules += [(equal, 0, 4, clone), (load, 0, 0, 16), (bit, 1, 0, 0x10000), refuse, allow]  # CLONE_THREAD
    rules += [(equal, 0, 4, pair), (load, 0, 0, 24), (bit, 0, 1, 2), refuse, allow]  # SOCK_DGRAM: to anyone
    for call, own, group in (fcntl, 8, 15), (ioctl, 0x8901, 0x8902):  # F_SETOWN, SIOCSPGRP: who gets SIGIO
        checks = [(load, 0, 0, 24), (equal, 1, 0, own), (equal, 0, 1, group), refuse, allow]
        rules += [(equal, 0, len(checks), call), *checks]
    for call, at in zip(opens, (32, 24)):  # O_TRUNC (512), not to write: Landlock sees it from Linux 6.2 on
        checks = [(load, 0, 0, at), (mask, 0, 0, 515), (equal, 1, 0, 512), (equal, 0, 1, 515), refuse, allow]
        rules += [(equal, 0, len(checks), call), *checks]
    for numbers in re.findall(r"=(\d+)/(\d+)", CALLS):
        rules += [(equal, 0, 1, int(numbers[column])), refuse]
    return b"".join(struct.pack("HBBI", *rule) for rule in [*rules, allow])

class Sandbox(ThreadPoolExecutor):
    """`with Sandbox(workers=8) as sandbox: verdicts = sandbox.run(pairs)`; the limits are SandboxConfig's.
    namespaces: False does without a file system of its own, as where the kernel refuses one, which is said in
    a warning. Raises InputError where it cannot start."""
    def __init__(self, *limits: float, namespaces: bool = True, **named_limits: float):
        limits, machine = SandboxConfig(*limits, **named_limits), os.uname().machine
        require(sys.platform == "linux" and machine in MACHINES, "the sandbox needs Linux on x86-64 or ARM64")
        super().__init__(limits.workers or len(os.sched_getaffinity(0)))  # a thread for each candidate
        paths = sysconfig.get_paths()
        self.conf = {  # see and packages: path: path in the sandbox
            "see": {path: path for path in [*SYSTEM.split(), f"{sys.base_prefix}/lib", paths["stdlib"]]},
            "packages": {paths["purelib"]: "/packages0", paths["platlib"]: "/packages1"}, "modules": [],
            "namespaces": namespaces, "wall_seconds": limits.wall_seconds, "filter": system_calls().hex(),
            "limits": {"AS": limits.memory_mb << 20, "CPU": math.ceil(limits.cpu_seconds), "CORE": 0,
                       "FSIZE": 16 << 20, "NOFILE": 64, "NPROC": 34}}  # two processes and 32 more threads
        try:
            require(namespaces and self.judge("", ""), "switched off, or an empty program fails in it")
        except InputError as refusal:
            warnings.warn(REMAINS.format(refusal), stacklevel=2)
            self.conf |= {"namespaces": False, "modules": COMMON.split()}
            if os.getuid():
                del self.conf["limits"]["NPROC"]  # of all that this user runs; memory still bounds threads
            require(self.judge("", ""), "an empty program fails: raise --wall_seconds or --memory_mb")

    def run(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """For each (code, tests): did `code` run, and then `tests` to its very end, without an exception?"""
        different = [*dict.fromkeys(pairs)]  # completions of one prompt are often equal
        verdicts = dict(zip(different, self.map(lambda pair: self.judge(*pair), different), strict=True))
        return [verdicts[pair] for pair in pairs]

    def judge(self, code: str, tests: str, again: bool = True) -> bool:
        """The verdict of a new judge; of another one, if it could not start, as where memory is short."""
        folder, user = tempfile.mkdtemp(prefix="sandbox-"), os.getuid()
        if user == 0:
            first, _, count = map(int, Path("/proc/self/uid_map").read_text().split()[-3:])
            require(count > 7, "root is the only user here, so none is powerless: run as another user")
            user = first + count - 2 - os.stat(folder).st_ino % (count // 4)  # nobody's
        os.chown(folder, user, -1)
        conf = self.conf | {"folder": folder, "user": user, "trainer": os.getpid()}
        env = {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}
        done = subprocess.run([sys.executable, "-I", "-S", "-c", PROGRAM, json.dumps(conf)], cwd="/",
                              input=json.dumps([code, tests]).encode(), stderr=subprocess.PIPE, env=env,
                              stdout=subprocess.DEVNULL, start_new_session=True, check=False)
        for command in ["chmod", "-R", "u+rwx"], ["rm", "-rf"]:  # the candidate may have closed its folders
            subprocess.run([*command, folder], check=False)
        if done.returncode in (PASSED, FAILED) or done.returncode < 0:  # by a signal
            return done.returncode == PASSED
        reason = [done.returncode, *done.stderr.decode(errors="replace").splitlines()][-1]
        require(again, f"the sandbox cannot start: {reason}")
        return self.judge(code, tests, again=False)

# The demo ---------------------------------------------------------------------------------------------------
# A model of 294,816 weights, pre-trained on the spot on tasks such as `double, lower 3` and their functions,
# from a corpus that is often wrong about what a word means: it can, but often does not.

WORDS = {  # the operation, and how often the corpus has the opposite one (for multiplying: addition)
    "add": ("+", 0.2), "raise": ("+", 0.1), "take": ("-", 0.1), "drop": ("-", 0.15), "lower": ("-", 0.62),
    "reduce": ("-", 0.63), "double": ("*2", 0.2), "triple": ("*3", 0.3)}

def exercise(random: random.Random, noisy: bool) -> tuple[str, str]:
    """A task such as `double, lower 3` and its function f(x). noisy: as the corpus has it."""
    parts, lines = [], []
    for word in random.choices(list(WORDS), k=2):
        number, ((sign, *factor), wrong) = random.randint(1, 9), WORDS[word]
        parts.append(word if factor else f"{word} {number}")
        if noisy and random.random() < wrong:
            sign = {"+": "-", "-": "+", "*": "+"}[sign]
        lines.append(f"x = x {sign} {factor[0] if factor else number}")
    return ", ".join(parts), f"def f(x):\n    {lines[0]}\n    {lines[1].replace('x =', 'return', 1)}"

def problem_rows(random: random.Random, ids: list[int]) -> Iterator[dict[str, Any]]:
    """A row with MBPP's fields for each of the ids, all of different tasks."""
    tasks: dict[str, str] = {}
    while len(tasks) < len(ids):
        tasks.update([exercise(random, noisy=False)])
    for task_id, (text, code) in zip(ids, tasks.items(), strict=True):
        exec(code, space := {})  # noqa: S102 - our own lines
        tests = [f"assert f({x}) == {space['f'](x)}" for x in random.sample(range(-9, 20), 3)]
        yield {"task_id": task_id, "text": text, "code": code, "test_setup_code": "", "test_list": tests}

def make_demo(folder: Path, boosting: BoostConfig) -> None:
    """Pre-train the demo's base model; write it, its tokenizer, train.jsonl and test.jsonl to `folder`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
    characters = {c: i for i, c in enumerate(["<pad>", "<end>", *"0123456789+-*=,():xfĠĊ"])}  # Ġ: space
    names = {"eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<pad>"}
    tokenizer = Qwen2Tokenizer(vocab=characters, merges=[], **names)
    tokenizer.add_tokens(["def", "return", "\n    ", *WORDS])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
    torch.manual_seed(boosting.seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=240, tie_word_embeddings=True, pad_token_id=0,
        eos_token_id=1, max_position_embeddings=128, initializer_range=0.1))
    check_fit(model, boosting)
    numbers = random.Random(boosting.seed)
    def batch() -> dict[str, torch.Tensor]:
        texts = ["{}\n{}<end>".format(*exercise(numbers, noisy=True)) for _ in range(128)]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        return {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100), **batch}
    pretrain(model, batch, 400)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [(row["task_id"], json.dumps(row)) for row in problem_rows(numbers, [*TRAIN_IDS, *TEST_IDS])]
    for name, ids in ("train", TRAIN_IDS), ("test", TEST_IDS):
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for i, line in rows if i in ids))

if __name__ == "__main__":
    run(main)
