"""Launches batch jobs on a Slurm cluster with a shared file system. Several jobs form one array.

    --launcher=slurm:partition=gpu:nodes=2:gpus_per_node=8:time=24:00:00

The code is exported to WORKDIR/launch/code/COMMIT and runs there. Paths in the flags of a job, except its workdir, must
therefore be absolute or refer to files of the checkout. Scripts and logs are in WORKDIR/launch.

`notice` seconds before the time limit Slurm sends SIGTERM. A training then saves and exits with code 75, and the job is
requeued and resumes. Exit codes 0, 2 and 3 are final. Any other exit code requeues the job, at most `retries` times. A
cancelled job is not requeued.
"""

import dataclasses
import os
from collections.abc import Sequence

from diffusion.core import checks
from launch.jobs import (
    Checkout,
    Job,
    JobSubmission,
    check_clean,
    dns_label,
    fill_template,
    launch_folder,
    quote,
    quote_command,
    staging_command,
    with_absolute_workdir,
)

# After `scontrol requeue`, Slurm runs the script again from its first line, possibly on other nodes.
_SCRIPT = """\
#!/usr/bin/env bash
@SETUP@
set -u
cd @CODE@ || exit 2
case "${SLURM_ARRAY_TASK_ID:-0}" in
@ARMS@
  *) exit 2 ;;
esac
job=$SLURM_JOB_ID
# The job ID of an array's last task is that of the whole array; requeueing by this ID would requeue all tasks.
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
crashes=@FOLDER@/crashes-$job
interrupted=0

# Records an event for launch.status if this is the run of a sweep, which has a launch.json.
record_event() {
  if [ -e "$run/launch.json" ]; then
    printf '{"time": %s, "event": "%s", "code": %s}\\n' "$(date +%s.%N)" "$1" "$2" >>"$run/events.jsonl"
  fi
}

end() {
  record_event ended "$code"
  exit "$code"
}

# Signals the tasks by scancel, because srun kills its tasks when it is signalled itself.
stop() {
  interrupted=1
  scancel --signal=TERM "$job"
}

# Requeues the job if it is still running: Slurm itself requeues a preempted job, and a cancelled job must not return.
requeue() {
  trap '' TERM
  case " $(scontrol show job --oneliner "$job") " in
    *" JobState=RUNNING "*) ;;
    *) end ;;
  esac
  echo "exit code $code: requeued"
  scontrol requeue "$job" || end
  exit 0
}

trap stop TERM
record_event submitted null
@STEP@ "${command[@]}" &
step=$!
while true; do
  interrupted=0
  wait "$step"
  code=$?
  # A signal interrupts `wait` before the step has ended.
  if [ "$interrupted" = 0 ] || [ "$code" -le 128 ]; then break; fi
done
case "$code" in
  0 | 2 | 3) ;;
  75) requeue ;;
  *)
    echo "$code" >>"$crashes"
    if [ "$(wc -l <"$crashes")" -le @RETRIES@ ]; then requeue; fi
    ;;
esac
rm -f "$crashes"
end
"""


@dataclasses.dataclass(frozen=True)
class Slurm:
    """A launcher for Slurm; see `make`.

    Attributes:
      options: Options of sbatch.
      step: The srun command with its options and the Python interpreter.
      setup: Lines of bash that run first.
      at_once: Maximum number of concurrent jobs of an array.
    """

    options: tuple[str, ...]
    step: tuple[str, ...]
    setup: str
    at_once: int | None
    tools: tuple[str, ...] = ("git", "tar", "sbatch")

    def submission(self, jobs: Sequence[Job], code: Checkout, workdir: str, retries: int) -> JobSubmission:
        folder = launch_folder(workdir, code)
        where, staging = code.root, ()  # without a checkout, the installed code runs in the current folder
        if code.commit:
            check_clean(code)
            where = os.path.join(folder, "code", code.commit)
            staging = (staging_command(code, where),)
        jobs = [with_absolute_workdir(job, code) for job in jobs]
        name = dns_label(
            jobs[0].name if len(jobs) == 1 else os.path.basename(workdir.rstrip("/")),
            "\n".join(job.workdir for job in jobs),
        )
        array, log = (), "%j"
        if len(jobs) > 1:
            array, log = (f"--array=0-{len(jobs) - 1}" + (f"%{self.at_once}" if self.at_once else ""),), "%A_%a"
        # Passed as arguments rather than in the script, where the environment variables SBATCH_* would override them.
        options = (
            f"--job-name={name}",
            f"--output={folder.replace('%', '%%')}/{log}.log",
            "--open-mode=append",
            "--requeue",
            *array,
            *self.options,
        )
        script = os.path.join(folder, f"{name}.sh")
        arms = [
            f"  {i}) run={quote(job.workdir)} command=({quote_command(job.command)}) ;;" for i, job in enumerate(jobs)
        ]
        text = fill_template(
            _SCRIPT, setup=self.setup, code=quote(where), arms="\n".join(arms), folder=quote(folder),
            step=quote_command(self.step), retries=str(retries),
        )  # fmt: skip
        return JobSubmission({script: text}, (*staging, ("sbatch", *options, script)))


def make(
    partition: str | None = None,
    account: str | None = None,
    nodes: int = 1,
    gpus_per_node: int | str | None = None,
    tasks_per_node: int = 1,
    cpus_per_task: int | None = None,
    memory: int | str | None = None,
    time: int | str | None = None,
    notice: int = 120,
    at_once: int | None = None,
    setup: str = "",
    python: str = "python",
    options: tuple[str, ...] = (),
) -> Slurm:
    """Returns a launcher that starts each job as a batch job with a step of `nodes * tasks_per_node` processes.

    Args:
      partition: Partition; the cluster's default if not given.
      account: Account; the user's default if not given.
      nodes: Number of nodes per job.
      gpus_per_node: A number, or TYPE:NUMBER. The processes of a node share the GPUs.
      tasks_per_node: Number of processes per node.
      cpus_per_task: Number of CPUs per process.
      memory: Memory per node in megabytes, or in Slurm's notation, as in 64G.
      time: Time limit in minutes, or in Slurm's notation; the cluster's default if not given.
      notice: Seconds between SIGTERM and the time limit, in which a job can save.
      at_once: Maximum number of concurrent jobs of an array; unlimited if not given.
      setup: Lines of bash that run first, such as `module load cuda` or the activation of a Python environment.
      python: Python interpreter; a path if it is not on the PATH of the nodes.
      options: Further options of sbatch.

    Raises:
      InputError: A number is below 1.
    """
    checks.at_least(1, nodes=nodes, tasks_per_node=tasks_per_node, notice=notice, cpus_per_task=cpus_per_task,
                    at_once=at_once)  # fmt: skip
    settings = {
        "partition": partition, "account": account, "nodes": nodes, "ntasks-per-node": tasks_per_node,
        "gpus-per-node": gpus_per_node, "cpus-per-task": cpus_per_task, "mem": memory, "time": time,
        "signal": f"B:TERM@{notice}",
    }  # fmt: skip
    # A process that exits after saving must not make srun kill those that are still saving. Steps do not inherit
    # --cpus-per-task.
    step = ["srun", "--kill-on-bad-exit=0"] + ([f"--cpus-per-task={cpus_per_task}"] if cpus_per_task else [])
    return Slurm(
        options=(*(f"--{key}={value}" for key, value in settings.items() if value is not None), *options),
        step=(*step, python, "-m"),
        setup=setup,
        at_once=at_once,
    )
