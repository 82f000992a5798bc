# What your cluster wants, once: copy to slurm/site.sh (git ignores it). Sourced by slurm/pipeline.sh and by every job.
# SBATCH_* variables also act on a plain `sbatch slurm/upcycle.sh` if you `source slurm/site.sh` in your shell first.

# export SBATCH_ACCOUNT=my-project SBATCH_PARTITION=gpu SBATCH_TIMELIMIT=12:00:00

# For slurm/pipeline.sh: options of all jobs, of the one that tokenises on CPUs, of jobs with one rank, and of jobs that
# train on many.
# SBATCH_FLAGS=(--mail-type=FAIL)
# CPU_FLAGS=(--partition=cpu --cpus-per-task=32)
# BRANCH_FLAGS=(--gpus-per-node=1 --cpus-per-task=8)
# WIDE_FLAGS=(--nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8)

# Modules, and what the network needs. NCCL_SOCKET_IFNAME and NCCL_IB_HCA are your site's to know.
# module load cuda
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NEXUS_MASTER_ADDR=...     # if the first node's name does not lead to it

# A container: put before python, or as options of srun (pyxis).
# CONTAINER=(apptainer exec --nv --bind /scratch image.sif)
# SRUN_FLAGS=(--container-image=... --container-mounts=/scratch:/scratch)

# Compute on CPUs although GPUs were requested.
# export DS_ACCELERATOR=cpu

# Another DeepSpeed JSON than ds_configs/z3.json, for example one that `nexus-ds plan --write` made.
# export NEXUS_DEEPSPEED=ds_configs/z3_offload.json
