"""
Seconds and memory of opening a large unlabeled set: `python benchmarks/million_images.py`.

A folder tree of hard links to one image stands for the set, and an index is made of it as
`ssod index` does. A fresh process then opens the index as a run does, checks included, and draws a
first batch. Its peak is all the memory it ever held, PyTorch's included. Last, loader workers are
forked that read entries at random. What is "own" of a worker is held by no other process
(USS); its share divides every page by the number of processes that have it (PSS). Workers that
read nothing, and workers that read the same entries as Python strings, are measured for comparison.

Needs Linux. The tree takes about 100 MB of disk for a million images, and a minute.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ssod.cli.common import run_command
from ssod.cli.main import main as ssod
from ssod.config import merge_config
from ssod.data.build import build_train_loader, load_run_data
from ssod.data.shapes import ShapesSpec, write_shapes
from ssod.hosts.torchvision.defaults import get_config

FOLDER_SIZE = 1000  # images
WORKERS = 4


def make_tree(root: Path, image: Path, count: int) -> None:
    """Link an image `count` times, in folders like those of ImageNet."""
    for start in range(0, count, FOLDER_SIZE):
        folder = root / f"n{start:08d}"
        folder.mkdir(parents=True)
        # A file system allows only so many links to one file.
        first = folder / f"{folder.name}_{start:08d}.jpg"
        first.write_bytes(image.read_bytes())
        for i in range(start + 1, min(count, start + FOLDER_SIZE)):
            os.link(first, f"{folder}/{folder.name}_{i:08d}.jpg")


@contextmanager
def timed(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{what:48} {time.perf_counter() - start:8.1f} s", flush=True)


def memory(file: str, *keys: str) -> int:
    """Sum of fields of a file of /proc/self, in bytes."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.split(":")[0] in keys)


class Reader(Dataset):
    """Reads entries at random, and measures the memory of the process that did."""

    def __init__(self, read: Callable[[int], Any], size: int, count: int):
        self._read = read
        self._size = size
        self._count = count

    def __len__(self) -> int:
        return WORKERS

    def __getitem__(self, worker: int) -> tuple[int, int]:
        for i in np.random.default_rng(worker).integers(self._size, size=self._count).tolist():
            self._read(i)
        own = memory("smaps_rollup", "Private_Clean", "Private_Dirty")
        return own, memory("smaps_rollup", "Pss")


def measure_workers(what: str, reader: Reader) -> float:
    """Print the mean over workers; returns the MB that are their own."""
    loader = DataLoader(reader, None, num_workers=WORKERS, multiprocessing_context="fork")
    own, share = np.array(list(loader)).mean(0) / 1e6
    print(f"{what:48} {own:8.0f} MB own {share:8.0f} MB share", flush=True)
    return own


def open_index(root: Path, index: Path) -> None:
    """Open the index as a run does, and print what it takes; in a process of its own."""
    annotations, images = root / "shapes" / "annotations", root / "shapes" / "images"
    keys = {"JSON": annotations / "labeled.json", "IMAGES": images}
    options = {f"SSOD.DATA.LABELED_{key}": value for key, value in keys.items()}
    options |= {f"SSOD.DATA.UNLABELED_{key}": "" for key in ("JSON", "IMAGES", "TRUTH_JSON")}
    options |= {"SSOD.DATA.UNLABELED_INDEX": index, "SSOD.DATA.VAL_JSON": ""}
    overrides = [str(item) for pair in options.items() for item in pair]
    cfg = merge_config(get_config(), "configs/quickstart.yaml", overrides)
    print(f"{'peak of a process that has PyTorch':48} {memory('status', 'VmHWM') / 1e6:8.0f} MB")
    with timed("open the sets of a run"):
        data = load_run_data(cfg)
    with timed("first batch of both streams"):
        next(iter(build_train_loader(cfg, data, cfg.SSOD.BURN_IN_ITERS)))
    print(f"{'peak of the process':48} {memory('status', 'VmHWM') / 1e6:8.0f} MB", flush=True)
    size = len(data.unlabeled)
    with timed(f"ids of a tenth of {size} images selected"):
        data.unlabeled.select(data.unlabeled.image_ids[::10])
    idle, reader = (Reader(data.unlabeled.__getitem__, size, n) for n in (0, size // 5))
    nothing = measure_workers("worker that reads nothing", idle)
    flat = measure_workers("worker", reader) - nothing
    ids, names = list(data.unlabeled.image_ids), list(data.unlabeled.file_names)
    reader = Reader(lambda i: ids[i] == names[i], size, size // 5)
    lists = measure_workers("worker, with lists of strings", reader) - nothing
    print(f"reading makes {flat:.1f} MB a worker's own; lists of strings {lists:.1f} MB", end="")
    print(f", {lists / flat:.0f} times as much" if flat > 0 else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_shapes(root / "shapes", ShapesSpec(num_labeled=24, num_unlabeled=1, num_val=1))
        image = next((root / "shapes" / "images").glob("unlabeled_*"))
        with timed(f"make {args.images} links"):
            make_tree(root / "images", image, args.images)
        index = root / "index.tsv"
        with timed("ssod index"):
            ssod(["index", str(root / "images"), "--output", str(index)])
        print(f"{'size of the index':48} {index.stat().st_size / 1e6:8.0f} MB", flush=True)
        process = multiprocessing.get_context("spawn").Process(
            target=open_index, args=(root, index)
        )
        process.start()
        process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


if __name__ == "__main__":
    sys.exit(run_command(main))
