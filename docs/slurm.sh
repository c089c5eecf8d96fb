#!/bin/bash
# One run on two machines of four GPUs each, which saves and continues when it is preempted or its time is over:
#
#     sbatch docs/slurm.sh experiment=vit_finetune backbone=vit_base optim.lr=1e-4
#
# from the checkout, which all machines see. A requeued job finds its run again: the folder is named by the job's number
# (logs/runs/<experiment>/slurm_<number>_<hash of the configuration>). One task for each GPU, as Lightning wants it.
#SBATCH --job-name=thaw
#SBATCH --partition=gpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --output=logs/slurm-%j.out
# USR1@120: two minutes before the end the tasks get the signal at which they save (never B:USR1, which the script gets).
set -euo pipefail

export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
export WANDB_MODE=${WANDB_MODE:-offline} # where compute nodes cannot reach W&B; upload later with `wandb sync`

# trainer=ddp keeps the whole model on each GPU; trainer=fsdp cuts it into pieces, for models that one cannot hold.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/python train.py trainer=ddp \
    trainer.num_nodes="$SLURM_NNODES" trainer.devices="$SLURM_NTASKS_PER_NODE" "$@"
