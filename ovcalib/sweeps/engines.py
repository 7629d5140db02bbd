"""Where the tasks of a sweep run: processes of this machine, or the workers of a dask cluster."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from ovcalib.errors import DeviceError, UsageError, require
from ovcalib.sweeps.worker import GRACE_S, run_task

# Attempts at a task before it is given up, as it may be what kills its workers; as many as dask makes.
ATTEMPTS = 4
CONNECT_S = 10
# Seconds between looks at a cluster, which may have grown or gone.
POLL_S = 5.0
THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Engine(Protocol):
    def slots(self) -> int:
        """How many tasks can run at once now, at least 1."""
        ...

    def submit(self, task: dict[str, Any]) -> Future[dict[str, Any]]:
        """Start a task of ovcalib.sweeps.worker.run_task; its future raises if all attempts failed."""
        ...

    def wait(self, running: Collection[Future[dict[str, Any]]]) -> Collection[Future[dict[str, Any]]]:
        """Those of some tasks that have ended, as soon as there is one; none where slots may have changed before.

        raises   DeviceError where no task can run any longer; what a lost cluster cancelled has not failed
        """
        ...


@contextlib.contextmanager
def open_engine(reference: str, jobs: int | None) -> Iterator[Engine]:
    """The engine that a reference names; what it runs has stopped when the context ends.

    reference   "local", or "dask:ADDRESS" with the address of a scheduler
    jobs        processes of "local"; None is 1
    raises      UsageError, DeviceError where there is no scheduler
    """
    kind, _, address = reference.partition(":")
    if reference == "local":
        local = LocalEngine(jobs or 1)
        try:
            yield local
        finally:
            local.stop()
    elif kind == "dask" and address:
        if jobs is not None:
            raise UsageError(f"`jobs={jobs}` is for `engine=local`; the workers of a cluster decide how much runs.")
        with _dask(address) as cluster:
            yield cluster
    else:
        raise UsageError(f"`engine={reference}`: expected local or dask:ADDRESS, such as dask:tcp://10.0.0.5:8786.")


# Processes of this machine --------------------------------------------------------------------


def share_of_cpus(cpus: Sequence[int], worker: int, jobs: int) -> list[int]:
    """The CPUs of one of `jobs` workers: disjoint shares, or one CPU each where there are more workers than CPUs."""
    return list(cpus[worker::jobs]) or [cpus[worker % len(cpus)]]


class LocalEngine:
    """Processes on shares of the CPUs, each running one task at a time; one that dies is replaced."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.pool = ThreadPoolExecutor(jobs)
        self.free = list(range(jobs))
        self.workers: dict[int, LocalWorker] = {}
        self.lock = threading.Lock()
        self.stopped = False

    def slots(self) -> int:
        return self.jobs

    def submit(self, task: dict[str, Any]) -> Future[dict[str, Any]]:
        return self.pool.submit(self._run, task)

    def wait(self, running: Collection[Future[dict[str, Any]]]) -> Collection[Future[dict[str, Any]]]:
        return wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED).done  # Windows: no Ctrl-C in a longer one

    def _run(self, task: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            index = self.free.pop()
        try:
            reason = ""
            for _ in range(ATTEMPTS):
                with self.lock:
                    if self.stopped:
                        break
                    if index not in self.workers:
                        self.workers[index] = LocalWorker(index, self.jobs)
                    worker = self.workers[index]
                answer = worker(task)
                if answer is not None:
                    return answer
                with self.lock:
                    if not self.stopped:
                        reason = self.workers.pop(index).stop()
            raise DeviceError(
                f"The process that ran it ended {ATTEMPTS} times ({reason}). Killed by signal 9, it ran out of memory: "
                "try fewer `jobs`."
            )
        finally:
            with self.lock:
                self.free.append(index)

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            workers = list(self.workers.values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.close()
        for worker in workers:
            worker.stop()
        self.pool.shutdown()


class LocalWorker:
    """A process of ovcalib.sweeps.worker."""

    def __init__(self, index: int, jobs: int) -> None:
        available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        cpus = share_of_cpus(available, index, jobs)
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ovcalib.sweeps.worker", ",".join(map(str, cpus))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env={**os.environ, **dict.fromkeys(THREAD_SETTINGS, str(len(cpus)))},
        )  # fmt: skip

    def __call__(self, task: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a task; None where the process died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            if line.endswith("\n"):
                return json.loads(line)  # type: ignore[no-any-return]
        return None

    def close(self) -> None:
        """Tell the process to stop."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def stop(self) -> str:
        """End the process; returns how it ended, with the last line that it printed."""
        self.close()
        try:
            code = self.process.wait(2 * GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.errors.seek(0)
        printed = self.errors.read().decode(errors="replace").strip().splitlines()
        self.errors.close()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return f"{how}: {printed[-1]}" if printed else how


# A dask cluster -------------------------------------------------------------------------------


class DaskEngine:
    """The workers of a cluster, one task each; dask itself runs the task of a lost worker again."""

    def __init__(self, address: str, client: Any) -> None:
        self.address, self.client = address, client
        self.executor = client.get_executor(pure=False)

    def slots(self) -> int:
        try:
            if self.client.status == "running":
                return max(1, len(self.client.nthreads()))
            reason = f"the client is {self.client.status}"
        except (OSError, TimeoutError) as error:
            reason = str(error)
        raise DeviceError(
            f"The dask scheduler at {self.address} went away ({reason}). Finished cells are kept: start it and the "
            "same sweep again."
        )

    def submit(self, task: dict[str, Any]) -> Future[dict[str, Any]]:
        return self.executor.submit(run_task, task)  # type: ignore[no-any-return]

    def wait(self, running: Collection[Future[dict[str, Any]]]) -> Collection[Future[dict[str, Any]]]:
        ended = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED).done
        self.slots()
        return ended


@contextlib.contextmanager
def _dask(address: str) -> Iterator[DaskEngine]:
    distributed = require("distributed", "dask", f"`engine=dask:{address}`")
    try:
        client = distributed.Client(address, timeout=CONNECT_S)
    except (OSError, TimeoutError, ValueError) as error:
        raise DeviceError(
            f"There is no dask scheduler at {address!r} ({error}). Start one with `dask scheduler`, and workers with "
            "`dask worker ADDRESS --nthreads 1`."
        ) from error
    engine = DaskEngine(address, client)
    try:
        yield engine
    finally:
        engine.executor.shutdown(wait=False)
        client.close(timeout=CONNECT_S)
