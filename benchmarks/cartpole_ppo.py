"""PPO on CartPole-v1 to a mean return of 475 over 100 episodes: every seed, and the time beside Stable-Baselines3's.

    python benchmarks/cartpole_ppo.py                                          # ours alone, ten seeds
    python benchmarks/cartpole_ppo.py --peer /path/to/other/bin/python         # and the ratios to Stable-Baselines3
    python benchmarks/cartpole_ppo.py --peer /path/to/other/bin/python --write # and the data file; about 20 minutes

A run ends at the first moment when the last 100 finished episodes, in order of finishing, average 475: ours looks after
each rollout of 32 x 64 steps, the peer after each step. That is all the stopping there is; whether it came too early is
measured afterwards, on 100 fresh episodes of the frozen policy, actions sampled. The peer runs in three ways: with its
defaults (one environment), with 32 environments and otherwise its defaults, and with our settings. It lives in an
environment of its own (`pip install torch==2.13.0 stable-baselines3 gymnasium`), in a process that waits while ours is
timed. One thread each; the two alternate, and only the ratio of neighbours counts. Timed is the learning, after a
warm-up of both, without the making of environments and networks.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parents[1] / "chapters" / "data" / "ch04_cartpole_ppo.json"
NUM_ENVS, LENGTH, STEPS, SOLVED = 32, 64, 147, 475.0
PEERS = {  # what the peer is called, which seeds it runs, and after how many steps it gives up
    "defaults": (range(5), 300_000),
    "32 environments": (range(5, 10), 800_000),
    "our settings": (range(5), NUM_ENVS * LENGTH * STEPS),
}


class Peer:
    """Another interpreter that runs this file with ``--serve`` and does one run whenever it is given a seed."""

    def __init__(self, python: str, kind: str) -> None:
        self.process = subprocess.Popen(
            [python, __file__, "--serve", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.versions = self.result()  # once it is warm

    def __call__(self, seed: int) -> dict[str, Any]:
        """What came of one run."""
        assert self.process.stdin
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()
        return self.result()

    def result(self) -> dict[str, Any]:
        """What it says next."""
        assert self.process.stdout
        for line in self.process.stdout:  # anything else it prints is not for us
            if line.startswith("result "):
                return json.loads(line.removeprefix("result "))
        raise RuntimeError(f"the peer stopped with exit status {self.process.wait()}")

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def serve(run: Callable[[int], dict[str, Any]], versions: dict[str, str]) -> None:
    """The peer's side: its versions, then one run per seed on standard input, what came of it to standard output."""
    print("result", json.dumps(versions), flush=True)
    for line in sys.stdin:
        print("result", json.dumps(run(int(line))), flush=True)


def ours(seed: int, stop_at: float | None = SOLVED, steps: int = STEPS) -> dict[str, Any]:
    """One run of ours."""
    import torch

    from rlhfkit import control
    from rlhfkit.train_control import train_cartpole_ppo

    generator = torch.Generator().manual_seed(seed)
    policy, value = control.cartpole_networks(generator=generator)
    envs, log = control.make_cartpole(NUM_ENVS), []
    wall, cpu = time.perf_counter(), time.process_time()
    train_cartpole_ppo(
        policy,
        value,
        envs,
        steps=steps,
        rollout_length=LENGTH,
        generator=generator,
        stop_at=stop_at,
        on_step=lambda _, metrics: log.append(metrics),
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    score = control.evaluate_policy(policy, control.make_cartpole(100), generator=generator)
    steps_taken, means = ([m[name] for m in log] for name in ("time/total_timesteps", "rollout/ep_rew_mean"))
    record: dict[str, Any] = {"seed": seed, "steps": int(steps_taken[-1]), "solved_at": None}
    if means[-1] >= SOLVED:
        record["solved_at"] = record["steps"]
    record |= {"seconds": round(wall, 2), "cpu_s": round(cpu, 2), "evaluation": round(score.mean().item(), 1)}
    curves: dict[str, Any] = {"timesteps": [int(x) for x in steps_taken]}
    curves["mean_return"] = [None if math.isnan(x) else round(x, 1) for x in means]  # before 100 episodes: none
    return record | curves


def stable_baselines(kind: str) -> tuple[Callable[[int], dict[str, Any]], dict[str, str]]:
    """The peer's run of one seed, and its versions; works where stable-baselines3 is installed."""
    import gymnasium
    import stable_baselines3
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    torch.set_num_threads(1)
    num_envs = 1 if kind == "defaults" else NUM_ENVS
    settings: dict[str, Any] = {}
    if kind == "our settings":  # those of rlhfkit.train_control.CARTPOLE; Adam's epsilon is 1e-5 there already
        settings = {"n_steps": LENGTH, "batch_size": 256, "n_epochs": 6, "gamma": 0.98, "gae_lambda": 0.95}
        settings |= {"learning_rate": lambda left: 3e-3 * left, "clip_range": lambda left: 0.2 * left}

    class UntilSolved(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.returns: list[float] = []
            self.solved_at: int | None = None

        def _on_step(self) -> bool:
            self.returns += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
            if len(self.returns) >= 100 and sum(self.returns[-100:]) / 100 >= SOLVED:
                self.solved_at = self.num_timesteps
            return self.solved_at is None

    def run(seed: int, limit: int = PEERS[kind][1]) -> dict[str, Any]:
        model = PPO("MlpPolicy", make_vec_env("CartPole-v1", num_envs), seed=seed, device="cpu", **settings)
        callback = UntilSolved()
        wall, cpu = time.perf_counter(), time.process_time()
        model.learn(limit, callback=callback)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        score, _ = evaluate_policy(
            model, make_vec_env("CartPole-v1", 100, seed=10_000 + seed), n_eval_episodes=100, deterministic=False
        )
        record = {"seed": seed, "solved_at": callback.solved_at, "steps": model.num_timesteps}
        return record | {"seconds": round(wall, 2), "cpu_s": round(cpu, 2), "evaluation": round(float(score), 1)}

    run(99, 1)  # one rollout and its updates
    versions = {"stable_baselines3": stable_baselines3.__version__, "torch": torch.__version__}
    return run, versions | {"gymnasium": gymnasium.__version__}


def compare(runs: list[dict[str, Any]], peer: list[dict[str, Any]]) -> dict[str, Any]:
    """What the peer took over what ours took beside it, by the clock and in processor time; and how it fared."""
    out: dict[str, Any] = {}
    beside = {row["seed"]: row for row in runs}
    for name, what in (("ratio", "seconds"), ("cpu_ratio", "cpu_s")):
        ratios = [row[what] / beside[row["seed"]][what] for row in peer]
        out |= {name: round(statistics.median(ratios), 2), f"{name}_spread": [round(f(ratios), 2) for f in (min, max)]}
    return out | summary(peer)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Steps and seconds over the seeds, and the worst evaluation; a run that gave up counts with what it took."""
    out: dict[str, Any] = {"solved": sum(r["solved_at"] is not None for r in runs), "seeds": len(runs)}
    for name in ("steps", "seconds", "cpu_s"):
        values = [r[name] for r in runs]
        out |= {f"median_{name}": round(statistics.median(values), 2), f"worst_{name}": max(values)}
    return out | {"lowest_evaluation": min(r["evaluation"] for r in runs)}


def alternate(
    seeds: int, peers: dict[str, Peer], records: dict[str, list[dict[str, Any]]], save: Callable[[], None]
) -> None:
    """Ours on every seed and each peer on its own ones, in turn; who goes first alternates too.

    A seed whose run of ours is in the records is done, with all its peers.
    """
    for seed in range(seeds):
        if any(row["seed"] == seed for row in records["ours"]):
            continue
        names = ["ours", *(name for name in peers if seed in PEERS[name][0])]
        for name in names[:: 1 if seed % 2 else -1]:
            record = ours(seed) if name == "ours" else peers[name](seed)
            records[name].append(record)
            print(name, {k: x for k, x in record.items() if not isinstance(x, list)}, flush=True)
        save()


def main() -> None:
    """Ten seeds of ours and, between them, the peer's; fails where a seed is not solved or the ratio is below 8."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a Python in whose environment stable-baselines3 is installed")
    parser.add_argument("--kind", choices=tuple(PEERS), action="append", help="of the peer's runs; all without it")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="the data file, after each seed")
    parser.add_argument("--resume", action="store_true", help="go on from the seeds that the data file has")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--serve", choices=tuple(PEERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*stable_baselines(arguments.serve))
        return
    import gymnasium
    import torch

    from rlhfkit.train_control import CARTPOLE

    torch.set_num_threads(1)
    ours(99, steps=2)  # imports and caches
    peers = {kind: Peer(arguments.peer, kind) for kind in arguments.kind or PEERS} if arguments.peer else {}

    old = json.loads(OUT.read_text()) if arguments.resume else {"runs": [], "peer": {}}
    runs, theirs = old["runs"], {kind: [] for kind in peers} | old["peer"]

    def save() -> None:
        if not arguments.write:
            return
        versions = {"python": platform.python_version(), "torch": torch.__version__, "gymnasium": gymnasium.__version__}
        out: dict[str, Any] = {"command": "python benchmarks/cartpole_ppo.py --peer .../bin/python --write"}
        out |= {"date": arguments.date, "versions": versions}
        out["peer_versions"] = next((peer.versions for peer in peers.values()), None)
        out["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        out["settings"] = {"num_envs": NUM_ENVS, "rollout_length": LENGTH, "steps": STEPS} | asdict(CARTPOLE)
        out["summary"] = summary(runs)
        out["ratios"] = {kind: compare(runs, rows) for kind, rows in theirs.items() if rows}
        out |= {"runs": runs, "peer": theirs}
        OUT.write_text(json.dumps(out, separators=(",", ":")).replace('{"seed"', '\n{"seed"') + "\n")

    alternate(arguments.seeds, peers, {"ours": runs, **theirs}, save)
    for peer in peers.values():
        peer.close()
    ratios = {kind: compare(runs, rows) for kind, rows in theirs.items() if rows}
    print("ours:", summary(runs))
    for kind, row in ratios.items():
        print(f"Stable-Baselines3, {kind}:", row)
    solved = all(r["solved_at"] is not None and r["evaluation"] >= SOLVED for r in runs)
    sys.exit(not solved or ("defaults" in ratios and ratios["defaults"]["ratio"] < 8))


if __name__ == "__main__":
    main()
