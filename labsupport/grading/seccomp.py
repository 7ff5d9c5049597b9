"""A filter of system calls: what an answer never needs, and what would go around the limits.

Without cgroups, memory that belongs to no process and lies in no counted file system is not counted: anonymous files (memfd),
System V memory. These calls fail with EPERM, as do those that make namespaces, mount, trace another process, or load code into
the kernel, and sockets other than local and internet ones (a virtual machine's sockets know no network namespace). The form is
classic BPF, see the kernel's Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import errno
import platform
import struct

# Numbers: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h of Linux.
X86_64 = {
    "memfd_create": 319, "shmget": 29, "shmat": 30, "msgget": 68, "semget": 64, "mq_open": 240,
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "unshare": 272, "setns": 308,
    "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "add_key": 248, "request_key": 249, "keyctl": 250,
    "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "open_by_handle_at": 304, "fanotify_init": 300,
    "init_module": 175, "finit_module": 313, "kexec_load": 246, "personality": 135,
}  # fmt: skip
AARCH64 = {
    "memfd_create": 279, "shmget": 194, "shmat": 196, "msgget": 186, "semget": 190, "mq_open": 180,
    "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "unshare": 97, "setns": 268,
    "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "add_key": 217, "request_key": 218, "keyctl": 219,
    "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "open_by_handle_at": 265, "fanotify_init": 262,
    "init_module": 105, "finit_module": 273, "kexec_load": 104, "personality": 92,
}  # fmt: skip
EVERYWHERE = {  # newer calls have one number on all machines
    "io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "pidfd_getfd": 438, "mount_setattr": 442, "memfd_secret": 447,
}  # fmt: skip
# Name of the machine: its number for audits, its calls, and the numbers of socket and clone.
MACHINES = {"x86_64": (0xC000003E, X86_64, 41, 56), "aarch64": (0xC00000B7, AARCH64, 198, 220)}
CLONE3 = 435
CLONE_NEWUSER = 0x10000000
SOCKETS = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # codes of classic BPF
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


def program(machine: str | None = None) -> bytes | None:
    """The filter as bubblewrap reads it, for this machine; None for a processor that is not in MACHINES."""
    machine = machine or platform.machine()
    if machine not in MACHINES:
        return None
    audit, calls, socket, clone = MACHINES[machine]
    steps: list[tuple[int, int, int, int]] = []  # code, steps to skip if true, if false, operand

    def step(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> None:
        steps.append((code, if_true, if_false, operand))

    step(LOAD, ARCHITECTURE)
    step(EQUAL, audit, 1, 0)
    step(RETURN, KILL)  # the 32-bit calls have other numbers
    step(LOAD, NUMBER)
    if machine == "x86_64":
        step(AT_LEAST, 0x40000000, 0, 1)  # the calls of x32, again with other numbers
        step(RETURN, KILL)
    for number in sorted({**calls, **EVERYWHERE}.values()):
        step(EQUAL, number, 0, 1)
        step(RETURN, ERROR | errno.EPERM)
    step(EQUAL, CLONE3, 0, 1)  # its flags lie in memory, where a filter cannot look; the C library then uses clone
    step(RETURN, ERROR | errno.ENOSYS)
    step(EQUAL, clone, 0, 3)
    step(LOAD, FIRST_ARGUMENT)
    step(ANY_BIT, CLONE_NEWUSER, 0, 1)
    step(RETURN, ERROR | errno.EPERM)
    step(LOAD, NUMBER)
    step(EQUAL, socket, 0, 5)
    step(LOAD, FIRST_ARGUMENT)
    for left, family in zip((2, 1, 0), SOCKETS, strict=True):
        step(EQUAL, family, left + 1, 0)
    step(RETURN, ERROR | errno.EAFNOSUPPORT)
    step(RETURN, ALLOW)
    return b"".join(struct.pack("=HBBI", *each) for each in steps)
