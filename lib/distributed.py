"""Several processes of one run, as torchrun starts them: one per GPU, over NCCL, or on CPUs, over gloo.

A process on its own is number 0 of 1, and nothing here has any effect. Counts travel over gloo, not the GPU.
"""

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from lib.cli import UserError

WAIT = datetime.timedelta(days=1)      # at most, for a process that prepares, evaluates or saves alone


def world_size() -> int:
    return max(1, int(os.environ.get("WORLD_SIZE") or 1))


def rank() -> int:
    return int(os.environ.get("RANK") or 0) if world_size() > 1 else 0


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Within it the processes know each other, and only process 0 prints; yields the device of this one.

    Raises UserError when there are more processes than GPUs, or when torchrun did not start them.
    """
    if world_size() == 1:
        yield device
        return
    if missing := {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        raise UserError(f"WORLD_SIZE is set, but not {min(missing)}: start several processes with torchrun")
    if device.type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise UserError(f"{count} GPUs are too few for so many processes: lower --nproc-per-node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
    try:
        with contextlib.redirect_stdout(None if rank() else sys.stdout):
            yield device
    finally:
        dist.destroy_process_group()


def total(number: int) -> int:
    """The sum of a whole number over all processes, each of which waits for the others here.

    Raises UserError when one of them has ended.
    """
    if world_size() > 1:
        try:
            dist.all_reduce(summed := torch.tensor(number))
        except RuntimeError:
            raise UserError("another process of this run has ended; its own message tells why") from None
        number = summed.item()
    return number


def add_up(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over all processes: one message for all of them."""
    if world_size() > 1:
        dist.all_reduce(flat := torch.cat([t.flatten() for t in tensors]))
        for t, summed in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(summed.view_as(t))


def gather(items: list) -> list:
    """The items of all processes, in each of them."""
    if world_size() == 1:
        return items
    held = [[]] * world_size()
    dist.all_gather_object(held, items)
    return [item for own in held for item in own]


@contextlib.contextmanager
def first_in_line() -> Iterator[None]:
    """Process 0 goes through the block while the others wait, then they do: what it left, they find."""
    if rank() > 0:
        total(0)
    yield
    if rank() == 0:
        total(0)
