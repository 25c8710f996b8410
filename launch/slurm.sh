#!/usr/bin/env bash
# A run under SLURM: sbatch [options] launch/slurm.sh CONFIG [key=value …], from the project's directory.
#
# Every task is one process of the run; ask for as many as there are GPUs, and for the GPUs by node, so that each task
# sees all of its node's: sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --time=24:00:00 launch/slurm.sh …
# Two minutes before the time limit, or when the job is preempted, the run saves, and the job is queued again and goes
# on; to go back before bad steps give bad_steps.rollback=true, since --rollback would then be refused. `touch
# RUN_DIR/STOP` ends it for good, with a checkpoint; its exit status is the run's (docs/design.md).
#SBATCH --job-name=flash
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# A process that dies gives the others half a minute; they would wait for it without end.
# shellcheck disable=SC2016  # the variables are each task's own
srun --kill-on-bad-exit=0 --wait=30 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python launch/train.py "$@"
' task "$@" run.resume=auto &
step=$!

queue_again=
trap 'queue_again=yes; kill -USR1 "$step"' USR1
while kill -0 "$step" 2>/dev/null; do
    wait "$step"  # which the trap ends too
done
wait "$step"
status=$?
if [ -n "$queue_again" ] && [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
