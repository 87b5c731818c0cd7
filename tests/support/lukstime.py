"""QEMU makes LUKS images in tests without measuring the processor first.

`qemu-img create` derives keys until it has used a second or two of processor time, only to know how many rounds the
time that it was allowed (`encrypt.iter-time`) is. A clock that is a second on whenever it is read ends that at the
first look: the image has the least number of rounds, 1,000, and is QEMU's own in everything else.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = """
#include <sys/resource.h>

int getrusage(int who, struct rusage *usage)
{
    static int seconds;
    (void)who;
    *usage = (struct rusage) { .ru_utime = { ++seconds, 0 } };
    return 0;
}
"""


@functools.cache
def hurried() -> dict[str, str]:
    """What QEMU's tools need in their environment; nothing, and they take their time, where no C compiler works."""
    directory = tempfile.mkdtemp(prefix="nbdimg-test-")
    atexit.register(shutil.rmtree, directory)
    library = Path(directory, "clock.so")
    command = ["cc", "-shared", "-fPIC", "-o", str(library), "-x", "c", "-"]
    try:
        subprocess.run(command, input=SOURCE, text=True, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"LD_PRELOAD": str(library)}
