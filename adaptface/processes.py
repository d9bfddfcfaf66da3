"""The processes of a launcher: accelerate's or torch's."""

from __future__ import annotations

import os

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def start_processes(script: str) -> PartialState:
    """Join the processes that the launcher started for a script, on CPUs if it says so; alone without a launcher.

    Raises:
        ValueError: see [`check_launch`].
    """
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    check_launch(processes.num_processes, script)
    return processes


def check_launch(num_processes: int, script: str) -> None:
    """Compare the processes that a script sees with those that its launcher was asked for.

    Raises:
        ValueError: there are fewer; says how to start several on CPUs.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    # `accelerate launch --cpu --num_processes 2` names a rendezvous and then starts one plain process.
    lost = "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if lost or asked != num_processes:
        raise ValueError(
            f"the launcher was asked for {'several' if lost else asked} processes, but {script} sees "
            f"{num_processes}. On CPUs use: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
            f"--num_processes N {script} ..."
        )
