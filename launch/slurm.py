"""Slurm: batch jobs on a cluster with a shared file system; several are one array.

    --launcher=slurm:partition=gpu:nodes=2:gpus_per_node=8:time=24:00:00

The code is laid out in WORKDIR/launch/code/COMMIT and runs there: paths in a job's flags other than its workdir must be
absolute, or of files in the code. Scripts and logs are in WORKDIR/launch.

SIGTERM, which comes `notice` seconds before the time is up, lets a training save and end with exit code 75; the job is
requeued then and goes on. 0, 2 and 3 are final. Any other exit code requeues it, `retries` times. A job that was
cancelled stays so.
"""

import dataclasses
import os
from collections.abc import Sequence

from diffusion.core.types import InputError
from launch.jobs import Code, Job, Submission, check_clean, fill, folder_for, label, quote, quoted, settled, staging

# sbatch and scontrol requeue run it again from its first line, on the nodes that the job gets then.
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
# The number of an array's last task is that of the whole array, which would be requeued.
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
crashes=@FOLDER@/crashes-$job
interrupted=0

# For launch.status: what has become of a sweep's run, which has a launch.json.
tell() {
  if [ -e "$run/launch.json" ]; then
    printf '{"time": %s, "event": "%s", "code": %s}\\n' "$(date +%s.%N)" "$1" "$2" >>"$run/events.jsonl"
  fi
}

end() {
  tell ended "$code"
  exit "$code"
}

# Not to srun: told to stop, it kills its tasks.
stop() {
  interrupted=1
  scancel --signal=TERM "$job"
}

# Slurm itself requeues a job that it preempted, and nobody wants back one that was cancelled.
again() {
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
tell submitted null
@STEP@ "${command[@]}" &
step=$!
while true; do
  interrupted=0
  wait "$step"
  code=$?
  # A signal ends `wait` before the step has ended.
  if [ "$interrupted" = 0 ] || [ "$code" -le 128 ]; then break; fi
done
case "$code" in
  0 | 2 | 3) ;;
  75) again ;;
  *)
    echo "$code" >>"$crashes"
    if [ "$(wc -l <"$crashes")" -le @RETRIES@ ]; then again; fi
    ;;
esac
rm -f "$crashes"
end
"""


@dataclasses.dataclass(frozen=True)
class Slurm:
    """As `make` describes it.

    Attributes:
      options: of sbatch.
      step: `srun` with its options, and the Python that it runs.
      setup: lines of bash before everything else.
      at_once: how many jobs of an array run at a time.
    """

    options: tuple[str, ...]
    step: tuple[str, ...]
    setup: str
    at_once: int | None
    tools: tuple[str, ...] = ("git", "tar", "sbatch")

    def submission(self, jobs: Sequence[Job], code: Code, workdir: str, retries: int) -> Submission:
        check_clean(code)
        folder = folder_for(workdir, code)
        there = os.path.join(folder, "code", code.commit)
        found = [settled(job, code) for job in jobs]
        name = label(
            jobs[0].name if len(jobs) == 1 else os.path.basename(workdir.rstrip("/")),
            "\n".join(job.workdir for job in found),
        )
        array, log = (), "%j"
        if len(jobs) > 1:
            array, log = (f"--array=0-{len(jobs) - 1}" + (f"%{self.at_once}" if self.at_once else ""),), "%A_%a"
        # As arguments, not in the script, where the environment's SBATCH_* would win over them.
        options = (
            f"--job-name={name}",
            f"--output={folder.replace('%', '%%')}/{log}.log",
            "--open-mode=append",
            "--requeue",
            *array,
            *self.options,
        )
        script = os.path.join(folder, f"{name}.sh")
        arms = [f"  {i}) run={quote(job.workdir)} command=({quoted(job.command)}) ;;" for i, job in enumerate(found)]
        text = fill(_SCRIPT, setup=self.setup, code=quote(there), arms="\n".join(arms), folder=quote(folder),
                    step=quoted(self.step), retries=str(retries))  # fmt: skip
        return Submission({script: text}, (staging(code, there), ("sbatch", *options, script)))


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
    """Batch jobs, each with a step of `nodes * tasks_per_node` processes.

    Args:
      gpus_per_node: a number, or TYPE:NUMBER; a node's processes share them.
      memory: of a node, in megabytes or as Slurm spells it, 64G.
      time: after which a job is stopped, in minutes or as Slurm spells it; the cluster's default if not given.
      notice: seconds before that, in which it can save.
      at_once: how many jobs run at a time; all that get nodes if not given.
      setup: lines of bash that come first, `module load cuda`, or what makes `python` the right one.
      python: the interpreter; a path if it is on no PATH there.
      options: of sbatch, beyond these.

    Raises:
      InputError: a number below one.
    """
    numbers = {"nodes": nodes, "tasks_per_node": tasks_per_node, "notice": notice,
               "cpus_per_task": cpus_per_task, "at_once": at_once}  # fmt: skip
    for key, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(key, f"must be at least 1, got {number}")
    wanted = {
        "partition": partition, "account": account, "nodes": nodes, "ntasks-per-node": tasks_per_node,
        "gpus-per-node": gpus_per_node, "cpus-per-task": cpus_per_task, "mem": memory, "time": time,
        "signal": f"B:TERM@{notice}",
    }  # fmt: skip
    # A process that is done saving must not have those killed that are still at it. Steps do not inherit cpus-per-task.
    step = ["srun", "--kill-on-bad-exit=0"] + ([f"--cpus-per-task={cpus_per_task}"] if cpus_per_task else [])
    return Slurm(
        options=(*(f"--{key}={value}" for key, value in wanted.items() if value is not None), *options),
        step=(*step, python, "-m"),
        setup=setup,
        at_once=at_once,
    )
