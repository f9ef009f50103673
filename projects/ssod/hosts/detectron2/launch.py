"""From a command line to one process a GPU, each with its `Run`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import BufferingHandler
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import default_setup, launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.evaluation import verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException

from ssod.config import merge_config
from ssod.core.distributed import get_rank, get_world_size
from ssod.errors import InputError
from ssod.evaluation.coco_metrics import LOW_FLOOR_AP
from ssod.evaluation.report import format_table
from ssod.hosts.detectron2.defaults import get_config, scale_to_world_size
from ssod.hosts.detectron2.run import Run, find_checkpoint
from ssod.hosts.detectron2.weights import local_path
from ssod.hosts.run import choose_checkpoint

INPUT_ERROR = 2  # exit status of a process that has told what is wrong with its input
COLUMNS = ("AP", LOW_FLOOR_AP, "AP50", "AP75", "APs", "APm", "APl")


def run(args: argparse.Namespace) -> None:
    """
    Train or evaluate with as many processes as `train_net.py`'s or torchrun's arguments ask for.

    Without GPUs the processes use gloo and one CPU.

    Raises:
        InputError: for more processes than GPUs; and as `Run`, if there is one process.
        SystemExit: with the status of a process that failed, which has said why.
    """
    if dist.is_torchelastic_launched():
        _join_torchrun()
        _work(args)
        return
    _check_processes("--num-gpus", args.num_gpus)
    if args.num_machines > 1 and args.dist_url == "auto":
        raise InputError("--num-machines above 1 needs --dist-url tcp://HOST:PORT of machine 0")
    try:
        launch(
            _work,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ProcessExitedException as error:
        if error.exit_code != INPUT_ERROR:  # such as being killed for its memory
            print(f"error: {error}", file=sys.stderr)
        sys.exit(max(error.exit_code, 1))


def _check_processes(what: str, count: int) -> None:
    num_gpus = torch.cuda.device_count()
    if count < 1:
        raise InputError(f"{what} must be at least 1, got {count}")
    if 0 < num_gpus < count:
        raise InputError(f"{what} is {count}, but this machine has {num_gpus} GPUs to use")


def _join_torchrun() -> None:
    """Do what Detectron2's launcher does, in a process that torchrun has started."""
    local_rank, local_size = (int(os.environ[f"LOCAL_{n}"]) for n in ("RANK", "WORLD_SIZE"))
    _check_processes("torchrun's --nproc-per-node", local_size)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=DEFAULT_TIMEOUT)
    comm.create_local_process_group(local_size)


def _work(args: argparse.Namespace) -> None:
    """Work as one of the processes."""
    try:
        main(args)
        leave_process_group()
    except InputError as error:
        if get_world_size() == 1:
            raise
        # Bad input mostly fails on all ranks; the others are ended with the first to exit.
        if get_rank() > 0:
            time.sleep(5)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(INPUT_ERROR)


@contextmanager
def _early_records() -> Iterator[list[logging.LogRecord]]:
    """Show what is said before there is a folder for the log, on the main rank, and keep it."""
    own = setup_logger(distributed_rank=get_rank(), name="ssod")
    early = BufferingHandler(sys.maxsize)
    own.addHandler(early)
    try:
        yield early.buffer
    finally:
        own.removeHandler(early)


def _start_log(cfg: CfgNode, args: argparse.Namespace, early: list[logging.LogRecord]) -> None:
    """Write the config and the log of the run into its folder, what was said before included."""
    default_setup(cfg, args)
    own = setup_logger(cfg.OUTPUT_DIR, get_rank(), name="ssod", configure_stdout=False)
    folder = os.path.join(cfg.OUTPUT_DIR, "")
    for handler in own.handlers:
        if str(getattr(getattr(handler, "stream", None), "name", "")).startswith(folder):
            for record in early:
                handler.handle(record)


def leave_process_group() -> None:
    """Wait for all ranks and end the process group, if there is one; the last call of a program."""
    # A process that exits with a group may be aborted by the threads of its backend.
    if get_world_size() > 1:
        dist.barrier()
        dist.destroy_process_group()


def main(args: argparse.Namespace) -> None:
    """Train or evaluate in this process, and print the results on the main one."""
    cfg = merge_config(get_config(), args.config_file, args.opts)
    cfg = scale_to_world_size(cfg, get_world_size())
    checkpoint = choose_checkpoint(cfg, find_checkpoint(cfg.OUTPUT_DIR), args, fetch=local_path)
    cfg.freeze()
    with _early_records() as early:
        run = Run(cfg, checkpoint, for_training=not args.eval_only)
    if args.eval_only:
        results = run.evaluate()
    else:
        # After the checks: it writes the config into a folder that may be of an earlier run.
        _start_log(cfg, args, early)
        results = run.train()
    if not comm.is_main_process():
        return
    if args.eval_only and not results:
        raise InputError(
            "--eval-only needs a test set; set SSOD.DATA.VAL_JSON, VAL_VOC or DATASETS.TEST"
        )
    if results:
        print(format_results(results))
        verify_results(cfg, results)


def format_results(results: dict[str, Any]) -> str:
    """Format nested results as a table, one row for each of teacher and student and measure."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for model in ("teacher", "student"):
        for name, value in flatten_results_dict(results.get(model, {})).items():
            measure, _, column = name.rpartition("/")
            row = rows.setdefault((model, measure), {"model": model, "measure": measure})
            row[column] = value
    columns = [c for c in COLUMNS if any(c in row for row in rows.values())]
    complete = [dict.fromkeys(columns, "") | row for row in rows.values()]
    return format_table(complete, ["model", "measure", *columns])
