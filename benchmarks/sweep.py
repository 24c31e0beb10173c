"""What a sweep costs beyond its runs: ours against plain Ray Tune, and against bare processes.

All three train the same tiny runs, as many at once. Each is timed as a whole process, with few runs
and with many: the slope is the price of a run, the rest is the price of starting. Plain Ray Tune is
what its manual shows, a function that runs the trainer and reports once; it ships nothing, holds no
lease and does not notice a hang.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

GRID = """
name: sweep
seeds: {seeds}
arms:
  hetero: {{attn: stiefel, mlp: dgram}}
base:
  data: {{source: text, path: {texts}}}
  model: {{n_layer: 1, n_head: 2, d_model: 16, context: 16, vocab_size: 256}}
  optimizer: {{muon: {{solver: projected}}}}
  schedule: {{steps: 4, warmup_steps: 1, batch_size: 8}}
  evaluation: {{every: 4, batches: 1}}
  runtime: {{device: cpu, threads: 1}}
resources: {{max_concurrent: {concurrent}}}
"""
GOAL = 1.2
"""Ours over plain Ray Tune, per run."""
WAYS = ("bare processes", "plain Ray Tune", "mmsweep")


# --- the three ways, each in a process of its own ----------------------------------------------------


def write_grid(folder: Path, runs: int, concurrent: int) -> Path:
    texts = folder / "texts"
    if not texts.exists():
        texts.mkdir()
        for number in range(20):
            (texts / f"{number}.txt").write_text(f"line {number} of a small corpus\n" * 40)
    path = folder / f"sweep-{runs}.yaml"
    path.write_text(
        GRID.format(seeds=list(range(1, runs + 1)), texts=f"{texts}/*.txt", concurrent=concurrent)
    )
    return path


def trainer_commands(grid: Path, out: Path) -> list[list[str]]:
    """What trains each run of the grid, alone."""
    from mmsweep.grid import load_grid
    from trainers.corpus import identify

    commands = []
    for run_id, run in load_grid(grid, identify=identify).runs.items():
        folder = out / run_id
        folder.mkdir(parents=True)
        (folder / "run.yaml").write_text(run.model_dump_json())
        commands.append([
            *(sys.executable, "-m", "trainers.train", str(folder / "run.yaml")),
            *("--run-dir", str(folder), "--quiet"),
        ])  # fmt: skip
    return commands


def bare(grid: Path, out: Path, concurrent: int) -> None:
    with ThreadPoolExecutor(concurrent) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), trainer_commands(grid, out)))


def plain_tune(grid: Path, out: Path, concurrent: int) -> None:
    from mmsweep.cluster import connect

    commands = trainer_commands(grid, out)
    with connect(None):
        from ray import tune

        def train(config: dict[str, Any]) -> None:
            subprocess.run(config["command"], check=True)
            tune.report({"done_": 1})

        tune.Tuner(
            tune.with_resources(train, {"CPU": 1}),
            param_space={"command": tune.grid_search(commands)},
            tune_config=tune.TuneConfig(max_concurrent_trials=concurrent),
            run_config=tune.RunConfig(storage_path=str(out / "tune"), verbose=0),
        ).fit()


def ours(grid: Path, out: Path, _: int) -> None:
    """The launch as it is, with stopwatches: a trial's start to its first step, and the report."""
    from mmsweep import launch
    from mmsweep.agent import News
    from mmsweep.progress import Board

    begun: dict[str, float] = {}
    first: dict[str, float] = {}

    class Stopwatch(Board):
        def started(self, run_id: str) -> None:
            begun[run_id] = time.perf_counter()
            super().started(run_id)

        def heard(self, run_id: str, news: News) -> None:
            if news.step > 0:
                first.setdefault(run_id, time.perf_counter() - begun[run_id])
            super().heard(run_id, news)

    vars(launch)["Board"] = Stopwatch
    write_report, report_s = vars(launch)["_report"], [0.0]

    def timed_report(*arguments: Any, **options: Any) -> int:
        start = time.perf_counter()
        code: int = write_report(*arguments, **options)
        report_s[0] += time.perf_counter() - start
        return code

    vars(launch)["_report"] = timed_report
    code = launch.main([str(grid), "--store", str(out)])
    if code:
        raise SystemExit(code)
    print(json.dumps({"first": list(first.values()), "report": report_s[0]}))


# --- the measurement ---------------------------------------------------------------------------------


def timed(way: str, runs: int, options: argparse.Namespace, folder: Path) -> tuple[float, list[float], float]:
    """Seconds of the whole but for the report; for ours those to each first step, and of the report."""
    grid = write_grid(folder, runs, options.concurrent)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, __file__, "--one", way, "--grid", str(grid), "--into", out]
        begun = time.perf_counter()
        done = subprocess.run(
            [*command, "--concurrent", str(options.concurrent)],
            env=os.environ | {"MMSWEEP_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(f"{way}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    if way != WAYS[2]:
        return seconds, [], 0.0
    own = json.loads(done.stdout.splitlines()[-1])
    return seconds - own["report"], own["first"], own["report"]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from machine import progress

    few, many = options.runs
    times: dict[str, dict[int, list[float]]] = {way: {few: [], many: []} for way in WAYS}
    first_steps: list[float] = []
    reports: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        timed(WAYS[0], few, options, folder)  # makes the corpus, and fills the page cache
        for number in range(options.rounds):
            for runs in options.runs:
                for way in WAYS:
                    progress(f"round {number + 1} of {options.rounds}: {runs} runs by {way}")
                    seconds, first, report_s = timed(way, runs, options, folder)
                    reports += [report_s] if way == WAYS[2] and runs == many else []
                    times[way][runs].append(seconds)
                    first_steps += first[
                        options.concurrent :
                    ]  # the first of each lane start a cold Ray worker
    result: dict[str, Any] = {"ways": {}}
    for way, own in times.items():
        low, high = (statistics.median(own[runs]) for runs in (few, many))
        a_run = (high - low) / (many - few)
        result["ways"][way] = {"seconds": own, "seconds_a_run": a_run, "seconds_to_start": low - few * a_run}
    plain = result["ways"][WAYS[1]]["seconds_a_run"]
    for own in result["ways"].values():
        own["over_plain_tune"] = own["seconds_a_run"] / plain
    result["seconds_of_the_report"] = statistics.median(reports)
    result["seconds_to_first_step"] = {"median": statistics.median(first_steps), "max": max(first_steps)}
    return result


def report(result: dict[str, Any]) -> str:
    from machine import introduction, table

    settings = result["settings"]
    lines = [introduction(result), ""]
    if settings["quick"]:
        lines += ["**Quick run: a smoke test.**", ""]
    few, many = settings["runs"]
    lines += [
        f"{settings['concurrent']} at once, {settings['rounds']} interleaved rounds, medians. A run: "
        f"(time of {many} − time of {few}) / {many - few}.",
        "",
    ]
    rows = [
        [
            way,
            f"{own['seconds_a_run']:.2f}",
            f"{own['over_plain_tune']:.2f}",
            f"{own['seconds_to_start']:.1f}",
        ]
        for way, own in result["ways"].items()
    ]
    lines += [table(("", "s a run", "over plain Ray Tune", "s to start and end"), rows), ""]
    first = result["seconds_to_first_step"]
    lines += [
        f"From the start of a warm trial to its first step: {first['median']:.2f} s (median), "
        f"{first['max']:.2f} s (worst); importing torch is most of it.",
        f"The report of {many} runs, which only mmsweep writes and which is not counted above: "
        f"{result['seconds_of_the_report']:.1f} s.",
        f"Goal: at most {GOAL} times plain Ray Tune a run, 5 s to the first step.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, nargs=2, default=[4, 20], metavar=("FEW", "MANY"))
    parser.add_argument("--concurrent", type=int, default=2, help="runs at once, and no fewer cores")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a smoke test: 1 and 2 runs, one round")
    for hidden in ("--one", "--grid", "--into"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        {WAYS[0]: bare, WAYS[1]: plain_tune, WAYS[2]: ours}[options.one](
            Path(options.grid), Path(options.into), options.concurrent
        )
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    import torch
    from machine import RESULTS, heading, publish

    options.out = options.out or RESULTS
    if options.quick:
        options.runs, options.rounds, options.concurrent = [1, 2], 1, 1
    torch.set_num_threads(1)
    device = torch.device("cpu")
    result = heading("sweep", device)
    result["settings"] = {key: getattr(options, key) for key in ("runs", "concurrent", "rounds", "quick")}
    result |= measure(options)
    publish(options, device, result, report(result))


if __name__ == "__main__":
    main()
