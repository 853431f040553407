"""The benchmark on a GPU: validates every implementation of every case, times it, keeps the run as JSON.

    python -m benchmarks.gpu.bench --json FILE [--seconds 150]

The file is written anew after every case, so that a run that is cut off keeps what it has. First all cases without
torch.compile; then those of COMPILED once more with it, all implementations interleaved again. The exit code is 1
if a result was wrong or an implementation failed; a missed bar is no failure.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch._functorch import config as functorch

from benchmarks import machine, peers
from benchmarks.gpu import device as gpu
from benchmarks.gpu import results, timing
from benchmarks.gpu.classes import HOST, all_cases, is_compiled
from benchmarks.gpu.judge import share_of_floor
from benchmarks.measure import disagreements, reference, settled
from benchmarks.measure import measure as on_the_hosts_clock
from benchmarks.shapes import Case

HOST_SECONDS = 1.0


def _reason(error: BaseException) -> str:
    """One line of it."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:150] if text else ''}"


class Bench:
    """One device, and the run that grows on it."""

    def __init__(self, device: str, l2_bytes: int, run: results.Run, save: Callable[[], None]) -> None:
        self.device, self.l2_bytes, self.run, self.save = device, l2_bytes, run, save
        self.flush = timing.flusher(l2_bytes, device)
        self.failures: list[str] = []

    def _fail(self, result: results.Result, name: str, why: str) -> None:
        result.notes[name] = why
        self.failures.append(f"{result.case}: {name}: {why}")
        print(f"FAILED {self.failures[-1]}", flush=True)

    def _subjects(
        self, case: Case, sets: timing.Inputs, names: Sequence[str], result: results.Result
    ) -> list[peers.Subject]:
        """Those whose results are right; the others leave a note."""
        data = settled(case, sets[0])
        expected = reference(case, data)
        subjects = []
        for name in names:
            try:
                subject = timing.build(name, case, data)
                with timing.backend(name):
                    wrong = disagreements(case, subject, expected)
            except peers.Unsupported as reason:
                result.notes[name] = str(reason)
            except Exception as error:
                self._fail(result, name, _reason(error))
            else:
                for complaint in wrong:
                    self._fail(result, name, complaint)
                if not wrong:
                    subjects.append(subject)
        return subjects

    def case(self, case: Case, names: Sequence[str]) -> results.Result:
        result = results.Result(case)
        rotation = timing.rotation(case.bytes_minimum, self.l2_bytes)
        with torch.set_grad_enabled(case.learns):
            sets = timing.inputs(case, rotation.sets, self.device)
            graphs = {}
            for subject in self._subjects(case, sets, names, result):
                try:
                    graphs[subject.name] = timing.Graph(subject, sets, case, rotation.calls, self.flush)
                except Exception as error:
                    self._fail(result, subject.name, _reason(error))
            result.seconds = timing.measure(graphs)
        self.run.put(result)
        self.save()
        return result

    def host(self) -> None:
        """The eager step of a small layer, call by call and without waiting for the device."""
        data = timing.inputs(HOST, 1, self.device)[0]
        subjects = [timing.build(name, HOST, data) for name in ("bnext", "native")]
        measurements = on_the_hosts_clock(HOST, subjects, timing.ROUNDS, HOST_SECONDS)
        self.run.host = results.Result(HOST, {m.name: m.seconds for m in measurements})
        self.save()

    def guarded(self, what: object, call: Callable[[], object]) -> None:
        """A case that cannot be measured at all (memory, for one) does not end the others."""
        try:
            call()
        except Exception as error:
            self.failures.append(f"{what}: {_reason(error)}")
            print(f"FAILED {self.failures[-1]}", flush=True)
        torch.cuda.empty_cache()


def line(result: results.Result, copy_rate: float) -> str:
    """For whoever watches."""
    share = share_of_floor(result, copy_rate)
    own = result.median("bnext")
    text = f"{result.case.shapes}, {result.case}: "
    text += "not measured" if own is None or share is None else f"{own * 1e6:.2f} us, {share:.0%} of copy"
    for name in ("native", "cudnn", "compile"):
        ratio = result.ratio(name)
        text += "" if ratio is None else f", {ratio:.2f} x {name}"
    return text


def measure_all(bench: Bench, copy_rate: float, deadline: float, only: Sequence[str] = ()) -> None:
    every = [name for name in timing.IMPLEMENTATIONS if not only or name in only]
    plain = [name for name in every if name != "compile"]
    left = [(case, plain) for case in all_cases()]
    if "compile" in every:
        left += [(case, every) for case in all_cases() if is_compiled(case)]
    bench.guarded(HOST, bench.host)
    while left:
        if time.monotonic() > deadline:
            bench.failures.append(f"out of time: {len(left)} cases were left out")
            print(f"FAILED {bench.failures[-1]}", flush=True)
            return
        case, names = left.pop(0)
        bench.guarded(
            case, lambda case=case, names=names: print(line(bench.case(case, names), copy_rate), flush=True)
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--seconds", type=float, default=150.0, help="begin no case after these (default: 150)"
    )
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="implementations; default: all")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    functorch.donated_buffer = False  # the compiled backward is captured several times for one forward
    run = results.Run(machine={**machine.describe(), "gpu": gpu.describe()})
    run.rates = gpu.rates("cuda")
    print(f"{run.machine['gpu']}\n{run.rates}", flush=True)

    def save() -> None:
        results.write(options.json, run)

    save()
    bench = Bench("cuda", run.machine["gpu"]["l2_bytes"], run, save)
    measure_all(bench, run.rates["copy"], deadline, options.only)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
