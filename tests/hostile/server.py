"""Runs commands in child processes of their own, without starting an interpreter for each.

One line of JSON in, {"folder", "arguments"}, and one out, {"code", "stdout", "stderr", "seconds", "peak_mb"}. Modules
are imported once; a fork of this process runs the command, with bounds on its time and memory. `code` is the exit code,
minus the number of the signal that ended it, or None where it took too long. `seconds` are those of its processor, so
that a busy machine does not count.
"""

import importlib
import json
import os
import pkgutil
import resource
import signal
import sys
import time
from pathlib import Path

# Far above what is asserted, so that a peak is measured and not only guessed from a failed allocation.
ADDRESS_SPACE = 6 * 2**30


def run(folder, arguments, seconds):
    out, err = Path(folder, ".stdout"), Path(folder, ".stderr")
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = command(folder, arguments, out, err)
        finally:
            os._exit(code)
    while True:
        pid, status, used = os.wait4(child, os.WNOHANG)
        if pid or time.monotonic() - began > seconds:
            break
        time.sleep(0.005)
    if not pid:
        os.kill(child, signal.SIGKILL)
        _, status, used = os.wait4(child, 0)
    texts = [path.read_text(errors="replace") if path.is_file() else "" for path in (out, err)]
    for path in (out, err):
        path.unlink(missing_ok=True)
    return {
        "code": os.waitstatus_to_exitcode(status) if pid else None,
        "stdout": texts[0], "stderr": texts[1], "seconds": used.ru_utime + used.ru_stime,
        "peak_mb": (used.ru_maxrss - RESIDENT_KB) / 1024,
    }  # fmt: skip


def command(folder, arguments, out, err):
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESS_SPACE, now + ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        app(arguments)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import openvino  # noqa: F401
    import PIL.Image
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401
    import yaml  # noqa: F401

    import ovcalib
    import tests.toy  # noqa: F401
    from ovcalib.cli.app import app

    # All of them: commands import what they need, which takes five times as long as what is tested here.
    for module in pkgutil.walk_packages(ovcalib.__path__, "ovcalib."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    PIL.Image.init()
    RESIDENT_KB = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    main()
