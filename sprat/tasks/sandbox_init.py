"""The first process of a sandbox: gives up all rights, then runs what it was sent. It must not import sprat.

By now bubblewrap has made the namespaces: no network, no process of the machine in sight, a file system of Python and
one small folder. Left to do, in this order, and not to be undone by what runs afterwards:

1. bounds of memory, CPU time, file size, open files and threads (rlimits);
2. another user, where this one is root: one to whom no file and no process belongs, and whose threads the kernel counts
   (it does not count root's, so RLIMIT_NPROC alone does not stop root's fork bomb);
3. no new privileges, so that no program can give them back;
4. Landlock, where the kernel has it: the same files once more, by another mechanism;
5. seccomp: no process but this one, no program but this one, no socket, no tracing, no mounts, no shared memory that
   the bounds do not count, and none of the doors of the kernel that code of a test never needs.

What it was sent is a line of JSON on a socket. ``program``: the code is run as a script; its output is read outside.
``module``: it is imported, and its functions are called from outside (``sandbox_calls``). ``facts``: nothing is run.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import importlib.util
import json
import os
import platform
import resource
import runpy
import socket
import struct
import sys
from typing import Any

BOX, CALLS = "/box", "/sandbox/sandbox_calls.py"
CLONE_THREAD = 0x10000
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 4, 22, 38
# By machine: AUDIT_ARCH, and the numbers of clone and clone3.
ARCHITECTURES = {"x86_64": (0xC000003E, 56, 435), "aarch64": (0xC00000B7, 220, 435)}
# Numbers that both tables share since Linux 5.1: pidfd_send_signal, io_uring_setup, io_uring_enter, io_uring_register,
# open_tree, move_mount, fsopen, fsconfig, fsmount, fspick, pidfd_open, pidfd_getfd, process_madvise, memfd_secret,
# process_mrelease.
NEW_CALLS = (424, 425, 426, 427, 428, 429, 430, 431, 432, 433, 434, 438, 440, 447, 448)
DENIED = {
    "x86_64": {
        "socket socketpair connect accept bind listen": (41, 53, 42, 43, 49, 50, 288),
        "fork vfork execve execveat": (57, 58, 59, 322),
        "ptrace process_vm_readv process_vm_writev kcmp": (101, 310, 311, 312),
        "shmget msgget semget mq_open memfd_create": (29, 68, 64, 240, 319),
        "mount umount2 pivot_root chroot unshare setns mount_setattr": (165, 166, 155, 161, 272, 308, 442),
        "bpf perf_event_open userfaultfd add_key request_key keyctl": (321, 298, 323, 248, 249, 250),
        "init_module finit_module delete_module kexec_load kexec_file_load": (175, 313, 176, 246, 320),
        "open_by_handle_at name_to_handle_at quotactl acct swapon swapoff reboot": (304, 303, 179, 163, 167, 168, 169),
        "settimeofday clock_settime adjtimex clock_adjtime sethostname setdomainname": (164, 227, 159, 305, 170, 171),
        "iopl ioperm modify_ldt personality syslog vhangup uselib nfsservctl": (172, 173, 154, 135, 103, 153, 134, 180),
        "move_pages migrate_pages mbind set_mempolicy lookup_dcookie fanotify_init": (279, 256, 237, 238, 212, 300),
    },
    "aarch64": {
        "socket socketpair connect accept bind listen": (198, 199, 203, 202, 200, 201, 242),
        "execve execveat": (221, 281),
        "ptrace process_vm_readv process_vm_writev kcmp": (117, 270, 271, 272),
        "shmget msgget semget mq_open memfd_create": (194, 186, 190, 180, 279),
        "mount umount2 pivot_root chroot unshare setns mount_setattr": (40, 39, 41, 51, 97, 268, 442),
        "bpf perf_event_open userfaultfd add_key request_key keyctl": (280, 241, 282, 217, 218, 219),
        "init_module finit_module delete_module kexec_load kexec_file_load": (105, 273, 106, 104, 294),
        "open_by_handle_at name_to_handle_at quotactl acct swapon swapoff reboot": (265, 264, 60, 89, 224, 225, 142),
        "settimeofday clock_settime adjtimex clock_adjtime sethostname setdomainname": (170, 112, 171, 266, 161, 162),
        "personality syslog vhangup nfsservctl": (92, 116, 58, 42),
        "move_pages migrate_pages mbind set_mempolicy lookup_dcookie fanotify_init": (239, 238, 235, 237, 18, 262),
    },
}
LIBC = ctypes.CDLL(None, use_errno=True)


def limit_resources(limits: dict[str, int]) -> None:
    """Bound what this process can take."""
    for name, value in {
        "RLIMIT_AS": limits["memory_bytes"],
        "RLIMIT_CPU": limits["cpu_seconds"],
        "RLIMIT_FSIZE": limits["disk_bytes"],
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": limits["threads"],
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }.items():
        number = getattr(resource, name, None)
        if number is not None:
            resource.setrlimit(number, (value, value))


def change_user(uid: int) -> None:
    """Become user and group ``uid``, in no other group; 0 stays who it is."""
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def restrict_files(readable: list[str]) -> int:
    """Landlock: read below ``readable``, write below ``BOX``, no network. Returns its version; 0 if there is none."""
    version = int(LIBC.syscall(444, None, 0, 1))
    if version < 1:
        return 0
    all_access = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    fields = [all_access, *([3] if version >= 4 else []), *([3] if version >= 6 else [])]  # files, ports, scopes
    ruleset = LIBC.syscall(444, struct.pack(f"{len(fields)}Q", *fields), 8 * len(fields), 0)
    if ruleset < 0:
        return 0
    read, device = 0b1101, 0b110
    for path, access in [*((path, read) for path in readable), (BOX, all_access), ("/dev/null", device)]:
        if not os.path.isdir(path):
            access &= 0b111
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        LIBC.syscall(445, ruleset, 1, struct.pack("=Qi", access, folder), 0)
        os.close(folder)
    result = LIBC.syscall(446, ruleset, 0)
    os.close(ruleset)
    return version if result == 0 else 0


def restrict_calls() -> bool:
    """Load the seccomp filter; whether the kernel took it."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        return False
    arch, clone, clone3 = ARCHITECTURES[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    denied = [*(number for group in DENIED[machine].values() for number in group), *NEW_CALLS]
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # the x32 calls
    program += [(equal, 0, 1, clone3), (give, 0, 0, refuse | errno.ENOSYS)]  # its flags lie out of reach
    for number in denied:
        program += [(equal, 0, 1, number), (give, 0, 0, refuse | errno.EPERM)]
    program += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 1, 0, CLONE_THREAD)]
    program += [(give, 0, 0, refuse | errno.EAGAIN), (give, 0, 0, allow)]
    code = b"".join(struct.pack("=HBBI", *row) for row in program)
    buffer = ctypes.create_string_buffer(code)
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    return int(LIBC.prctl(PR_SET_SECCOMP, 2, header, 0, 0)) == 0


def give_up_rights(job: dict[str, Any]) -> dict[str, Any]:
    """All five steps; what came of them."""
    limit_resources(job["limits"])
    change_user(job["uid"])
    no_new_privileges = LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    version = restrict_files(job["readable"])
    return {
        "uid": os.getuid(),
        "no_new_privileges": no_new_privileges,
        "landlock": version,
        "seccomp": no_new_privileges and restrict_calls(),
    }


def give_input(data: bytes) -> None:
    """Make ``data``, all of it, what standard input will give."""
    reading, writing = os.pipe()
    if len(data) > 1 << 15:
        fcntl.fcntl(writing, 1031, len(data) + 4096)  # F_SETPIPE_SZ
    os.set_blocking(writing, False)
    if data and os.write(writing, data) < len(data):
        raise SystemExit("the input is longer than a pipe holds")
    os.dup2(reading, 0)
    os.close(reading)
    os.close(writing)


def main() -> None:
    """Take the job from the socket and do it."""
    control = socket.socket(fileno=int(sys.argv[1]))
    stream = control.makefile("rwb")
    job = json.loads(stream.readline())
    path = f"{BOX}/{'main' if job['mode'] == 'program' else 'solution'}.py"
    if job["mode"] != "facts":
        with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(job["code"])
    os.chdir(BOX)
    if job["mode"] == "program":
        give_input(job["stdin"].encode("utf-8", "surrogatepass"))
    facts = give_up_rights(job)
    stream.write(json.dumps(facts).encode() + b"\n")
    stream.flush()
    if job["mode"] == "facts" or not facts["seccomp"]:
        return
    nothing = os.open("/dev/null", os.O_RDWR)
    if job["mode"] == "program":
        stream.close()
        control.close()
        os.dup2(nothing, 2)
        sys.argv = [path]
        runpy.run_path(path, run_name="__main__")
        return
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    spec = importlib.util.spec_from_file_location("sandbox_calls", CALLS)
    assert spec is not None and spec.loader is not None
    calls = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(calls)
    calls.serve(stream, path)


if __name__ == "__main__":
    main()
