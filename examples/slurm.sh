#!/usr/bin/env bash
# The quickstart on a SLURM cluster, from the root of the repository: sbatch examples/slurm.sh [options of fit]
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --signal=SIGUSR1@90
# One task per GPU. Ninety seconds before the time limit, Lightning saves a checkpoint and requeues the job, which
# resumes with the alpha of that step. Each job has its own folder, so that no other job resumes from it.
set -euo pipefail
srun lightning-rdrop fit --config examples/quickstart.yaml \
    --trainer.strategy ddp --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
    --trainer.default_root_dir "logs/slurm/$SLURM_JOB_ID" "$@"
