"""The first program in a sandbox: takes on the limits, gives up what rights are left, and becomes the command.

It needs the standard library alone, and is run as a file: `python -I -S launch.py SETTINGS COMMAND...`. SETTINGS is JSON:
channel: number of a socket to which open descriptors of /out, /tmp and /proc are sent, or null. uid: the user to become, or null.
rlimits: by name. first_is_ours: whether process 1 belongs to the same user, who could then write to its memory: it gets the same
limits. The descriptors leave before anything hostile runs, and through them the outside looks on.
"""

import json
import os
import resource
import socket
import sys
from contextlib import suppress


def main() -> None:
    settings, command = json.loads(sys.argv[1]), sys.argv[2:]
    if settings["channel"] is not None:
        shown = [os.open(folder, os.O_RDONLY | os.O_DIRECTORY) for folder in ("/out", "/tmp", "/proc")]
        with socket.socket(fileno=settings["channel"]) as channel:
            socket.send_fds(channel, [b"."], shown)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="utf-8") as stream:
        stream.write("1000")  # where the machine's memory runs out, the kernel ends this first
    if (user := settings["uid"]) is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        with open("/proc/self/status", encoding="utf-8") as stream:
            if any(line.startswith(("CapEff", "CapPrm", "CapAmb")) and int(line.split()[1], 16) for line in stream):
                sys.exit("launch: capabilities are left")
    for name, value in settings["rlimits"].items():
        with suppress(ValueError, AttributeError):  # already lower, or not known to this system
            if settings["first_is_ours"]:
                resource.prlimit(1, getattr(resource, name), (value, value))
            resource.setrlimit(getattr(resource, name), (value, value))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
