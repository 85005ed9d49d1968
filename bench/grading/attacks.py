"""Fifteen attacks on the sandbox in which code is judged, each carried out for real, with a look from outside after it.

Code that gets somewhere prints BREACH with what it got. Most can tell by itself; what it cannot tell (a connection that
arrived, a process that died, a file that changed, points that were paid) is seen here.
"""

# ruff: noqa: E501 - attacks are read best as they are written

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sprat.tasks.code_tests import ProgramTest, run_asserts, run_programs
from sprat.tasks.sandbox import FIRST_UID, NUM_UIDS, Limits, Outcome, run_program

LIMITS = Limits(cpu_seconds=2, memory_bytes=256 << 20, disk_bytes=4 << 20, output_bytes=1 << 18, idle_seconds=2)
TESTS = "assert add(1, 2) == 3\nassert add(20, 22) == 42\n"
SECRET = "the-secret-of-the-machine"


def breaches(outcome: Outcome) -> list[str]:
    """What the code says that it got; an attack that did not come to its end was none."""
    lines = outcome.output.decode("utf-8", "replace").splitlines()
    ending = [] if "end" in lines else [f"the attack broke off: {outcome}"[:300]]
    return [line for line in lines if "BREACH" in line] + ending


def trying(*attempts: str) -> str:
    """Code that makes each attempt (lines that end by setting ``got``), whatever becomes of the others."""
    blocks = ["import ctypes, os, socket, sys, threading, time", "libc = ctypes.CDLL(None, use_errno=True)"]
    for number, attempt in enumerate(attempts, 1):
        body = "\n".join(f"    {line}" for line in attempt.splitlines())
        blocks.append(f"got = None\ntry:\n{body}\nexcept BaseException:\n    pass")
        blocks.append(f"if got:\n    print('BREACH', {number}, type(got).__name__)")  # what it got is nobody's business
    return "\n".join([*blocks, "print('end')"])


def run_bare(code: str, stdin: str = "", limits: Limits = LIMITS) -> Outcome:
    """The control: ``code`` without a sandbox, as a user without rights where this one has them."""
    user = FIRST_UID if os.getuid() == 0 else None
    python = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        command = [python, "-I", "-c", code]
        try:
            done = subprocess.run(
                command, input=stdin.encode(), capture_output=True, timeout=20, cwd=folder, user=user, group=user
            )
        except subprocess.TimeoutExpired as error:
            return Outcome("idle", -1, error.stdout or b"")
    return Outcome("exit", done.returncode, done.stdout)


@contextlib.contextmanager
def without_sandbox() -> Iterator[None]:
    """Attacks in this block meet none; only those of ``CONTROLS`` may run in it."""
    RUNNER[0] = run_bare
    try:
        yield
    finally:
        RUNNER[0] = run_program


RUNNER: list[Callable[..., Outcome]] = [run_program]
CONTROLS = ("net", "fs", "ptrace", "/proc", "symlink")  # whose attempts harm nothing


def naive_points(codes: Sequence[str]) -> int:
    """How many of ``codes`` a grader pays that runs the tests behind them in one process, and looks at its status."""
    return sum(run_bare(f"{code}\n{TESTS}").status == 0 for code in codes)


def network() -> list[str]:
    """It connects to a server of this machine, by address, by name of a socket, and without any."""
    arrived: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        name = f"\0sprat-{os.getpid()}"
        abstract.bind(name)
        abstract.listen()
        for listener in (server, abstract):
            listener.settimeout(0.2)
        port = server.getsockname()[1]
        found = breaches(
            RUNNER[0](
                trying(
                    f"s = socket.create_connection(('127.0.0.1', {port}), 1)\ns.send(b'x')\ngot = 'tcp'",
                    "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ngot = s.sendto(b'x', ('8.8.8.8', 53))",
                    f"s = socket.socket(socket.AF_UNIX)\ns.connect({name!r})\ngot = 'abstract'",
                    "s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)\ngot = 'raw'",
                    "got = [i for i in socket.if_nameindex() if i[1] != 'lo']",
                ),
                limits=LIMITS,
            )
        )
        for kind, listener in (("tcp", server), ("abstract", abstract)):
            with contextlib.suppress(OSError):
                listener.accept()
                arrived.append(f"a {kind} connection arrived")
    return found + arrived


def files() -> list[str]:
    """It reads a file of this machine that everybody may read, and writes where it should not."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "secret")
        path.write_text(SECRET)
        path.chmod(0o666)
        Path(folder).chmod(0o777)
        outcome = RUNNER[0](
            trying(
                f"got = open({str(path)!r}).read()",
                f"open({str(path)!r}, 'a').write('x')\ngot = 'append'",
                f"got = os.listdir({folder!r})",
                "got = open('/etc/passwd').read()",
                "got = open('/etc/shadow').read()",
                f"got = os.listdir({os.getcwd()!r})",
                "got = open('/usr/planted', 'w')",
                f"got = open({str(Path(sys.base_prefix, 'planted'))!r}, 'w')",
                "got = open('/planted', 'w')",
                "got = open('/sandbox/sandbox_calls.py', 'a')",
                "os.chmod('/box', 0o777)\nos.chroot('/box')\ngot = 'chroot'",
                "os.mknod('/box/d', 0o600 | 0o060000, os.makedev(254, 0))\ngot = open('/box/d', 'rb').read(16)",
                "got = libc.mount(b'none', b'/box', b'tmpfs', 0, None) == 0 and 'mount'",
            ),
            limits=LIMITS,
        )
        changed = [] if path.read_text() == SECRET else ["the file changed"]
    return breaches(outcome) + changed


def sandboxed() -> int:
    """Processes and threads that run as a user of the sandbox."""
    count = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            uid = int(fields["Uid"].split()[0])
            count += int(fields["Threads"]) * (FIRST_UID <= uid < FIRST_UID + NUM_UIDS)
    return count


@contextlib.contextmanager
def most_sandboxed() -> Iterator[list[int]]:
    """The most processes of the sandbox at one time, looked for while the block runs."""
    most, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            most[0] = max(most[0], sandboxed())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def fork_bomb() -> list[str]:
    """It makes processes by every call there is, and threads without end."""
    with most_sandboxed() as most:
        outcome = RUNNER[0](
            trying(
                "for _ in range(500):\n    if os.fork() == 0:\n        time.sleep(30)\n        os._exit(0)\n    got = 'fork'",
                "for _ in range(50):\n    if libc.vfork() == 0:\n        os._exit(0)\n    got = 'vfork' if ctypes.get_errno() == 0 else None",
                "import subprocess\ngot = subprocess.run([sys.executable, '-c', '0']).returncode == 0 and 'run'",
                "got = os.posix_spawn(sys.executable, [sys.executable, '-c', '0'], {})",
                "os.execv('/bin/sh', ['sh', '-c', 'echo BREACH exec'])",
                "n = 0\ntry:\n    while n < 2000:\n        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n        n += 1\nexcept RuntimeError:\n    pass\ngot = n > 64 and n",
                "import signal\ngot = libc.syscall(56, 17, 0, 0, 0, 0) > 0 and 'clone'",
                "import signal\ngot = libc.syscall(435, (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17), 88) > 0 and 'clone3'",
            ),
            limits=LIMITS,
        )
    return breaches(outcome) + ([f"{most[0]} processes and threads at once"] if most[0] > 4 * LIMITS.threads else [])


def memory() -> list[str]:
    """It takes memory by objects, maps, files in memory and shared segments."""
    outcome = RUNNER[0](
        trying(
            "kept = []\nwhile len(kept) < 64:\n    kept.append(bytearray(16 << 20))\n    got = len(kept) > 16 and len(kept)",
            "import mmap\nmaps = []\nwhile len(maps) < 64:\n    m = mmap.mmap(-1, 16 << 20)\n    m[:] = b'x' * len(m)\n    maps.append(m)\n    got = len(maps) > 16 and len(maps)",
            "got = os.memfd_create('x') and 'memfd'",
            "got = libc.shmget(0, 1 << 30, 0o1600) >= 0 and 'shm'",
            "got = libc.mlockall(3) == 0 and 'mlock'",
        ),
        limits=LIMITS,
    )
    return breaches(outcome)


def spin() -> list[str]:
    """It runs for ever, also where it was asked by a signal to stop."""
    found = []
    for code in (
        "while True:\n    pass",
        "import signal\nfor n in range(1, 65):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n    except Exception:\n        pass\nwhile True:\n    pass",
        "import threading\nfor _ in range(8):\n    threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()",
        "9 ** 9 ** 9",
    ):
        before = os.times()
        outcome = run_program(code, limits=LIMITS)
        if outcome.status == 0:
            found.append(f"it ended well: {code[:20]!r}")
        used = os.times().children_user - before.children_user
        if used > 3 * LIMITS.cpu_seconds:
            found.append(f"it took {used:.0f} CPU seconds")
    return found


def disk() -> list[str]:
    """It fills the disk, in one file and in many, and with files that are all hole."""
    bound = LIMITS.disk_bytes
    outcome = RUNNER[0](
        trying(
            f"n = 0\nf = open('/box/big', 'wb')\ntry:\n    while n < {16 * bound}:\n        n += f.write(b'x' * 65536)\n        f.flush()\nfinally:\n    got = n > {2 * bound} and n",
            f"n = 0\ntry:\n    for i in range(4000):\n        n += open(f'/box/{{i}}', 'wb').write(b'x' * 65536)\nfinally:\n    got = n > {2 * bound} and n",
            "got = open('/dev/shm/x', 'wb').write(b'x') and 'shm'",
            "got = open('/tmp/x', 'wb').write(b'x') and 'tmp'",
        ),
        limits=LIMITS,
    )
    return breaches(outcome)


def tracing() -> list[str]:
    """It looks into other processes, and lets itself be looked into."""
    return breaches(
        RUNNER[0](
            trying(
                *(
                    f"got = libc.ptrace({request}, {pid}, 0, 0) == 0 and 'ptrace'"
                    for request in (0, 16, 0x4206)
                    for pid in (0, 1, os.getpid())
                ),
                "b = ctypes.create_string_buffer(64)\nv = (ctypes.c_uint64 * 2)(ctypes.addressof(b), 64)\ngot = libc.process_vm_readv(1, v, 1, v, 1, 0) > 0 and 'vm'",
                f"got = libc.syscall(434, {os.getpid()}, 0) >= 0 and 'pidfd'",
                "got = libc.syscall(298, 0, 0, 0, 0, 0) >= 0 and 'perf'",
                "got = libc.syscall(321, 0, 0, 0) >= 0 and 'bpf'",
            ),
            limits=LIMITS,
        )
    )


def proc() -> list[str]:
    """It reads what the kernel tells about processes, and asks for it to be mounted."""
    os.environ["SPRAT_ATTACK"] = SECRET
    try:
        return breaches(
            RUNNER[0](
                trying(
                    *(
                        f"got = open('/proc/{name}', 'rb').read()"
                        for name in (
                            "1/environ",
                            "self/environ",
                            "self/maps",
                            "self/mem",
                            f"{os.getpid()}/environ",
                            "kallsyms",
                            "sysrq-trigger",
                        )
                    ),
                    "got = os.listdir('/proc')",
                    "got = os.listdir('/sys')",
                    "got = libc.mount(b'proc', b'/box', b'proc', 0, None) == 0 and 'mount'",
                    "got = libc.unshare(0x10000000) == 0 and 'unshare'",
                    "got = os.environ.get('SPRAT_ATTACK')",
                ),
                limits=LIMITS,
            )
        )
    finally:
        del os.environ["SPRAT_ATTACK"]


def symlinks() -> list[str]:
    """It makes links to what lies outside, for itself and for whoever cleans up or reads after it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "secret")
        path.write_text(SECRET)
        Path(folder).chmod(0o755)
        outcome = RUNNER[0](
            trying(
                f"os.symlink({str(path)!r}, 'a')\ngot = open('a').read()",
                f"os.link({str(path)!r}, 'b')\ngot = 'hard link'",
                "os.symlink('/', 'c')\ngot = open('c/etc/passwd').read()",
                "os.symlink('../../../../../..', 'e')\ngot = open('e/etc/hostname').read()",
                "os.remove('main.py')\nos.symlink('/etc/passwd', 'main.py')\ngot = open('main.py').read()",
                "os.rename('/sandbox/sandbox_calls.py', 'x')\ngot = 'rename'",
            ),
            limits=LIMITS,
        )
        changed = [] if path.read_text() == SECRET else ["the file changed"]
    return breaches(outcome) + changed


def signals() -> list[str]:
    """It kills its parent, everybody, and a process that runs as the very user that it might be."""
    is_root = os.getuid() == 0
    bystander = subprocess.Popen(
        ["sleep", "60"], user=FIRST_UID if is_root else None, group=FIRST_UID if is_root else None
    )
    try:
        targets = (bystander.pid, os.getpid(), -1, 0, 1, 2)
        code = "import os, signal\nsignal.signal(15, signal.SIG_IGN)\n" + "\n".join(
            f"try:\n    os.kill({pid}, 15)\nexcept OSError:\n    pass" for pid in targets
        )
        kills = "\n".join(
            f"try:\n    os.kill({pid}, 9)\nexcept OSError:\n    pass" for pid in (bystander.pid, os.getppid(), 1, -1)
        )
        run_program(f"{code}\n{kills}\nos.kill(os.getppid(), 9)", limits=LIMITS)
        time.sleep(0.1)
        return [] if bystander.poll() is None else ["a process outside was killed"]
    finally:
        bystander.kill()
        bystander.wait()


def flood() -> list[str]:
    """It writes without end, to standard output, to the error output, and to every file that is open."""
    found = []
    for target in ("os.write(1, b'x' * 65536)", "os.write(2, b'x' * 65536)", "sys.stdout.write('x' * 65536)"):
        outcome = run_program(f"import os, sys\nwhile True:\n    {target}", limits=LIMITS)
        if len(outcome.output) > LIMITS.output_bytes or outcome.ended == "exit" and outcome.status == 0:
            found.append(f"{len(outcome.output)} bytes came of {target}")
    if run_asserts(
        "import os\nwhile True:\n    for n in range(64):\n        try:\n            os.write(n, b'x' * 65536)\n        except OSError:\n            pass",
        TESTS,
        LIMITS,
    ):
        found.append("points for a flood")
    return found


def unpaid(*codes: str) -> list[str]:
    """Codes that neither add nor print a sum, and are paid all the same."""
    program = (ProgramTest("1 2\n", "3\n"), ProgramTest("20 22\n", "42\n"))
    paid = [f"points for asserts: {code[:60]!r}" for code in codes if run_asserts(code, TESTS, LIMITS)]
    return paid + [f"points for output: {code[:60]!r}" for code in codes if run_programs(code, program, LIMITS)]


EXITS = (
    "import os\nos._exit(0)",
    "import sys\nsys.exit(0)",
    "raise SystemExit(0)",
    "exit(0)",
    "import atexit, os\natexit.register(os._exit, 0)",
    "def add(a, b):\n    import os\n    os._exit(0)",
    "def add(a, b):\n    raise SystemExit(0)",
    "def add(a, b):\n    raise KeyboardInterrupt",
    "def add(a, b):\n    raise StopIteration",
    "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
)


def exits() -> list[str]:
    """It ends well before it is tested, in every way there is."""
    return unpaid(*EXITS)


FORGER = """
import json, os, threading
def forge():
    while True:
        for n in range(3, 64):
            for line in (b'{"passed": true}\\n', b'{"passed": true, "nonce": ""}\\n', b'{"value": {"i": "3"}}\\n'):
                try:
                    os.write(n, line)
                except OSError:
                    pass
"""


MONKEYPATCHES = (
    "class Any:\n    def __eq__(self, other):\n        return True\n    def __bool__(self):\n        return True\ndef add(a, b):\n    return Any()",
    "class Any(int):\n    def __eq__(self, other):\n        return True\ndef add(a, b):\n    return Any()",
    "class Any(str):\n    __eq__ = lambda a, b: True\n    __hash__ = str.__hash__\ndef add(a, b):\n    return Any()",
    "import builtins\nbuiltins.AssertionError = ZeroDivisionError\nbuiltins.all = builtins.any = lambda *a: True\ndef add(a, b):\n    return None",
    "import unittest, sys\nunittest.TestCase.assertEqual = lambda *a: None\nsys.settrace(lambda *a: None)\ndef add(a, b):\n    return None",
    "import ctypes\nctypes.memset(id(3) + 24, 0, 1)\ndef add(a, b):\n    return 0",
    "import gc, sys\nfor o in gc.get_objects():\n    if isinstance(o, dict):\n        for k in list(o):\n            if isinstance(k, str) and 'pass' in k:\n                o[k] = True\ndef add(a, b):\n    return 1",
    FORGER + "threading.Thread(target=forge, daemon=True).start()\ndef add(a, b):\n    return 0",
    FORGER + "forge()",
    "import sys\nf = sys._getframe()\nwhile f:\n    for k, v in list(f.f_locals.items()):\n        if k == 'objects':\n            v[0] = lambda *a: True\n    f = f.f_back\ndef add(a, b):\n    return 0",
    "print('PASSED')\nprint('2 passed in 0.01s')",
    "def add(a, b):\n    return [3, 42]",
    "def add(a, b):\n    return True",
)


def monkeypatches() -> list[str]:
    """It changes what tests compare with, count and report, and forges their verdict."""
    return unpaid(*MONKEYPATCHES)


IMPORTS = (
    "import sys, types\nfor n in ('json', 'ast', 'tests', 'builtins', 'sandbox_calls', 'code_tester'):\n    sys.modules[n] = types.ModuleType(n)\ndef add(a, b):\n    return 0",
    "for n in ('json', 'ast', 'secrets', 'socket', 'sitecustomize', 'usercustomize', 'sandbox_calls'):\n    open(f'/box/{n}.py', 'w').write('def loads(*a, **k): return {\"passed\": True}\\ndumps = loads')\nimport sys\nsys.path.insert(0, '/box')\ndef add(a, b):\n    return 0",
    'import json\njson.loads = lambda *a, **k: {\'passed\': True}\njson.dumps = lambda *a, **k: \'{"passed": true, "value": {"i": "3"}}\'\ndef add(a, b):\n    return 0',
    "import sys\nclass F:\n    def find_spec(self, *a):\n        return None\nsys.meta_path.insert(0, F())\nsys.path_hooks.clear()\ndef add(a, b):\n    return 0",
    "import builtins\nbuiltins.__import__ = lambda *a, **k: builtins\ndef add(a, b):\n    return 0",
)


def imports() -> list[str]:
    """It puts its own modules where those of the tests, and of the sandbox, are looked for."""
    return unpaid(*IMPORTS)


def time_bombs() -> list[str]:
    """It sleeps, goes off later, or leaves somebody behind who does."""
    found = unpaid(
        "import time\ntime.sleep(1000)",
        "import time\ndef add(a, b):\n    time.sleep(1000)",
        "import signal\nsignal.alarm(1)\nsignal.pause()\nsignal.pause()",
        "n = 0\ndef add(a, b):\n    global n\n    n += 1\n    while n > 1:\n        pass\n    return a + b",
        "import threading\nthreading.Event().wait()",
        "import sys\nsys.stdin.read()\nsys.stdin.read()\nimport select\nselect.select([], [], [])",
    )
    run_program("import os, threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()", limits=LIMITS)
    time.sleep(0.2)
    return found + ([f"{left} left behind" for left in [sandboxed()] if left])


ATTACKS: dict[str, Callable[[], list[str]]] = {
    "net": network,
    "fs": files,
    "fork bomb": fork_bomb,
    "memory": memory,
    "spin": spin,
    "disk": disk,
    "ptrace": tracing,
    "/proc": proc,
    "symlink": symlinks,
    "signal parent": signals,
    "stdout flood": flood,
    "exit 0": exits,
    "test monkeypatch": monkeypatches,
    "import override": imports,
    "time bomb": time_bombs,
}


@dataclass(frozen=True)
class Attack:
    """How one attack went: what it got, and how long it took."""

    name: str
    breaches: list[str]
    seconds: float


def carry_out(name: str) -> Attack:
    """One attack; after it the sandbox must still do its work."""
    start = time.monotonic()
    found = ATTACKS[name]()
    outcome = run_program("print(sum(map(int, input().split())))", "1 2\n", LIMITS)
    if outcome.output != b"3\n":
        found.append(f"afterwards nothing runs: {outcome}")
    return Attack(name, found, time.monotonic() - start)
