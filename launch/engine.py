"""Processes and the DeepSpeed engine: the only module, with gradients.py and checkpoint.py, that touches DeepSpeed."""

import os
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from flash_model.gau import GatedAttentionUnit
from flash_model.lm import FlashLM, build_model, decayed_parameters
from launch.config import RunConfig, accumulation_steps
from launch.deepspeed_config import deepspeed_config
from pipeline.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them."""

    rank: int
    world_size: int
    device: torch.device
    control: Any
    """A gloo group for small decisions on the CPU: it neither waits for the GPU nor makes the GPU wait."""
    launched: bool = True
    """Whether a launcher started them, which they are not to outlive."""

    def total(self, *values: int) -> list[int]:
        """Sums of `values` over all processes."""
        sums = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(sums, group=self.control)
        return [int(value) for value in sums]

    def gather(self, value: T) -> list[T]:
        """`value` of every process, by rank."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self.control)
        return gathered

    def once(self, action: Callable[[], T]) -> T:
        """Run `action` in the first process and return its result in all; a `UserError` is raised in all."""
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [action()]
            except UserError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        result: T = outcome[0]
        return result

    def barrier(self) -> None:
        """Wait for all processes."""
        dist.barrier(group=self.control)

    def leave(self) -> None:
        """Take leave of the other processes."""
        dist.destroy_process_group()


class Alone(Processes):
    """One process that belongs to no group: for what a run's processes would find out together."""

    def __init__(self) -> None:
        super().__init__(0, 1, torch.device("cpu"), None)

    def gather(self, value: T) -> list[T]:
        return [value]

    def once(self, action: Callable[[], T]) -> T:
        return action()


def check_hostfile() -> None:
    """Raise `UserError` if the `deepspeed` launcher above this process was given a hostfile that does not exist.

    The launcher itself only warns, and trains on this machine alone.
    """
    for ancestor in psutil.Process().parents():
        try:
            command, directory = ancestor.cmdline(), ancestor.cwd()
        except psutil.Error:
            continue
        if not any(Path(word).name == "deepspeed" or "deepspeed.launcher.runner" in word for word in command[:4]):
            continue
        for position, word in enumerate(command):
            if word.startswith(("--hostfile=", "-H=")):
                named = word.split("=", 1)[1]
            elif word in ("--hostfile", "-H") and position + 1 < len(command):
                named = command[position + 1]
            else:
                continue
            if not Path(directory, named).is_file():
                raise UserError(
                    f"--hostfile: {named} does not exist; write it (lines like `host slots=8`) or leave it out"
                )


def free_port() -> int:
    """A TCP port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_processes() -> Processes:
    """Join the other processes of the run; alone when no launcher set RANK and WORLD_SIZE.

    Raises `UserError` in the first process if the port where they are to meet is taken.
    """
    launched = "RANK" in os.environ
    if not launched:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = _import_deepspeed()
    deepspeed.utils.logging.set_log_level_from_string("warning")
    # DeepSpeed's own calls, which this project cannot change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # On CPUs DeepSpeed would compile a shared-memory reduction (80 s, g++) that only its inference code calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Half a dozen reports of memory at the start, which no setting switches off.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda message, force=False: None
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    try:
        deepspeed.init_distributed("nccl" if gpu else "gloo", verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"MASTER_PORT: port {os.environ['MASTER_PORT']} is in use on this machine, by another run perhaps; give "
            "another (deepspeed --master_port N …)"
        ) from error
    control = dist.new_group(backend="gloo") if gpu else dist.group.WORLD
    return Processes(dist.get_rank(), dist.get_world_size(), device, control, launched)


def _import_deepspeed() -> Any:
    """Import DeepSpeed without MLflow, which its autotuner would load wherever it is installed, in every process."""
    loaded = "mlflow" in sys.modules
    if not loaded:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    import deepspeed

    if not loaded:
        del sys.modules["mlflow"]
    return deepspeed


def build_engine(config: RunConfig, processes: Processes) -> Any:
    """A DeepSpeed engine around a fresh model and AdamW. Its forward returns summed nats; see `FlashLM.forward`."""
    import deepspeed
    from pydantic import ValidationError

    accumulation = accumulation_steps(config, processes.world_size)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product on a GPU
        torch.use_deterministic_algorithms(True)
    model = build_model(config.model, seed=config.run.seed)
    model.recomputed = config.recomputed_layers
    decayed = decayed_parameters(model)
    named = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named.items() if name in decayed]},
        {"params": [p for name, p in named.items() if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        fused=processes.device.type == "cuda",
    )
    if config.train.compile:
        if config.train.deterministic:
            # Otherwise the shapes of compiled sums are chosen by timing: another process may choose, and round, others.
            import torch._inductor.config as inductor

            inductor.deterministic = True
        _compile(model, config.train.zero_stage)
    settings = deepspeed_config(config, accumulation)
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    except ValidationError as error:
        raise UserError(f"deepspeed: DeepSpeed refuses these settings: {error}") from error
    if isinstance(engine.optimizer, deepspeed.runtime.bf16_optimizer.BF16_Optimizer):
        _take_whole_gradients(engine.optimizer)
    return engine


def _take_whole_gradients(optimizer: Any) -> None:
    """Let DeepSpeed's optimizer of stage 1 in bf16 measure and clip a group's gradient in one piece.

    It does so parameter by parameter, hundreds of kernels that an idle GPU waits for. Between them lies nothing.
    """
    flat = optimizer.fp32_groups_actual_gradients_flat
    optimizer.get_grads_for_norm = lambda for_clipping=False: flat if for_clipping else (flat, {})


def _compile(model: FlashLM, zero_stage: int) -> None:
    """Compile the model's forward, with ZeRO-3 every layer's, each as one graph, before DeepSpeed hooks into it.

    `engine.compile()` compiles modules with DeepSpeed's hooks, which break the graph; a forward has them around it.
    With ZeRO-3 a layer is made a leaf: it has no hooks inside, and gathers all of its parameters at once. Layers share
    their compiled code.
    """
    if zero_stage == 3:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [GatedAttentionUnit])
    for module in model.layers if zero_stage == 3 else [model]:
        module.forward = torch.compile(module.forward, fullgraph=True)


def update(engine: Any) -> None:
    """Apply the accumulated gradients, clipped."""
    engine.step()
    if not engine.was_step_applied():
        raise RuntimeError("DeepSpeed skipped an update that was found to be good")


def set_learning_rate(engine: Any, lr: float) -> None:
    """Set the learning rate of every parameter group for the next update."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
