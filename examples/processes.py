"""The digits network in several processes with few images each, whose batch norms share their statistics.

Trained by DistributedDataParallel on the CPU after bnext.synchronize, and beside that by one process with all images of
a step: the same network up to rounding. The exit code is 1 where the former recognizes fewer than 97 % of the test
images, or where processes disagree.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.nn import functional as F
from tqdm import tqdm

import bnext
from digits import load, network

REQUIRED_ACCURACY = 0.97


def train(model: nn.Module, options: argparse.Namespace, share: slice, bar: tqdm[None]) -> float:
    """Test accuracy after some epochs over all images; of those of a step this process has a share."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    (images, labels), (test_images, test_labels) = load()
    generator = torch.Generator().manual_seed(options.seed)  # the same order everywhere
    for _ in range(options.epochs):
        model.train()
        for chosen in torch.randperm(len(labels), generator=generator).split(
            options.images * options.processes
        ):
            mine = chosen[share]
            if len(chosen) < options.images * options.processes:
                break  # DistributedDataParallel takes the mean of everyone's mean loss: equal shares
            optimizer.zero_grad()
            F.cross_entropy(model(images[mine]), labels[mine]).backward()
            optimizer.step()
        bar.update()
    model.eval()
    with torch.no_grad():
        return (model(test_images).argmax(1) == test_labels).float().mean().item()


def process(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.processes
    )
    accuracies = {}
    with tqdm(total=2 * options.epochs, unit="epoch", disable=rank > 0) as bar:
        torch.manual_seed(options.seed)
        synchronized = nn.parallel.DistributedDataParallel(bnext.synchronize(network(nn.BatchNorm2d)))
        mine = slice(rank, None, options.processes)
        accuracies["all processes"] = train(synchronized, options, mine, bar)
        torch.manual_seed(options.seed)
        accuracies["one"] = train(network(bnext.BatchNorm2d), options, slice(None), bar)
    everyones: list[dict[str, float]] = [{}] * options.processes
    dist.all_gather_object(everyones, accuracies)
    dist.destroy_process_group()
    if rank > 0:
        return
    print(
        f"{options.processes} processes, {options.images} images in each at a time, {options.epochs} epochs"
    )
    print(f"{'trained by':14}{'test accuracy in each process'}")
    for name in accuracies:
        print(f"{name:14}{', '.join(f'{of[name]:.2%}' for of in everyones)}")
    together = {of["all processes"] for of in everyones}
    if len(together) > 1 or min(together) < REQUIRED_ACCURACY:
        sys.exit(f"expected the same accuracy of {REQUIRED_ACCURACY:.0%} or more in all processes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Handwritten digits in several processes on this machine.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--images", type=int, default=4, help="of each process in a step")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if min(options.processes, options.images, options.epochs) < 1:
        parser.error("--processes, --images and --epochs must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(process, (options, folder), nprocs=options.processes)


if __name__ == "__main__":
    main()
