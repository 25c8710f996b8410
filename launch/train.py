"""What the deepspeed launcher starts in each process: `deepspeed launch/train.py CONFIG [key=value …] [--resume]`.

Exit status: 0 last step reached, 75 stopped cleanly and to be resumed, 2 user error, 70 over the
budget of bad steps, 71 a process hung, died or failed.
"""

import argparse
import os
import socket
import sys
import time
from pathlib import Path

# Started as a file, Python puts launch/ first on the path; the packages lie one level up.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pipeline.errors import USER_ERROR_EXIT, UserError  # noqa: E402

# The launcher kills a node's other processes a second after the first one fails: those that do not print must not be
# first. Afterwards, who is still there is on a node that may have a problem of its own.
SILENT_EXIT_SECONDS = 5.0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="deepspeed launch/train.py", description=__doc__)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parser.add_argument("--resume", action="store_true", help="continue the run; the same as run.resume=must")
    parser.add_argument(
        "--rollback",
        action="store_true",
        help="continue a run that stopped over its budget of bad steps from before them, without their samples",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    processes = None
    try:
        from launch.config import accumulation_steps, load_run_config
        from launch.console import say
        from launch.engine import check_hostfile, start_processes
        from launch.run_directory import RunDirectory
        from launch.trainer import open_datasets, train

        check_hostfile()
        overrides = [*arguments.overrides, *(["bad_steps.rollback=true"] if arguments.rollback else [])]
        resume = arguments.resume or arguments.rollback
        config = load_run_config(arguments.config, overrides, resume=resume)
        directory = RunDirectory(config.run.dir)
        done = directory.done_tokens
        if config.run.resume != "never" and done is not None and done >= config.train.tokens:
            say(f"nothing to do: {directory.path} is done at {done:,} tokens; raise train.tokens to go on")
            return 0
        directory.check(config.run.resume)
        if arguments.rollback and not directory.over_budget.exists():
            raise UserError(
                f"--rollback: {directory.path} did not stop over its budget of bad steps; --resume continues it"
            )
        accumulation_steps(config, int(os.environ.get("WORLD_SIZE", "1")))
        datasets = open_datasets(config)
        processes = start_processes()
        status = train(config, datasets, processes)
        processes.leave()
        return status
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(SILENT_EXIT_SECONDS)
            if processes is None and os.environ.get("LOCAL_RANK") == "0":
                print(f"error on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        if processes is not None:
            processes.leave()
            # Threads of the group that are still ending can abort an orderly exit; nothing is left to be written.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(USER_ERROR_EXIT)
        return USER_ERROR_EXIT


if __name__ == "__main__":
    sys.exit(main())
