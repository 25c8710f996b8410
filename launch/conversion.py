"""The state of a checkpoint, parameter by parameter, whatever ZeRO stage and number of processes wrote it.

DeepSpeed's files hold flat partitions; the manifest's layout says which parameter lies where. Files are memory-mapped
and a record is read when it is asked for, so that no process holds more than one parameter beside its own partitions.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of a flattened parameter: at `offset` of a process's partition of a group."""

    rank: int
    group: int
    offset: int
    start: int
    numel: int


def parameter_layout(engine: Any) -> dict[str, Any]:
    """How parameters lie in the optimizer's flat partitions: enough to cut and join them for another world size.

    With stages 1 and 2 a group is one flat vector, padded and cut evenly over processes, `offset` is the parameter's
    place in it; with stage 3 each parameter is padded and cut by itself, `offset` is its place in every partition; with
    stage 0 nothing is cut.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    layout = {"stage": stage, "optimizer": type(optimizer).__name__}
    if stage == 0:
        names = {id(p): name for name, p in engine.module.named_parameters()}
        groups = [
            [{"name": names[id(p)], "shape": list(p.shape)} for p in group["params"]]
            for group in optimizer.param_groups
        ]
        return layout | {"groups": [{"parameters": parameters} for parameters in groups]}
    groups = [
        [{"name": name, "shape": list(shape)} for name, shape in shapes.items()]
        for shapes in engine._get_zero_param_shapes()
    ]
    sizes = {name: p.ds_tensor.ds_numel if stage == 3 else p.numel() for name, p in engine.module.named_parameters()}
    for parameters in groups:
        offset = 0
        for parameter in parameters:
            size = int(sizes[parameter["name"]])
            parameter |= {"offset": offset, **({"partition_numel": size} if stage == 3 else {})}
            offset += size
    if stage == 3:
        return layout | {"groups": [{"parameters": parameters} for parameters in groups]}
    # With parameter_alignment there are gaps between parameters.
    for parameters, offsets in zip(groups, getattr(optimizer, "round_robin_bit16_offsets", ()), strict=False):
        for parameter, offset in zip(parameters, offsets, strict=True):
            parameter["offset"] = int(offset)
    return layout | {
        "groups": [
            {"parameters": parameters, "partition_numel": int(partition.numel())}
            for parameters, partition in zip(groups, _partitions(engine), strict=True)
        ]
    }


def pieces(layout: dict[str, Any], world_size: int) -> dict[str, list[Piece]]:
    """Where the pieces of each parameter lie, in the parameter's order; padding belongs to none."""
    found: dict[str, list[Piece]] = {}
    for number, group in enumerate(layout["groups"]):
        for parameter in group["parameters"]:
            numel = math.prod(parameter["shape"])
            if layout["stage"] == 0:
                cut = [Piece(0, number, 0, 0, numel)]
            elif layout["stage"] == 3:
                size, offset = parameter["partition_numel"], parameter["offset"]
                cut = [
                    Piece(rank, number, offset, start, min(size, numel - start))
                    for rank, start in enumerate(range(0, numel, size))
                ]
            else:
                size, offset = group["partition_numel"], parameter["offset"]
                cut = []
                for rank in range(offset // size, -(-(offset + numel) // size)):
                    begin, end = max(offset, rank * size), min(offset + numel, (rank + 1) * size)
                    cut.append(Piece(rank, number, begin - rank * size, begin - offset, end - begin))
            assert cut[-1].rank < world_size, parameter
            found[parameter["name"]] = cut
    return found


class Record:
    """One parameter of a checkpoint: its float32 weight, AdamW's two moments and number of updates."""

    def __init__(self, name: str, shape: tuple[int, ...], parts: list[tuple[Piece, dict[str, Tensor]]]) -> None:
        self.name = name
        self.shape = shape
        self._parts = parts

    @property
    def step(self) -> int:
        """How many updates the moments have seen; 0: there are none yet."""
        saved = self._parts[0][1].get("step")
        return 0 if saved is None else int(saved)

    def read(self, what: str, start: int = 0, numel: int | None = None) -> Tensor:
        """`numel` elements from `start` on of "weight", "exp_avg" or "exp_avg_sq": flat, float32, on the CPU."""
        numel = math.prod(self.shape) - start if numel is None else numel
        values = torch.zeros(numel)
        for piece, tensors in self._parts:
            begin, end = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if begin < end and what in tensors:
                offset = piece.offset + begin - piece.start
                values[begin - start : end - start] = tensors[what].flatten()[offset : offset + end - begin]
        return values


class Records:
    """The records of a checkpoint whose files are known to be whole."""

    def __init__(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        self._layout = manifest["layout"]
        self._pieces = pieces(self._layout, manifest["world_size"])
        self.shapes = {p["name"]: tuple(p["shape"]) for group in self._layout["groups"] for p in group["parameters"]}
        self._numbers = {name: number for number, name in enumerate(self.shapes)}
        pattern = "mp_rank_00_model_states" if self._layout["stage"] == 0 else r"zero_pp_rank_(\d+)_.*_optim_states"
        self._files: dict[int, Any] = {}
        for name in manifest["files"]:
            if match := re.fullmatch(rf"deepspeed/(?:bf16_)?{pattern}\.pt", name):
                rank = int(match[1]) if match.re.groups else 0
                self._files[rank] = torch.load(checkpoint / name, map_location="cpu", mmap=True, weights_only=False)

    def __iter__(self) -> Iterator[Record]:
        return (self[name] for name in self.shapes)

    def __getitem__(self, name: str) -> Record:
        return Record(name, self.shapes[name], [(piece, self._tensors(name, piece)) for piece in self._pieces[name]])

    def _tensors(self, name: str, piece: Piece) -> dict[str, Tensor]:
        saved = self._files[piece.rank]
        if self._layout["stage"] == 0:
            weight, number, state = saved["module"][name], self._numbers[name], saved["optimizer"]["state"]
        else:
            zero, number = saved["optimizer_state_dict"], piece.group
            third = self._layout["stage"] == 3
            weight = zero["fp32_flat_groups" if third else "single_partition_of_fp32_groups"][number]
            state = zero["optimizer_state_dict" if third else "base_optimizer_state"]["state"]
        return {"weight": weight, **state.get(number, {})}


@torch.no_grad()
def load_records(records: Records, engine: Any, rank: int, world_size: int, *, moments: bool) -> None:
    """Put the weights of a fresh engine, with `moments` also the state of its optimizer, to what `records` say.

    Called by all processes. The engine's parameters are those of `records`, in names and shapes. Raises `UserError` if
    the optimizer's state lies on NVMe.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        for name, parameter in engine.module.named_parameters():
            record = records[name]
            parameter.copy_(record.read("weight").view(record.shape))
            if moments and record.step:
                state = optimizer.state[parameter] = _fresh_state(optimizer, parameter, record.step)
                for key in MOMENTS:
                    state[key].copy_(record.read(key).view(record.shape))
        return
    if getattr(optimizer, "swap_optimizer", False):
        raise UserError(
            "deepspeed.zero_optimization.offload_optimizer.device: nvme: only a checkpoint of the same number of "
            "processes and train.zero_stage can be loaded; use device: cpu"
        )
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    partitions = _partitions(engine)
    for name, cut in pieces(parameter_layout(engine), world_size).items():
        record = records[name]
        for piece in cut:
            if piece.rank != rank:
                continue
            partition, place = partitions[piece.group], slice(piece.offset, piece.offset + piece.numel)
            partition.data[place] = record.read("weight", piece.start, piece.numel).to(partition.device)
            if moments and record.step:
                if not (state := optimizer.optimizer.state[partition]):
                    state |= _fresh_state(optimizer.optimizer, partition, record.step)
                for key in MOMENTS:
                    state[key][place] = record.read(key, piece.start, piece.numel).to(partition.device)
    if moments:
        # A process that holds nothing but padding of a group has a state of it too.
        step = max((record.step for record in records), default=0)
        for partition in partitions:
            if step and partition.numel() and not (state := optimizer.optimizer.state[partition]):
                state |= _fresh_state(optimizer.optimizer, partition, step)
    if stage != 3:
        optimizer.update_lp_params()
        return
    for number, partition in enumerate(partitions):
        flat, parameters = optimizer.fp16_partitioned_groups_flat[number], optimizer.fp16_partitioned_groups[number]
        flat.data.copy_(partition.data)
        for parameter, values in zip(parameters, optimizer.unflatten(flat, parameters), strict=True):
            parameter.data = values.data
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    optimizer.checkpoint_event_epilogue()


def _fresh_state(optimizer: torch.optim.Optimizer, parameter: Tensor, step: int) -> dict[str, Tensor]:
    """AdamW's state with moments of 0; its fused form counts on the parameter's device."""
    device = parameter.device if optimizer.defaults.get("fused") else "cpu"
    return {
        "step": torch.tensor(float(step), dtype=torch.float32, device=device),
        **{key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS},
    }


def master_weights(engine: Any) -> list[Tensor]:
    """What the optimizer updates in this process: flat float32 weights, one vector a group; stage 0: the parameters."""
    if engine.zero_optimization_stage() == 0:
        return list(engine.module.parameters())
    return _partitions(engine)


def _partitions(engine: Any) -> list[Tensor]:
    """This process's flat float32 weights, one vector a group."""
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            partitions: list[Tensor] = getattr(optimizer, name)
            return partitions
    raise TypeError(f"{type(optimizer).__name__} has no float32 partitions that this project knows")
